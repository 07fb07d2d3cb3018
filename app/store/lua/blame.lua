-- Decides which job is to blame when a worker is gone.
--
-- A job's `is_in_engine` is set before the worker's engine gets it, and outlives the process. The
-- jobs of a lost worker that have it set are its crew, and one of them may have killed the worker.
-- If there are several, they become suspects and are charged with nothing. A job that was alone is
-- charged with a death, unless there is reason to think otherwise. The charge is stored as
-- lost:{attempt}, so that it can be withdrawn: by the worker, if it was only away, or by its
-- supervisor, which saw how it ended.
--
-- A worker's `fate` is what its supervisor saw: `own`, it ended itself (a crash, an exit code);
-- `outside`, somebody killed it, and no job is to blame; or `unknown`. If its whole machine or
-- container is gone, nobody saw it, either. Then a job that was alone is charged only if it made no
-- progress in this delivery, because a job that kills workers does so at the same point each time.
local MAX_DEATHS = 2 -- of a job's own
local MAX_DELIVERIES = 8 -- that were not given back
local FURTHER_TOKENS = 4 -- made in a delivery: whatever kills at once has not
local LOST_TTL_MS = 3600000 -- of what is known of a worker's end; longer than any job
local DEATH, SPARED, CREW = 'death', 'spared', 'crew' -- what lost:{attempt} may say

-- Notes on each job of a worker that is gone how many were in its engine.
local function muster(model, worker_id)
  local stream, crew = jobs_key(model), {}
  for _, pending in ipairs(redis.call('XPENDING', stream, GROUP, '-', '+', MAX_HELD, worker_id)) do
    local job_id = holder_of(model, pending[1])
    local job = job_id and job_fields(job_id, 'state', 'worker', 'is_in_engine') or {}
    if job.state == 'running' and job.worker == worker_id and job.is_in_engine then
      crew[#crew + 1] = job_id
    end
  end
  for _, job_id in ipairs(crew) do redis.call('HSETNX', job_key(job_id), 'crew', #crew) end
end

-- Charges a job that was in the engine of a lost worker, together with `crew - 1` others.
-- Returns what it is charged with.
local function accuse(job_id, crew, fate)
  local key = job_key(job_id)
  local job = job_fields(job_id, 'next_index', 'cleared_at')
  local tokens = job.next_index - (tonumber(job.cleared_at or 0) - PROBATION_TOKENS)
  local charge = CREW
  if tonumber(crew) == 1 then
    charge = (fate == 'own' or tokens < FURTHER_TOKENS) and DEATH or SPARED
  end
  if charge == DEATH then redis.call('HINCRBY', key, 'deaths', 1) end
  redis.call('HINCRBY', key, 'losses', 1)
  redis.call('HSET', key, 'is_suspect', 1)
  return charge
end

-- Takes back what a job was charged with for the loss of an attempt. Returns whether it was.
local function withdraw_charge(job_id, attempt)
  local key = job_key(job_id)
  local charge = redis.call('HGET', key, 'lost:' .. attempt)
  if not charge then return false end
  redis.call('HDEL', key, 'lost:' .. attempt)
  if charge == DEATH then redis.call('HINCRBY', key, 'deaths', -1) end
  if redis.call('HINCRBY', key, 'losses', -1) == 0 then redis.call('HSET', key, 'is_suspect', 0) end
  return true
end

-- Withdraws a charge: the worker of an attempt that was given up turns out to be alive.
local function acquit(job_id, attempt)
  local key = job_key(job_id)
  local job = job_fields(job_id, 'state', 'attempt', 'crew')
  if not job.state or FINAL[job.state] then return end
  if job.crew and job.attempt == attempt then redis.call('HDEL', key, 'crew') end
  if not withdraw_charge(job_id, attempt) then return end
  if job.attempt == attempt then -- no other worker has it: its lease continues
    redis.call('HDEL', key, 'judged')
  else
    redis.call('HINCRBY', key, 'deliveries', -1)
  end
end

-- Judges, once, the loss of the current attempt, before `claimant` takes the job over.
local function judge(job_id, claimant)
  local key = job_key(job_id)
  local job = job_fields(job_id, 'state', 'model', 'worker', 'attempt', 'is_in_engine', 'judged',
    'crew')
  if job.state ~= 'running' then return end
  if job.worker == claimant then
    acquit(job_id, job.attempt)
  elseif job.judged == job.attempt then
    return
  end
  redis.call('HSET', key, 'judged', job.attempt)
  if job.worker == claimant or not job.is_in_engine then
    redis.call('HINCRBY', key, 'deliveries', -1)
    return
  end
  local lost_worker = lost_worker_key(job.worker)
  local fate = redis.call('HGET', lost_worker, 'fate')
  if fate == 'outside' then return end -- which still counts as a delivery
  if not job.crew then muster(job.model, job.worker) end
  local crew = job.crew or redis.call('HGET', key, 'crew')
  redis.call('HSET', key, 'lost:' .. job.attempt, accuse(job_id, crew, fate))
  redis.call('HSET', lost_worker, 'job:' .. job_id, job.attempt)
  redis.call('PEXPIRE', lost_worker, LOST_TTL_MS)
end

-- Whether this worker, by this attempt, still holds the job. If so, it is alive: see `acquit`.
local function is_held_by_living(job_id, job, worker_id, attempt)
  acquit(job_id, attempt)
  return is_held(job, worker_id, attempt)
end

-- Gives a job's entry to a consumer of its own, from which any worker may claim it at once: so the
-- one that had it holds nothing and can be removed. Idle workers get a suspect sooner than busy
-- ones, see `claim`. job_id: nil or false where the entry has no job.
local function offer(model, job_id, entry_id, lease_ms)
  local is_suspect = job_id and redis.call('HGET', job_key(job_id), 'is_suspect') == '1'
  redis.call('XCLAIM', jobs_key(model), GROUP, HANDED_BACK, 0, entry_id, 'IDLE',
    is_suspect and lease_ms or DAY_MS, 'JUSTID')
end

-- Ends a job that has used up its tries, and leaves a dead letter without any of its
-- content. Returns whether it did.
-- faults: JSON object {deaths, deliveries}, each a fault
local function bury_if_spent(job_id, faults, ttl_ms)
  local job = job_fields(job_id, 'model', 'deliveries', 'deaths', 'worker')
  local deaths, deliveries = tonumber(job.deaths or 0), tonumber(job.deliveries)
  local reason = deaths >= MAX_DEATHS and 'deaths' or deliveries >= MAX_DELIVERIES and 'deliveries'
  if not reason then return false end
  redis.call('XADD', dead_key(), 'MAXLEN', '~', 1000, '*', 'job_id', job_id, 'model', job.model,
    'deliveries', deliveries, 'deaths', deaths, 'worker', job.worker or '')
  local fault = cjson.encode(cjson.decode(faults)[reason])
  finish_and_tell(job_id, 'error', error_event(job_id, fault), ttl_ms)
  return true
end
