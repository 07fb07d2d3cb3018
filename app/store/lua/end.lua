-- Any live state -> a final one, by anyone but the job's worker: cancel, deadline, reader's error.
--
-- ARGV: prefix, job_id, state, event, ttl_ms, unless_adopted (1, or anything else for no),
--       reader (the number of one whose reading failed; or '' for none)
-- Returns 1, 0 if the job had ended already, is spared as adopted, or has another reader by now, -1
-- if there is no such job.
local job_id = ARGV[2]
local job = job_fields(job_id, 'state', 'is_adopted', 'num_readers')
if not job.state then return -1 end
if FINAL[job.state] or ARGV[6] == '1' and job.is_adopted then return 0 end
local reader = tonumber(ARGV[7] or '')
if reader and (job.state ~= 'reading' or reader ~= tonumber(job.num_readers or 0)) then return 0 end
finish_and_tell(job_id, ARGV[3], ARGV[4], ARGV[5])
return 1
