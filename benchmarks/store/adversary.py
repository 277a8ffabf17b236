"""A malicious target: it speaks the protocol, stores puts, and answers each GET as instructed."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from crc32c import crc32c

from kvstore.net import wire
from kvstore.net.transport import Stream
from kvstore.net.wire import Header, Op, Outcome

BOUND_SECONDS = 20.0


class Answer(NamedTuple):
    """The adversary's answer for one key of a GET."""

    value: bytes
    outcome: int = Outcome.HIT
    crc: int | None = None  # None: the right one
    sent: int | None = None  # send only so many bytes of the value, then close the connection


class Adversary:
    """A target on a port of its own. `answer` is called for each key of a GET, with its name and the size of the
    client's buffer."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.answer: Callable[[bytes, int], Answer] = lambda name, size: Answer(b"", Outcome.MISS)
        self.exchange_numbers = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(Stream(sock),), daemon=True).start()

    def _serve(self, stream: Stream) -> None:
        with contextlib.closing(stream), contextlib.suppress(OSError):
            while stream.wait_for_frame():
                deadline = time.monotonic() + BOUND_SECONDS
                header = stream.receive_header(deadline)
                control = stream.receive_control(header, deadline)
                match header.op:
                    case Op.HELLO:
                        welcome = wire.Welcome(self.address, 1, wire.VALUE_BYTES_MAX, "")
                        stream.send([wire.encode(Header(Op.WELCOME, header.request), welcome)], deadline)
                    case Op.PUT:
                        self._put(stream, header, wire.decode_control(control, wire.Put), deadline)
                    case Op.GET:
                        self._get(stream, header.request, wire.decode_control(control, wire.Get), deadline)
                    case _:
                        return

    def _put(self, stream: Stream, header: Header, put: wire.Put, deadline: float) -> None:
        for item in put.items:
            value = bytearray(item.length)
            stream.receive(memoryview(value), deadline)
            self.values[item.key] = bytes(value)
        outcomes = wire.Outcomes([Outcome.STORED] * len(put.items))
        stream.send([wire.encode(Header(Op.STORED, header.request), outcomes)], deadline)

    def _get(self, stream: Stream, request: int, get: wire.Get, deadline: float) -> None:
        numbers = list(range(len(get.keys)))
        if self.exchange_numbers:
            numbers.reverse()
        for number, name, size in zip(numbers, get.keys, get.sizes, strict=True):
            value, outcome, crc, sent = self.answer(name, size)
            crc = crc32c(value) if crc is None else crc
            frame = wire.encode(Header(Op.VALUE, request, outcome, number, crc, data_bytes=len(value)))
            stream.send([frame, value[:sent]], deadline)
            if sent is not None:
                raise ConnectionAbortedError
