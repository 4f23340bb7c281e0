-- Put tasks, each one once: its record, its place in the ledger, its element in the list.
-- KEYS  queue, leases, unfinished, recent, then the record of each task
-- ARGV  how many ids `recent` keeps, delay (ms), then for each task: id, id as JSON, data as JSON
-- Returns for each task 1, or 0 if a task of that id exists (then nothing changes).
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local delay = tonumber(ARGV[2])
local created = {}
for n = 1, #KEYS - 4 do
  local record, id, id_json, data = KEYS[n + 4], ARGV[3 * n], ARGV[3 * n + 1], ARGV[3 * n + 2]
  local is_known = redis.call('EXISTS', record)
  if is_known == 0 then
    redis.call('HSET', record, 'data', data, 'status', delay > 0 and 'delayed' or 'waiting', 'put_at', now)
    redis.call('ZADD', KEYS[3], now, id)
    redis.call('ZADD', KEYS[4], now, id)
    if delay > 0 then
      redis.call('ZADD', KEYS[2], now + delay, id) -- recover pushes it when it is due
    else
      redis.call('LPUSH', KEYS[1], '{"id": ' .. id_json .. ', "data": ' .. data .. '}')
    end
  end
  created[n] = 1 - is_known
end
redis.call('ZREMRANGEBYRANK', KEYS[4], 0, -ARGV[1] - 1)
return created
