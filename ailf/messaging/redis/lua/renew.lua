-- Keep pending entries of one's own from becoming stale: set their idle time to 0, without counting a delivery.
-- KEYS  stream
-- ARGV  group, consumer, entry ids …
-- Returns those ids that this consumer still holds.
local held = {}
for i = 3, #ARGV do
  if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2]) > 0 then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'JUSTID')
    held[#held + 1] = ARGV[i]
  end
end
return held
