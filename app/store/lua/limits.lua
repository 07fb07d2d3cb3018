-- Enforces a key's limits: jobs under way, waiting jobs, tokens and frames per minute.
--
-- A bucket holds a minute's worth and fills evenly. When a job is created it takes out what it is
-- predicted to use; when it ends, that is corrected to its actual use. A request that is larger
-- than its bucket is accepted while the bucket is full, and leaves it in debt. A bucket without a
-- record is full. Limits may change at any time: a job's correction goes into the bucket as it is
-- then.
--
-- Limits are `max_jobs max_queued_jobs tokens_per_minute frames_per_minute`, 0 for none; '' for no
-- limits at all. What a job takes is `prompt_tokens max_tokens frames`, as predicted.
local MINUTE_MS = 60000
local WAITING = 0 -- in `owner_jobs`, of a job that no worker has; else the time of its start
local UNLIMITED = -1

local function four_numbers(words)
  local a, b, c, d = string.match(words, '^(%d+) (%d+) (%d+) (%d+)$')
  return tonumber(a), tonumber(b), tonumber(c), tonumber(d)
end

local function level_of(bucket, per_minute, now)
  local saved = redis.call('HMGET', bucket, 'level', 'at')
  if not saved[1] then return per_minute end
  local filled = math.max(0, now - saved[2]) * per_minute / MINUTE_MS
  return math.min(per_minute, saved[1] + filled)
end

-- Puts an amount into a bucket, or takes it out. Returns what is in it then.
local function fill(bucket, per_minute, amount, now)
  local level = math.min(per_minute, level_of(bucket, per_minute, now) + amount)
  redis.call('HSET', bucket, 'level', level, 'at', now)
  local full_in_ms = (per_minute - level) * MINUTE_MS / per_minute
  redis.call('PEXPIRE', bucket, math.ceil(full_in_ms) + 1)
  return level
end

-- When a bucket will hold this much, at most all that it can hold. 0: it does.
local function wait_ms(level, per_minute, amount)
  if amount <= 0 then return 0 end
  local missing = math.min(amount, per_minute) - level
  return math.max(0, math.ceil(missing * MINUTE_MS / per_minute))
end

-- Drops jobs that ended under a release that does not update this set.
local function prune_owner_jobs(owner)
  for _, job_id in ipairs(redis.call('ZRANGE', owner_jobs_key(owner), 0, -1)) do
    if not redis.call('ZSCORE', live_key(), job_id) then
      redis.call('ZREM', owner_jobs_key(owner), job_id)
    end
  end
end

-- How many jobs an owner has under way, and how many of them wait for a worker.
local function count_owner_jobs(owner)
  local key = owner_jobs_key(owner)
  return redis.call('ZCARD', key), redis.call('ZCOUNT', key, WAITING, WAITING)
end

-- Jobs that run in a steady stream end about every (age of the oldest) / (how many run).
local function until_an_end_ms(owner, now)
  local running = redis.call('ZRANGEBYSCORE', owner_jobs_key(owner), '(' .. WAITING, '+inf',
    'WITHSCORES', 'LIMIT', 0, 1)
  if not running[2] then return 0 end
  local num_running = redis.call('ZCOUNT', owner_jobs_key(owner), '(' .. WAITING, '+inf')
  return math.max(0, math.floor((now - running[2]) / num_running))
end

local function left_of(limit, used)
  return limit > 0 and math.max(0, math.floor(limit - used)) or UNLIMITED
end

-- What an owner has left of its limits, of jobs, queued jobs, tokens and frames: {{left, wait_ms},
-- ...}, left -1 where there is no limit; wait_ms, where the limit refuses the request, is when to
-- try again, and -1 where it does not.
--
-- tokens, frames: what the request wants. Tokens nil: it is not known yet. Then it is refused where
-- there is no token left, and is expected to want as many as the last one.
local function limit_states(owner, limits, tokens, frames)
  local now = now_ms()
  local max_jobs, max_queued, tokens_per_minute, frames_per_minute = four_numbers(limits)
  local num_jobs, num_waiting = count_owner_jobs(owner)
  if max_jobs > 0 and num_jobs >= max_jobs or max_queued > 0 and num_waiting >= max_queued then
    prune_owner_jobs(owner)
    num_jobs, num_waiting = count_owner_jobs(owner)
  end

  local function of_jobs(limit, used)
    local is_refused = limit > 0 and used >= limit
    return {left_of(limit, used), is_refused and until_an_end_ms(owner, now) or -1}
  end

  local function of_bucket(kind, per_minute, amount)
    if per_minute == 0 then return {UNLIMITED, -1} end
    local bucket = bucket_key(owner .. ':' .. kind)
    local level = level_of(bucket, per_minute, now)
    local wait = wait_ms(level, per_minute, amount or 1)
    if not amount and wait > 0 then
      wait = wait_ms(level, per_minute, tonumber(redis.call('HGET', bucket, 'last') or 1))
    end
    return {left_of(per_minute, per_minute - level), wait > 0 and wait or -1}
  end

  return {
    of_jobs(max_jobs, num_jobs),
    of_jobs(max_queued, num_waiting),
    of_bucket('tokens', tokens_per_minute, tokens),
    of_bucket('frames', frames_per_minute, frames),
  }
