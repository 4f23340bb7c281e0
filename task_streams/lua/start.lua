-- Write the first event of an attempt that was claimed: for a Cluster, where record and stream are on different nodes.
-- KEYS  stream
-- ARGV  epoch, put_at ('' if the record has none), epochs of earlier attempts, last seq that the record knows,
--       lost worker or '', MAXLEN, timestamp, event, its fields and values
-- Returns what first_append in first.lua returns.
-- include first
return first_append(KEYS[1], tonumber(ARGV[1]), true, false, ARGV[2] ~= '' and ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6],
  ARGV[7], {unpack(ARGV, 8)})
