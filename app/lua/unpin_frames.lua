-- Takes a job's pin off a blob before the job's end.
--
-- ARGV: prefix, digest, job_id
-- Returns 1 if it was pinned, else 0.
redis.call('HDEL', job_key(ARGV[3]), 'frames_digest')
return redis.call('SREM', frame_pins_key(ARGV[2]), ARGV[3])
