-- Ends what nothing else will, jobs past their deadline; finds jobs whose reader is gone; puts
-- tickets into the queue where they are missing, and gives turns to owners that have none.
--
-- A running job's worker enforces the deadline itself; it is swept only grace_ms later.
-- ARGV: prefix, ttl_ms, grace_ms, deadline_fault, max_jobs
-- Returns {ids past their deadline, model and id of each job without a reader}, of at
-- most max_jobs jobs each (of the latter, per model).
local ttl_ms, grace_ms = ARGV[2], tonumber(ARGV[3])
local now = now_ms()
local overdue, lost = {}, {}
local late = redis.call('ZRANGEBYSCORE', live_key(), '-inf', now, 'WITHSCORES', 'LIMIT', 0, ARGV[5])
for i = 1, #late, 2 do
  local job_id, deadline = late[i], tonumber(late[i + 1])
  local state = redis.call('HGET', job_key(job_id), 'state')
  if not state then
    redis.call('ZREM', live_key(), job_id)
  elseif state ~= 'running' or now > deadline + grace_ms then
    finish_and_tell(job_id, 'error', error_event(job_id, ARGV[4]), ttl_ms)
    overdue[#overdue + 1] = job_id
  end
end
for _, model in ipairs(redis.call('SMEMBERS', models_key())) do
  replace_lost_tickets(model)
  lay_out_starved(model)
  prune_more_places(model)
  local places = places_key(model)
  for _, job_id in ipairs(redis.call('ZRANGEBYSCORE', places, '-inf', now, 'LIMIT', 0, ARGV[5])) do
    if redis.call('HGET', job_key(job_id), 'state') == 'reading' then
      lost[#lost + 1] = model
      lost[#lost + 1] = job_id
    else
      give_up_place(model, job_id)
    end
  end
end
return {overdue, lost}
