-- Reserves a place in a model's queue, for a request that is all there.
--
-- ARGV: prefix, model, job_id, max_jobs, lease_ms
-- Returns {1, 0} or {0, retry_after_ms}, see `reserve`.
return reserve(ARGV[2], ARGV[3], ARGV[4], ARGV[5])
