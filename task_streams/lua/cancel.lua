-- Ask for a task's cancellation; whoever works on it, or claims it next, carries it out.
-- A task that rests until its retry is due is pushed again at once, so that a worker can end it.
-- KEYS  record, leases
-- ARGV  id, reason
-- Returns the task's status, or nil where it has no record.
local status = redis.call('HGET', KEYS[1], 'status')
if status == 'waiting' or status == 'running' or status == 'retrying' then
  redis.call('HSETNX', KEYS[1], 'cancel', ARGV[2])
end
if status == 'retrying' then
  redis.call('ZADD', KEYS[2], 'XX', 0, ARGV[1])
end
return status
