-- Push a task again whose lease is over: its worker is lost, it is due, or it was popped and never claimed.
-- A task that was only suspected, and stands in the list after all, is left there and not suspected for a while.
-- KEYS  queue, record, leases, unfinished
-- ARGV  id, id as JSON, how many of the list's next elements to look at, how long not to suspect again (ms)
-- Returns 1 (pushed) or 0 (nothing to do).
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease = redis.call('ZSCORE', KEYS[3], ARGV[1])
if not lease or tonumber(lease) > now then
  return 0
end
local record = redis.call('HMGET', KEYS[2], 'status', 'data', 'worker')
local status = record[1]
if not status or status == 'completed' or status == 'failed' or status == 'cancelled' then
  redis.call('ZREM', KEYS[3], ARGV[1])
  redis.call('ZREM', KEYS[4], ARGV[1])
  return 0
end
local element = '{"id": ' .. ARGV[2] .. ', "data": ' .. record[2] .. '}'
if status == 'waiting' and redis.call('LPOS', KEYS[1], element, 'RANK', -1, 'MAXLEN', ARGV[3]) then
  redis.call('ZADD', KEYS[3], now + ARGV[4], ARGV[1])
  return 0
end
if status == 'running' then
  redis.call('HINCRBY', KEYS[2], 'losses', 1)
  redis.call('HSET', KEYS[2], 'lost', record[3] or '')
end
redis.call('HSET', KEYS[2], 'status', 'waiting')
redis.call('HDEL', KEYS[2], 'token')
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('RPUSH', KEYS[1], element)
return 1
