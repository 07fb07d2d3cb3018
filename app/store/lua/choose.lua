-- Notes the compression that was chosen for a job, once: later attempts answer with the same.
--
-- ARGV: prefix, job_id, worker_id, attempt, choice
-- Returns 1, or 0 when the job has ended or is another attempt's.
local job_id, worker_id, attempt = ARGV[2], ARGV[3], ARGV[4]
local job = job_fields(job_id, 'state', 'worker', 'attempt')
if not is_held_by_living(job_id, job, worker_id, attempt) then return 0 end
redis.call('HSET', job_key(job_id), 'choice', ARGV[5])
return 1
