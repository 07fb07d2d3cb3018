-- Prelude of every script: names of keys, the clock, and the transitions that several scripts
-- share.
--
-- ARGV[1] is the key prefix in each of them. Keys are derived from it (app/store/keys.py has the
-- same list and says what each holds), so no script declares KEYS: Redis Cluster is not supported.
-- Redis before 7 replicates scripts by their text by default; ours read the clock.
if redis.replicate_commands then redis.replicate_commands() end

local PREFIX = ARGV[1]
local GROUP = 'workers'
local HANDED_BACK = 'handed-back' -- consumer of entries that any worker may claim at once
local MAX_ENDED_BYTES = 256 * 1024 * 1024 -- of ended jobs' records, events and kept sets
local MAX_FORGOTTEN = 1000 -- ended jobs at a time; more than the largest one ever displaces
local MAX_HELD = 10000 -- more than a worker ever has pending
local PROBATION_TOKENS = 16 -- that a suspect makes alone before others may join it
local DAY_MS = 24 * 3600 * 1000
local MAX_ARRIVALS = 32 -- whose mean is the rate of arrivals
local LAST_ARRIVALS = 8 -- that show a burst first; `app/store/queue_snapshot.py` has it too
local MAX_LINE = 64 -- waiting jobs that a worker hears of
local USAGE_DAYS = 92 -- that usage is kept
local FINAL = {done = true, error = true, cancelled = true}

local function jobs_key(model) return PREFIX .. ':jobs:' .. model end
local function models_key() return PREFIX .. ':models' end
local function job_key(job_id) return PREFIX .. ':job:' .. job_id end
local function events_key(job_id) return PREFIX .. ':events:' .. job_id end
local function kept_key(job_id) return PREFIX .. ':kept:' .. job_id end
local function places_key(model) return PREFIX .. ':places:' .. model end
local function place_owners_key(model) return PREFIX .. ':place_owners:' .. model end
local function owner_places_key(model) return PREFIX .. ':owner_places:' .. model end
local function more_places_key(model) return PREFIX .. ':more_places:' .. model end
local function queued_key(model) return PREFIX .. ':queued:' .. model end
local function order_key(model) return PREFIX .. ':order:' .. model end
local function tags_key(model) return PREFIX .. ':tags:' .. model end
local function share_key(model_and_owner) return PREFIX .. ':share:' .. model_and_owner end
local function given_key(model) return PREFIX .. ':given:' .. model end
local function starts_key(model) return PREFIX .. ':starts:' .. model end
local function pace_key(model) return PREFIX .. ':pace:' .. model end
local function arrivals_key(model) return PREFIX .. ':arrivals:' .. model end
local function live_key() return PREFIX .. ':live' end
local function dead_key() return PREFIX .. ':dead' end
local function idempotency_key(hash) return PREFIX .. ':idempotency:' .. hash end
local function frames_key(digest) return PREFIX .. ':frames:' .. digest end
local function frame_sizes_key() return PREFIX .. ':frame_sizes' end
local function frame_bytes_key() return PREFIX .. ':frame_bytes' end
local function frame_uses_key() return PREFIX .. ':frame_uses' end
local function frame_upload_key(job_id) return PREFIX .. ':frame_upload:' .. job_id end
local function frame_pins_key(digest) return PREFIX .. ':frame_pins:' .. digest end
local function frame_videos_key() return PREFIX .. ':frame_videos' end
local function video_frames_key(video) return PREFIX .. ':video_frames:' .. video end
local function forgotten_key() return PREFIX .. ':forgotten' end
local function forgettings_key() return PREFIX .. ':forgettings' end
local function owner_jobs_key(owner) return PREFIX .. ':owner_jobs:' .. owner end
local function bucket_key(owner_and_kind) return PREFIX .. ':bucket:' .. owner_and_kind end
local function owner_limits_key(owner) return PREFIX .. ':owner_limits:' .. owner end
local function usage_key(owner_and_day) return PREFIX .. ':usage:' .. owner_and_day end
local function ended_jobs_key() return PREFIX .. ':ended_jobs' end
local function ended_sizes_key() return PREFIX .. ':ended_sizes' end
local function ended_bytes_key() return PREFIX .. ':ended_bytes' end
local function ended_owners_key() return PREFIX .. ':ended_owners' end
local function ended_of_jobs_key() return PREFIX .. ':ended_of_jobs' end
local function ended_of_key(owner) return PREFIX .. ':ended_of:' .. owner end
local function lost_worker_key(worker_id) return PREFIX .. ':lost_worker:' .. worker_id end
local function worker_key(id) return PREFIX .. ':worker:' .. id end
local function workers_key() return PREFIX .. ':workers' end
local function ended_channel() return PREFIX .. ':ended' end
local function news_channel() return PREFIX .. ':news' end

