"""The check of part 7's exercise: the other agent answers at a moment of our choosing. fakeredis has channels, too."""

from collections.abc import Callable
from typing import Any

import pytest
from fakeredis import FakeRedis, FakeServer
from part7_answer import wait_for_answer

GETS = 5  # more of them in a fifth of a second would be polling


class Watched(FakeRedis):
    """Counts its GETs, and lets something happen after the first one."""

    gets = 0

    def after_first_get(self) -> None:
        """A test replaces this."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        reply = super().execute_command(*args, **options)
        if args[0] == "GET":
            self.gets += 1
            if self.gets == 1:
                self.after_first_get()
        return reply


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def redis(server: FakeServer) -> Watched:
    return Watched(server=server, decode_responses=True)


@pytest.fixture
def answer(server: FakeServer) -> Callable[[str, str], None]:
    """What the other agent does: the key first, then the message."""
    other = FakeRedis(server=server, decode_responses=True)

    def answer(question: str, text: str) -> None:
        other.set(f"answer:{question}", text)
        other.publish("answers", question)

    return answer


def test_an_answer_that_is_there_is_returned(redis: Watched, answer: Callable[[str, str], None]) -> None:
    """It was published before we listened; a channel keeps nothing, but the key does."""
    answer("six times nine?", "42")

    assert wait_for_answer(redis, "six times nine?", 60) == "42"


def test_an_answer_that_comes_after_a_look_is_not_missed(redis: Watched, answer: Callable[[str, str], None]) -> None:
    """It comes just after you have looked. If you subscribe only then, you never hear of it."""
    redis.after_first_get = lambda: answer("why?", "because")  # type: ignore[method-assign]

    assert wait_for_answer(redis, "why?", 3) == "because"


def test_another_question_is_not_ours(redis: Watched, answer: Callable[[str, str], None]) -> None:
    """A message wakes everybody who listens, but the answer to another question does not count."""
    redis.after_first_get = lambda: answer("when?", "now")  # type: ignore[method-assign]

    assert wait_for_answer(redis, "why?", 0.2) is None


def test_it_waits_without_asking(redis: Watched) -> None:
    """No answer within the time: None, after a few looks at most."""
    assert wait_for_answer(redis, "why?", 0.2) is None

    assert 1 <= redis.gets <= GETS
