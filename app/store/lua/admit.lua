-- What the live workers serve, and whether there is room in the queue of any model of theirs: which
-- one a post is for is known once its body is there, and `reserve` decides then.
--
-- ARGV: prefix, max_jobs
-- Returns {cards, 1 or 0 for no room, retry_after_ms}. Drops workers whose card is gone.
local cards, models = {}, {}
for _, worker_id in ipairs(redis.call('SMEMBERS', workers_key())) do
  local card = redis.call('GET', worker_key(worker_id))
  if card then
    cards[#cards + 1] = card
    models[cjson.decode(card).model] = true
  else
    redis.call('SREM', workers_key(), worker_id)
  end
end
local retry_after_ms = nil
for model in pairs(models) do
  local reply = room(model, ARGV[2])
  if reply[1] == 1 then return {cards, 1, 0} end
  retry_after_ms = math.min(retry_after_ms or reply[2], reply[2])
end
if retry_after_ms then return {cards, 0, retry_after_ms} end
return {cards, 1, 0}
