-- Takes over the reading of a job whose API has let its place run out.
--
-- ARGV: prefix, model, job_id, lease_ms, max_adoptions, fault, ttl_ms
-- Returns {request, the reader's number}; {} when there is nothing to take over, or this ended the
-- job, whose readers were lost too often.
local model, job_id = ARGV[2], ARGV[3]
local now = now_ms()
local lease_end = redis.call('ZSCORE', places_key(model), job_id)
if not lease_end or tonumber(lease_end) > now then return {} end
local job = job_fields(job_id, 'state', 'request')
if job.state ~= 'reading' then
  give_up_place(model, job_id)
  return {}
end
local reader = redis.call('HINCRBY', job_key(job_id), 'num_readers', 1)
if reader > tonumber(ARGV[5]) then
  finish_and_tell(job_id, 'error', error_event(job_id, ARGV[6]), ARGV[7])
  return {}
end
redis.call('ZADD', places_key(model), now + ARGV[4], job_id)
return {job.request, reader}
