-- Removes consumers of processes that are gone from a model's group. One that still has entries
-- pending stays until others have claimed them: removing it would lose them.
--
-- ARGV: prefix, model, idle_ms
-- Returns how many were removed.
local model, idle_ms = ARGV[2], tonumber(ARGV[3])
local removed = 0
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', jobs_key(model), GROUP)) do
  local info = {}
  for i = 1, #consumer, 2 do info[consumer[i]] = consumer[i + 1] end
  if info.pending == 0 and info.idle > idle_ms then
    redis.call('XGROUP', 'DELCONSUMER', jobs_key(model), GROUP, info.name)
    removed = removed + 1
  end
end
return removed
