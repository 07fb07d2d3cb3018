-- Creates a job in state `reading` on a reserved place.
--
-- ARGV: prefix, model, job_id, request, job_event, accepted_at_ms, deadline_ms,
--       idempotency_hash ('' for none), fingerprint, idempotency_ttl_ms, owner,
--       video (as caches name it, '' for none), frames digest ('' for none), what its blob is
--       expected to say of the frames ('' for nothing), the request with such frames, bytes to
--       reserve for the frames (0 for none), byte budget of all frames, limits of the owner, what
--       the job takes of them (see `limits`), its length and priority (see `order`),
--       ms left until the deadline that the client has set ('' for none)
-- Returns {outcome, job_id, found, states}: `created`; `queued` where the frames are stored and are
-- as expected; `existing` with the job that answers for the same key and fingerprint, whereupon the
-- place is given up; `conflict` for another fingerprint; `no_place`; `limited` where the owner has
-- reached a limit; `too_late`, with `found` the ms by which it would miss its deadline (0: it has
-- passed); `no_room` where live jobs, or the owner's, hold too much of the frames' budget, and
-- nothing is reserved.
-- Else `found` is what a stored blob says of the frames, which are then pinned, or ''. `states` is
-- what the owner has left of its limits, see `limit_states`; {} where that was not asked.
--
-- A job that was cancelled, or that ended in an error worth another try, answers for its key no
-- longer: the retry that the key is for gets a job of its own. One that a retry has found is
-- adopted: it does not end with the connection that posted it.
local function stands_for_its_key(job_id)
  local state = redis.call('HGET', job_key(job_id), 'state')
  if not state or state == 'cancelled' then return false end
  if state ~= 'error' then return true end
  local last = redis.call('XREVRANGE', events_key(job_id), '+', '-', 'COUNT', 1)
  return not (last[1] and cjson.decode(last[1][2][2]).retryable)
end

local model, job_id, hash = ARGV[2], ARGV[3], ARGV[8]
local digest, frame_bytes = ARGV[13], tonumber(ARGV[16])
local state = redis.call('HGET', job_key(job_id), 'state')
if state then return {state == 'reading' and 'created' or 'queued', job_id, '', {}} end -- a retry
if hash ~= '' then
  local earlier = redis.call('HMGET', idempotency_key(hash), 'fingerprint', 'job_id')
  if earlier[2] and stands_for_its_key(earlier[2]) then
    give_up_place(model, job_id)
    if earlier[1] ~= ARGV[9] then return {'conflict', earlier[2], '', {}} end
    redis.call('HSET', job_key(earlier[2]), 'is_adopted', 1)
    return {'existing', earlier[2], '', {}}
  end
end
if not redis.call('ZSCORE', places_key(model), job_id) then return {'no_place', job_id, '', {}} end
local owner, limits, taken = ARGV[11], ARGV[18], ARGV[19]
if limits ~= '' then
  local prompt, max_tokens, frames = string.match(taken, '^(%d+) (%d+) (%d+)$')
  local states = limit_states(owner, limits, prompt + max_tokens, tonumber(frames))
  if is_refused(states) then return {'limited', job_id, '', states} end
end
if ARGV[22] ~= '' then
  local job = {owner = owner, length = ARGV[20], priority = ARGV[21]}
  local late_by = late_by_ms(model, job, tonumber(ARGV[22]))
  if late_by then return {'too_late', job_id, late_by, {}} end
end
local is_to_read = digest ~= '' and redis.call('EXISTS', frames_key(digest)) == 0
if digest ~= '' then
  local num_bytes = math.max(frames_share(digest), is_to_read and frame_bytes or 0)
  if not may_hold_frames(owner, digest, num_bytes, tonumber(ARGV[17])) then
    return {'no_room', job_id, '', {}}
  end
end
if is_to_read and frames_share(digest) < frame_bytes
  and not resize_frames(digest, frame_bytes, tonumber(ARGV[17]), ARGV[12]) then
  return {'no_room', job_id, '', {}}
end
if hash ~= '' then
  redis.call('HSET', idempotency_key(hash), 'fingerprint', ARGV[9], 'job_id', job_id)
  redis.call('PEXPIRE', idempotency_key(hash), ARGV[10])
end
redis.call('HSET', job_key(job_id), 'state', 'reading', 'model', model, 'request', ARGV[4],
  'accepted_at', ARGV[6], 'attempt', 0, 'deliveries', 0, 'next_index', 0, 'sequence', 0,
  'owner', owner, 'video', ARGV[12], 'length', ARGV[20], 'priority', ARGV[21])
redis.call('ZADD', live_key(), ARGV[7], job_id)
append_unnumbered(job_id, ARGV[5])
local states = charge_owner(owner, job_id, limits, taken)
if is_to_read and frame_bytes > 0 then pin_frames(digest, job_id) end
local found = digest ~= '' and find_frames(digest, job_id) or ''
if found == '' or found ~= ARGV[14] then return {'created', job_id, found, states} end
enqueue(model, job_id, ARGV[15])
return {'queued', job_id, found, states}
