-- Appends what a worker produced for its running jobs, and ends those that come with a final state.
--
-- Each job is fenced on its own, and an error of one job does not affect the others. Sending the
-- same again is harmless: tokens below next_index are skipped, and a job that this attempt has
-- already ended is reported as such. After a gap (Redis lost the last tokens) nothing is written.
-- ARGV: prefix, worker_id, ttl_ms, sampler_version (of the tokens), lines. For each job:
--           job_id attempt final_state first_token_at_ms num_events
--           final_event
--       and for each event
--           first_index index_behind_its_last_token event
--       Unknown values are empty, and so are both indexes of a status. JSON has no line breaks.
-- Publishes a line for each event that it appended, for readers that have all events before it:
--     job_id first_index index_behind_its_last_token event
-- For a status, the ids of the event before it and of itself take the place of the indexes. If a
-- job appends more than MAX_TOLD events, or sends some again, only its job_id is published.
-- Returns for each job next_index, or {1 or 0 for refused, next_index, 1 while the job must run
-- alone} where that is not {1, next_index, 0}, or {the error's text}.
local worker_id, ttl_ms, sampler_version, lines = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local MAX_TOLD = 8
local news = {}
local read_to = 0

local function next_line()
  local from = read_to + 1
  read_to = string.find(lines, '\n', from, true)
  return string.sub(lines, from, read_to - 1)
end

local function append_event(job, key, job_id, line)
  local first, behind, at = string.match(line, '^(%d*) (%d*) ()')
  local event = string.sub(line, at)
  first = tonumber(first)
  if not first then
    local before, id = append_unnumbered(job_id, event)
    job.is_plain = false
    job.news[#job.news + 1] = table.concat({job_id, before, id, event}, ' ')
  elseif first > job.next_index then
    return false
  elseif first == job.next_index then
    redis.call('XADD', events_key(job_id), behind .. '-0', 'event', event)
    job.next_index = tonumber(behind)
    job.news[#job.news + 1] = job_id .. ' ' .. line
    if job.is_plain then
      redis.call('HSET', key, 'next_index', behind)
    else
      redis.call('HSET', key, 'next_index', behind, 'sequence', 0,
        'sampler_version', sampler_version)
      job.is_plain = true
    end
  end
  return true
end

local function reply_of(is_accepted, job)
  if is_accepted and not job.is_suspect then return job.next_index end
  return {is_accepted and 1 or 0, job.next_index, job.is_suspect and 1 or 0}
end

local function refused(job, key, held_attempt, attempt)
  local is_mine = held_attempt == attempt and redis.call('HGET', key, 'ended_by') == worker_id
  job.is_suspect = false
  return reply_of(is_mine, job)
end

local function tell(job_id, job, num_sent)
  if num_sent > MAX_TOLD or #job.news < num_sent then job.news = {job_id} end
  for _, line in ipairs(job.news) do news[#news + 1] = line end
end

local function append(head, final_event, events)
  local job_id, attempt, final_state, first_token_at = head[1], head[2], head[3], head[4]
  local key = job_key(job_id)
  local fields = redis.call('HMGET', key, 'state', 'worker', 'attempt', 'next_index', 'is_suspect',
    'sequence', 'sampler_version', 'crew', 'lost:' .. attempt)
  if fields[8] or fields[9] then acquit(job_id, attempt) end
  local job = {
    next_index = tonumber(fields[4] or 0),
    is_suspect = fields[5] == '1',
    is_plain = fields[6] == '0' and fields[7] == sampler_version, -- only next_index will change
    news = {},
  }
  if fields[1] ~= 'running' or fields[2] ~= worker_id or fields[3] ~= attempt then
    return refused(job, key, fields[3], attempt)
  end
  local before = job.next_index
  for i = 1, #events do
    if not append_event(job, key, job_id, events[i]) then return reply_of(true, job) end
  end
  if job.is_suspect and job.next_index >= tonumber(redis.call('HGET', key, 'cleared_at') or 0) then
    job.is_suspect = false
    redis.call('HSET', key, 'is_suspect', 0)
  end
  if before == 0 and first_token_at ~= '' then
    redis.call('HSETNX', key, 'first_token_at', first_token_at)
  end
  if final_state ~= '' then
    redis.call('HSET', key, 'ended_by', worker_id)
    finish(job_id, final_state, final_event, ttl_ms)
    job.news[#job.news + 1] =
      string.format('%s %d %d %s', job_id, job.next_index, job.next_index + 1, final_event)
  end
  tell(job_id, job, #events + (final_state == '' and 0 or 1))
  return reply_of(true, job)
end

local replies = {}
while read_to < #lines do
  local head = {string.match(next_line(), '^(%S+) (%d+) (%a*) (%d*) (%d+)$')}
  local final_event, events = next_line(), {}
  for i = 1, tonumber(head[5]) do events[i] = next_line() end
  local is_done, reply = pcall(append, head, final_event, events)
  if not is_done then reply = {type(reply) == 'table' and reply.err or tostring(reply)} end
  replies[#replies + 1] = reply
end
if #news > 0 then redis.call('PUBLISH', news_channel(), table.concat(news, '\n')) end
return replies
