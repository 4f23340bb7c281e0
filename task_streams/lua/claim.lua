-- Claim a task that was popped: nobody else may hold it, and it must not have ended.
-- KEYS  record, leases, unfinished, recent
-- ARGV  id, token, worker, lease (ms), data as JSON ('' where only a known task may be claimed), size of `recent`
-- Returns {'claimed', data, attempt, failures, lost worker or '', reason of a cancellation or ''},
--         {'held'} (somebody works on it or it waits for its retry), {'done'} or {'unknown'}.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local status = redis.call('HGET', KEYS[1], 'status')

if not status then -- pushed by hand: from its first claim on it is a task like any other
  if ARGV[5] == '' then
    return {'unknown'}
  end
  status = 'waiting'
  redis.call('HSET', KEYS[1], 'data', ARGV[5], 'status', status, 'attempts', 0, 'failures', 0, 'put_at', now)
  redis.call('ZADD', KEYS[3], now, ARGV[1])
  redis.call('ZADD', KEYS[4], now, ARGV[1])
  redis.call('ZREMRANGEBYRANK', KEYS[4], 0, -ARGV[6] - 1)
end
if status == 'completed' or status == 'failed' or status == 'cancelled' then
  return {'done'}
end

-- subtle: the same token again is a claim whose reply was lost; it is answered, not counted
local mine = redis.call('HGET', KEYS[1], 'token') == ARGV[2]
if not mine then
  local lease = redis.call('ZSCORE', KEYS[2], ARGV[1])
  if status ~= 'waiting' and lease and tonumber(lease) > now then
    return {'held'}
  end
  if status == 'running' then -- its lease is over, and nobody has recovered it yet
    redis.call('HINCRBY', KEYS[1], 'failures', 1)
    redis.call('HSET', KEYS[1], 'lost', redis.call('HGET', KEYS[1], 'worker'))
  end
  redis.call('HINCRBY', KEYS[1], 'attempts', 1)
  redis.call('HSET', KEYS[1], 'status', 'running', 'worker', ARGV[3], 'token', ARGV[2], 'started_at', now)
end
redis.call('ZADD', KEYS[2], now + ARGV[4], ARGV[1]) -- also where repeated: the worker counts from its last try
local record = redis.call('HMGET', KEYS[1], 'data', 'attempts', 'failures', 'lost', 'cancel')
return {'claimed', record[1], record[2], record[3], record[4] or '', record[5] or ''}
