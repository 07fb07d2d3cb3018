-- Decides who gets a place in a model's queue. A complete request holds a place from its
-- reservation until a worker has its job. A large job takes several (`num_places` in
-- app/store/owner_limits.py); a job that a worker hands back takes one.
--
-- The first max_jobs places are open to all, so a key alone may take them all. Once they are taken
-- there are as many again, in which none gets more than an equal share of what is left: an owner
-- with n places is let in while n x (owners with places) < (places left). So an owner that has
-- filled the queue takes nothing from others, one with nothing waiting gets in as long as a place
-- is left, and no more than 2 x max_jobs are ever taken. An owner alone never gets more than
-- max_jobs. The shares shrink with what is left, as thresholds of shared buffers do (Choudhury,
-- Hahne: IEEE/ACM Transactions on Networking 6(2), 1998).
--
-- A large job is let in if a small one would be; otherwise it would hardly ever get into a queue
-- that is nearly full. So each of these bounds may be exceeded by the places that the last job
-- takes beyond its first one.
--
-- Places beyond a job's first one are stored apart, because the previous release only knows first
-- places. `sweep` frees those that it does not give back.
local ALL_MORE = '' -- field of `more_places`, whose other fields are job ids

local function change_owner_places(model, owner, change)
  if tonumber(redis.call('ZADD', owner_places_key(model), 'INCR', change, owner)) <= 0 then
    redis.call('ZREM', owner_places_key(model), owner)
  end
  redis.call('PEXPIRE', owner_places_key(model), DAY_MS)
end

local function num_more_places(model)
  return tonumber(redis.call('HGET', more_places_key(model), ALL_MORE) or 0)
end

local function note_more_places(model, job_id, owner, number)
  local key = more_places_key(model)
  if number == 0 or redis.call('HSETNX', key, job_id, number .. ' ' .. owner) == 0 then return end
  redis.call('HINCRBY', key, ALL_MORE, number)
  redis.call('PEXPIRE', key, DAY_MS)
  change_owner_places(model, owner, number)
end

local function forget_more_places(model, job_id)
  local key = more_places_key(model)
  local number, owner = string.match(redis.call('HGET', key, job_id) or '', '^(%d+) (.*)$')
  if not number then return end
  redis.call('HDEL', key, job_id)
  if redis.call('HINCRBY', key, ALL_MORE, -number) <= 0 then redis.call('HDEL', key, ALL_MORE) end
  change_owner_places(model, owner, -number)
end

note_place = function(model, job_id, owner, num_places)
  if redis.call('HSETNX', place_owners_key(model), job_id, owner) == 0 then return end
  redis.call('PEXPIRE', place_owners_key(model), DAY_MS)
  change_owner_places(model, owner, 1)
  note_more_places(model, job_id, owner, num_places - 1)
end

forget_place = function(model, job_id)
  forget_more_places(model, job_id)
  local owner = redis.call('HGET', place_owners_key(model), job_id)
  if not owner then return end -- of the previous release, or forgotten already
  redis.call('HDEL', place_owners_key(model), job_id)
  change_owner_places(model, owner, -1)
end

-- Gives up a place that is held before its job is queued.
local function give_up_place(model, job_id)
  redis.call('ZREM', places_key(model), job_id)
  if not redis.call('ZSCORE', queued_key(model), job_id) then forget_place(model, job_id) end
end

local function forget_gone(model, noted)
  for _, job_id in ipairs(redis.call('HKEYS', noted)) do
    if job_id ~= ALL_MORE and not redis.call('ZSCORE', queued_key(model), job_id)
      and not redis.call('ZSCORE', places_key(model), job_id) then
      forget_place(model, job_id)
    end
  end
end

-- Forgets places whose jobs were continued by a release that does not count them: by owner, or
-- beyond the first.
local function prune_places(model) forget_gone(model, place_owners_key(model)) end
local function prune_more_places(model) forget_gone(model, more_places_key(model)) end

local function is_within_share(model, owner, num_left)
  local held = tonumber(redis.call('ZSCORE', owner_places_key(model), owner) or 0)
  local num_owners = redis.call('ZCARD', owner_places_key(model)) + (held == 0 and 1 or 0)
  return held * num_owners < num_left
end

-- Whether there is room in a model's queue for an owner: {1, 0}, or {0, retry_after_ms}:
-- retry_after_ms is the mean time between the last jobs that left the queue, 0 if none is known.
local function room(model, owner, max_jobs)
  local now = now_ms()
  local taken = redis.call('ZCOUNT', places_key(model), '(' .. now, '+inf')
    + redis.call('ZCARD', queued_key(model)) + num_more_places(model)
  if taken < max_jobs or is_within_share(model, owner, 2 * max_jobs - taken) then
    return {1, 0}
  end
  local oldest = redis.call('LINDEX', starts_key(model), -1)
  if not oldest then return {0, 0} end
  return {0, math.floor((now - oldest) / redis.call('LLEN', starts_key(model)))}
end
