"""Accepts connections for a server: one target, or the lobby of several."""

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
    """Listens. A UNIX socket admits only processes of users in `unix_uids`; None admits every process that can open
    it. With `tls`, every TCP connection must use TLS."""

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
        """Start to serve a connection. Called from the accepting thread or from the connection's own; must not wait for
        the client."""

    def _accept(self, listener: socket.socket) -> None:
        while not self._stopping:
            try:
                sock, _ = listener.accept()
            except OSError:
                if not self._stopping:
                    time.sleep(0.1)  # most likely out of descriptors: wait until other connections close
                continue
            try:
                if not transport.is_permitted(sock, self._unix_uids):
                    sock.close()
                elif self._tls is not None and sock.family != socket.AF_UNIX:
                    self._tls.accept(sock, self._admit)
                else:
                    self._admit(Stream(sock))
            except (OSError, RuntimeError) as error:  # the client is gone, or no descriptor or thread is left
                logger.error("cannot serve a client: %s", error)
                sock.close()
