-- Write the first event of an attempt that was claimed: for a Cluster, where record and stream are on different nodes.
-- KEYS  stream
-- ARGV  epoch, put_at ('' if unknown), epochs of the task's attempts, last seq that the record knows, lost worker or '',
--       MAXLEN, timestamp, event, its fields and values
-- Returns {what first_append in first.lua returns, or an error that concerns this task alone}.
-- include first
local ok, begun = pcall(first_append, KEYS[1], {epoch = tonumber(ARGV[1]), put_at = ARGV[2] ~= '' and ARGV[2], epochs = ARGV[3],
  seq = ARGV[4], lost = ARGV[5], maxlen = ARGV[6], timestamp = ARGV[7], fields = {unpack(ARGV, 8)}})
return {ok and begun or {err = type(begun) == 'table' and begun.err or tostring(begun)}}
