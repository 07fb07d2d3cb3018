-- What the live workers serve, and a place in the queue of the first model of them.
--
-- ARGV: prefix, job_id, max_jobs, lease_ms
-- Returns {cards, model or '', 1 or 0 for no room, retry_after_ms}: without a worker there is no
-- model and no place. Drops workers whose card is gone.
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
if not first then return {cards, '', 0, 0} end
local reply = reserve(first, ARGV[2], ARGV[3], ARGV[4])
return {cards, first, reply[1], reply[2]}
