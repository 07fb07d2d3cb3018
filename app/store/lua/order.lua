-- Decides which job is next: weighted fair queueing between the owners of a model's waiting jobs.
--
-- Start-time fair queueing (Goyal, Vin, Cheng: SIGCOMM 1996). A queued job's turn is at its start,
--     max(virtual time, finish of its owner's last job),    finish = start + cost / weight,
-- and the smallest start is next; virtual time is the start of the job that was given out last. So
-- one owner's jobs are first in, first out; owners who all have jobs waiting are given equal cost,
-- by their weights; and an owner that comes back has neither credit nor debt.
--
-- Within an owner's share, its jobs run by priority, then age (see `share`); other owners are
-- unaffected, and a lower priority never brings a job forward. Only the first MAX_AHEAD jobs of an
-- owner, at least half as many, have their turns; later ones are kept at BEHIND + the turn that
-- they would have had when they came, or when they lost theirs to a higher priority, until it is
-- clear which jobs come before them. So no operation on the line takes longer if many jobs wait,
-- except repairs after workers of the previous release, which do not know BEHIND.
--
-- The stream's entries are tickets. Each job adds one, and a worker that reads one gets the next
-- job, whichever job added the ticket. So workers wait for the stream and hold its entries as their
-- leases, and its length is the number of waiting and running jobs. An entry's holder is the job
-- that it was given to, stored in `given` unless that job added the entry.
local HANDED_BACK_START = -1e13 -- plus the time of queueing (ms): before all fresh ones, in order
local NO_JOB = '-' -- has brought a ticket that was missing

local MAX_AHEAD = 64
local BEHIND = 2 ^ 46 -- more than any turn

local function member_of(owner, job_id) return owner .. ' ' .. job_id end

local function start_of(model, owner, job_id)
  if not owner then return nil end
  return tonumber(redis.call('ZSCORE', order_key(model), member_of(owner, job_id)) or nil)
end

local function put(model, owner, job_id, turn)
  redis.call('ZADD', order_key(model), turn, member_of(owner, job_id))
end

local function num_passed(model, owner)
  return tonumber(redis.call('HGET', tags_key(model), 'passed:' .. owner) or 0)
end

-- How many of an owner's jobs have their turns; nil: all.
local function num_ahead(model, owner)
  return tonumber(redis.call('HGET', tags_key(model), 'ahead:' .. owner) or nil)
end

-- The first jobs of an owner's share that are in line, with their turns. Others are no longer
-- there: the previous release has served or ended them.
local function first_in_line(model, owner, number, joining)
  while true do
    local jobs, num_gone = {}, 0
    for _, job in ipairs(served_first(model, owner, number, num_passed(model, owner), joining)) do
      if job ~= joining then job.turn = start_of(model, owner, job.job_id) end
      if job == joining or job.turn and job.turn >= 0 then
        jobs[#jobs + 1] = job
      else
        num_gone = num_gone + remove_from_share(model, owner, job.job_id, job.length)
      end
    end
    if num_gone == 0 then return jobs end
  end
end

-- The first turn that an owner has; nil where none of its jobs has one.
local function first_turn(model, owner)
  local first = first_in_line(model, owner, 1)[1]
  return first and first.turn < BEHIND and first.turn or nil
end

-- An owner's first jobs in line: MAX_AHEAD, and all others that may have a turn. One that joins
-- puts others at most two places back, one that leaves puts none back.
local function all_with_turns(model, owner)
  local number = MAX_AHEAD + NUM_RANKS
  local jobs = first_in_line(model, owner, number)
  if not jobs[number] or jobs[number].turn >= BEHIND then return jobs end
  -- the previous release has given all of them turns
  return first_in_line(model, owner, redis.call('ZCARD', share_of(model, owner)))
end

-- Gives an owner's first jobs their turns, from `start` on.
local function lay_out(model, owner, start)
  local tags, turn, number = tags_key(model), start, 0
  for place, job in ipairs(all_with_turns(model, owner)) do
    if place <= MAX_AHEAD then
      if job.turn ~= turn then put(model, owner, job.job_id, turn) end
      number = place
    elseif job.turn < BEHIND then
      put(model, owner, job.job_id, BEHIND + turn)
    end
    turn = turn + job.length
  end
  if redis.call('ZCARD', share_of(model, owner)) > number then
    redis.call('HSET', tags, 'ahead:' .. owner, number)
  else
    redis.call('HDEL', tags, 'ahead:' .. owner)
  end
end

-- Puts into an owner's share what the previous release has in line. All of it waits behind until
-- it is laid out.
local function adopt_line(model, owner)
  local prefix, jobs = owner .. ' ', {}
  local fresh = redis.call('ZRANGEBYSCORE', order_key(model), 0, '+inf', 'WITHSCORES')
  for i = 1, #fresh, 2 do
    if string.sub(fresh[i], 1, #prefix) == prefix then
      local job_id = string.sub(fresh[i], #prefix + 1)
      local job = job_fields(job_id, 'length', 'priority')
      job.owner = owner
      add_to_share(model, job_id, job)
      jobs[#jobs + 1] = {job_id = job_id, turn = tonumber(fresh[i + 1]) % BEHIND}
    end
  end
  for _, job in ipairs(jobs) do put(model, owner, job.job_id, BEHIND + job.turn) end
  if jobs[1] then lay_out(model, owner, jobs[1].turn) end
end

-- Virtual time, or the end of an owner's line, as saved. The previous release has counted BEHIND in
-- once it has served a job behind, and takes from that the lengths of jobs that end.
local function from_saved(saved)
  local turn = tonumber(saved or 0)
  return turn < BEHIND / 2 and turn or turn - BEHIND
end

-- When the turn of a job that joins now would be, after all others of its owner.
local function end_of_line(model, owner)
  local saved = redis.call('HMGET', tags_key(model), 'now', 'owner:' .. owner)
  return math.max(from_saved(saved[1]), from_saved(saved[2]))
end

-- Lays an owner's jobs out if all of them stand behind: workers of the previous release have served
-- those that had turns. Returns its first turn; nil where no job of it waits.
local function lay_out_if_starved(model, owner)
  local first = first_turn(model, owner)
  if first or not num_ahead(model, owner) then return first end
  local start
  for _, job in ipairs(first_in_line(model, owner, MAX_AHEAD)) do
    start = math.min(start or job.turn, job.turn)
  end
  local now = from_saved(redis.call('HGET', tags_key(model), 'now'))
  lay_out(model, owner, math.max(now, (start or 0) % BEHIND))
  return first_turn(model, owner)
end

-- Puts a fresh job in line.
-- job, here and below: its fields owner, length (cost / weight), priority
join_order = function(model, job_id, job)
  local tags, owner = tags_key(model), job.owner
  local turn = end_of_line(model, owner)
  local has_share = redis.call('HSETNX', tags, 'has_share:' .. owner, 1) == 0
  if not has_share and redis.call('HGET', tags, 'owner:' .. owner) then
    adopt_line(model, owner)
  end
  local first = lay_out_if_starved(model, owner) or turn
  add_to_share(model, job_id, job)
  redis.call('HSET', tags, 'owner:' .. owner, turn + (job.length or 1))
  redis.call('PEXPIRE', tags, DAY_MS)
  local number = redis.call('ZCARD', share_of(model, owner))
  local num_before = num_up_to(model, owner, rank_of(job)) - 1
  local is_last = num_before + 1 == number
  if is_last and number <= MAX_AHEAD and not num_ahead(model, owner) then
    put(model, owner, job_id, turn)
    return
  end
  put(model, owner, job_id, BEHIND + turn)
  if is_last or num_before >= MAX_AHEAD then
    redis.call('HSETNX', tags, 'ahead:' .. owner, math.min(number - 1, MAX_AHEAD))
  else
    lay_out(model, owner, first)
  end
end

-- Puts a job that was handed back before all fresh ones. It keeps its entry.
join_order_again = function(model, job_id, owner, queued_at)
  put(model, owner, job_id, HANDED_BACK_START + queued_at)
end

-- One of an owner's jobs has left the line, where it had a turn: the next ones may be given theirs.
local function note_left_ahead(model, owner)
  local tags = tags_key(model)
  if redis.call('ZCARD', share_of(model, owner)) == 0 then
    redis.call('HDEL', tags, 'ahead:' .. owner, 'passed:' .. owner)
    return false
  end
  return num_ahead(model, owner) and redis.call('HINCRBY', tags, 'ahead:' .. owner, -1)
end

-- A worker is given the job: it leaves the line, and virtual time advances.
leave_order_served = function(model, job_id, job)
  local tags, owner = tags_key(model), job.owner
  local turn = start_of(model, owner, job_id)
  if not turn then return end
  redis.call('ZREM', order_key(model), member_of(owner, job_id))
  if turn < 0 then return end
  turn = turn % BEHIND
  redis.call('HSET', tags, 'now', turn)
  redis.call('PEXPIRE', tags, DAY_MS)
  local arrival = arrival_of(model, owner, job_id, job.length)
  if not arrival then return end -- the previous release has put it in line
  remove_from_share(model, owner, job_id, job.length)
  local oldest = oldest_arrival(model, owner)
  if oldest and oldest < arrival then
    redis.call('HINCRBY', tags, 'passed:' .. owner, 1)
  else
    redis.call('HDEL', tags, 'passed:' .. owner)
  end
  local left = note_left_ahead(model, owner)
  if left and left <= MAX_AHEAD / 2 then
    lay_out(model, owner, first_turn(model, owner) or turn + (job.length or 1))
  end
end

-- The job ends while it waits: its owner's later ones move up.
leave_order = function(model, job_id, job)
  local tags, owner = tags_key(model), job.owner
  local turn = start_of(model, owner, job_id)
  if not turn then return end
  redis.call('ZREM', order_key(model), member_of(owner, job_id))
  if turn < 0 then return end
  local share_end = redis.call('HGET', tags, 'owner:' .. owner)
  if share_end then
    redis.call('HSET', tags, 'owner:' .. owner, share_end - (job.length or 1))
  end
  remove_from_share(model, owner, job_id, job.length)
  if turn >= BEHIND then return end
  note_left_ahead(model, owner)
  lay_out(model, owner, math.min(turn, first_turn(model, owner) or turn))
end

-- How many jobs would be taken before one whose turn is this.
local function num_before_turn(model, turn)
  local order = order_key(model)
  local behind = string.format('(%.17g', BEHIND + turn)
  return redis.call('ZCOUNT', order, '-inf', string.format('(%.17g', turn))
    + redis.call('ZCOUNT', order, BEHIND, behind)
end

-- When the turn would be of a job that stands behind so many others of its owner, as far as one
-- can tell: if all of them cost the same.
local function turn_behind(model, owner, num_others)
  local first, number = first_turn(model, owner), redis.call('ZCARD', share_of(model, owner))
  local turn = end_of_line(model, owner)
  if not first or number == 0 then return turn end
  return first + (turn - first) * math.min(num_others / number, 1)
end

-- How many jobs would be taken before one that joined the line now.
local function num_before(model, job)
  local owner = job.owner
  local turn = end_of_line(model, owner)
  local num_others = num_up_to(model, owner, rank_of(job))
  if num_others < redis.call('ZCARD', share_of(model, owner)) and num_others < MAX_AHEAD then
    turn = first_turn(model, owner) or turn
    for _, other in ipairs(first_in_line(model, owner, MAX_AHEAD, job)) do
      if other == job then break end
      turn = turn + other.length
    end
  elseif num_ahead(model, owner) then
    turn = turn_behind(model, owner, num_others)
  end
  return num_before_turn(model, turn)
end

-- How many jobs would be taken before one that is in line now; false if it is not.
local function place_of(model, owner, job_id)
  local turn = start_of(model, owner, job_id)
  if not turn then return false end
  if turn < BEHIND then
    local behind = string.format('(%.17g', BEHIND + turn)
    return redis.call('ZRANK', order_key(model), member_of(owner, job_id))
      + redis.call('ZCOUNT', order_key(model), BEHIND, behind)
  end
  local num_others = num_better(model, owner, job_id, job_fields(job_id, 'length').length)
  if not num_others then return num_before_turn(model, turn - BEHIND) end
  return math.max(num_others, num_before_turn(model, turn_behind(model, owner, num_others)))
end

-- The fresh job that is next; nil if there is none.
local function next_in_order(model)
  local order = order_key(model)
  while true do
    local found = redis.call('ZRANGEBYSCORE', order, 0, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
    local first, turn = found[1], tonumber(found[2])
    if not first then return nil end
    local owner, job_id = string.match(first, '^(%S*) (.*)$')
    if redis.call('HGET', job_key(job_id), 'state') ~= 'queued' then
      redis.call('ZREM', order, first) -- a worker of the previous release has it, or had
    elseif turn < BEHIND then
      return job_id
    else -- workers of the previous release have served all that had turns
      lay_out(model, owner, turn - BEHIND)
      if not first_turn(model, owner) then return job_id end
    end
  end
end

-- The job that has brought an entry; nil for one that is not a ticket.
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

-- Lays out every owner that is starved: as long as others have turns, theirs are all served first.
local function lay_out_starved(model)
  if redis.call('ZCOUNT', order_key(model), BEHIND, '+inf') == 0 then return end
  for _, tag in ipairs(redis.call('HKEYS', tags_key(model))) do
    local owner = string.match(tag, '^ahead:(.*)$')
    if owner then lay_out_if_starved(model, owner) end
  end
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
