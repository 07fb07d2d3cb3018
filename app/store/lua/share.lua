-- In which order an owner's waiting jobs are served: by priority, then age.
--
-- The best priority goes first, the oldest of it before the others; but after MAX_OVERTAKES times
-- in a row that the oldest of all has been passed over, it is its turn. So who has n older ones of
-- its owner before it has at the latest the (n + 1) * (MAX_OVERTAKES + 1)-th of its owner's turns,
-- whatever else comes. (An engine goes by the same rule: dycoke_core/precedence.py.)
--
-- A share has each job under a number by priority, then arrival, so all that is asked of it takes
-- the same time however many wait, but for their logarithm. Scripts of the previous release know of
-- no share: jobs may be missing in it, and have gone that are in it.
local RANKS = {high = 1, normal = 2, low = 3} -- as in dycoke_core/config.py
local NUM_RANKS = 3
local MAX_OVERTAKES = 4
local RANK = 2 ^ 46 -- between numbers of two ranks; more than jobs ever come

-- Of releases that do not say, all jobs are normal.
local function rank_of(job) return RANKS[job.priority] or RANKS.normal end

local function share_of(model, owner) return share_key(model .. ':' .. owner) end

local function share_member(job_id, length) return job_id .. ' ' .. (length or 1) end

-- Adds a job that is younger than all others.
local function add_to_share(model, job_id, job)
  local arrival = redis.call('HINCRBY', tags_key(model), 'arrivals', 1)
  local number, share = rank_of(job) * RANK + arrival, share_of(model, job.owner)
  redis.call('ZADD', share, number, share_member(job_id, job.length))
  redis.call('PEXPIRE', share, DAY_MS)
end

-- The number of a job; nil where it is not in the share.
local function number_in_share(model, owner, job_id, length)
  local number = redis.call('ZSCORE', share_of(model, owner), share_member(job_id, length))
  return tonumber(number or nil)
end

-- When a job came, compared with others; nil where it is not in the share.
local function arrival_of(model, owner, job_id, length)
  local number = number_in_share(model, owner, job_id, length)
  return number and number % RANK
end

-- How many jobs are of a better priority, or of the same one and older; nil where it is not in the
-- share.
local function num_better(model, owner, job_id, length)
  local number = number_in_share(model, owner, job_id, length)
  if not number then return nil end
  return redis.call('ZCOUNT', share_of(model, owner), '-inf', string.format('(%.17g', number))
end

-- Returns how many were removed: 1, or 0 where it was not in the share.
local function remove_from_share(model, owner, job_id, length)
  return redis.call('ZREM', share_of(model, owner), share_member(job_id, length))
end

-- How many jobs are of a rank or of better ones.
local function num_up_to(model, owner, rank)
  local behind = string.format('(%.17g', (rank + 1) * RANK)
  return redis.call('ZCOUNT', share_of(model, owner), '-inf', behind)
end

-- When the oldest job came; nil where there is none.
local function oldest_arrival(model, owner)
  local oldest
  for rank = 1, NUM_RANKS do
    local first = redis.call('ZRANGEBYSCORE', share_of(model, owner), rank * RANK,
      string.format('(%.17g', (rank + 1) * RANK), 'WITHSCORES', 'LIMIT', 0, 1)
    local arrival = first[2] and tonumber(first[2]) % RANK
    if arrival and (not oldest or arrival < oldest) then oldest = arrival end
  end
  return oldest
end

-- The first `number` jobs of a rank: {job_id, length, arrival}, the oldest first.
local function first_of_rank(model, owner, rank, number)
  local found = redis.call('ZRANGEBYSCORE', share_of(model, owner), rank * RANK,
    string.format('(%.17g', (rank + 1) * RANK), 'WITHSCORES', 'LIMIT', 0, number)
  local jobs = {}
  for i = 1, #found, 2 do
    local job_id, length = string.match(found[i], '^(.*) (%S+)$')
    jobs[#jobs + 1] =
      {job_id = job_id, length = length, arrival = tonumber(found[i + 1]) % RANK}
  end
  return jobs
end

-- The first `number` jobs, in the order in which they are served.
--
-- num_passed: how often in a row the oldest has been passed over
-- joining: a job that would be the youngest, or nil
local function served_first(model, owner, number, num_passed, joining)
  local queues, heads = {}, {}
  for rank = 1, NUM_RANKS do
    queues[rank], heads[rank] = first_of_rank(model, owner, rank, number), 1
  end
  if joining then
    joining.arrival = RANK
    table.insert(queues[rank_of(joining)], joining)
  end
  local line = {}
  while #line < number do
    local best, oldest
    for rank = 1, NUM_RANKS do
      local head = queues[rank][heads[rank]]
      if head and not best then best = rank end
      if head and (not oldest or head.arrival < queues[oldest][heads[oldest]].arrival) then
        oldest = rank
      end
    end
    if not best then break end
    local rank = num_passed >= MAX_OVERTAKES and oldest or best
    num_passed = rank == oldest and 0 or num_passed + 1
    line[#line + 1] = queues[rank][heads[rank]]
    heads[rank] = heads[rank] + 1
  end
  return line
end
