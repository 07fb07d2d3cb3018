-- reading -> queued, see `enqueue`.
--
-- ARGV: prefix, model, job_id, request
-- Returns 1 if the job is now queued (or was already taken: a retry), 0 if it has ended.
local model, job_id = ARGV[2], ARGV[3]
local state = redis.call('HGET', job_key(job_id), 'state')
if not state or FINAL[state] then return 0 end
if state == 'reading' then enqueue(model, job_id, ARGV[4]) end
return 1
