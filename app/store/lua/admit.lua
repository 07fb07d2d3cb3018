-- What the live workers serve, and whether an owner has room in the queue of any of these models.
-- The model of a post is known once its body has arrived; `reserve` decides then.
--
-- ARGV: prefix, max_jobs, owner, limits of the owner (see `limits`), idempotency_hash ('' for none)
-- Returns {cards, 1 or 0 for no room, retry_after_ms, states}. Drops workers whose card is gone.
-- `states` is what the owner has left of its limits, see `limit_states`; {} if it has no limits, or
-- if a job is known by the idempotency key: a retry that finds its job takes nothing, so `create`
-- decides. The limit of frames is not checked: the request may be about none.
local cards, models = {}, {}
local states = {}
local is_known = ARGV[5] ~= '' and redis.call('EXISTS', idempotency_key(ARGV[5])) == 1
if ARGV[4] ~= '' and not is_known then
  note_limits(ARGV[3], ARGV[4])
  states = limit_states(ARGV[3], ARGV[4], nil, 0)
end
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
  local reply = room(model, ARGV[3], tonumber(ARGV[2]))
  if reply[1] == 1 then return {cards, 1, 0, states} end
  retry_after_ms = math.min(retry_after_ms or reply[2], reply[2])
end
if retry_after_ms then return {cards, 0, retry_after_ms, states} end
return {cards, 1, 0, states}
