-- Renews a worker's lease on a running job.
--
-- ARGV: prefix, model, job_id, worker_id, attempt, entry_id
-- Returns 1, or 0 when the job has ended or is another attempt's.
local model, job_id, worker_id = ARGV[2], ARGV[3], ARGV[4]
local job = job_fields(job_id, 'state', 'worker', 'attempt')
if not is_held_by_living(job_id, job, worker_id, ARGV[5]) then return 0 end
return #redis.call('XCLAIM', jobs_key(model), GROUP, worker_id, 0, ARGV[6], 'JUSTID')
