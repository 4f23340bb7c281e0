"""A proxy that cuts connections, delays what it passes on, and drops replies half-way, at random."""

import contextlib
import random
import socket
import threading
import time

from conftest import Proxy

LONGEST_DELAY_SECONDS = 0.02


class ChaosProxy(Proxy):
    """While `at_work`, a part of all chunks is delayed, and a part is the last of its connection: a request that never
    arrives, a reply of which nothing or only a half arrives."""

    def __init__(self, port: int, cut_chance: float = 0.01, delay_chance: float = 0.1) -> None:
        super().__init__(port, cut_before=b"")
        self.cut_chance, self.delay_chance = cut_chance, delay_chance
        self.at_work = threading.Event()
        self.chance = random.Random(1)
        self.cut_requests = self.cut_replies = self.half_replies = 0

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:  # the listener is closed: the test is over
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:  # the server is down, as the client learns
                client.close()
                continue
            for source, target, replies in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pass, args=(source, target, replies), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, replies: bool) -> None:
        with contextlib.suppress(OSError):  # one side has gone, which the other is told below
            while data := source.recv(65536):
                if self.at_work.is_set():
                    if self.chance.random() < self.delay_chance:
                        time.sleep(self.chance.random() * LONGEST_DELAY_SECONDS)
                    if self.chance.random() < self.cut_chance:
                        if not replies:
                            self.cut_requests += 1
                        elif self.chance.random() < 0.5:
                            self.cut_replies += 1
                        else:
                            self.half_replies += 1
                            target.sendall(data[: len(data) // 2])
                        break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
