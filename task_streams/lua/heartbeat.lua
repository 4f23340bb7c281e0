-- Renew leases that are still held, and note how far each log is.
-- KEYS  leases, then the record of each task
-- ARGV  lease (ms), then for each task: id, token, last seq
-- Returns for each task 1 (renewed), the reason of a cancellation (renewed too), 0 (the lease is lost), or an error that
--         concerns it alone.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function renew(record, id, token, seq)
  local lease = redis.call('ZSCORE', KEYS[1], id)
  local r = redis.call('HMGET', record, 'status', 'token', 'cancel')
  if r[1] ~= 'running' or r[2] ~= token or not lease or tonumber(lease) <= now then
    return 0
  end
  redis.call('ZREM', KEYS[1], id) -- subtle: a script that has removed something is not refused for lack of memory
  redis.call('ZADD', KEYS[1], now + ARGV[1], id)
  redis.call('HSET', record, 'seq', seq)
  return r[3] or 1
end

local renewed = {}
for n = 1, #KEYS - 1 do
  local at = 3 * n - 1
  local ok, reply = pcall(renew, KEYS[n + 1], ARGV[at], ARGV[at + 1], ARGV[at + 2])
  renewed[n] = ok and reply or {err = type(reply) == 'table' and reply.err or tostring(reply)}
end
return renewed
