-- Pins a stored blob of frames for a live job, so that it is not evicted before the job's end.
--
-- ARGV: prefix, digest, job_id
-- Returns what the blob says of its frames, '' if it is not there. A job that is not live pins
-- nothing.
return find_frames(ARGV[2], ARGV[3])
