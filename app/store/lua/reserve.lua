-- Reserves a place in a model's queue, for a request that is all there.
--
-- ARGV: prefix, model, job_id, max_jobs, lease_ms
-- Returns {1, 0} or {0, retry_after_ms}, see `room`.
local model, job_id = ARGV[2], ARGV[3]
if not redis.call('ZSCORE', places_key(model), job_id) then
  local reply = room(model, ARGV[4])
  if reply[1] == 0 then return reply end
end
redis.call('SADD', models_key(), model)
redis.call('ZADD', places_key(model), now_ms() + ARGV[5], job_id)
return {1, 0}
