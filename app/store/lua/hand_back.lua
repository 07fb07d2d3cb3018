-- running -> queued: a worker gives a job up and any other may claim it at once.
--
-- ARGV: prefix, model, job_id, worker_id, attempt, entry_id, lease_ms, crew (how many were in the
--       engine that failed, this job among them; 0: it is not to blame), was_set_aside (1: for
--       others to run, by a worker that keeps running)
-- Returns 1, or 0 when the job has ended or is another attempt's.
local model, job_id, worker_id, attempt = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local key = job_key(job_id)
local job = job_fields(job_id, 'state', 'worker', 'attempt', 'queued_at', 'owner')
if not is_held_by_living(job_id, job, worker_id, attempt) then return 0 end
redis.call('HSET', key, 'state', 'queued', 'worker', '', 'take_id', '', 'was_set_aside', ARGV[9])
if ARGV[8] == '0' then
  redis.call('HINCRBY', key, 'deliveries', -1)
else
  accuse(job_id, ARGV[8], 'own')
end
offer(model, job_id, ARGV[6], ARGV[7])
begin_to_wait(model, job_id, job.queued_at)
if job.owner then
  note_place(model, job_id, job.owner, 1)
  join_order_again(model, job_id, job.owner, job.queued_at)
  note_started(job.owner, job_id, nil)
end
return 1
