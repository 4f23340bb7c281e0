-- Claim tasks that were popped. Nobody else may hold them, and they must not have ended. On one server the stream of
-- each is given too: then the attempt's first event is written in the same call.
-- KEYS  leases, unfinished, recent, then for each task its record, and its stream if it is given
-- ARGV  keys a task (1 or 2), worker, lease (ms), size of `recent`, MAXLEN, timestamp, event, its field, value,
--       then for each task: id, token, data as JSON ('' if only a known task may be claimed), an epoch to be above
-- Returns for each task {'claimed', attempt, epoch, seq, epochs known before, put_at, failures, losses, lost worker, reason of
--         a cancellation, data if the record has other data}; {'held'}: somebody works on it, or it is not due;
--         {'done'}; {'unknown'}; {'ended', terminal event}, {'spoilt', why}: claimed, but see first.lua;
--         or an error that concerns it alone.
-- include first
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local leases, unfinished, recent, each = KEYS[1], KEYS[2], KEYS[3], tonumber(ARGV[1])

-- Return the epochs of the last attempts, with one more: seven at most.
local function join(epochs, epoch)
  local joined = epochs == '' and epoch or epochs .. ' ' .. epoch
  return #joined > 98 and (string.gsub(joined, '^%d+ ', '', 1)) or joined
end

local function claim(record, stream, id, token, data, above)
  local r = redis.call('HMGET', record, 'status', 'token', 'attempts', 'failures', 'losses', 'worker', 'lost', 'cancel',
    'epoch', 'epochs', 'seq', 'put_at', 'data')
  local status, attempt, losses, lost = r[1], tonumber(r[3] or 0), tonumber(r[5] or 0), r[7] or ''
  local epoch, epochs = tonumber(r[9] or 0), r[10] or ''
  if not status then -- pushed by hand, or its record was lost: from its first claim on it is a task like any other
    if data == '' then
      return {'unknown'}
    end
    status = 'waiting' -- subtle: without put_at, which would make an older stream of this task a stranger's
    redis.call('HSET', record, 'data', data)
    redis.call('ZADD', unfinished, 'NX', now, id)
    redis.call('ZADD', recent, now, id)
    redis.call('ZREMRANGEBYRANK', recent, 0, -ARGV[4] - 1)
  elseif ENDS[status] then
    return {'done'}
  end
  -- subtle: the same token again is a claim whose reply was lost; it is answered, not counted
  local is_mine = r[2] == token and status == 'running'
  if not is_mine then
    local lease = status ~= 'waiting' and redis.call('ZSCORE', leases, id)
    if lease and tonumber(lease) > now then
      return {'held'}
    end
    if status == 'running' then -- its lease is over, and nobody has recovered it yet
      losses, lost = losses + 1, r[6]
    end
    attempt = attempt + 1
  end
  local before = epochs
  if not is_mine or tonumber(above) >= epoch then
    epoch = math.max(now, epoch + 1, tonumber(r[12] or 0), tonumber(above) + 1)
  else -- `epochs` ends with this attempt's own
    before = string.match(epochs, '^(.*) %d+$') or ''
  end
  local text, seq = string.format('%.0f', epoch), r[11] or '0'
  redis.call('ZADD', leases, now + ARGV[3], id)
  redis.call('HSET', record, 'status', 'running', 'worker', ARGV[2], 'token', token, 'started_at', now,
    'attempts', attempt, 'losses', losses, 'lost', lost, 'epoch', text, 'epochs', join(before, text))
  if stream then
    local fields = {ARGV[7], ARGV[8], ARGV[9]}
    if ARGV[7] == 'started' then
      fields[4], fields[5] = 'attempt', tostring(attempt)
    end
    local first = first_append(stream, epoch, is_mine, true, r[12], epochs, seq, lost, ARGV[5], ARGV[6], fields)
    if first[1] ~= 'ok' then
      return first
    end
    seq = tostring(first[2])
    if first[3] ~= text then
      text = first[3]
      redis.call('HSET', record, 'epoch', text, 'epochs', join(before, text))
    end
  end
  return {'claimed', attempt, text, seq, epochs, r[12] or '', r[4] or '0', losses, lost, r[8] or '',
    r[13] and r[13] ~= data and r[13] or ''}
end

local claimed = {}
for n = 1, (#KEYS - 3) / each do
  local at, record = 10 + 4 * (n - 1), KEYS[4 + each * (n - 1)]
  local stream = each == 2 and KEYS[5 + each * (n - 1)]
  local ok, reply = pcall(claim, record, stream, ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3])
  claimed[n] = ok and reply or {err = type(reply) == 'table' and reply.err or tostring(reply)}
end
return claimed