local unpin_frames, forget_video -- see `frames`
local charge_owner, settle, note_started -- see `limits`
local note_place, forget_place -- see `places`
local join_order, join_order_again, leave_order, leave_order_served -- see `order`

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- A job's fields by name; false for those that it lacks.
local function job_fields(job_id, ...)
  local values = redis.call('HMGET', job_key(job_id), ...)
  local fields = {}
  for i, name in ipairs({...}) do fields[name] = values[i] end
  return fields
end

local function forget_entry(model, entry_id)
  redis.call('XACK', jobs_key(model), GROUP, entry_id)
  redis.call('XDEL', jobs_key(model), entry_id)
  redis.call('HDEL', given_key(model), entry_id)
end

-- Acks and deletes an entry that a worker has read. One that is still unread stays until it is
-- read: deleting it would make the group's lag unknown.
local function forget_entry_if_read(model, entry_id)
  local pending = redis.pcall('XPENDING', jobs_key(model), GROUP, entry_id, entry_id, 1)
  if not pending.err and #pending > 0 then forget_entry(model, entry_id) end
end

-- Ids in the event log say where in the answer an event belongs, so they are the same after a
-- restart that lost the last writes: the event that brings the answer to n tokens is `n-0`, the
-- k-th event after it that adds none is `n-k`, the terminal one is `(n+1)-0`.
--
-- Returns the ids of the event before it and of its own.
local function append_unnumbered(job_id, event)
  local sequence = redis.call('HINCRBY', job_key(job_id), 'sequence', 1)
  local next_index = redis.call('HGET', job_key(job_id), 'next_index')
  local id = next_index .. '-' .. sequence
  redis.call('XADD', events_key(job_id), id, 'event', event)
  return next_index .. '-' .. sequence - 1, id
end

local function forget_ended_of(job_id)
  local noted = redis.call('HGET', ended_of_jobs_key(), job_id)
  if not noted then return end -- it ended under the previous release
  local bytes, owner = string.match(noted, '^(%d+) (.*)$')
  redis.call('HDEL', ended_of_jobs_key(), job_id)
  redis.call('ZREM', ended_of_key(owner), job_id)
  if tonumber(redis.call('ZADD', ended_owners_key(), 'INCR', -bytes, owner)) <= 0 then
    redis.call('ZREM', ended_owners_key(), owner)
  end
end

-- Counts an ended job among its owner's, without those whose TTL is over: the previous release
-- drops them elsewhere alone.
local function note_ended_of(owner, job_id, bytes, now, ttl_ms)
  local key = ended_of_key(owner)
  for _, gone in ipairs(redis.call('ZRANGEBYSCORE', key, '-inf', now, 'LIMIT', 0, 100)) do
    forget_ended_of(gone)
  end
  redis.call('HSET', ended_of_jobs_key(), job_id, bytes .. ' ' .. owner)
  redis.call('ZADD', key, now + ttl_ms, job_id)
  redis.call('ZADD', ended_owners_key(), 'INCR', bytes, owner)
  for _, each in ipairs({key, ended_of_jobs_key(), ended_owners_key()}) do
    redis.call('PEXPIRE', each, ttl_ms)
  end
end

-- The ended job to delete next: the oldest where its TTL is over; else, where all together exceed
-- their budget, the oldest of the owner whose jobs take most. Nil: there is none.
local function next_ended_to_go(total)
  local oldest = redis.call('ZRANGE', ended_jobs_key(), 0, 0, 'WITHSCORES')
  if oldest[1] and tonumber(oldest[2]) <= now_ms() then return oldest[1] end
  if total <= MAX_ENDED_BYTES then return nil end
  local largest = redis.call('ZRANGE', ended_owners_key(), -1, -1)[1]
  return largest and redis.call('ZRANGE', ended_of_key(largest), 0, 0)[1] or oldest[1]
end

