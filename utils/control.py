"""A line between all ranks for what cannot wait for their next exchange: a rank that fails or vanishes, a stop, a hang.

It is a star of TCP connections around rank 0, beside torch.distributed, in whose calls a rank may be stuck.  A process that dies
loses its connection at once: its kernel closes it.  A machine or a cable that dies is noticed by TCP's keep-alive probes.  Those
are answered by kernels, so a process that is busy or stopped is never taken for a dead one; one that is stopped for long is noticed
by the signs of life that it does not give (:data:`ALIVE`).
"""

import json
import os
import secrets
import selectors
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from utils.errors import UserError
from utils.topology import Topology

CONNECT_SECONDS = 60.0
# Silence is probed after 5 s, then every 3 s; four probes without an answer end the connection: 17 s.
PROBES = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 17_000}

ALIVE = "alive"
"""The kind of message that tells that its sender lives: of each rank for rank 0, and of rank 0 for all.  It is not passed on."""

Message = dict[str, Any]
"""JSON values; ``kind`` says what it is, ``rank`` who sent it."""


@dataclass
class _Peer:
    """The other end of a connection."""

    rank: int
    connection: socket.socket
    unread: bytes = b""


class ControlLine:
    """Messages from every rank to every other, and the news of ranks that are gone."""

    def __init__(self, topology: Topology):
        """Connect; collective.  Raises UserError if a rank cannot be reached."""
        self.rank = topology.rank
        self.hosts = topology.gather(socket.gethostname())
        """Name of each rank's machine."""
        self._sending = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._peers: dict[int, _Peer] = {}
        if topology.world_size > 1:
            self._connect(topology)

    def _connect(self, topology: Topology) -> None:
        server = _listen() if self.rank == 0 else None
        # The token keeps out whatever else knocks at the port.
        port, token = topology.broadcast((server.getsockname()[1], secrets.token_hex(16)) if server else None)
        if server is None:
            try:
                connection = socket.create_connection((os.environ["MASTER_ADDR"], port), CONNECT_SECONDS)
            except OSError as error:
                raise UserError(
                    f"rank {self.rank} on {self.hosts[self.rank]} cannot reach rank 0 at {os.environ['MASTER_ADDR']}:{port} "
                    f"({error}); the machines of a run must reach each other at any port"
                ) from None
            self._add(0, connection)
            self._send_to(self._peers[0], {"rank": self.rank, "token": token})
            return
        deadline = time.monotonic() + CONNECT_SECONDS
        with server:
            while len(self._peers) < topology.world_size - 1 and time.monotonic() < deadline:
                server.settimeout(max(0.1, deadline - time.monotonic()))
                with suppress(OSError, ValueError, KeyError, TypeError):
                    connection, _ = server.accept()
                    connection.settimeout(5.0)
                    hello = json.loads(connection.makefile("rb").readline(1000))
                    if secrets.compare_digest(hello["token"], token):
                        self._add(int(hello["rank"]), connection)
        if missing := sorted(set(range(1, topology.world_size)) - self._peers.keys()):
            names = ", ".join(f"{rank} on {self.hosts[rank]}" for rank in missing)
            raise UserError(f"rank 0 on {self.hosts[0]} was not reached at port {port} by rank {names}")

    def _add(self, rank: int, connection: socket.socket) -> None:
        connection.settimeout(10.0)  # of sending; what is received is there already
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in PROBES.items():
            if hasattr(socket, name):  # macOS calls them otherwise
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._peers[rank] = peer = _Peer(rank, connection)
        self._selector.register(connection, selectors.EVENT_READ, peer)

    @property
    def connected(self) -> list[int]:
        """The ranks at the other ends: all others for rank 0, and rank 0 for those."""
        return sorted(self._peers)

    def send(self, kind: str, **values: Any) -> None:
        """To all other ranks; from any thread.  Those that are gone get nothing."""
        self._pass_on({"kind": kind, "rank": self.rank, **values})

    def _pass_on(self, message: Message) -> None:
        for peer in list(self._peers.values()):
            if peer.rank != message["rank"]:
                self._send_to(peer, message)

    def _send_to(self, peer: _Peer, message: Message) -> None:
        with self._sending, suppress(OSError):  # who is gone is told by `receive`
            peer.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float) -> list[Message]:
        """What has come, waiting up to ``timeout`` seconds for something.  ``{"kind": "lost", "rank": r}``: r's connection ended.

        Rank 0 passes on what the others send.
        """
        messages: list[Message] = []
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                self._woken.recv(64)
                continue
            peer: _Peer = key.data
            try:
                data = peer.connection.recv(65536)
            except OSError:
                data = b""
            if not data:
                self._drop(peer)
                messages.append({"kind": "lost", "rank": peer.rank})
                continue
            *lines, peer.unread = (peer.unread + data).split(b"\n")
            for line in lines:
                messages.append(message := json.loads(line))
                if self.rank == 0 and message["kind"] != ALIVE:
                    self._pass_on(message)
        return messages

    def wake(self) -> None:
        """Let ``receive`` return at once."""
        self._waker.send(b"!")

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()
        self._peers.pop(peer.rank, None)

    def close(self) -> None:
        for peer in list(self._peers.values()):
            self._drop(peer)
        self._selector.close()
        self._waker.close()
        self._woken.close()


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)
