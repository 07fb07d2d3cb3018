-- Renews the lease on a place, while its job is reserved or reading.
--
-- ARGV: prefix, model, job_id, lease_ms
-- Returns 1, or 0 when the place is lost or the job has gone on or ended.
local model, job_id = ARGV[2], ARGV[3]
if not redis.call('ZSCORE', places_key(model), job_id) then return 0 end
redis.call('ZADD', places_key(model), now_ms() + ARGV[4], job_id)
return 1
