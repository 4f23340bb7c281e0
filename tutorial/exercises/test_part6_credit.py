"""The check of part 6's exercise: a worker dies before its first, second … command, and the next one tries again."""

import contextlib
from typing import Any

import pytest
from fakeredis import FakeRedis, FakeServer
from part6_credit import credit

COMMANDS = 5  # no solution needs more


class Died(BaseException):
    """The worker is gone."""


class Dying(FakeRedis):
    """Dies before its n-th command; a MULTI or a script counts as one, since the server runs it as a whole."""

    commands_left = COMMANDS

    def execute_command(self, *args: Any, **options: Any) -> Any:
        if self.commands_left == 0:
            raise Died
        self.commands_left -= 1
        return super().execute_command(*args, **options)


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


def test_the_same_payment_counts_once(server: FakeServer) -> None:
    """A second call with the same id changes nothing, and returns the balance."""
    redis = FakeRedis(server=server, decode_responses=True)

    assert [int(credit(redis, "ann", 100, "p1")) for _ in range(2)] == [100, 100]


def test_every_payment_counts(server: FakeServer) -> None:
    """Other payments and other accounts are not mistaken for it."""
    redis = FakeRedis(server=server, decode_responses=True)
    credit(redis, "ann", 100, "p1")
    credit(redis, "bob", 5, "p3")

    assert int(credit(redis, "ann", 20, "p2")) == 120


@pytest.mark.parametrize("commands", range(COMMANDS))
def test_a_worker_that_dies_neither_loses_nor_doubles(server: FakeServer, commands: int) -> None:
    """Wherever the first worker dies, after the second one the money is there once."""
    dying = Dying(server=server, decode_responses=True)
    dying.commands_left = commands
    with contextlib.suppress(Died):  # if it needs fewer commands, it does not die
        credit(dying, "ann", 100, "p1")

    assert int(credit(FakeRedis(server=server, decode_responses=True), "ann", 100, "p1")) == 100
