-- Answer the question that is open about a task. The first answer counts. If the task is parked, it is pushed.
-- KEYS  queue, leases, record
-- ARGV  id, id as JSON, the question as the record has it, answer as JSON
-- Returns 'answered' (also if the reply of a first try was lost), 'expired', or 'closed': it is not the open question,
--         somebody has answered it, or the task has ended.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local r = redis.call('HMGET', KEYS[3], 'status', 'question', 'answer', 'expires_at', 'data')
if r[2] ~= ARGV[3] or r[1] == 'completed' or r[1] == 'failed' or r[1] == 'cancelled' then
  return 'closed'
elseif r[3] then
  return r[3] == ARGV[4] and 'answered' or 'closed'
elseif tonumber(r[4]) <= now then
  return 'expired'
end
if r[1] == 'parked' then
  redis.call('ZREM', KEYS[2], ARGV[1]) -- subtle: first, because then the rest is not refused for lack of memory
  redis.call('RPUSH', KEYS[1], '{"id": ' .. ARGV[2] .. ', "data": ' .. r[5] .. '}')
  redis.call('HDEL', KEYS[3], 'token')
  redis.call('HSET', KEYS[3], 'status', 'waiting')
end
redis.call('HSET', KEYS[3], 'answer', ARGV[4])
return 'answered'
