-- Appends what a worker produced for a running job, and with a final state ends the job.
--
-- Sending the same again is harmless: tokens below next_index are skipped, and a job that this
-- attempt has ended says so. A gap (Redis lost the last tokens) writes nothing.
-- ARGV: prefix, job_id, worker_id, attempt, ttl_ms, final_state ('' for none), final_event,
--       first_token_at_ms ('' for unknown), sampler_version (of the tokens), then for each event:
--       first index, index behind its last token (both '' for a status), event
-- Returns {1 or 0 for refused, next_index, 1 while the job must run alone}.
local job_id, worker_id, attempt, final_state = ARGV[2], ARGV[3], ARGV[4], ARGV[6]
local key = job_key(job_id)
local job = job_fields(job_id, 'state', 'worker', 'attempt', 'next_index', 'ended_by', 'is_suspect', 'cleared_at')
local next_index = tonumber(job.next_index or 0)
if not is_held_by_living(job_id, job, worker_id, attempt) then
  local is_mine = job.ended_by == worker_id and job.attempt == attempt
  return {is_mine and 1 or 0, next_index, 0}
end
for i = 10, #ARGV, 3 do
  local first, behind = tonumber(ARGV[i]), ARGV[i + 1]
  if not first then
    append_unnumbered(job_id, ARGV[i + 2])
  elseif first > next_index then
    return {1, next_index, job.is_suspect == '1' and 1 or 0}
  elseif first == next_index then
    redis.call('XADD', events_key(job_id), behind .. '-0', 'event', ARGV[i + 2])
    next_index = tonumber(behind)
    redis.call('HSET', key, 'next_index', behind, 'sequence', 0, 'sampler_version', ARGV[9])
  end
end
local is_suspect = job.is_suspect == '1'
if is_suspect and next_index >= tonumber(job.cleared_at or 0) then
  is_suspect = false
  redis.call('HSET', key, 'is_suspect', 0)
end
if ARGV[8] ~= '' then redis.call('HSETNX', key, 'first_token_at', ARGV[8]) end
if final_state ~= '' then
  redis.call('HSET', key, 'ended_by', worker_id)
  finish(job_id, final_state, ARGV[7], ARGV[5])
end
return {1, next_index, is_suspect and 1 or 0}
