-- Request a task's cancellation. If the task runs, its worker ends it. Otherwise the caller claims the task and ends it.
-- KEYS  record, leases
-- ARGV  id, reason, channel on which workers listen
-- Returns the task's status, or nil if it has no record.
local status = redis.call('HGET', KEYS[1], 'status')
if status == 'running' then
  redis.call('HSETNX', KEYS[1], 'cancel', ARGV[2])
  redis.call('PUBLISH', ARGV[3], ARGV[1])
elseif status and status ~= 'completed' and status ~= 'failed' and status ~= 'cancelled' then
  redis.call('HSETNX', KEYS[1], 'cancel', ARGV[2])
  redis.call('ZADD', KEYS[2], 'XX', 0, ARGV[1]) -- it need not wait until it is due
end
return status
