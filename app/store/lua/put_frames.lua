-- Stores a blob of frames, which lies under the job's `frame_upload`, within its share of the byte
-- budget, and pins it for a live job.
--
-- Needs more than its share where the frames were not reserved, or under another digest.
-- ARGV: prefix, digest, job_id, max_bytes, video (as caches name it)
-- Returns 1, 0 when live jobs hold too much of the budget, -1 when the blob is not there any more.
local digest, job_id, max_bytes, video = ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local upload = frame_upload_key(job_id)

pin_frames(digest, job_id) -- and gives back what was reserved under another digest
if redis.call('EXISTS', frames_key(digest)) == 0 then
  local num_bytes = redis.call('STRLEN', upload)
  if num_bytes == 0 then return -1 end
  if not resize_frames(digest, num_bytes, max_bytes, video) then
    redis.call('UNLINK', upload)
    return 0
  end
  redis.call('RENAME', upload, frames_key(digest))
  redis.call('PERSIST', frames_key(digest))
else
  redis.call('UNLINK', upload)
end
redis.call('ZADD', frame_uses_key(), now_ms(), digest)
-- A job that ended while its frames were read leaves none of a video that was deleted meanwhile.
if redis.call('ZSCORE', forgotten_key(), video) then forget_video(video) end
return 1
