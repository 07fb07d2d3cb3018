-- How many jobs would be taken before a waiting one now: exact for an owner's jobs that have their
-- turns, otherwise an estimate (see `order`).
--
-- ARGV: prefix, model, owner, job_id
-- Returns their number; false if the job is not in line.
return place_of(ARGV[2], ARGV[3], ARGV[4])