-- Counts a job that has just ended, and deletes others while all of them together exceed their
-- budget. Drops from the count those whose TTL is over.
local function make_room_for_ended(job_id, owner, ttl_ms, has_kept)
  local now = now_ms()
  local bytes = 0
  local keys = {job_key(job_id), events_key(job_id)}
  if has_kept then keys[3] = kept_key(job_id) end
  for _, key in ipairs(keys) do
    bytes = bytes + (redis.call('MEMORY', 'USAGE', key, 'SAMPLES', 0) or 0)
  end
  redis.call('ZADD', ended_jobs_key(), now + ttl_ms, job_id)
  redis.call('HSET', ended_sizes_key(), job_id, bytes)
  local total = redis.call('INCRBY', ended_bytes_key(), bytes)
  if owner then note_ended_of(owner, job_id, bytes, now, ttl_ms) end
  for _ = 1, MAX_FORGOTTEN do
    local other_id = next_ended_to_go(total)
    if not other_id or other_id == job_id then return end
    redis.call('UNLINK', job_key(other_id), events_key(other_id), kept_key(other_id))
    redis.call('ZREM', ended_jobs_key(), other_id)
    local bytes_freed = redis.call('HGET', ended_sizes_key(), other_id)
    total = redis.call('DECRBY', ended_bytes_key(), bytes_freed or 0)
    redis.call('HDEL', ended_sizes_key(), other_id)
    forget_ended_of(other_id)
  end
end

