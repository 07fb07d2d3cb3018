-- Notes how a worker ended, revises what its jobs were charged with before that was known, and
-- gives the jobs that it still held to the first worker that claims them.
--
-- ARGV: prefix, worker_id, fate (own, outside or unknown), lease_ms
-- Returns how many jobs it still held.
local worker_id, fate = ARGV[2], ARGV[3]
local key = lost_worker_key(worker_id)

local function revise(job_id, attempt)
  local state, charge = unpack(redis.call('HMGET', job_key(job_id), 'state', 'lost:' .. attempt))
  if not charge or FINAL[state] then return end
  if fate == 'outside' then
    withdraw_charge(job_id, attempt)
  elseif fate == 'own' and charge == SPARED then
    redis.call('HINCRBY', job_key(job_id), 'deaths', 1)
    redis.call('HSET', job_key(job_id), 'lost:' .. attempt, DEATH)
  end
end

local function give_up(model, entry_id)
  local job_id = holder_of(model, entry_id)
  if job_id then judge(job_id, '') end
  offer(model, job_id, entry_id, ARGV[4])
end

redis.call('HSET', key, 'fate', fate)
redis.call('PEXPIRE', key, LOST_TTL_MS)
local noted = redis.call('HGETALL', key)
for i = 1, #noted, 2 do
  local job_id = noted[i]:match('^job:(.*)')
  if job_id then revise(job_id, noted[i + 1]) end
end
local num_held = 0
for _, model in ipairs(redis.call('SMEMBERS', models_key())) do
  local pending = redis.pcall('XPENDING', jobs_key(model), GROUP, '-', '+', MAX_HELD, worker_id)
  if not pending.err then
    for _, held in ipairs(pending) do give_up(model, held[1]) end
    num_held = num_held + #pending
  end
end
return num_held
