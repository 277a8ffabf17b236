"""How connections come in, for whoever serves them: a target, or the lobby of several."""

import contextlib
import logging
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Collection

from kvstore.net import transport
from kvstore.net.tls import ServerTls
from kvstore.net.transport import Stream

logger = logging.getLogger(__name__)


class Acceptor(ABC):
    """Listens. Only users of `unix_uids` are let in on a UNIX socket; None: all who can open it. With `tls` nobody is
    over TCP without it."""

    def __init__(self, unix_uids: Collection[int] | None = None, tls: ServerTls | None = None):
        self._unix_uids = unix_uids
        self._tls = tls
        self._listeners: list[socket.socket] = []
        self._stopping = False

    def serve(self, listener: socket.socket) -> None:
        """Accept clients on `listener` in a thread of its own."""
        self._listeners.append(listener)
        threading.Thread(target=self._accept, args=(listener,), name="kvtier-accept", daemon=True).start()

    def stop_accepting(self) -> None:
        self._stopping = True
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    @abstractmethod
    def _admit(self, stream: Stream) -> None:
        """Take a connection in, without waiting for its client. From the accepting thread, or from one of the
        connection's own."""

    def _accept(self, listener: socket.socket) -> None:
        while not self._stopping:
            try:
                sock, _ = listener.accept()
            except OSError:
                if not self._stopping:
                    time.sleep(0.1)  # out of descriptors, most likely: others will close theirs
                continue
            try:
                if not transport.is_permitted(sock, self._unix_uids):
                    sock.close()
                elif self._tls is not None and sock.family != socket.AF_UNIX:
                    self._tls.accept(sock, self._admit)
                else:
                    self._admit(Stream(sock))
            except (OSError, RuntimeError) as error:  # the client is gone, or no descriptor or thread to be had
                logger.error("a client cannot be served: %s", error)
                sock.close()
