-- Count a failure and let the task rest: its lease now ends when the next attempt is due.
-- KEYS  record, leases
-- ARGV  id, token, delay (ms)
-- Returns 1, or 0 where the lease is lost. Calling it again changes nothing.
local record = redis.call('HMGET', KEYS[1], 'status', 'token')
if record[2] ~= ARGV[2] then
  return 0
end
if record[1] == 'running' then
  local time = redis.call('TIME')
  redis.call('HDEL', KEYS[1], 'lost')
  redis.call('HINCRBY', KEYS[1], 'failures', 1)
  redis.call('HSET', KEYS[1], 'status', 'retrying')
  redis.call('ZADD', KEYS[2], time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[3], ARGV[1])
end
return 1
