"""Connections between rank 0 and each other rank, for what is no array: orders, answers, files.

`mx.distributed` waits by turning a processor core in circles and carries arrays alone; a rank that waits
for an evaluation of an hour waits here, asleep. Only who was told the token, through the group, is let in.
"""

import hmac
import json
import os
import socket
import struct
import sys
import time
from typing import Any, NamedTuple

from mlx_distill.errors import Stopped

SILENT = 8  # seconds after which the system gives up a machine that answers nothing, not even for its kernel
PURPOSES = ("orders", "watch")  # of the two connections of a rank
_HEAD = struct.Struct(">QQ")  # bytes of a message's values and of its data
_HELLO = struct.Struct(">32sIB")  # token, rank, number of the purpose


class Message(NamedTuple):
    """What is sent at once."""

    value: Any  # plain values
    data: bytes = b""


class Link:
    """A connection to one other rank."""

    def __init__(self, connection: socket.socket, rank: int):
        self.connection, self.rank = connection, rank
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        notice_silence(connection)

    def send(self, value: Any, data: bytes = b"") -> None:
        """Raises `Stopped` where the other rank has ended."""
        text = json.dumps(value).encode()
        try:
            self.connection.sendall(_HEAD.pack(len(text), len(data)) + text)
            if data:
                self.connection.sendall(data)
        except OSError as error:
            raise self._ended() from error

    def receive(self) -> Message:
        """The next message, however long it takes. Raises `Stopped` where the other rank has ended."""
        length, size = _HEAD.unpack(self._read(_HEAD.size))
        value = json.loads(self._read(length))
        return Message(value, self._read(size))

    def close(self) -> None:
        self.connection.close()

    def _read(self, size: int) -> bytes:
        content = bytearray(size)
        view, have = memoryview(content), 0
        while have < size:
            try:
                count = self.connection.recv_into(view[have:])
            except OSError as error:
                raise self._ended() from error
            if not count:
                raise self._ended()
            have += count
        return bytes(content)

    def _ended(self) -> Stopped:
        return Stopped(f"rank {self.rank} ended")


def notice_silence(connection: socket.socket) -> None:
    """Let the kernel ask the other one's kernel, so that a pulled cable or a power cut ends the connection.

    Kernels answer even while Python computes: no thread of ours has to be quick.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    tcp = socket.IPPROTO_TCP
    idle = socket.TCP_KEEPALIVE if sys.platform == "darwin" else socket.TCP_KEEPIDLE
    connection.setsockopt(tcp, idle, 2)
    connection.setsockopt(tcp, socket.TCP_KEEPINTVL, 2)
    connection.setsockopt(tcp, socket.TCP_KEEPCNT, (SILENT - 2) // 2)
    if sys.platform == "darwin":
        connection.setsockopt(tcp, 0x80, SILENT)  # TCP_RXT_CONNDROPTIME: seconds of sending in vain
    else:
        connection.setsockopt(tcp, socket.TCP_USER_TIMEOUT, 1000 * SILENT)


class Door:
    """Where rank 0 lets the others in.

    Args:
        addresses: of this machine, as far as known. Where all are its own loopback, nobody else can knock.
    """

    def __init__(self, addresses: list[str]):
        at_home = bool(addresses) and all(one.startswith("127.") for one in addresses)
        self.token = os.urandom(16).hex()
        self._server = socket.create_server(("127.0.0.1" if at_home else "", 0), backlog=64)
        self.card: dict[str, Any] = {
            "addresses": addresses if at_home else [*addresses, *own_addresses()],
            "port": self._server.getsockname()[1],
            "token": self.token,
        }

    def let_in(self, size: int, seconds: float = 60.0) -> dict[tuple[int, str], Link]:
        """Two connections of each rank from 1 on, by rank and purpose.

        Raises:
            Stopped: some did not come.
        """
        found: dict[tuple[int, str], Link] = {}
        end = time.monotonic() + seconds
        try:
            while len(found) < 2 * (size - 1):
                self._server.settimeout(max(0.01, end - time.monotonic()))
                connection, _ = self._server.accept()
                connection.settimeout(5)
                try:
                    token, rank, purpose = _HELLO.unpack(connection.recv(_HELLO.size, socket.MSG_WAITALL))
                except (OSError, struct.error):
                    token, rank, purpose = b"", 0, 0
                if hmac.compare_digest(token, self.token.encode()) and 0 < rank < size:
                    found[rank, PURPOSES[purpose]] = Link(connection, rank)
                else:
                    connection.close()  # a stranger
        except TimeoutError:
            missing = min(rank for rank in range(1, size) if (rank, PURPOSES[-1]) not in found)
            raise Stopped(
                f"rank {missing} did not connect to rank 0 within {seconds:.0f} s; "
                f"is a firewall between the machines? Rank 0 is at {', '.join(self.card['addresses'])}"
            ) from None
        finally:
            self._server.close()
        return found


def knock(card: dict[str, Any], rank: int) -> dict[str, Link]:
    """The connections of this rank to rank 0, by purpose.

    Args:
        card: rank 0's `Door.card`.

    Raises:
        Stopped: rank 0 answers at none of its addresses.
    """
    for address in card["addresses"]:
        try:
            found = {}
            for number, purpose in enumerate(PURPOSES):
                connection = socket.create_connection((address, card["port"]), timeout=5)
                connection.sendall(_HELLO.pack(card["token"].encode(), rank, number))
                found[purpose] = Link(connection, 0)
            return found
        except OSError:
            continue
    tried = ", ".join(card["addresses"])
    raise Stopped(f"rank {rank} reaches rank 0 at none of {tried}; is a firewall between the machines?")


def own_addresses() -> list[str]:
    """Where this machine is reached by its name, and by itself."""
    found = []
    for name in (socket.gethostname(), f"{socket.gethostname().removesuffix('.local')}.local"):
        try:
            found += [str(info[4][0]) for info in socket.getaddrinfo(name, None, socket.AF_INET)]
        except OSError:
            continue
    return [*dict.fromkeys([*found, "127.0.0.1"])]
