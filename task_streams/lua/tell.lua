-- Put a message into the inbox of a task that has not ended. It stays there: the task's stream says how many were read.
-- KEYS  record
-- ARGV  message as JSON, how many a task may get in its life
-- Returns 'told' (also if the reply of a first try was lost), 'full', the status of a task that has ended, or nil if the
--         task has no record.
local r = redis.call('HMGET', KEYS[1], 'status', 'told')
local status, told = r[1], tonumber(r[2] or 0)
if not status or status == 'completed' or status == 'failed' or status == 'cancelled' then
  return status
elseif redis.call('HGET', KEYS[1], 'told:' .. told) == ARGV[1] then
  return 'told'
elseif told >= tonumber(ARGV[2]) then
  return 'full'
end
redis.call('HSET', KEYS[1], 'told', told + 1, 'told:' .. (told + 1), ARGV[1])
return 'told'
