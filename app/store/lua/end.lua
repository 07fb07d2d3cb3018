-- Any live state -> a final one, by anyone but the job's worker: cancel, deadline, reader's error.
--
-- ARGV: prefix, job_id, state, event, ttl_ms, unless_adopted (1, or anything else for no)
-- Returns 1, 0 if the job had ended already or is spared as adopted, -1 if there is no such job.
local job_id = ARGV[2]
local job = job_fields(job_id, 'state', 'is_adopted')
if not job.state then return -1 end
if FINAL[job.state] or ARGV[6] == '1' and job.is_adopted then return 0 end
finish_and_tell(job_id, ARGV[3], ARGV[4], ARGV[5])
return 1
