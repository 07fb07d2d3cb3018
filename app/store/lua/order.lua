-- Who is next: weighted fair queueing between the owners of a model's waiting jobs.
--
-- Start-time fair queueing (Goyal, Vin, Cheng: SIGCOMM 1996). A queued job's turn is at its start,
--     max(virtual time, finish of its owner's last job),    finish = start + cost / weight,
-- and the smallest start is next; virtual time is the start of the job that was given out last. So
-- one owner's jobs are first in, first out; owners who all have jobs waiting are given equal cost,
-- by their weights; and whoever comes back has saved up nothing and owes nothing.
--
-- Within an owner's share, its jobs run by priority, then age; other owners are unaffected. The
-- best priority goes first, the oldest of it before the others; but after MAX_OVERTAKES times in a
-- row that the oldest of all has been passed over, it is its turn. So who has n older ones of its
-- owner before it has at the latest the (n + 1) * (MAX_OVERTAKES + 1)-th of its owner's turns,
-- whatever else comes; and a lower priority never brings a job forward. (An engine goes by the same
-- rule: dycoke_core/precedence.py.)
--
-- The stream's entries are tickets. Each job brings one, and a worker that reads one is given the
-- next job, whoever has brought the ticket: so workers wait for the stream and hold its entries as
-- their leases, and its length is what waits and what runs. An entry's holder is the job that it
-- was given to, noted in `given` unless it is the one that has brought it.
local HANDED_BACK_START = -1e13 -- plus the time of queueing (ms): before all fresh ones, in order
local NO_JOB = '-' -- has brought a ticket that was missing

local RANKS = {high = 1, normal = 2, low = 3} -- as in dycoke_core/config.py
local MAX_OVERTAKES = 4
local MIXED = 'mixed'

local function member_of(owner, job_id) return owner .. ' ' .. job_id end

local function start_of(model, owner, job_id)
  if not owner then return nil end
  return tonumber(redis.call('ZSCORE', order_key(model), member_of(owner, job_id)) or nil)
end

-- Of releases that do not say, all jobs are normal.
local function priority_of(job) return RANKS[job.priority] and job.priority or 'normal' end

-- Whether one job has waited longer than another; of two that came together, the better one has.
local function is_older(job, other)
  local came, other_came = tonumber(job.queued_at or 0), tonumber(other.queued_at or 0)
  if came ~= other_came then return came < other_came end
  local rank, other_rank = RANKS[priority_of(job)], RANKS[priority_of(other)]
  if rank ~= other_rank then return rank < other_rank end
  return job.place < other.place -- of one priority they never change places
end

-- An owner's fresh jobs, the oldest first, and when the first of them has its turn.
local function waiting_of(model, owner)
  local jobs = {}
  local fresh = redis.call('ZRANGEBYSCORE', order_key(model), 0, '+inf', 'WITHSCORES')
  for i = 1, #fresh, 2 do
    if string.sub(fresh[i], 1, #owner + 1) == owner .. ' ' then
      local job_id = string.sub(fresh[i], #owner + 2)
      local job = job_fields(job_id, 'priority', 'length', 'queued_at')
      job.member, job.turn, job.place = fresh[i], tonumber(fresh[i + 1]), i
      jobs[#jobs + 1] = job
    end
  end
  local start = jobs[1] and jobs[1].turn
  table.sort(jobs, is_older)
  return jobs, start
end

-- One owner's jobs in the order in which they are served.
--
-- jobs: the oldest first
-- num_passed: how often in a row the oldest has been passed over
local function by_turns(jobs, num_passed)
  local queues, heads = {{}, {}, {}}, {1, 1, 1}
  for _, job in ipairs(jobs) do table.insert(queues[RANKS[priority_of(job)]], job) end
  local line, is_served, oldest = {}, {}, 1
  while #line < #jobs do
    while is_served[jobs[oldest]] do oldest = oldest + 1 end
    local rank = 1
    while not queues[rank][heads[rank]] do rank = rank + 1 end
    if num_passed >= MAX_OVERTAKES then rank = RANKS[priority_of(jobs[oldest])] end
    local job = queues[rank][heads[rank]]
    heads[rank] = heads[rank] + 1
    num_passed = job == jobs[oldest] and 0 or num_passed + 1
    line[#line + 1], is_served[job] = job, true
  end
  return line
end

-- The one priority of these jobs, or MIXED.
local function common_priority(jobs)
  local common = priority_of(jobs[1])
  for _, job in ipairs(jobs) do
    if priority_of(job) ~= common then return MIXED end
  end
  return common
end

local function num_passed(model, owner)
  return tonumber(redis.call('HGET', tags_key(model), 'passed:' .. owner) or 0)
end

-- Lays an owner's waiting jobs out in its share again, from `start` on or from the first one's
-- turn.
local function lay_out(model, owner, start)
  local jobs, first = waiting_of(model, owner)
  if not first then return end
  redis.call('HSET', tags_key(model), 'priority:' .. owner, common_priority(jobs))
  local turn = math.min(start or first, first)
  for _, job in ipairs(by_turns(jobs, num_passed(model, owner))) do
    if job.turn ~= turn then redis.call('ZADD', order_key(model), turn, job.member) end
    turn = turn + (job.length or 1)
  end
end

-- Takes in that one of an owner's jobs, of several priorities, was given to a worker.
local function note_served(model, job)
  local tags = tags_key(model)
  if redis.call('HGET', tags, 'priority:' .. job.owner) ~= MIXED then return end
  local left = waiting_of(model, job.owner)
  job.place = 0
  if #left == 0 then
    redis.call('HDEL', tags, 'priority:' .. job.owner, 'passed:' .. job.owner)
  elseif is_older(job, left[1]) then
    redis.call('HDEL', tags, 'passed:' .. job.owner)
  else
    redis.call('HINCRBY', tags, 'passed:' .. job.owner, 1)
  end
end

-- When the turn of a job that joins now would be, after all others of its owner; whether it has
-- another priority than they have.
local function end_of_line(model, job)
  local saved = redis.call('HMGET', tags_key(model), 'now', 'owner:' .. job.owner,
    'priority:' .. job.owner)
  local turn = math.max(tonumber(saved[1] or 0), tonumber(saved[2] or 0))
  return turn, (saved[3] or 'normal') ~= priority_of(job)
end

-- Puts a fresh job in line.
-- job, here and below: its fields owner, length (cost / weight), priority, queued_at
join_order = function(model, job_id, job)
  local tags = tags_key(model)
  local turn, is_other = end_of_line(model, job)
  redis.call('HSET', tags, 'owner:' .. job.owner, turn + (job.length or 1))
  redis.call('PEXPIRE', tags, DAY_MS)
  redis.call('ZADD', order_key(model), turn, member_of(job.owner, job_id))
  if is_other then lay_out(model, job.owner) end
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
  note_served(model, job)
end

-- The job ends while it waits: its owner's later ones move up.
leave_order = function(model, job_id, job)
  local order, owner = order_key(model), job.owner
  local turn = start_of(model, owner, job_id)
  if not turn then return end
  redis.call('ZREM', order, member_of(owner, job_id))
  if turn < 0 then return end
  local share_end = redis.call('HGET', tags_key(model), 'owner:' .. owner)
  if share_end then
    redis.call('HSET', tags_key(model), 'owner:' .. owner, share_end - (job.length or 1))
  end
  lay_out(model, owner, turn)
end

-- How many jobs would be taken before one that joined the line now.
local function num_before(model, job)
  local turn, is_other = end_of_line(model, job)
  if is_other then
    local jobs, first = waiting_of(model, job.owner)
    jobs[#jobs + 1] = job
    turn = first or turn
    for _, other in ipairs(by_turns(jobs, num_passed(model, job.owner))) do
      if other == job then break end
      turn = turn + (other.length or 1)
    end
  end
  return redis.call('ZCOUNT', order_key(model), '-inf', string.format('(%.17g', turn))
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

-- Gives an entry, which a worker holds, to the job that is next. Returns the job's id; nil where
-- none waits, whereupon the entry goes.
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
