-- Give up a claim: push the task, to be popped next; let it rest until its next attempt; or park it until its question is
-- answered.
-- KEYS  queue, leases, record
-- ARGV  id, token, id as JSON, delay (ms), '' to push it now, or 'park', counter to increment: 'failures', 'losses' or ''
-- Returns 1, or 0 if the lease is lost. A second call changes nothing.
local r = redis.call('HMGET', KEYS[3], 'status', 'token', 'data', 'worker', 'expires_at', 'answer', 'cancel')
if r[2] ~= ARGV[2] then
  return 0
end
if r[1] ~= 'running' then
  return (r[1] == 'retrying' or r[1] == 'parked') and 1 or 0
end
redis.call('HSET', KEYS[3], 'lost', ARGV[5] == 'losses' and r[4] or '')
if ARGV[5] ~= '' then
  redis.call('HINCRBY', KEYS[3], ARGV[5], 1)
end
-- subtle: the answer may have come first, or somebody may have cancelled the task: then it need not rest
if ARGV[4] == '' or r[7] or ARGV[4] == 'park' and r[6] then
  redis.call('HDEL', KEYS[3], 'token')
  redis.call('ZREM', KEYS[2], ARGV[1])
  redis.call('HSET', KEYS[3], 'status', 'waiting')
  redis.call('RPUSH', KEYS[1], '{"id": ' .. ARGV[3] .. ', "data": ' .. r[3] .. '}')
elseif ARGV[4] == 'park' then
  redis.call('HSET', KEYS[3], 'status', 'parked')
  redis.call('ZADD', KEYS[2], r[5], ARGV[1])
else
  local time = redis.call('TIME')
  redis.call('HSET', KEYS[3], 'status', 'retrying')
  redis.call('ZADD', KEYS[2], time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[4], ARGV[1])
end
return 1
