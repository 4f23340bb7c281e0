-- The first append of an attempt. Included by claim.lua, which shares its call with it on one server, and by start.lua.
local ENDS = {completed = true, failed = true, cancelled = true}
local LOOK_BACK = 10 -- entries at the end of a stream, among which its terminal event is looked for
local TOO_LARGE = 2 ^ 53 -- from here on the parts of an id cannot be compared as numbers; no clock and no count gets there

local function ms_of(id)
  return tonumber(string.match(id, '^%d+'))
end

-- Return the greatest id that a stream has given, also if that entry was deleted since.
local function last_id_of(stream)
  local info = redis.call('XINFO', 'STREAM', stream)
  for n = 1, #info, 2 do
    if info[n] == 'last-generated-id' then
      return info[n + 1]
    end
  end
end

-- Whether two entries have the same fields, in the same order; the timestamp, the fourth, may differ.
local function is_same(entry, other)
  for n = 1, math.max(#entry, #other) do
    if entry[n] ~= other[n] and n ~= 4 then
      return false
    end
  end
  return true
end

-- Return the greatest seq in a stream that an attempt of this task has written: nobody else's entry counts.
-- `last`: the last entries of the stream, `last_id`: the last id it gave. `epochs`: of earlier attempts, separated by
-- spaces, the newest last; without any the record was lost, and all entries count. `seq`: what the record knows.
local function seq_of(stream, last, last_id, epochs, seq)
  local found, newer = 0, ''
  local function is_ours(id)
    return epochs == '' or string.find(' ' .. epochs .. ' ', ' ' .. string.match(id, '^%d+') .. ' ', 1, true)
  end
  local function take(id)
    if is_ours(id) then
      found = math.max(found, tonumber(string.match(id, '%d+$')))
    end
  end
  for epoch in string.gmatch(epochs, '%d+') do
    newer = epoch .. ' ' .. newer
  end
  take(last_id) -- subtle: trimmed or deleted to nothing, the stream still knows the last id it gave
  for _, entry in ipairs(last) do
    take(entry[1])
  end
  for epoch in string.gmatch(last[1] and newer or '', '%d+') do
    if found > 0 then -- else there are more foreign entries behind ours than `last` holds
      break
    end
    for _, entry in ipairs(redis.call('XREVRANGE', stream, epoch .. '-18446744073709551615', epoch, 'COUNT', 1)) do
      take(entry[1])
    end
  end
  return math.max(found, tonumber(seq) or 0)
end

-- Append the first event of an attempt, unless the stream has ended or a later attempt has written.
-- `is_again`: this may be a call whose reply was lost. `may_rise`: if the epoch is not above all that is in the
-- stream, take one that is.
-- Returns {'ok', seq of the event, epoch}, {'ended', terminal event}, {'lost', ms of the newest entry} or
--         {'spoilt', why}: the key is not a stream, or a foreign id is so large that it takes no more; it is deleted.
local function first_append(stream, epoch, is_again, may_rise, put_at, epochs, seq, lost_worker, maxlen, timestamp,
  fields)
  local kind = redis.call('TYPE', stream).ok
  if kind ~= 'stream' and kind ~= 'none' then
    redis.call('DEL', stream)
    return {'spoilt', 'it is a ' .. kind}
  end
  local is_there = kind == 'stream'
  local last = is_there and redis.call('XREVRANGE', stream, '+', '-', 'COUNT', LOOK_BACK) or {}
  local last_id = is_there and last_id_of(stream)
  if last_id and put_at and ms_of(last_id) < tonumber(put_at) then -- an earlier task of that id wrote it
    redis.call('DEL', stream)
    last, last_id = {}, nil
  end
  local entry = {'event', fields[1], 'timestamp', timestamp, unpack(fields, 2)}
  for _, one in ipairs(last) do
    for n = 1, #one[2], 2 do
      if one[2][n] == 'event' and ENDS[one[2][n + 1]] then
        return {'ended', one[2][n + 1]}
      end
    end
  end
  if last_id then
    local newest = ms_of(last_id)
    if newest >= TOO_LARGE or tonumber(string.match(last_id, '%d+$')) >= TOO_LARGE then
      redis.call('DEL', stream)
      return {'spoilt', 'it has the entry ' .. last_id}
    end
    if newest >= epoch then
      -- subtle: the same entry again is a call whose reply was lost
      local mine = string.format('%.0f', epoch)
      for _, one in ipairs(is_again and redis.call('XRANGE', stream, mine, mine, 'COUNT', 3) or {}) do
        if is_same(one[2], entry) then
          return {'ok', tonumber(string.match(one[1], '%-(%d+)')), mine}
        end
      end
      if not may_rise then
        return {'lost', string.format('%.0f', newest)}
      end
      epoch = newest + 1
    end
  end
  local seq_now = last_id and seq_of(stream, last, last_id, epochs, seq) or tonumber(seq) or 0
  local epoch_now = string.format('%.0f', epoch)
  local function add(values)
    seq_now = seq_now + 1
    redis.call('XADD', stream, 'MAXLEN', '~', maxlen, string.format('%s-%.0f', epoch_now, seq_now), unpack(values))
  end
  if lost_worker ~= '' then
    add({'event', 'worker_lost', 'timestamp', timestamp, 'worker', lost_worker})
  end
  add(entry)
  return {'ok', seq_now, epoch_now}
end
