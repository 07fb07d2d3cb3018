-- What the live workers serve, and whether there is room in the queue of the first model of them.
--
-- ARGV: prefix, max_jobs
-- Returns {cards, 1 or 0 for no room, retry_after_ms}. Drops workers whose card is gone.
local cards, first = {}, nil
for _, worker_id in ipairs(redis.call('SMEMBERS', workers_key())) do
  local card = redis.call('GET', worker_key(worker_id))
  if card then
    cards[#cards + 1] = card
    local model = cjson.decode(card).model
    if not first or model < first then first = model end
  else
    redis.call('SREM', workers_key(), worker_id)
  end
end
if not first then return {cards, 1, 0} end
local reply = room(first, ARGV[2])
return {cards, reply[1], reply[2]}