-- Counts what a job of this owner has taken, on the day of its end.
-- done: the decoded event of an answer that is whole, else false
local function count_usage(owner, state, done)
  local key = usage_key(owner .. ':' .. math.floor(now_ms() / DAY_MS))
  redis.call('HINCRBY', key, 'jobs', 1)
  redis.call('HINCRBY', key, 'jobs_' .. state, 1)
  if done then
    for _, name in ipairs({'prompt_tokens', 'visual_tokens', 'completion_tokens'}) do
      redis.call('HINCRBY', key, name, done.usage[name])
    end
    if done.frames ~= cjson.null then -- else a conversation without a video
      redis.call('HINCRBY', key, 'frames', #done.frames.indices)
    end
  end
  redis.call('PEXPIRE', key, USAGE_DAYS * DAY_MS)
end

-- The one way a job ends: terminal event, final state, TTLs, and all that it held is freed.
local function finish(job_id, state, event, ttl_ms)
  local job = job_fields(job_id, 'model', 'frames_digest', 'entry_id', 'next_index', 'owner',
    'video', 'has_kept', 'state', 'attempt', 'limits', 'taken', 'length')
  local event_id = string.format('%d-0', job.next_index + 1)
  redis.call('XADD', events_key(job_id), event_id, 'event', event)
  redis.call('HSET', job_key(job_id), 'state', state, 'ended_at', now_ms())
  redis.call('PEXPIRE', job_key(job_id), ttl_ms)
  redis.call('PEXPIRE', events_key(job_id), ttl_ms)
  if job.has_kept then redis.call('PEXPIRE', kept_key(job_id), ttl_ms) end
  redis.call('ZREM', places_key(job.model), job_id)
  redis.call('ZREM', queued_key(job.model), job_id)
  forget_place(job.model, job_id)
  redis.call('ZREM', live_key(), job_id)
  if job.frames_digest then unpin_frames(job.frames_digest, job_id) end
  if job.video and redis.call('ZSCORE', forgotten_key(), job.video) then forget_video(job.video) end
  if job.entry_id and job.entry_id ~= '' then forget_entry_if_read(job.model, job.entry_id) end
  if job.owner then
    local leave = job.state == 'queued' and leave_order or leave_order_served
    leave(job.model, job_id, job)
    local done = state == 'done' and cjson.decode(event)
    settle(job_id, job, done)
    count_usage(job.owner, state, done)
  end
  make_room_for_ended(job_id, job.owner, ttl_ms, job.has_kept)
end

-- Ends a job from outside its worker, which learns of it through the channel.
local function finish_and_tell(job_id, state, event, ttl_ms)
  finish(job_id, state, event, ttl_ms)
  redis.call('PUBLISH', ended_channel(), job_id)
end

-- `fault` is a JSON object {code, message, retryable} of our own making.
local function error_event(job_id, fault)
  local event = cjson.decode(fault)
  event.type = 'error'
  event.job_id = job_id
  return cjson.encode(event)
end

-- Queues a job. A queue that was empty has no pace: it is forgotten.
local function begin_to_wait(model, job_id, queued_at)
  if redis.call('EXISTS', queued_key(model)) == 0 then redis.call('DEL', pace_key(model)) end
  redis.call('ZADD', queued_key(model), queued_at, job_id)
end

-- reading -> queued: the frames are stored, a worker may take the job.
local function enqueue(model, job_id, request)
  local now = now_ms()
  local entry_id = redis.call('XADD', jobs_key(model), '*', 'job_id', job_id)
  redis.call('HSET', job_key(job_id), 'state', 'queued', 'request', request, 'entry_id', entry_id,
    'queued_at', now)
  redis.call('ZREM', places_key(model), job_id)
  begin_to_wait(model, job_id, now)
  local job = job_fields(job_id, 'owner', 'length', 'priority')
  if job.priority ~= 'low' then -- low ones give way: they are no load for others
    redis.call('LPUSH', arrivals_key(model), now)
    redis.call('LTRIM', arrivals_key(model), 0, MAX_ARRIVALS - 1)
    redis.call('PEXPIRE', arrivals_key(model), 3600000)
  end
  if job.owner then join_order(model, job_id, job) end
end

-- Gives a queued or running job to a worker. The attempt is the fencing token: the one that held
-- the job before is refused from here on.
local function start(job_id, worker_id, take_id)
  local key = job_key(job_id)
  local job = job_fields(job_id, 'model', 'next_index', 'owner', 'length')
  local model = job.model
  local now = now_ms()
  redis.call('HINCRBY', key, 'attempt', 1)
  redis.call('HINCRBY', key, 'deliveries', 1)
  redis.call('HSET', key, 'state', 'running', 'worker', worker_id, 'take_id', take_id,
    'started_at', now, 'cleared_at', job.next_index + PROBATION_TOKENS)
  redis.call('HDEL', key, 'is_in_engine', 'crew')
  if job.owner then
    leave_order_served(model, job_id, job)
    note_started(job.owner, job_id, now)
  end
  forget_place(model, job_id)
  if redis.call('ZREM', queued_key(model), job_id) == 1 then
    for _, times in ipairs({starts_key(model), pace_key(model)}) do
      redis.call('LPUSH', times, now)
      redis.call('LTRIM', times, 0, 31)
      redis.call('PEXPIRE', times, 3600000)
    end
  end
end

-- How many workers serve a model, whether they hold jobs or wait for some.
local function num_workers_of(model)
  local number = 0
  local consumers = redis.pcall('XINFO', 'CONSUMERS', jobs_key(model), GROUP)
  for _, consumer in ipairs(not consumers.err and consumers or {}) do
    local info = {}
    for i = 1, #consumer, 2 do info[consumer[i]] = consumer[i + 1] end
    local is_alive = info.pending > 0 or redis.call('EXISTS', worker_key(info.name)) == 1
    if is_alive and info.name ~= HANDED_BACK then number = number + 1 end
  end
  return number
end

-- Adds the times of queueing of waiting jobs, from one place in their order to another, each with
-- its priority unless that is normal. Returns whether one is low.
local function add_line(words, model, from, to, leaves_out_low)
  local line = redis.call('ZRANGE', queued_key(model), from, to, 'WITHSCORES')
  local has_low = false
  for i = 1, #line, 2 do
    local priority = redis.call('HGET', job_key(line[i]), 'priority') or 'normal'
    local is_low = priority == 'low'
    if not (is_low and leaves_out_low) then
      words[#words + 1] = line[i + 1] .. (priority == 'normal' and '' or ':' .. priority)
    end
    has_low = has_low or is_low
  end
  return has_low
end

-- The queue as `QueueSnapshot.read` takes it, in words: now, the number of workers, the number of
-- arrivals, the times of the first and of the first of the last ones, and when each of the oldest
-- jobs was queued. Times are in ms. Better jobs overtake a backlog of low ones, so they are looked
-- for among the newest.
local function queue_snapshot(model)
  local arrivals = arrivals_key(model)
  local words = {now_ms(), num_workers_of(model), redis.call('LLEN', arrivals),
    redis.call('LINDEX', arrivals, -1) or now_ms(),
    redis.call('LINDEX', arrivals, LAST_ARRIVALS - 1) or now_ms()}
  local has_low = add_line(words, model, 0, MAX_LINE - 1, false)
  local number = redis.call('ZCARD', queued_key(model))
  if has_low and number > MAX_LINE then
    add_line(words, model, math.max(MAX_LINE, number - MAX_LINE), -1, true)
  end
  return table.concat(words, ' ')
end

-- Whether policy `auto` chooses a job's compression. `request` as pydantic writes it, in which a
-- text that looks like this has other quotes.
local function is_auto(request) return string.find(request, '"policy":"auto"', 1, true) end

-- What a worker needs to know of a job that it was given, and where policy `auto` is to choose for
-- it, what waits.
local function delivery(job_id)
  local reply = redis.call('HMGET', job_key(job_id), 'attempt', 'entry_id', 'request',
    'next_index', 'queued_at', 'started_at', 'first_token_at', 'is_suspect', 'sampler_version',
    'choice', 'was_set_aside', 'model')
  local model, request = table.remove(reply), reply[3]
  table.insert(reply, 1, job_id)
  reply[#reply + 1] = is_auto(request) and queue_snapshot(model) or ''
  return reply
end

-- Whether this worker, by this attempt, still holds the job.
local function is_held(job, worker_id, attempt)
  return job.state == 'running' and job.worker == worker_id and job.attempt == attempt
end
