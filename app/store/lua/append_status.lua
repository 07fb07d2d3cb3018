-- Appends a status event while no worker has the job.
--
-- ARGV: prefix, job_id, event
-- Returns 1, or 0 when the job is neither reading nor queued.
local job_id = ARGV[2]
local state = redis.call('HGET', job_key(job_id), 'state')
if state ~= 'reading' and state ~= 'queued' then return 0 end
local before, id = append_unnumbered(job_id, ARGV[3])
redis.call('PUBLISH', news_channel(), table.concat({job_id, before, id, ARGV[3]}, ' '))
return 1
