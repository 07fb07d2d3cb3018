-- Blobs of frames: which live jobs have pinned them, how much of the byte budget they take, and
-- which are evicted when it is exceeded.
--
-- The live jobs of a single key may hold COMMON_SHARE of the budget, or one job's frames if these
-- are larger. The rest is for other keys, and is shared like places in the queue (`places`). So no
-- key's jobs keep another key from its frames. Without keys everyone is one owner, who may hold all
-- of it.
local FRAMES_LENGTH_BYTES = 4 -- app/store/frame_store.py
local MAX_FORGETTINGS = 10000 -- deleted videos that a worker may have missed
local COMMON_SHARE = 3 / 4
local ANONYMOUS = 'anonymous' -- app/keys/entries.py

-- A pin counts while its job is live, so a process that dies before its job's end leaks none.
local function is_pinned(digest)
  for _, job_id in ipairs(redis.call('SMEMBERS', frame_pins_key(digest))) do
    if redis.call('ZSCORE', live_key(), job_id) then return true end
    redis.call('SREM', frame_pins_key(digest), job_id)
  end
  return false
end

-- Removes a blob and all records of it. The caller subtracts its bytes from the sum.
local function drop_frames(digest)
  local video = redis.call('HGET', frame_videos_key(), digest)
  if video then redis.call('SREM', video_frames_key(video), digest) end
  redis.call('HDEL', frame_videos_key(), digest)
  redis.call('DEL', frames_key(digest), frame_pins_key(digest))
  redis.call('HDEL', frame_sizes_key(), digest)
  redis.call('ZREM', frame_uses_key(), digest)
end

-- The bytes that a blob takes of the budget, or that are reserved for one that is being read.
local function frames_share(digest)
  return tonumber(redis.call('HGET', frame_sizes_key(), digest) or 0)
end

-- What live jobs hold of the budget, by owner and in all; which owners hold this blob. What jobs of
-- several owners hold counts for each of them, and once in all.
local function held_by_owner(digest)
  local held, total, has_counted, holders = {}, 0, {}, {}
  for _, job_id in ipairs(redis.call('ZRANGE', live_key(), 0, -1)) do
    local job = job_fields(job_id, 'owner', 'frames_digest')
    local owner, of_job = job.owner or ANONYMOUS, job.frames_digest
    if of_job and not has_counted[of_job .. owner] then
      local share = frames_share(of_job)
      held[owner] = (held[owner] or 0) + share
      if not has_counted[of_job] then total = total + share end
      has_counted[of_job], has_counted[of_job .. owner] = true, true
      if of_job == digest then holders[owner] = true end
    end
  end
  return held, total, holders
end

-- Whether an owner's live jobs may hold this blob too. Looks at live jobs, however many blobs are
-- stored.
-- num_bytes: that it takes, stored or to be read
local function may_hold_frames(owner, digest, num_bytes, max_bytes)
  if owner == ANONYMOUS then return true end
  local held, total, holders = held_by_owner(digest)
  local own = held[owner] or 0
  if own == 0 or holders[owner] then return true end
  local more = next(holders) and 0 or num_bytes
  if total + more <= COMMON_SHARE * max_bytes then return true end
  local num_owners = 0
  for _ in pairs(held) do num_owners = num_owners + 1 end
  return (own + num_bytes) * num_owners <= max_bytes - total
end

-- Sets a blob's share of the budget, before its frames are read or when they are stored. Where it
-- grows, blobs that no live job has pinned go for it, least recently used first. Returns false, and
-- changes nothing, when live jobs hold too much of the budget.
local function resize_frames(digest, num_bytes, max_bytes, video)
  local share = frames_share(digest)
  local total = tonumber(redis.call('GET', frame_bytes_key()) or 0) - share + num_bytes
  local victims = {}
  if num_bytes > share and total > max_bytes then
    for _, other in ipairs(redis.call('ZRANGE', frame_uses_key(), 0, -1)) do
      if other ~= digest and not is_pinned(other) then
        victims[#victims + 1] = other
        total = total - frames_share(other)
        if total <= max_bytes then break end
      end
    end
    if total > max_bytes then return false end
  end
  for _, other in ipairs(victims) do drop_frames(other) end
  redis.call('HSET', frame_sizes_key(), digest, num_bytes)
  redis.call('SET', frame_bytes_key(), total)
  redis.call('ZADD', frame_uses_key(), now_ms(), digest)
  redis.call('HSET', frame_videos_key(), digest, video)
  redis.call('SADD', video_frames_key(video), digest)
  return true
end

-- Releases a job's hold on a blob: its reservation is freed, unless the blob is stored or somebody
-- else waits for it.
unpin_frames = function(digest, job_id)
  redis.call('SREM', frame_pins_key(digest), job_id)
  if redis.call('EXISTS', frames_key(digest)) == 0 and not is_pinned(digest) then
    redis.call('DECRBY', frame_bytes_key(), frames_share(digest))
    drop_frames(digest)
  end
end

-- Drops the frames of a video that no live job needs, and asks workers to forget it too.
forget_video = function(video)
  for _, digest in ipairs(redis.call('SMEMBERS', video_frames_key(video))) do
    if not is_pinned(digest) then
      redis.call('DECRBY', frame_bytes_key(), frames_share(digest))
      drop_frames(digest)
    end
  end
  redis.call('XADD', forgettings_key(), 'MAXLEN', '~', MAX_FORGETTINGS, '*', 'video', video)
  redis.call('PEXPIRE', forgettings_key(), DAY_MS)
end

-- Notes that a live job needs this blob, stored or reserved, until its end, and no longer any that
-- it needed before.
local function pin_frames(digest, job_id)
  if not redis.call('ZSCORE', live_key(), job_id) then return end
  local before = redis.call('HGET', job_key(job_id), 'frames_digest')
  if before and before ~= digest then unpin_frames(before, job_id) end
  redis.call('SADD', frame_pins_key(digest), job_id)
  redis.call('HSET', job_key(job_id), 'frames_digest', digest)
end

-- Pins a blob of frames that is stored, for a live job, and returns what it says of them before
-- their pixels (FRAMES_LENGTH_BYTES of length, then so many of header); '' if it is not stored.
local function find_frames(digest, job_id)
  local length = redis.call('GETRANGE', frames_key(digest), 0, FRAMES_LENGTH_BYTES - 1)
  if length == '' then return '' end
  local header_bytes = 0
  for i = 1, #length do header_bytes = header_bytes * 256 + string.byte(length, i) end
  redis.call('ZADD', frame_uses_key(), now_ms(), digest)
  pin_frames(digest, job_id)
  return redis.call('GETRANGE', frames_key(digest), FRAMES_LENGTH_BYTES,
    FRAMES_LENGTH_BYTES + header_bytes - 1)
end
