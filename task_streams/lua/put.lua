-- Put tasks, each one once: its record, its place in the ledger, its element in the list.
-- KEYS  queue, leases, unfinished, recent, the tasks of their owner, then the record of each task
-- ARGV  how many ids `recent` and the owner's list keep, delay (ms), a text of this call's own, owner ('' for none),
--       traceparent ('' for none), how long the owner's list lives (s), then for each task: id, id as JSON, data
-- Returns for each task '' if it is new, also if the reply of a first try was lost; or the data of the task that has this
--         id already, or an error if its record is spoilt (then nothing changes).
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local delay, by, owner, traceparent, known = tonumber(ARGV[2]), ARGV[3], ARGV[4], ARGV[5], {}
for n = 1, #KEYS - 5 do
  local record, id, id_json, data = KEYS[n + 5], ARGV[3 * n + 4], ARGV[3 * n + 5], ARGV[3 * n + 6]
  if redis.call('EXISTS', record) == 1 then
    known[n] = redis.pcall('HGET', record, 'put_by') == by and '' or redis.pcall('HGET', record, 'data')
  else
    known[n] = ''
    redis.call('HSET', record, 'data', data, 'status', delay > 0 and 'delayed' or 'waiting', 'put_at', now, 'put_by', by)
    redis.call('ZADD', KEYS[3], now, id)
    redis.call('ZADD', KEYS[4], now, id)
    if owner ~= '' then
      redis.call('HSET', record, 'owner', owner)
      redis.call('ZADD', KEYS[5], now, id)
    end
    if traceparent ~= '' then
      redis.call('HSET', record, 'traceparent', traceparent)
    end
    if delay > 0 then
      redis.call('ZADD', KEYS[2], now + delay, id) -- recover pushes it when it is due
    else
      redis.call('LPUSH', KEYS[1], '{"id": ' .. id_json .. ', "data": ' .. data .. '}')
    end
  end
end
redis.call('ZREMRANGEBYRANK', KEYS[4], 0, -ARGV[1] - 1)
if owner ~= '' then
  redis.call('ZREMRANGEBYRANK', KEYS[5], 0, -ARGV[1] - 1)
  redis.call('EXPIRE', KEYS[5], ARGV[6])
end
return known
