"""A solution of part 7's exercise: listen first, then look, then wait; so whatever comes, one of them sees it."""

import time

from redis import Redis

CHANNEL = "answers"


def wait_for_answer(redis: Redis, question: str, seconds: float) -> str | None:
    """Return the value of `answer:<question>` as soon as it is there; None after so many seconds."""
    deadline = time.monotonic() + seconds
    with redis.pubsub() as pubsub:
        pubsub.subscribe(CHANNEL)
        pubsub.get_message(timeout=seconds)  # the confirmation: from here on we hear everything
        answer = redis.get(f"answer:{question}")
        while answer is None and (left := deadline - time.monotonic()) > 0:
            message = pubsub.get_message(timeout=left)
            if message and message["data"] == question:
                answer = redis.get(f"answer:{question}")
    return answer
