-- Reserves a place in a model's queue, before a request's body is read.
--
-- ARGV: prefix, model, job_id, max_jobs, lease_ms
-- Returns {1, 0}, or {0, retry_after_ms} when places in use + queued jobs have reached max_jobs:
-- retry_after_ms is the mean time between the last jobs that left the queue, 0 if none is known.
local model, job_id = ARGV[2], ARGV[3]
local now = now_ms()
if not redis.call('ZSCORE', places_key(model), job_id) then
  local places = redis.call('ZCOUNT', places_key(model), '(' .. now, '+inf')
  local queued = redis.call('ZCARD', queued_key(model))
  if places + queued >= tonumber(ARGV[4]) then
    local oldest = redis.call('LINDEX', starts_key(model), -1)
    if not oldest then return {0, 0} end
    return {0, math.floor((now - oldest) / redis.call('LLEN', starts_key(model)))}
  end
end
redis.call('SADD', models_key(), model)
redis.call('ZADD', places_key(model), now + ARGV[5], job_id)
return {1, 0}
