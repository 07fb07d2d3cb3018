-- reading -> queued: the frames are stored, a worker may take the job.
--
-- ARGV: prefix, model, job_id, request
-- Returns 1 if the job is now queued (or was already taken: a retry), 0 if it has ended.
local model, job_id = ARGV[2], ARGV[3]
local state = redis.call('HGET', job_key(job_id), 'state')
if not state or FINAL[state] then return 0 end
if state ~= 'reading' then return 1 end
local now = now_ms()
local entry_id = redis.call('XADD', jobs_key(model), '*', 'job_id', job_id)
redis.call('HSET', job_key(job_id), 'state', 'queued', 'request', ARGV[4], 'entry_id', entry_id,
  'queued_at', now)
redis.call('ZREM', places_key(model), job_id)
redis.call('ZADD', queued_key(model), now, job_id)
return 1
