-- How long a model's queue is.
--
-- ARGV: prefix, model
-- Returns {places in use, queued, running, age of the oldest queued job in ms since acceptance or
-- -1}.
local model = ARGV[2]
local now = now_ms()
local places = redis.call('ZCOUNT', places_key(model), '(' .. now, '+inf')
local queued = redis.call('ZCARD', queued_key(model))
local running, age = 0, -1
local pending = redis.pcall('XPENDING', jobs_key(model), GROUP)
if not pending.err then running = pending[1] end
local oldest = redis.call('ZRANGE', queued_key(model), 0, 0)[1]
if oldest then
  local accepted_at = redis.call('HGET', job_key(oldest), 'accepted_at')
  if accepted_at then age = math.max(0, now - accepted_at) end
end
return {places, queued, running, age}
