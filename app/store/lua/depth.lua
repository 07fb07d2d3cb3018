-- How long a model's queue is.
--
-- ARGV: prefix, model
-- Returns {jobs that are reserved or reading, queued, running, age of the oldest queued job in ms
-- since acceptance or -1, places that the first two take}.
local model = ARGV[2]
local now = now_ms()
local reading = redis.call('ZCOUNT', places_key(model), '(' .. now, '+inf')
local queued = redis.call('ZCARD', queued_key(model))
local running, age = 0, -1
local pending = redis.pcall('XPENDING', jobs_key(model), GROUP)
if not pending.err then running = pending[1] end
local oldest = redis.call('ZRANGE', queued_key(model), 0, 0)[1]
if oldest then
  local accepted_at = redis.call('HGET', job_key(oldest), 'accepted_at')
  if accepted_at then age = math.max(0, now - accepted_at) end
end
return {reading, queued, running, age, reading + queued + num_more_places(model)}
