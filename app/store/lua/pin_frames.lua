-- Pins a stored blob of frames for a live job, so that it is not evicted before the job's end.
--
-- ARGV: prefix, digest, job_id
-- Returns 1 if the blob is there, else 0. A job that is not live pins nothing.
local digest, job_id = ARGV[2], ARGV[3]
if redis.call('EXISTS', frames_key(digest)) == 0 then return 0 end
redis.call('ZADD', frame_uses_key(), now_ms(), digest)
pin_frames(digest, job_id)
return 1