end

local function is_refused(states)
  for _, one in ipairs(states) do
    if one[2] >= 0 then return true end
  end
  return false
end

-- Remembers an owner's current limits for `settle`: a job may end where they are not known.
local function note_limits(owner, limits)
  redis.call('SET', owner_limits_key(owner), limits, 'PX', DAY_MS)
end

-- Takes what a new job is predicted to use. Returns what its owner then has left, see
-- `limit_states`.
charge_owner = function(owner, job_id, limits, taken)
  redis.call('ZADD', owner_jobs_key(owner), WAITING, job_id)
  redis.call('PEXPIRE', owner_jobs_key(owner), DAY_MS)
  note_limits(owner, limits)
  if limits == '' then return {} end
  local now = now_ms()
  local _, _, tokens_per_minute, frames_per_minute = four_numbers(limits)
  local prompt, max_tokens, frames = string.match(taken, '^(%d+) (%d+) (%d+)$')
  if tokens_per_minute > 0 then
    local bucket = bucket_key(owner .. ':tokens')
    fill(bucket, tokens_per_minute, -(prompt + max_tokens), now)
    redis.call('HSET', bucket, 'last', prompt + max_tokens)
  end
  if frames_per_minute > 0 then
    fill(bucket_key(owner .. ':frames'), frames_per_minute, -frames, now)
  end
  redis.call('HSET', job_key(job_id), 'limits', limits, 'taken', taken)
  local states = limit_states(owner, limits, 0, 0)
  for _, one in ipairs(states) do one[2] = -1 end -- it is in
  return states
end

-- What a job that ends has used of what it took: {tokens, frames}. What was never read is not used,
-- nor what no worker had; of an answer that broke off, the tokens that were published.
local function used_of(job, taken, done)
  if done then
    local has_frames = done.frames ~= cjson.null
    return done.usage.prompt_tokens + done.usage.completion_tokens,
      has_frames and #done.frames.indices or 0
  end
  local prompt, _, frames = string.match(taken, '^(%d+) (%d+) (%d+)$')
  local tokens = tonumber(job.attempt or 0) > 0 and prompt + job.next_index or 0
  return tokens, job.state == 'reading' and 0 or tonumber(frames)
end

-- What the buckets of tokens and frames hold now: as of the owner's last request, not as of the
-- job. 0 of one that is there no longer, or that the job took nothing from because there was none.
local function capacities_now(job)
  local at_creation = {select(3, four_numbers(job.limits))}
  local limits = redis.call('GET', owner_limits_key(job.owner))
  if not limits then return unpack(at_creation) end -- the previous release has made the job
  if limits == '' then return 0, 0 end
  local now = {select(3, four_numbers(limits))}
  for i = 1, 2 do
    if at_creation[i] == 0 then now[i] = 0 end
  end
  return unpack(now)
end

-- A job ends: its owner's places are free, and the buckets learn what it used.
--
-- job: its fields before the end: owner, state, attempt, next_index, limits, taken
-- done: the decoded event of an answer that is whole, else false
settle = function(job_id, job, done)
  redis.call('ZREM', owner_jobs_key(job.owner), job_id)
  if not job.limits or not job.taken then return end
  local now = now_ms()
  local tokens_per_minute, frames_per_minute = capacities_now(job)
  local prompt, max_tokens, frames = string.match(job.taken, '^(%d+) (%d+) (%d+)$')
  local used_tokens, used_frames = used_of(job, job.taken, done)
  if tokens_per_minute > 0 then
    local unused = prompt + max_tokens - used_tokens
    fill(bucket_key(job.owner .. ':tokens'), tokens_per_minute, unused, now)
  end
  if frames_per_minute > 0 then
    fill(bucket_key(job.owner .. ':frames'), frames_per_minute, frames - used_frames, now)
  end
end

-- A worker has one of an owner's jobs from now on, or no worker has it any more.
note_started = function(owner, job_id, started_at)
  redis.call('ZADD', owner_jobs_key(owner), 'XX', started_at or WAITING, job_id)
end
