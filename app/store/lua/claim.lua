-- Takes over one job whose lease ran out or that was handed back.
--
-- It uses XPENDING and XCLAIM instead of XAUTOCLAIM, to choose the job before claiming it. A job
-- that was in the engine of a worker that died is a suspect, and is skipped unless it has been idle
-- for suspect_idle_ms (-1: always skipped).
-- A repeated call returns the same job, which carries the call's take_id. Dead letters are reported
-- only once.
-- ARGV: prefix, model, worker_id, take_id, lease_ms, suspect_idle_ms, faults, ttl_ms,
--       must_be_suspect (1: none but a suspect will do)
-- Returns {ids of jobs that this ended (dead letters), delivery or {}}.
local PAGE = 100
local model, worker_id, take_id, lease_ms = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local suspect_idle_ms = tonumber(ARGV[6])
local stream = jobs_key(model)
local dead = {}

-- A ticket whose reader died before it got a job can be used for the next job.
local function consider_ticket(entry_id)
  if ARGV[9] == '1' then return nil end
  local job_id = give_to_next(model, entry_id)
  if not job_id then return nil end
  redis.call('XCLAIM', stream, GROUP, worker_id, lease_ms, entry_id, 'JUSTID')
  start(job_id, worker_id, take_id)
  return delivery(job_id)
end

local function consider(entry_id, idle_ms)
  local job_id = holder_of(model, entry_id)
  if not job_id then return consider_ticket(entry_id) end
  judge(job_id, worker_id)
  if bury_if_spent(job_id, ARGV[7], ARGV[8]) then
    dead[#dead + 1] = job_id
    return nil
  end
  local is_suspect = redis.call('HGET', job_key(job_id), 'is_suspect') == '1'
  if is_suspect and (suspect_idle_ms < 0 or idle_ms < suspect_idle_ms) then return nil end
  if not is_suspect and ARGV[9] == '1' then return nil end
  redis.call('XCLAIM', stream, GROUP, worker_id, lease_ms, entry_id, 'JUSTID')
  start(job_id, worker_id, take_id)
  local given = delivery(job_id)
  redis.call('HDEL', job_key(job_id), 'was_set_aside')
  return given
end

for _, pending in ipairs(redis.call('XPENDING', stream, GROUP, '-', '+', MAX_HELD, worker_id)) do
  local job_id = holder_of(model, pending[1])
  if job_id and redis.call('HGET', job_key(job_id), 'take_id') == take_id then
    return {dead, delivery(job_id)}
  end
end

local from = '-'
while true do
  local page = redis.call('XPENDING', stream, GROUP, 'IDLE', lease_ms, from, '+', PAGE)
  for _, pending in ipairs(page) do
    local given = consider(pending[1], pending[3])
    if given then return {dead, given} end
  end
  if #page < PAGE then return {dead, {}} end
  from = '(' .. page[#page][1]
end
