"""Exercise of part 6: a tool that may be used twice, and whose effect comes once.

Check:   python -m pytest tutorial/exercises/test_part6_credit.py
"""

from redis import Redis


def credit(redis: Redis, account: str, cents: int, payment_id: str) -> int:
    """Add cents to `balance:<account>`, once for each payment id, and return the balance.

    A worker may die before any command of yours, and then another one calls this again, with the same payment id.
    """
    return redis.incrby(f"balance:{account}", cents)  # your code: this credits twice
