-- The first append of an attempt. Included by claim.lua, which shares its call with it on one server, and by start.lua.
local ENDS = {completed = true, failed = true, cancelled = true}
local LOOK_BACK = 10 -- entries at the end of a stream, among which its terminal event is looked for
local TOO_LARGE = 2 ^ 53 -- from here on the parts of an id cannot be compared as numbers; no clock and no count gets there

-- Return the parts of an entry id as numbers.
local function parts(id)
  return tonumber(string.match(id, '^%d+')), tonumber(string.match(id, '%d+$'))
end

-- Return the greatest id that a stream has given, even if that entry was deleted since.
local function last_id_of(stream)
  local info = redis.call('XINFO', 'STREAM', stream)
  for n = 1, #info, 2 do
    if info[n] == 'last-generated-id' then
      return info[n + 1]
    end
  end
end

-- Return the terminal event among some entries, or nil.
local function end_among(entries)
  for _, entry in ipairs(entries) do
    for n = 1, #entry[2], 2 do
      if entry[2][n] == 'event' and ENDS[entry[2][n + 1]] then
        return entry[2][n + 1]
      end
    end
  end
end

-- Return the greatest seq that this task's attempts have written: a stranger's entries don't count. If the record was
-- lost, the epochs of the attempts are unknown; then all of the last entries count.
local function last_seq(stream, last, last_id, epochs, seq)
  local found = tonumber(seq) or 0
  if epochs == '' then
    for _, entry in ipairs(last) do
      found = math.max(found, select(2, parts(entry[1])))
    end
    epochs = string.match(last_id, '^%d+')
  end
  for epoch in string.gmatch(epochs, '%d+') do
    local entry = redis.call('XREVRANGE', stream, epoch .. '-18446744073709551615', epoch, 'COUNT', 1)[1]
    if entry then
      found = math.max(found, select(2, parts(entry[1])))
    end
    if string.match(last_id, '^%d+') == epoch then -- subtle: also if the stream was trimmed or deleted to nothing
      found = math.max(found, select(2, parts(last_id)))
    end
  end
  return found
end

-- Append the first event of an attempt, unless the stream has ended or a later attempt has written.
-- a  epoch; epochs: of this task's attempts, separated by spaces; seq: the last one that the record knows; put_at (ms), or
--    false; lost: the worker that was lost, or ''; maxlen; timestamp; fields: the event, then names and values;
--    may_rise: if the epoch is not above all that is in the stream, take one that is
-- Returns {'ok', seq of the event, epoch, problem}, {'ended', terminal event} or {'lost', ms of the newest entry}.
-- problem: why the stream had to be deleted (its key is not a stream, or a foreign id is too large to go on), or ''.
local function first_append(stream, a)
  local epoch, seq, problem, last, last_id = a.epoch, tonumber(a.seq) or 0, '', {}, nil
  local kind = redis.call('TYPE', stream).ok
  if kind == 'stream' then
    last, last_id = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', LOOK_BACK), last_id_of(stream)
    local newest, newest_seq = parts(last_id)
    local is_older = a.put_at and newest < tonumber(a.put_at) -- then an earlier task of that id wrote it
    local ended = not is_older and end_among(last)
    if ended then
      return {'ended', ended}
    elseif not is_older and math.max(newest, newest_seq) >= TOO_LARGE then
      problem = 'it has the entry ' .. last_id
    elseif newest >= epoch and not is_older then
      -- subtle: the same event of the same epoch is a call whose reply was lost; on one server the claim knows that
      local mine = string.format('%.0f', epoch)
      for _, entry in ipairs(a.may_rise and {} or redis.call('XRANGE', stream, mine, mine, 'COUNT', 3)) do
        if entry[2][2] == a.fields[1] and entry[2][6] == a.fields[3] then
          return {'ok', select(2, parts(entry[1])), mine, ''}
        end
      end
      if not a.may_rise then
        return {'lost', string.format('%.0f', newest)}
      end
      epoch = newest + 1
    end
    local last_of_ours = is_older and 0 or last_seq(stream, last, last_id, a.epochs, seq)
    if last_of_ours >= TOO_LARGE and problem == '' then
      problem = 'it has a number above ' .. string.format('%.0f', TOO_LARGE)
    end
    if is_older or problem ~= '' then
      redis.call('DEL', stream)
    else
      seq = last_of_ours
    end
  elseif kind ~= 'none' then
    problem = 'it is a ' .. kind
    redis.call('DEL', stream)
  end
  local epoch_text = string.format('%.0f', epoch)
  local function add(event, ...)
    seq = seq + 1
    local id = string.format('%s-%.0f', epoch_text, seq)
    redis.call('XADD', stream, 'MAXLEN', '~', a.maxlen, id, 'event', event, 'timestamp', a.timestamp, ...)
  end
  if a.lost ~= '' then
    add('worker_lost', 'worker', a.lost)
  end
  add(unpack(a.fields))
  return {'ok', seq, epoch_text, problem}
end
