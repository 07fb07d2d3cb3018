-- Whether a job would come too late for its deadline, by how fast jobs leave the queue just now.
--
-- That is known while jobs wait all the time: `pace` holds the times at which they left since. It is
-- believed to be too slow by a factor, for workers may be added and the next jobs may be smaller:
-- a request is refused when it is sure to be late, and none because a guess was wrong.
local MIN_PACE = 8 -- jobs that must have left the queue
local MARGIN = 2 -- how much faster they may leave from now on

-- By how many ms the turn of a job that joined the line now would come after its deadline; nil where
-- it may be in time.
--
-- job: as `join_order` takes it
-- left_ms: until its deadline
local function late_by_ms(model, job, left_ms)
  if left_ms <= 0 then return 0 end
  local num_times = redis.call('LLEN', pace_key(model))
  if num_times < MIN_PACE then return nil end
  local first = redis.call('LINDEX', pace_key(model), -1)
  local last = redis.call('LINDEX', pace_key(model), 0)
  local wait_ms = num_before(model, job) * (last - first) / (num_times - 1) / MARGIN
  return wait_ms >= left_ms and math.ceil(wait_ms - left_ms) or nil
end
