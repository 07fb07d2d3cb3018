-- Stores a blob of frames under the byte budget and pins it for a live job.
--
-- Evicts the least recently used blobs that no live job has pinned. Evicts nothing if that would
-- not make room.
-- ARGV: prefix, digest, job_id, max_bytes, blob
-- Returns 1, or 0 when live jobs hold too much of the budget.
local digest, job_id, max_bytes, blob = ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]

-- A pin counts while its job is live: a process that died before its job's end leaks none.
local function is_pinned(other)
  for _, owner in ipairs(redis.call('SMEMBERS', frame_pins_key(other))) do
    if redis.call('ZSCORE', live_key(), owner) then return true end
    redis.call('SREM', frame_pins_key(other), owner)
  end
  return false
end

local function evict(other)
  redis.call('DEL', frames_key(other), frame_pins_key(other))
  redis.call('HDEL', frame_sizes_key(), other)
  redis.call('ZREM', frame_uses_key(), other)
end

if redis.call('EXISTS', frames_key(digest)) == 0 then
  local stale_bytes = tonumber(redis.call('HGET', frame_sizes_key(), digest) or 0)
  local total = tonumber(redis.call('GET', frame_bytes_key()) or 0) - stale_bytes + #blob
  local victims = {}
  if total > max_bytes then
    for _, other in ipairs(redis.call('ZRANGE', frame_uses_key(), 0, -1)) do
      if other ~= digest and not is_pinned(other) then
        victims[#victims + 1] = other
        total = total - (redis.call('HGET', frame_sizes_key(), other) or 0)
        if total <= max_bytes then break end
      end
    end
  end
  if total > max_bytes then return 0 end
  for _, other in ipairs(victims) do evict(other) end
  redis.call('SET', frames_key(digest), blob)
  redis.call('HSET', frame_sizes_key(), digest, #blob)
  redis.call('SET', frame_bytes_key(), total)
end
redis.call('ZADD', frame_uses_key(), now_ms(), digest)
pin_frames(digest, job_id)
return 1
