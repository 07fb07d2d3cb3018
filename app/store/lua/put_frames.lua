-- Stores a blob of frames under the byte budget and pins it for a live job.
--
-- Evicts the least recently used blobs that no live job has pinned. Evicts nothing if that would
-- not make room.
-- ARGV: prefix, digest, job_id, max_bytes, video (as caches name it), blob
-- Returns 1, or 0 when live jobs hold too much of the budget.
local digest, job_id, max_bytes, video, blob = ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5], ARGV[6]

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
  for _, other in ipairs(victims) do drop_frames(other) end
  redis.call('SET', frames_key(digest), blob)
  redis.call('HSET', frame_sizes_key(), digest, #blob)
  redis.call('SET', frame_bytes_key(), total)
  redis.call('HSET', frame_videos_key(), digest, video)
  redis.call('SADD', video_frames_key(video), digest)
end
redis.call('ZADD', frame_uses_key(), now_ms(), digest)
pin_frames(digest, job_id)
-- A job that ended while its frames were read leaves none of a video that was deleted meanwhile.
if redis.call('ZSCORE', forgotten_key(), video) then forget_video(video) end
return 1
