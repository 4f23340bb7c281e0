-- Close a task's record after its stream has ended.
-- KEYS  record, leases, unfinished, dead, finished, totals; also the stream's writer where this is sent behind the
--       terminal event, in the same round trip: whether that was written is seen there (not in a cluster: another slot)
-- ARGV  id, token, status, result as JSON, time to live (ms), dead letter as JSON ('' for none), sizes of `dead` and
--       `finished`, id as the field codec stores it
-- Returns 1, 0 where the lease is lost, or -1 where the terminal event was not written. Once more, it changes nothing.
if KEYS[7] then
  local writer = redis.call('HMGET', KEYS[7], 'ended', 'token')
  if writer[1] ~= ARGV[3] or writer[2] ~= ARGV[2] then
    return -1
  end
end
local record = redis.call('HMGET', KEYS[1], 'status', 'token')
if record[2] ~= ARGV[2] then
  return 0
end
if record[1] ~= 'running' then
  return record[1] == ARGV[3] and 1 or 0
end
local time = redis.call('TIME')
redis.call('ZREM', KEYS[2], ARGV[1]) -- subtle: first, because then the rest is not refused for lack of memory
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('HSET', KEYS[1], 'status', ARGV[3], 'result', ARGV[4],
  'finished_at', time[1] * 1000 + math.floor(time[2] / 1000))
redis.call('PEXPIRE', KEYS[1], ARGV[5])
redis.call('HINCRBY', KEYS[6], ARGV[3], 1)
redis.call('XADD', KEYS[5], 'MAXLEN', '~', ARGV[8], '*', 'id', ARGV[9], 'status', ARGV[3])
if ARGV[6] ~= '' then
  redis.call('LPUSH', KEYS[4], ARGV[6])
  redis.call('LTRIM', KEYS[4], 0, ARGV[7] - 1)
end
return 1
