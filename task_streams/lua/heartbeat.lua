-- Renew a lease that is still held.
-- KEYS  leases, record
-- ARGV  id, token, lease (ms)
-- Returns 1 (renewed), 2 (renewed, and its cancellation was asked for), 0 (the lease is lost).
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease = redis.call('ZSCORE', KEYS[1], ARGV[1])
local record = redis.call('HMGET', KEYS[2], 'status', 'token', 'cancel')
if record[1] ~= 'running' or record[2] ~= ARGV[2] or not lease or tonumber(lease) <= now then
  return 0
end
redis.call('ZREM', KEYS[1], ARGV[1]) -- subtle: a script that has removed something is not refused for lack of memory
redis.call('ZADD', KEYS[1], now + ARGV[3], ARGV[1])
return record[3] and 2 or 1
