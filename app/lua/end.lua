-- Any live state -> a final one, by anyone but the job's worker: cancel, deadline, reader's error.
--
-- ARGV: prefix, job_id, state, event, ttl_ms
-- Returns 1, 0 if the job had ended already, -1 if there is no such job.
local job_id = ARGV[2]
local state = redis.call('HGET', job_key(job_id), 'state')
if not state then return -1 end
if FINAL[state] then return 0 end
finish_and_tell(job_id, ARGV[3], ARGV[4], ARGV[5])
return 1
