-- Takes a complete request's places in a model's queue.
--
-- ARGV: prefix, model, job_id, max_jobs, lease_ms, owner, num_places
-- Returns {1, 0} or {0, retry_after_ms}, see `room`.
local model, job_id, owner = ARGV[2], ARGV[3], ARGV[6]
if not redis.call('ZSCORE', places_key(model), job_id) then
  local reply = room(model, owner, tonumber(ARGV[4]))
  if reply[1] == 0 then return reply end
end
redis.call('SADD', models_key(), model)
redis.call('ZADD', places_key(model), now_ms() + ARGV[5], job_id)
note_place(model, job_id, owner, tonumber(ARGV[7]))
return {1, 0}
