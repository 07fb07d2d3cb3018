-- Who gets a place in a model's queue: a complete request holds one from its reservation until a
-- worker has its job.
--
-- The first max_jobs places are anybody's, so a key alone may take them all. Once they are taken
-- there are as many again, in which nobody gets more than an equal share of what is left: an owner
-- with n places is let in while n x (owners with places) < (places left). So whoever has filled the
-- queue takes nothing from the others, whoever has nothing waiting gets in as long as one place is
-- left, and no more than 2 x max_jobs are ever let in. An owner alone never gets more than
-- max_jobs. The shares shrink with what is left, as thresholds of shared buffers do (Choudhury,
-- Hahne: IEEE/ACM Transactions on Networking 6(2), 1998).

note_place = function(model, job_id, owner)
  if redis.call('HSETNX', place_owners_key(model), job_id, owner) == 0 then return end
  redis.call('ZADD', owner_places_key(model), 'INCR', 1, owner)
  redis.call('PEXPIRE', place_owners_key(model), DAY_MS)
  redis.call('PEXPIRE', owner_places_key(model), DAY_MS)
end

forget_place = function(model, job_id)
  local owner = redis.call('HGET', place_owners_key(model), job_id)
  if not owner then return end -- of the previous release, or forgotten already
  redis.call('HDEL', place_owners_key(model), job_id)
  if tonumber(redis.call('ZADD', owner_places_key(model), 'INCR', -1, owner)) <= 0 then
    redis.call('ZREM', owner_places_key(model), owner)
  end
end

-- Gives up a place that is held before its job is queued.
local function give_up_place(model, job_id)
  redis.call('ZREM', places_key(model), job_id)
  if not redis.call('ZSCORE', queued_key(model), job_id) then forget_place(model, job_id) end
end

-- Forgets places whose jobs went on under the previous release, which does not count by owner.
local function prune_places(model)
  local noted = redis.call('HGETALL', place_owners_key(model))
  for i = 1, #noted, 2 do
    local job_id = noted[i]
    if not redis.call('ZSCORE', queued_key(model), job_id)
      and not redis.call('ZSCORE', places_key(model), job_id) then
      forget_place(model, job_id)
    end
  end
end

local function is_within_share(model, owner, num_left)
  local held = tonumber(redis.call('ZSCORE', owner_places_key(model), owner) or 0)
  local num_owners = redis.call('ZCARD', owner_places_key(model)) + (held == 0 and 1 or 0)
  return held * num_owners < num_left
end

-- Whether there is room in a model's queue for an owner: {1, 0}, or {0, retry_after_ms}:
-- retry_after_ms is the mean time between the last jobs that left the queue, 0 if none is known.
local function room(model, owner, max_jobs)
  local now = now_ms()
  local places = redis.call('ZCOUNT', places_key(model), '(' .. now, '+inf')
  local waiting = places + redis.call('ZCARD', queued_key(model))
  if waiting < max_jobs or is_within_share(model, owner, 2 * max_jobs - waiting) then
    return {1, 0}
  end
  local oldest = redis.call('LINDEX', starts_key(model), -1)
  if not oldest then return {0, 0} end
  return {0, math.floor((now - oldest) / redis.call('LLEN', starts_key(model)))}
end
