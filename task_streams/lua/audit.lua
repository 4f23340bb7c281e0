-- List the tasks whose lease is over, after giving a short lease to those that were popped but never claimed.
--
-- BRPOP takes an element before anybody claims its task, so a worker that dies in between leaves the task in the
-- ledger only. The list is in the order of putting (oldest on the right), so every task that is not younger than the
-- oldest ones in the list, and that nobody leases, has probably been popped. It gets a lease of `grace`; if nobody
-- has claimed it by then, recover.lua pushes it again, unless it finds it in the list: what was pushed again stands on
-- the right, in no order, and so do those of one millisecond. A false suspicion beyond that costs one more element,
-- which the claim drops.
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
