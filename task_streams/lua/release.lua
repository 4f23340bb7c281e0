-- Hand a task back: its lease ends now, and it is the next to be popped. It does not count as a failure.
-- KEYS  queue, record, leases
-- ARGV  id, token, id as JSON
-- Returns 1, or 0 where the lease is lost.
local record = redis.call('HMGET', KEYS[2], 'status', 'token', 'data')
if record[1] ~= 'running' or record[2] ~= ARGV[2] then
  return 0
end
redis.call('HDEL', KEYS[2], 'token', 'lost')
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('HSET', KEYS[2], 'status', 'waiting')
redis.call('RPUSH', KEYS[1], '{"id": ' .. ARGV[3] .. ', "data": ' .. record[3] .. '}')
return 1
