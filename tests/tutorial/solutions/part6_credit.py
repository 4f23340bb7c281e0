"""A solution of part 6's exercise: the effect and the memory of it in one script, so there is nothing in between."""

from redis import Redis

CREDIT = """
if redis.call('SET', KEYS[2], 1, 'NX', 'EX', ARGV[2]) then
  return redis.call('INCRBY', KEYS[1], ARGV[1])
end
return tonumber(redis.call('GET', KEYS[1]))
"""
REMEMBERED_SECONDS = 48 * 3600  # longer than a task can be tried again


def credit(redis: Redis, account: str, cents: int, payment_id: str) -> int:
    """Add cents to `balance:<account>`, once for each payment id, and return the balance."""
    keys = [f"balance:{account}", f"paid:{payment_id}"]
    return int(redis.eval(CREDIT, len(keys), *keys, cents, REMEMBERED_SECONDS))
