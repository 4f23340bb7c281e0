-- Acquire a lock that expires, and draw a fencing token.
-- KEYS  lock, fence
-- ARGV  the holder's mark, time to live (ms), time that the fence outlives it (ms)
-- Returns the fencing token, or 0 where somebody holds the lock.
if not redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then
  return 0
end
-- A token is the server's time (microseconds), or the last one plus 1 where that is more. So it grows with every
-- acquisition even where the clock was put back, and, since time goes on, where the fence expired or was lost.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local token = math.max(now, (tonumber(redis.call('GET', KEYS[2])) or 0) + 1)
redis.call('SET', KEYS[2], string.format('%.0f', token), 'PX', ARGV[2] + ARGV[3])
return token
