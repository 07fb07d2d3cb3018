-- Gives up a place whose job was never created. One whose job was, after all, by a post that has
-- gone since, is for any API to adopt.
--
-- ARGV: prefix, model, job_id
if redis.call('EXISTS', job_key(ARGV[3])) == 0 then
  give_up_place(ARGV[2], ARGV[3])
else
  redis.call('ZADD', places_key(ARGV[2]), 'XX', now_ms(), ARGV[3])
end
