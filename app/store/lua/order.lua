-- Who is next: weighted fair queueing between the owners of a model's waiting jobs.
--
-- Start-time fair queueing (Goyal, Vin, Cheng: SIGCOMM 1996). A queued job's turn is at its start,
--     max(virtual time, finish of its owner's last job),    finish = start + cost / weight,
-- and the smallest start is next; virtual time is the start of the job that was given out last. So
-- one owner's jobs are first in, first out; owners who all have jobs waiting are given equal cost,
-- by their weights; and whoever comes back has saved up nothing and owes nothing.
--
-- Which of its jobs an owner's turn is for goes by their priorities, of which other owners notice
-- nothing: its jobs are laid out one after the other in the share that is its own. A priority that
-- has jobs waiting is due after so many turns (STRIDES) since it began to wait or was served last;
-- the one that is due first gives its oldest job, of two the higher one. So of one owner's jobs
-- there go before the n-th waiting one (counted in its priority)
--     low:     at most 4n of high priority and 2n + 1 of normal
--     normal:  at most 2n of high priority and n/2 of low, rounded up
--     high:    at most n/2 of normal priority and n/4 of low, rounded up
-- whatever else the owner asks meanwhile: low ones wait longer, and never starve.
--
-- The stream's entries are tickets. Each job brings one, and a worker that reads one is given the
-- next job, whoever has brought the ticket: so workers wait for the stream and hold its entries as
-- their leases, and its length is what waits and what runs. An entry's holder is the job that it
-- was given to, noted in `given` unless it is the one that has brought it.
local HANDED_BACK_START = -1e13 -- plus the time of queueing (ms): before all fresh ones, in order
local NO_JOB = '-' -- has brought a ticket that was missing

local PRIORITIES = {'high', 'normal', 'low'} -- as in dycoke_core/config.py
local STRIDES = {high = 1, normal = 2, low = 4}
local NORMAL_ALONE = '- 2 -' -- of an owner that never asked for another priority

local function member_of(owner, job_id) return owner .. ' ' .. job_id end

local function start_of(model, owner, job_id)
  if not owner then return nil end
  return tonumber(redis.call('ZSCORE', order_key(model), member_of(owner, job_id)) or nil)
end

-- Of releases that do not say, all jobs are normal.
local function priority_of(job) return STRIDES[job.priority] and job.priority or 'normal' end

-- After how many of its owner's turns each priority is due: those that wait, and perhaps some that
-- have ceased to.
local function parse_dues(words)
  local dues, i = {}, 0
  for word in string.gmatch(words or NORMAL_ALONE, '%S+') do
    i = i + 1
    dues[PRIORITIES[i]] = tonumber(word)
  end
  return dues
end

local function save_dues(model, owner, dues)
  local words = {}
  for i, priority in ipairs(PRIORITIES) do words[i] = dues[priority] or '-' end
  redis.call('HSET', tags_key(model), 'due:' .. owner, table.concat(words, ' '))
end

local function first_due(dues)
  local first = nil
  for _, priority in ipairs(PRIORITIES) do
    local due = dues[priority]
    if due and (not first or due < dues[first]) then first = priority end
  end
  return first
end

-- A priority gives a job.
local function advance(dues, priority)
  local turns = dues[priority] or 0
  for other, due in pairs(dues) do dues[other] = math.max(0, due - turns) end
  dues[priority] = STRIDES[priority]
end

-- An owner's fresh jobs by priority, first come, first served; and when the first of all has its turn.
local function waiting_of(model, owner)
  local queues, start = {high = {}, normal = {}, low = {}}, nil
  local fresh = redis.call('ZRANGEBYSCORE', order_key(model), 0, '+inf', 'WITHSCORES')
  for i = 1, #fresh, 2 do
    if string.sub(fresh[i], 1, #owner + 1) == owner .. ' ' then
      local job = job_fields(string.sub(fresh[i], #owner + 2), 'priority', 'length')
      job.member, job.turn = fresh[i], tonumber(fresh[i + 1])
      table.insert(queues[priority_of(job)], job)
      start = start or job.turn
    end
  end
  return queues, start
end

-- One owner's jobs in the order in which they are served.
local function by_turns(queues, dues)
  local line, taken, left = {}, {high = 0, normal = 0, low = 0}, {}
  for priority, due in pairs(dues) do left[priority] = due end
  local priority = first_due(left)
  while priority do
    taken[priority] = taken[priority] + 1
    line[#line + 1] = queues[priority][taken[priority]]
    advance(left, priority)
    if taken[priority] == #queues[priority] then left[priority] = nil end
    priority = first_due(left)
  end
  return line
end

-- When each priority with jobs waiting is due, where one has just got its last job.
local function current_dues(saved, queues, joined)
  local dues = parse_dues(saved)
  for priority, queue in pairs(queues) do
    if #queue == 0 then
      dues[priority] = nil
    elseif not dues[priority] or priority == joined and #queue == 1 then
      dues[priority] = STRIDES[priority]
    end
  end
  return dues
end

-- Lays an owner's waiting jobs out in its share again, from `start` on or from the first one's turn.
local function lay_out(model, owner, start, joined)
  local queues, first = waiting_of(model, owner)
  if not first then return end
  local dues = current_dues(redis.call('HGET', tags_key(model), 'due:' .. owner), queues, joined)
  save_dues(model, owner, dues)
  local turn = math.min(start or first, first)
  for _, job in ipairs(by_turns(queues, dues)) do
    if job.turn ~= turn then redis.call('ZADD', order_key(model), turn, job.member) end
    turn = turn + (job.length or 1)
  end
end

local function is_alone(dues, priority)
  for other in pairs(dues) do
    if other ~= priority then return false end
  end
  return true
end

-- Puts a fresh job in line.
-- job, here and below: its fields owner, length (cost / weight), priority
join_order = function(model, job_id, job)
  local tags, priority = tags_key(model), priority_of(job)
  local saved = redis.call('HMGET', tags, 'now', 'owner:' .. job.owner, 'due:' .. job.owner)
  local turn = math.max(tonumber(saved[1] or 0), tonumber(saved[2] or 0))
  redis.call('HSET', tags, 'owner:' .. job.owner, turn + (job.length or 1))
  redis.call('PEXPIRE', tags, DAY_MS)
  redis.call('ZADD', order_key(model), turn, member_of(job.owner, job_id))
  if not is_alone(parse_dues(saved[3]), priority) then lay_out(model, job.owner, nil, priority) end
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
  local saved = redis.call('HGET', tags_key(model), 'due:' .. job.owner)
  if not saved then return end
  local dues = parse_dues(saved)
  advance(dues, priority_of(job))
  save_dues(model, job.owner, dues)
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
