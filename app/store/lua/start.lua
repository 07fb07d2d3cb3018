-- queued -> running, for an entry that this worker has just read from the group: the job that is
-- next by the order of the queue.
-- Also meets entries without a job, and, after the group was recreated, entries of jobs that
-- were given out before. That loss is Redis', and no job is blamed for it.
-- ARGV: prefix, model, entry_id, worker_id, take_id, faults, ttl_ms
-- Returns the delivery; {} when no job waits or the entry is not this worker's any more; {'dead',
-- job_id} when this ended the job (dead letter).
local model, entry_id, worker_id, take_id = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local held = redis.pcall('XPENDING', jobs_key(model), GROUP, entry_id, entry_id, 1, worker_id)
if held.err or #held == 0 then return {} end
local job_id = holder_of(model, entry_id)
if job_id then
  if redis.call('HGET', job_key(job_id), 'take_id') == take_id then return delivery(job_id) end
  if bury_if_spent(job_id, ARGV[6], ARGV[7]) then return {'dead', job_id} end
else
  job_id = give_to_next(model, entry_id)
  if not job_id then return {} end
end
start(job_id, worker_id, take_id)
return delivery(job_id)
