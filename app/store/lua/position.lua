-- How many jobs would be taken before one that waits, as things are: exact for those of an owner
-- that have their turns, else as far as one can tell (see `order`).
--
-- ARGV: prefix, model, owner, job_id
-- Returns their number; false where the job is not in line.
return place_of(ARGV[2], ARGV[3], ARGV[4])
