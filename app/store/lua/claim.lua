-- Takes over one job whose lease ran out or that was handed back.
--
-- XPENDING + XCLAIM instead of XAUTOCLAIM: what is claimed is chosen before it is claimed. A job
-- that was in flight when a worker died is a suspect, and is left alone unless allow_suspect is 1.
-- A repeated call gives what the first one gave: the job that carries its take_id. Only the dead
-- letters are not told twice.
-- ARGV: prefix, model, worker_id, take_id, lease_ms, allow_suspect, max_deliveries, fault, ttl_ms
-- Returns {ids of jobs that this ended (dead letters), delivery or {}}.
local PAGE = 100
local MAX_HELD = 10000 -- more than a worker ever has pending
local model, worker_id, take_id, lease_ms = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local stream = jobs_key(model)
local dead = {}

local function job_of(entry_id)
  local entry = redis.call('XRANGE', stream, entry_id, entry_id)[1]
  return entry and entry[2][2]
end

local function consider(entry_id)
  local job_id = job_of(entry_id)
  local job = job_id and job_fields(job_id, 'state', 'deliveries') or {}
  if not job.state or FINAL[job.state] then
    forget_entry(model, entry_id)
    return nil
  end
  local deliveries = tonumber(job.deliveries)
  if deliveries >= tonumber(ARGV[7]) then
    bury(job_id, ARGV[8], ARGV[9])
    dead[#dead + 1] = job_id
    return nil
  end
  if deliveries > 0 and ARGV[6] ~= '1' then return nil end
  redis.call('XCLAIM', stream, GROUP, worker_id, lease_ms, entry_id, 'JUSTID')
  start(job_id, worker_id, take_id, deliveries > 0)
  return delivery(job_id)
end

for _, pending in ipairs(redis.call('XPENDING', stream, GROUP, '-', '+', MAX_HELD, worker_id)) do
  local job_id = job_of(pending[1])
  if job_id and redis.call('HGET', job_key(job_id), 'take_id') == take_id then
    return {dead, delivery(job_id)}
  end
end

local from = '-'
while true do
  local page = redis.call('XPENDING', stream, GROUP, 'IDLE', lease_ms, from, '+', PAGE)
  for _, pending in ipairs(page) do
    local given = consider(pending[1])
    if given then return {dead, given} end
  end
  if #page < PAGE then return {dead, {}} end
  from = '(' .. page[#page][1]
end
