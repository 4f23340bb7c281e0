-- Put a task once: its record, its place in the ledger, its element in the list.
-- KEYS  queue, record, unfinished, recent
-- ARGV  id, id as JSON, data as JSON, how many ids `recent` keeps
-- Returns 1, or 0 where a task of that id exists (then nothing changes).
if redis.call('HSETNX', KEYS[2], 'data', ARGV[3]) == 0 then
  return 0
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[2], 'status', 'waiting', 'attempts', 0, 'failures', 0, 'put_at', now)
redis.call('ZADD', KEYS[3], now, ARGV[1])
redis.call('ZADD', KEYS[4], now, ARGV[1])
redis.call('ZREMRANGEBYRANK', KEYS[4], 0, -ARGV[4] - 1)
redis.call('LPUSH', KEYS[1], '{"id": ' .. ARGV[2] .. ', "data": ' .. ARGV[3] .. '}')
return 1
