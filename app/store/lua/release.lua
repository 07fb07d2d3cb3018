-- Gives up a place whose job was never created.
--
-- ARGV: prefix, model, job_id
give_up_place(ARGV[2], ARGV[3])
