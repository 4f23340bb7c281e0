-- Claim tasks that were popped. Nobody else may hold them, and they must not have ended. On one server the stream of
-- each is given too: then the attempt's first event is written in the same call.
-- KEYS  leases, unfinished, recent, then for each task its record, and its stream if it is given
-- ARGV  keys a task (1 or 2), worker, lease (ms), size of `recent`, MAXLEN, timestamp, event, its field, value,
--       then for each task: id, token, data as JSON ('' if only a known task may be claimed), an epoch to be above
-- Returns for each task {'claimed', attempt, epoch, seq, failures, losses, reason of a cancellation, data if the record
--         has other data, problem (see first.lua), and for start.lua: epochs, put_at, lost worker};
--         {'held'}: somebody works on it, or it is not due; {'done'}; {'unknown'}; {'ended', terminal event}: claimed,
--         but its stream has ended; or an error that concerns it alone.
-- include first
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local leases, unfinished, recent, each = KEYS[1], KEYS[2], KEYS[3], tonumber(ARGV[1])
local FIELDS = {'status', 'token', 'attempts', 'failures', 'losses', 'worker', 'lost', 'cancel', 'epoch', 'epochs', 'seq',
  'put_at', 'data', 'problem'}

-- Return a text with the epochs of the last attempts, and one more: seven at most.
local function join(epochs, epoch)
  local joined = epochs == '' and epoch or epochs .. ' ' .. epoch
  return #joined > 98 and (string.gsub(joined, '^%d+ ', '', 1)) or joined
end

local function claim(record, stream, id, token, data, above)
  local r, values = {}, redis.call('HMGET', record, unpack(FIELDS))
  for n, name in ipairs(FIELDS) do
    r[name] = values[n] or nil
  end
  local status, attempt, losses, lost = r.status, tonumber(r.attempts or 0), tonumber(r.losses or 0), r.lost or ''
  local epoch, epochs, seq, problem = r.epoch or '0', r.epochs or '', r.seq or '0', r.problem or ''
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
  local is_mine = r.token == token and status == 'running'
  if not is_mine then
    local lease = status ~= 'waiting' and redis.call('ZSCORE', leases, id)
    if lease and tonumber(lease) > now then
      return {'held'}
    end
    if status == 'running' then -- its lease is over, and nobody has recovered it yet
      losses, lost = losses + 1, r.worker
    end
    attempt = attempt + 1
  end
  redis.call('ZADD', leases, now + ARGV[3], id)
  if is_mine and tonumber(above) < tonumber(epoch) then
    local ended = stream and end_among(redis.call('XREVRANGE', stream, '+', '-', 'COUNT', LOOK_BACK))
    if ended then
      return {'ended', ended}
    end
  else
    local new = math.max(now, epoch + 1, tonumber(r.put_at or 0), above + 1)
    epoch = string.format('%.0f', new)
    if stream then
      local fields = {ARGV[7], ARGV[8], ARGV[9]}
      if ARGV[7] == 'started' then
        fields[4], fields[5] = 'attempt', tostring(attempt)
      end
      local first = first_append(stream, {epoch = new, epochs = epochs, seq = seq, put_at = r.put_at, lost = lost,
        maxlen = ARGV[5], timestamp = ARGV[6], fields = fields, may_rise = true})
      if first[1] == 'ended' then -- only the record is open
        redis.call('HSET', record, 'status', 'running', 'worker', ARGV[2], 'token', token)
        return first
      end
      seq, epoch = tostring(first[2]), first[3]
      if first[4] ~= '' then
        problem = first[4]
        redis.call('HSET', record, 'problem', problem)
      end
    end
    epochs = join(epochs, epoch)
    redis.call('HSET', record, 'status', 'running', 'worker', ARGV[2], 'token', token, 'started_at', now, 'attempts',
      attempt, 'losses', losses, 'lost', lost, 'epoch', epoch, 'epochs', epochs, 'seq', seq)
  end
  return {'claimed', attempt, epoch, seq, r.failures or '0', losses, r.cancel or '', r.data and r.data ~= data and r.data or '',
    problem, epochs, r.put_at or '', lost}
end

local claimed = {}
for n = 1, (#KEYS - 3) / each do
  local at, record = 10 + 4 * (n - 1), KEYS[4 + each * (n - 1)]
  local stream = each == 2 and KEYS[5 + each * (n - 1)]
  local ok, reply = pcall(claim, record, stream, ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3])
  claimed[n] = ok and reply or {err = type(reply) == 'table' and reply.err or tostring(reply)}
end
return claimed
