-- Pins a blob of frames for a live job, so that it is not evicted before the job's end. Reserves
-- its bytes if it is not stored yet.
--
-- ARGV: prefix, digest, job_id, num_bytes to reserve (0 for none), max_bytes, video (as caches name
--       it)
-- Returns the blob's header, '' if it is not stored, or 0 if live jobs hold too much of the budget.
-- A job that is not live pins and reserves nothing.
local digest, job_id, num_bytes = ARGV[2], ARGV[3], tonumber(ARGV[4])
local found = find_frames(digest, job_id)
if found ~= '' or num_bytes == 0 then return found end
if not redis.call('ZSCORE', live_key(), job_id) then return found end
if frames_share(digest) < num_bytes
  and not resize_frames(digest, num_bytes, tonumber(ARGV[5]), ARGV[6]) then
  return 0
end
pin_frames(digest, job_id)
return ''
