-- Close the records of tasks whose streams have ended. On one server the stream of each is given too: then its terminal
-- event is written in the same call, and nothing is closed without it.
-- KEYS  leases, unfinished, totals, finished, dead, then for each task its record, and its stream if it is given
-- ARGV  keys a task (1 or 2), record's time to live (ms), stream's (ms), MAXLEN of a stream, sizes of `dead` and
--       `finished`, then for each task: id, token, status, result as JSON, dead letter as JSON ('' for none),
--       id as the field codec stores it, entry id, how many fields and values follow, these
-- Returns for each task 1 (also if it was closed so before); 0: the lease is lost, or somebody else has written to the
--         stream; or an error that concerns it alone.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local each = tonumber(ARGV[1])

local ended = {} -- status -> how many tasks have ended so in this call

-- Write a terminal event, whose fields and values are ARGV[first] to ARGV[last]. Returns false if it is refused.
local function end_stream(stream, entry_id, first, last)
  local id = redis.pcall('XADD', stream, 'NOMKSTREAM', 'MAXLEN', '~', ARGV[4], entry_id, unpack(ARGV, first, last))
  if type(id) == 'table' then
    if not string.find(id.err, 'equal or smaller', 1, true) and not string.find(id.err, 'last possible ID', 1, true) then
      error(id)
    end
    local entry = redis.call('XRANGE', stream, entry_id, entry_id)[1] -- subtle: ours, if its reply was lost
    if not entry then
      return false
    end
    for n = first, last do
      if entry[2][n - first + 1] ~= ARGV[n] then
        return false
      end
    end
  elseif not id then -- the stream is gone
    return false
  end
  redis.call('PEXPIRE', stream, ARGV[3])
  return true
end

local function finish(record, stream, at, id, token, status, result, letter, encoded_id, entry_id, count)
  local r = redis.call('HMGET', record, 'status', 'token')
  if r[2] ~= token then
    return 0
  elseif r[1] ~= 'running' then
    return r[1] == status and 1 or 0
  elseif stream and not end_stream(stream, entry_id, at + 8, at + 7 + count) then
    return 0
  end
  redis.call('ZREM', KEYS[1], id) -- subtle: first, because then the rest is not refused for lack of memory
  redis.call('ZREM', KEYS[2], id)
  redis.call('HSET', record, 'status', status, 'result', result, 'finished_at', now)
  redis.call('PEXPIRE', record, ARGV[2])
  redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[6], '*', 'id', encoded_id, 'status', status)
  if letter ~= '' then
    redis.call('LPUSH', KEYS[5], letter)
    redis.call('LTRIM', KEYS[5], 0, ARGV[5] - 1)
  end
  ended[status] = (ended[status] or 0) + 1
  return 1
end

local finished, at = {}, 7
for n = 1, (#KEYS - 5) / each do
  local record, stream = KEYS[6 + each * (n - 1)], each == 2 and KEYS[7 + each * (n - 1)]
  local ok, reply = pcall(finish, record, stream, at, unpack(ARGV, at, at + 7))
  finished[n] = ok and reply or {err = type(reply) == 'table' and reply.err or tostring(reply)}
  at = at + 8 + ARGV[at + 7]
end
for status, count in pairs(ended) do
  redis.pcall('HINCRBY', KEYS[3], status, count)
end
return finished
