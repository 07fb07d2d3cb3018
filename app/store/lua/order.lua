-- Who is next: weighted fair queueing between the owners of a model's waiting jobs.
--
-- Start-time fair queueing (Goyal, Vin, Cheng: SIGCOMM 1996). A queued job's turn is at its start,
--     max(virtual time, finish of its owner's last job),    finish = start + cost / weight,
-- and the smallest start is next; virtual time is the start of the job that was given out last. So
-- one owner's jobs are first in, first out; owners who all have jobs waiting are given equal cost,
-- by their weights; and whoever comes back has saved up nothing and owes nothing.
--
-- The stream's entries are tickets. Each job brings one, and a worker that reads one is given the
-- next job, whoever has brought the ticket: so workers wait for the stream and hold its entries as
-- their leases, and its length is what waits and what runs. An entry's holder is the job that it
-- was given to, noted in `given` unless it is the one that has brought it.
local HANDED_BACK_START = -1e13 -- plus the time of queueing (ms): before all fresh ones, in order
local NO_JOB = '-' -- has brought a ticket that was missing

local function member_of(owner, job_id) return owner .. ' ' .. job_id end

local function start_of(model, owner, job_id)
  if not owner then return nil end
  return tonumber(redis.call('ZSCORE', order_key(model), member_of(owner, job_id)) or nil)
end

-- Puts a fresh job in line.
-- job, here and below: its fields owner, length (cost / weight)
join_order = function(model, job_id, job)
  local tags = tags_key(model)
  local saved = redis.call('HMGET', tags, 'now', 'owner:' .. job.owner)
  local turn = math.max(tonumber(saved[1] or 0), tonumber(saved[2] or 0))
  redis.call('HSET', tags, 'owner:' .. job.owner, turn + (job.length or 1))
  redis.call('PEXPIRE', tags, DAY_MS)
  redis.call('ZADD', order_key(model), turn, member_of(job.owner, job_id))
end

-- Puts a job that was handed back before all fresh ones. It keeps its entry.
join_order_again = function(model, job_id, owner, queued_at)
  local turn = HANDED_BACK_START + queued_at
  redis.call('ZADD', order_key(model), turn, member_of(owner, job_id))
end

-- A worker is given the job: it leaves the line, and virtual time advances.
leave_order_served = function(model, job_id, job)
  local turn = start_of(model, job.owner, job_id)
  if not turn then return end
  redis.call('ZREM', order_key(model), member_of(job.owner, job_id))
  if turn < 0 then return end
  redis.call('HSET', tags_key(model), 'now', turn)
  redis.call('PEXPIRE', tags_key(model), DAY_MS)
end

-- The job ends while it waits: its owner's later ones move up.
leave_order = function(model, job_id, job)
  local order, owner = order_key(model), job.owner
  local turn = start_of(model, owner, job_id)
  if not turn then return end
  redis.call('ZREM', order, member_of(owner, job_id))
  if turn < 0 then return end
  local length = tonumber(job.length or 1)
  local later = redis.call('ZRANGEBYSCORE', order, turn, '+inf', 'WITHSCORES')
  for i = 1, #later, 2 do
    if string.sub(later[i], 1, #owner + 1) == owner .. ' ' then
      redis.call('ZADD', order, later[i + 1] - length, later[i])
    end
  end
  local share_end = redis.call('HGET', tags_key(model), 'owner:' .. owner)
  if share_end then redis.call('HSET', tags_key(model), 'owner:' .. owner, share_end - length) end
end

-- The fresh job that is next; nil where there is none.
local function next_in_order(model)
  local order = order_key(model)
  while true do
    local first = redis.call('ZRANGEBYSCORE', order, 0, '+inf', 'LIMIT', 0, 1)[1]
    if not first then return nil end
    local job_id = string.match(first, ' (.*)$')
    if redis.call('HGET', job_key(job_id), 'state') == 'queued' then return job_id end
    redis.call('ZREM', order, first) -- a worker of the previous release has it, or had
  end
end

-- The job that has brought an entry; nil for one that is no ticket.
local function brought_by(model, entry_id)
  local entry = redis.call('XRANGE', jobs_key(model), entry_id, entry_id)[1]
  return entry and entry[2][1] == 'job_id' and entry[2][2] or nil
end

-- The job that an entry was given to; nil: it is a ticket. A job that waits and is not in line, or
-- was handed back, holds its own: the former is what the previous release has queued.
local function holder_of(model, entry_id)
  local job_id = redis.call('HGET', given_key(model), entry_id) or brought_by(model, entry_id)
  if not job_id then return nil end
  local job = job_fields(job_id, 'state', 'entry_id', 'owner')
  if job.entry_id ~= entry_id then return nil end
  if job.state == 'running' then return job_id end
  if job.state ~= 'queued' then return nil end
  local turn = start_of(model, job.owner, job_id)
  return (not turn or turn < 0) and job_id or nil
end

-- Gives an entry, which a worker holds, to the job that is next. Returns the job's id; nil where none
-- waits, whereupon the entry goes.
local function give_to_next(model, entry_id)
  local bringer = brought_by(model, entry_id)
  local job_id = bringer and next_in_order(model)
  if not job_id then
    forget_entry(model, entry_id)
    return nil
  end
  if bringer ~= job_id then
    redis.call('HSET', given_key(model), entry_id, job_id)
    redis.call('PEXPIRE', given_key(model), DAY_MS)
    if redis.call('HGET', job_key(bringer), 'entry_id') == entry_id then
      redis.call('HSET', job_key(bringer), 'entry_id', '') -- it will have another
    end
  end
  redis.call('HSET', job_key(job_id), 'entry_id', entry_id)
  return job_id
end

-- Makes up for tickets that are missing: workers of the previous release drop those that were
-- brought by a job which has another by now, and a Redis may lose some.
local function replace_lost_tickets(model)
  local stream = jobs_key(model)
  for _, turn in ipairs(redis.call('ZRANGEBYSCORE', order_key(model), '-inf', '(0')) do
    local job_id = string.match(turn, ' (.*)$') -- was handed back; the previous release ended it
    if redis.call('HGET', job_key(job_id), 'state') ~= 'queued' then
      redis.call('ZREM', order_key(model), turn)
    end
  end
  local waiting = redis.call('ZCARD', queued_key(model))
    - redis.call('ZCOUNT', order_key(model), '-inf', '(0')
  if waiting <= 0 then return end
  local pending = redis.pcall('XPENDING', stream, GROUP)
  local unread = redis.call('XLEN', stream) - (pending.err and 0 or pending[1])
  for _ = unread + 1, waiting do redis.call('XADD', stream, '*', 'job_id', NO_JOB) end
end
