-- Append one event to a task's stream: by its present writer only, once, and never after the end.
-- KEYS  stream, writer; also the record where this is the first event of a task's first attempt and is sent behind its
--       claim, in the same round trip: whether the claim was granted is seen there (not in a cluster: another slot)
-- ARGV  attempt, token, number of the event within the attempt, '1' if it ends the stream,
--       MAXLEN, time to live after the end (ms), event, then its fields and values
-- Returns {'ok', entry id}, {'lost', present attempt} or {'ended', terminal event}; {'unclaimed'} where the record does
--         not show that claim, or shows more than a first attempt.
-- The entry id is <ms>-<seq>: a reader that knows an id knows its `seq`, so it can count what it missed.
if KEYS[3] then
  local record = redis.call('HMGET', KEYS[3], 'status', 'token', 'attempts', 'cancel')
  if record[1] ~= 'running' or record[2] ~= ARGV[2] or record[3] ~= ARGV[1] or record[4] then
    return {'unclaimed'}
  end
end
local attempt, number = tonumber(ARGV[1]), tonumber(ARGV[3])
local w = redis.call('HMGET', KEYS[2], 'attempt', 'token', 'number', 'seq', 'ms', 'ended')
local present = tonumber(w[1] or -1)
if attempt < present or (attempt == present and w[2] ~= ARGV[2]) then
  return {'lost', present}
end
if attempt > 0 and attempt ~= present and number > 1 then -- what it wrote before is gone: a failover, or a power cut,
  return {'lost', present}                               -- took it, and maybe the task as well
end
if attempt == present and number <= tonumber(w[3]) then -- its reply was lost: it is written already
  return {'ok', w[5] .. '-' .. w[4]}
end
if w[6] then
  return {'ended', w[6]}
end

local time = redis.call('TIME')
local ms = math.max(time[1] * 1000 + math.floor(time[2] / 1000), tonumber(w[5] or 0)) -- the clock may step back
local seq = tonumber(w[4] or 0) + 1

-- The date from the days since 1970: Howard Hinnant, chrono-compatible low-level date algorithms, civil_from_days.
local day = math.floor(ms / 86400000) + 719468
local era = math.floor(day / 146097)
local doe = day - era * 146097
local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
local mp = math.floor((5 * doy + 2) / 153)
local month = mp < 10 and mp + 3 or mp - 9
local year = yoe + era * 400 + (month <= 2 and 1 or 0)
local second = math.floor(ms / 1000) % 86400
local timestamp = string.format('%04d-%02d-%02dT%02d:%02d:%02d.%03dZ', year, month,
  doy - math.floor((153 * mp + 2) / 5) + 1, math.floor(second / 3600), math.floor(second / 60) % 60, second % 60,
  ms % 1000)

local entry = {'event', ARGV[7], 'timestamp', timestamp, 'attempt', ARGV[1], 'seq', seq}
for i = 8, #ARGV do
  entry[#entry + 1] = ARGV[i]
end
local function add()
  return redis.pcall('XADD', KEYS[1], 'MAXLEN', '~', ARGV[5], string.format('%d-%d', ms, seq), unpack(entry))
end
local id = add()
if type(id) == 'table' and string.find(id.err, 'equal or smaller', 1, true) then -- somebody used XADD by hand
  local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
  ms = math.max(ms, newest and tonumber(string.match(newest[1], '^%d+')) or 0) + 1
  id = add()
end
if type(id) == 'table' then
  return id
end
redis.call('HSET', KEYS[2], 'attempt', ARGV[1], 'token', ARGV[2], 'number', ARGV[3], 'seq', seq,
  'ms', string.format('%d', ms))
if ARGV[4] == '1' then
  redis.call('HSET', KEYS[2], 'ended', ARGV[7])
  redis.call('PEXPIRE', KEYS[1], ARGV[6])
  redis.call('PEXPIRE', KEYS[2], ARGV[6])
end
return {'ok', id}
