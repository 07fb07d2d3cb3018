-- queued -> running, for an entry that this worker has just read from the group.
--
-- Also meets entries of jobs that ended while they waited, and, after the group was recreated, of
-- jobs that were given out before. That loss is Redis', and nobody is blamed for it.
-- ARGV: prefix, model, entry_id, job_id, worker_id, take_id, faults, ttl_ms
-- Returns the delivery; {} when the job has ended; {'dead'} when this ended it (dead letter).
local model, entry_id, job_id, worker_id, take_id = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local job = job_fields(job_id, 'state', 'entry_id', 'take_id')
if not job.state or FINAL[job.state] or job.entry_id ~= entry_id then
  forget_entry(model, entry_id)
  return {}
end
if job.take_id == take_id then return delivery(job_id) end -- a retry
if bury_if_spent(job_id, ARGV[7], ARGV[8]) then return {'dead'} end
start(job_id, worker_id, take_id)
return delivery(job_id)
