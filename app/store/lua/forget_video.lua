-- Deletes what is cached of a deleted video, at once or when the live jobs that need it end.
--
-- ARGV: prefix, video (as caches name it)
local now = now_ms()
redis.call('ZREMRANGEBYSCORE', forgotten_key(), '-inf', now - DAY_MS)
redis.call('ZADD', forgotten_key(), now, ARGV[2])
redis.call('PEXPIRE', forgotten_key(), DAY_MS)
forget_video(ARGV[2])
return 1
