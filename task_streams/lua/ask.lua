-- Open a question about a running task, or learn how it was answered.
-- KEYS  record
-- ARGV  token, question as JSON, how long it may be answered (ms)
-- Returns {answer as JSON ('' if nobody has answered yet, 'null' if it is too late), when the question expires (ms)},
--         or nil if the lease is lost. Asking the same question again changes nothing.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local r = redis.call('HMGET', KEYS[1], 'status', 'token', 'question', 'answer', 'expires_at')
if r[1] ~= 'running' or r[2] ~= ARGV[1] then
  return nil
end
if r[3] ~= ARGV[2] then
  redis.call('HSET', KEYS[1], 'question', ARGV[2], 'expires_at', now + ARGV[3])
  redis.call('HDEL', KEYS[1], 'answer')
  return {'', now + ARGV[3]}
end
if not r[4] and tonumber(r[5]) <= now then
  redis.call('HSET', KEYS[1], 'answer', 'null') -- subtle: from now on it is too late, even if the clock goes back
  r[4] = 'null'
end
return {r[4] or '', tonumber(r[5])}
