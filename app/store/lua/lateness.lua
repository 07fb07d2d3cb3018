-- Whether a job would come too late for its deadline, by how fast jobs leave the queue just now.
--
-- That is known while jobs wait all the time: `pace` holds the times at which they left since. We
-- assume that it could be MARGIN times faster (workers may join, jobs may be smaller), so only
-- requests that are clearly late are refused.
local MIN_PACE = 8 -- jobs that must have left the queue
local MARGIN = 2 -- how much faster they may leave from now on

-- From one job's leaving to the next one's: the mean or the median, whichever is less, so that an
-- outage is forgotten at once. nil while it is not known.
local function usual_gap_ms(times)
  if #times < MIN_PACE then return nil end
  local gaps = {}
  for i = 1, #times - 1 do gaps[i] = times[i] - times[i + 1] end
  table.sort(gaps)
  return math.min((times[1] - times[#times]) / #gaps, gaps[math.ceil(#gaps / 2)])
end

-- By how many ms the turn of a job that joined the line now would come after its deadline; nil
-- where it may be in time.
--
-- job: as `join_order` takes it
-- left_ms: until its deadline
local function late_by_ms(model, job, left_ms)
  if left_ms <= 0 then return 0 end
  local gap_ms = usual_gap_ms(redis.call('LRANGE', pace_key(model), 0, -1))
  if not gap_ms then return nil end
  local wait_ms = num_before(model, job) * gap_ms / MARGIN
  return wait_ms >= left_ms and math.ceil(wait_ms - left_ms) or nil
end
