-- List the tasks whose lease is over. First, give a short lease to tasks that seem to be popped but not claimed.
--
-- BRPOP removes an element before its task is claimed. If the worker dies in between, only the ledger knows the task.
-- The list is in the order of putting, the oldest on the right. So a task that nobody leases, and that is at least as
-- old as the oldest elements of the list, was probably popped. It gets a lease of `grace`. If nobody has claimed it by
-- then, recover.lua pushes it again, unless the list still holds it. (Tasks that were pushed again, or put in the same
-- millisecond, are not in order.) A wrong guess beyond that costs one extra element, which the claim drops.
-- KEYS  queue, leases, unfinished, audited
-- ARGV  grace (ms), how many of the ledger to look at, ms in which one audit is enough for all workers (0: look now)
-- Returns the ids whose lease is over, 100 at most.
local WINDOW = 5 -- the oldest elements of the list
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if tonumber(ARGV[3]) > 0 and not redis.call('SET', KEYS[4], now, 'NX', 'PX', ARGV[3]) then
  return {}
end
local listed = {}
local before = redis.call('LLEN', KEYS[1]) <= WINDOW and '+inf' or nil
for _, element in ipairs(redis.call('LRANGE', KEYS[1], -WINDOW, -1)) do
  local id = string.match(element, '^%s*{%s*"id"%s*:%s*"?([^",}]+)')
  if id then
    listed[id] = true
    local put_at = not before and redis.call('ZSCORE', KEYS[3], id)
    if put_at then
      before = put_at
    end
  end
end
if before then
  -- a thousand long tasks may stand before a lost one: each second has its page of the ledger
  local pages = math.ceil(redis.call('ZCOUNT', KEYS[3], '-inf', before) / ARGV[2])
  local offset = time[1] % math.max(pages, 1) * ARGV[2]
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', before, 'LIMIT', offset, ARGV[2])) do
    if not listed[id] then
      redis.call('ZADD', KEYS[2], 'NX', now + ARGV[1], id)
    end
  end
end
return redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, 100)
