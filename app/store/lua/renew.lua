-- Renews a worker's leases on its running jobs.
--
-- ARGV: prefix, model, worker_id, then for each job: job_id, attempt, entry_id
-- Returns for each job 1, or 0 when it has ended or is another attempt's.
local model, worker_id = ARGV[2], ARGV[3]

local function renew(job_id, attempt, entry_id)
  local job = job_fields(job_id, 'state', 'worker', 'attempt')
  if not is_held_by_living(job_id, job, worker_id, attempt) then return 0 end
  return #redis.call('XCLAIM', jobs_key(model), GROUP, worker_id, 0, entry_id, 'JUSTID')
end

local replies = {}
for i = 4, #ARGV, 3 do replies[#replies + 1] = renew(ARGV[i], ARGV[i + 1], ARGV[i + 2]) end
return replies
