-- Allow a call, or say when the next may come: an exact sliding window of the last calls that were allowed.
-- KEYS  calls: a list of times (microseconds, the server's clock), the newest first, `rate` at most
-- ARGV  rate (calls), period (microseconds)
-- Returns {1 or 0, calls left, microseconds until a call may be allowed}. A denied call is not counted.
local rate, period = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

local newest = tonumber(redis.call('LINDEX', KEYS[1], 0))
if newest and newest > now then -- the clock was put back: count those calls as made just now
  for i = 0, redis.call('LLEN', KEYS[1]) - 1 do
    redis.call('LSET', KEYS[1], i, string.format('%.0f', now))
  end
end

-- A call leaves the window once it is more than a period old; every call is removed once, so this is O(1) on average.
local oldest = tonumber(redis.call('LINDEX', KEYS[1], -1))
while oldest and oldest + period < now do
  redis.call('RPOP', KEYS[1])
  oldest = tonumber(redis.call('LINDEX', KEYS[1], -1))
end

local used = redis.call('LLEN', KEYS[1])
if used >= rate then -- more than rate, where another caller gave a higher one
  local leaving = tonumber(redis.call('LINDEX', KEYS[1], rate - 1))
  return { 0, 0, leaving + period + 1 - now }
end
redis.call('LPUSH', KEYS[1], string.format('%.0f', now))
-- subtle: not PEXPIRE, which counts from when the script began; on a busy machine that is long before TIME
redis.call('PEXPIREAT', KEYS[1], string.format('%.0f', math.ceil((now + period) / 1000) + 1))
return { 1, rate - used - 1, 0 }
