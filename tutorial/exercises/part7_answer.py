"""Exercise of part 7: wait for another agent's answer; the key holds it, and a channel only wakes.

Check:   python -m pytest tutorial/exercises/test_part7_answer.py
"""

from redis import Redis

CHANNEL = "answers"  # an agent sets answer:<question>, then publishes the question here


def wait_for_answer(redis: Redis, question: str, seconds: float) -> str | None:
    """Return the value of `answer:<question>` as soon as it is there; None after so many seconds.

    The answer may be there already, and it may come between any two of your commands. Do not poll.
    """
    raise NotImplementedError("your code: redis.pubsub() with get_message(timeout=…), and GET, in the right order")
