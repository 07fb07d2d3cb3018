-- Stores the compression that was chosen for a job, unless it has one. So all attempts answer with
-- the same one, even if a call arrives late or twice.
--
-- ARGV: prefix, job_id, worker_id, attempt, choice
-- Returns {the choice that holds, what waits for the workers (see `queue_snapshot`)}; {} when the
-- job has ended or is another attempt's.
local job_id, worker_id, attempt = ARGV[2], ARGV[3], ARGV[4]
local job = job_fields(job_id, 'state', 'worker', 'attempt', 'model')
if not is_held_by_living(job_id, job, worker_id, attempt) then return {} end
redis.call('HSETNX', job_key(job_id), 'choice', ARGV[5])
return {redis.call('HGET', job_key(job_id), 'choice'), queue_snapshot(job.model)}
