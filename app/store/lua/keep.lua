-- Stores what a running job kept, just before its worker ends it.
--
-- ARGV: prefix, job_id, worker_id, attempt, blob
-- Returns 1, or 0 if the job is no longer this worker's.
local job_id = ARGV[2]
if not is_held(job_fields(job_id, 'state', 'worker', 'attempt'), ARGV[3], ARGV[4]) then return 0 end
redis.call('SET', kept_key(job_id), ARGV[5], 'PX', DAY_MS)
redis.call('HSET', job_key(job_id), 'has_kept', 1)
return 1
