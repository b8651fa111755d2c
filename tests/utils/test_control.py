"""The line between ranks, with a thread for each rank and real connections."""

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from utils import control
from utils.control import ALIVE, ControlLine, Message
from utils.errors import UserError


class Threads:
    """What a line needs of the topology, for ranks that are threads."""

    def __init__(self, rank: int, world_size: int, values: list[Any], barrier: threading.Barrier):
        self.rank, self.world_size, self._values, self._barrier = rank, world_size, values, barrier

    def gather(self, value: Any) -> list[Any]:
        self._values[self.rank] = value
        self._barrier.wait(30)
        gathered = list(self._values)
        self._barrier.wait(30)
        return gathered

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]


def connect(world_size: int, make: Callable[[Threads], Any] = ControlLine) -> list[Any]:
    values, barrier = [None] * world_size, threading.Barrier(world_size)
    ranks = [Threads(rank, world_size, values, barrier) for rank in range(world_size)]
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(make, ranks))


@pytest.fixture(autouse=True)
def address(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def receive(line: ControlLine, count: int) -> list[Message]:
    """So many messages; what did not come in 30 s is missing."""
    messages: list[Message] = []
    deadline = time.monotonic() + 30
    while len(messages) < count and time.monotonic() < deadline:
        messages += line.receive(0.1)
    return messages


def test_what_one_sends_all_others_get_and_who_vanishes_is_noticed():
    lines = connect(4)
    assert all(line.hosts == [socket.gethostname()] * 4 for line in lines)
    lines[0].send("stop", reason="SIGTERM")
    for line in lines[1:]:
        assert receive(line, 1) == [{"kind": "stop", "rank": 0, "reason": "SIGTERM"}]
    lines[2].send("hung", text="step 3")
    for line in (lines[0], lines[1], lines[3]):
        assert receive(line, 1) == [{"kind": "hung", "rank": 2, "text": "step 3"}]
    assert lines[2].receive(0.1) == []

    lines[3].close()
    assert receive(lines[0], 1) == [{"kind": "lost", "rank": 3}]
    lines[0].send("stop", reason="to those who are left")
    assert receive(lines[1], 1) == receive(lines[2], 1)
    lines[0].close()
    assert receive(lines[1], 1) == receive(lines[2], 1) == [{"kind": "lost", "rank": 0}]
    for line in lines[1:3]:
        line.close()


def test_signs_of_life_go_to_the_next_rank_only():
    lines = connect(3)
    assert [line.connected for line in lines] == [[1, 2], [0], [0]]
    lines[1].send(ALIVE, phase="encoding")
    assert receive(lines[0], 1) == [{"kind": ALIVE, "rank": 1, "phase": "encoding"}]
    lines[0].send(ALIVE, phase="encoding")
    lines[0].send("stop", reason="SIGTERM")
    for line in lines[1:]:
        assert receive(line, 2) == [
            {"kind": ALIVE, "rank": 0, "phase": "encoding"},
            {"kind": "stop", "rank": 0, "reason": "SIGTERM"},
        ]
    for line in lines:
        line.close()


def test_many_messages_at_once_come_in_order():
    one, other = connect(2)
    for number in range(1000):
        one.send("stop", number=number)
    assert [message["number"] for message in receive(other, 1000)] == list(range(1000))
    one.close()
    other.close()


def test_one_process_has_no_connections():
    [line] = connect(1)
    line.send("stop", reason="SIGTERM")
    assert line.receive(0) == []
    line.close()


def test_a_stranger_is_not_let_in():
    class Intruded(Threads):
        def broadcast(self, value: Any) -> Any:
            if self.rank == 0:
                for hello in ({"rank": 1, "token": "guessed"}, [], {"rank": 1}):
                    with socket.create_connection(("127.0.0.1", value[0])) as stranger:
                        stranger.sendall(json.dumps(hello).encode() + b"\n")
            return super().broadcast(value)

    values, barrier = [None] * 2, threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(ControlLine, [Intruded(rank, 2, values, barrier) for rank in range(2)])
    other.send("stop", reason="of the real rank 1")
    assert receive(one, 1) == [{"kind": "stop", "rank": 1, "reason": "of the real rank 1"}]
    one.close()
    other.close()


def test_a_rank_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setattr(control, "CONNECT_SECONDS", 1.0)

    def make(rank: Threads) -> Any:
        if rank.rank == 1:  # takes part in the exchange and never connects
            return rank.gather("elsewhere"), rank.broadcast(None)
        with pytest.raises(UserError, match=r"was not reached at port \d+ by rank 1 on elsewhere"):
            ControlLine(rank)
        return None

    connect(2, make)


def test_an_address_that_does_not_answer_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]

    class Nobody(Threads):
        def gather(self, value: Any) -> list[Any]:
            return ["first", "second"]

        def broadcast(self, value: Any) -> Any:
            return port, "token"

    with pytest.raises(UserError, match=rf"rank 1 on second cannot reach rank 0 at 127.0.0.1:{port} .*refused"):
        ControlLine(Nobody(1, 2, [], threading.Barrier(1)))
