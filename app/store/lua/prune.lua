-- Forgets jobs that are still counted as their owner's although they have ended, or have left the
-- queue: under a release that does not keep that count.
--
-- ARGV: prefix, then owners
for i = 2, #ARGV do prune_owner_jobs(ARGV[i]) end
for _, model in ipairs(redis.call('SMEMBERS', models_key())) do prune_places(model) end
