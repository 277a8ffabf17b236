"""Frames over TLS 1.3: a transport.Stream with encryption and an authenticated peer.

OpenSSL works on memory BIOs here; this module reads and writes the socket itself. So one thread may receive while
another sends, which OpenSSL does not allow on a socket, and one system call moves several records of 16 KiB.

A side that is configured for TLS never falls back to plain frames.
"""

import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kvstore import certificates, private
from kvstore.certificates import CLIENT, SERVER, Files
from kvstore.errors import ConfigError
from kvstore.net import transport, wire
from kvstore.net.transport import Stream
from kvstore.net.wire import Header, Op
from kvstore.rarely import COMPLAIN_SECONDS, Rarely

logger = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 5.0
# Unfinished handshakes. Beyond this the oldest is closed: a flood of silent connections does not block a client that is
# quick.
HANDSHAKES_MAX = 256
# A changed file is noticed within this time.
RELOAD_SECONDS = 1.0
# AES-GCM is good for 2^24.5 records under one key (RFC 8446, 5.5), and ssl cannot change the key of a connection.
RECORDS_MAX = 1 << 24
_RECORD_BYTES = 16 << 10
# Plaintext per call of OpenSSL. More is no faster, and a connection keeps about four times as much memory.
_PIECE_BYTES = 4 * _RECORD_BYTES
# A piece plus the overhead of its records, so that a receive mostly ends at the end of a record.
_ROOM_BYTES = _PIECE_BYTES + 1024
_LINGER_SECONDS = 1.0
_LINGER_BYTES_MAX = 64 << 10


class PlainClientError(ConnectionError):
    """A client sends plain frames to a target that requires TLS."""


class TlsStream(Stream):
    """A stream whose frames are encrypted; `shake_hands` comes before them. Its twin shares the TLS session."""

    def __init__(self, sock: socket.socket, session: "_Session"):
        super().__init__(sock)
        self._session = session
        self._ciphertext = memoryview(b"")  # to be sent
        self._plaintext_bytes = 0  # plaintext length of `_ciphertext`
        self._room = memoryview(b"")  # receive buffer for ciphertext
        self._first, self._has_first = memoryview(bytearray(1)), False  # first byte of a frame, from `wait_for_frame`
        self.has_received = False  # whether the peer has sent anything

    def shake_hands(self, deadline: float) -> None:
        """Do the handshake. Raises TimeoutError, and ConnectionError with the reason."""
        try:
            while not self._session.shake_hands():
                self._flush(deadline)
                if not self._feed(deadline):
                    raise ConnectionResetError("TLS: the peer closed the connection before the handshake was done")
                if not self.has_received:
                    self._session.check_not_plain(self._room[0])
                self.has_received = True
            self._flush(deadline)
        except _TlsError:
            with contextlib.suppress(OSError):
                self._flush(deadline)  # tell the peer why
            raise

    def refuse(self, error: OSError, deadline: float) -> None:
        """Close after a failed handshake. A peer that sends plain frames gets an ERROR. The peer's data is read until
        then: closing with unread data would reset the connection, and the ERROR would be lost."""
        deadline = min(deadline, time.monotonic() + _LINGER_SECONDS)
        with contextlib.suppress(OSError):
            if isinstance(error, PlainClientError):
                self._arm(deadline)
                self._socket.sendall(wire.encode(Header(Op.ERROR), wire.Failure(str(error))))
            self._socket.shutdown(socket.SHUT_WR)
            left = _LINGER_BYTES_MAX
            while left > 0 and (count := self._receive_raw(deadline)):
                left -= count
        self.close()

    def _send_some(self, parts: Sequence[memoryview], deadline: float) -> int:
        if not self._ciphertext:
            self._plaintext_bytes, ciphertext = self._session.encrypt(parts)
            self._ciphertext = memoryview(ciphertext)
        self._arm(deadline)
        self._ciphertext = self._ciphertext[self._socket.send(self._ciphertext) :]
        return 0 if self._ciphertext else self._plaintext_bytes

    def _receive_some(self, into: memoryview, deadline: float) -> int:
        if self._has_first:
            into[:1], self._has_first = self._first, False
            return 1
        while (count := self._session.decrypt(into)) is None:
            if not self._feed(deadline):
                return 0
        return count

    def _feed(self, deadline: float) -> bool:
        """Receive some ciphertext; False at the end of the connection."""
        count = self._receive_raw(deadline)
        self._session.feed(self._room[:count])
        return count > 0

    def _receive_raw(self, deadline: float) -> int:
        if not self._room:
            self._room = memoryview(bytearray(_ROOM_BYTES))
        self._arm(deadline)
        return self._socket.recv_into(self._room)

    def _flush(self, deadline: float) -> None:
        self._arm(deadline)
        self._socket.sendall(self._session.pending_output())

    def twin(self) -> "TlsStream":
        return TlsStream(self._socket.dup(), self._session)

    def wait_for_frame(self) -> bool:
        while True:
            with contextlib.suppress(TimeoutError):
                deadline = time.monotonic() + transport.PATIENCE_SECONDS
                self._has_first = self._receive_some(self._first, deadline) > 0
                return self._has_first

    def is_idle(self) -> bool:
        """Also False if the connection's keys are used up."""
        return self._session.is_fresh and super().is_idle()


class _TlsError(ConnectionError):
    """An error of OpenSSL, with a readable text."""


class _Session:
    """A TLS session without a socket: plaintext on one side, ciphertext on the other. Thread-safe; one thread sends."""

    def __init__(self, context: ssl.SSLContext, server_name: str | None = None):
        """With `server_name` a client's session, which checks the certificate for that name; without, a server's."""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._is_server = server_name is None
        self._ssl = context.wrap_bio(
            self._incoming, self._outgoing, server_side=self._is_server, server_hostname=server_name
        )
        self._records = [0, 0]  # sent, received
        self._lock = threading.Lock()

    def shake_hands(self) -> bool:
        """Whether the handshake is done; False if it needs more data from the peer."""
        with self._lock:
            try:
                self._ssl.do_handshake()
            except ssl.SSLWantReadError:
                return False
            except ssl.SSLError as error:
                raise self._worded(error) from None
            return True

    def check_not_plain(self, first: int) -> None:
        """Raises ConnectionError if the peer's first byte is that of a plain frame."""
        if first != wire.MAGIC[0]:
            return
        if self._is_server:
            raise PlainClientError("this target requires TLS: give the client --store-tls-ca")
        raise ConnectionError("the target does not use TLS: give it --tls-cert and --tls-key")

    def feed(self, ciphertext: memoryview) -> None:
        with self._lock:
            self._incoming.write(ciphertext)

    def pending_output(self) -> bytes:
        with self._lock:
            return self._outgoing.read()

    def encrypt(self, parts: Sequence[memoryview]) -> tuple[int, bytes]:
        """The number of bytes, from the start of `parts`, that were encrypted, and their ciphertext."""
        done = 0
        with self._lock:
            try:
                for part in parts:
                    part = part[: _PIECE_BYTES - done]
                    while part:
                        count = self._ssl.write(part)
                        self._records[0] += -(-count // _RECORD_BYTES)
                        done, part = done + count, part[count:]
                    if done == _PIECE_BYTES:
                        break
            except ssl.SSLError as error:
                raise self._worded(error) from None
            return done, self._outgoing.read()

    def decrypt(self, into: memoryview) -> int | None:
        """The number of bytes decrypted into `into`; 0 at the end of the session, None if more ciphertext is needed."""
        done = 0
        with self._lock:
            try:
                # If both are empty there is nothing to read; asking `ssl` would take longer than decrypting a record.
                while done < len(into) and (self._incoming.pending or self._ssl.pending()):
                    count: int = self._ssl.read(len(into) - done, into[done:])  # type: ignore[assignment]
                    if not count:
                        return done
                    self._records[1] += 1
                    done += count
            except ssl.SSLWantReadError:
                pass  # an incomplete record
            except ssl.SSLError as error:
                raise self._worded(error) from None
            return done or None

    @property
    def is_fresh(self) -> bool:
        """Whether there is nothing to read, and the keys are below their record limit."""
        with self._lock:
            return not self._incoming.pending and not self._ssl.pending() and max(self._records) < RECORDS_MAX

    def _worded(self, error: ssl.SSLError) -> _TlsError:
        return _TlsError(f"TLS: {_words(error, self._is_server)}")


def _words(error: ssl.SSLError, is_server: bool) -> str:
    """The problem, and the option of this side or of the peer that it concerns."""
    mine, theirs = (SERVER, CLIENT) if is_server else (CLIENT, SERVER)
    peer = "client" if is_server else "target"
    reason = error.reason or str(error)
    told = reason.lower().replace("_", " ")
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the {peer}'s certificate is not valid for --{mine.ca}: {error.verify_message}"
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return f"the client has no certificate: give it --{theirs.cert} and --{theirs.key}"
    if "ALERT" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason):
        return f"the {peer} does not accept the certificate of --{mine.cert} for its --{theirs.ca}: {told}"
    return told


class ServerTls:
    """A target's certificate and its unfinished handshakes. Thread-safe."""

    def __init__(self, files: Files):
        """Raises ConfigError."""
        self._files = files
        self._loaded = certificates.load(files, SERVER)
        self._shaking: dict[TlsStream, None] = {}  # unfinished handshakes; the oldest first
        self._lock = threading.Lock()
        self._complains = Rarely(COMPLAIN_SECONDS)
        self.refused = 0  # connections
        self._log()

    @property
    def valid_until(self) -> float:
        """End of the certificate's validity, in seconds since 1970; 0 if unknown."""
        return self._loaded.valid_until.timestamp() if self._loaded.valid_until else 0.0

    def reload(self) -> None:
        """Read the files again, for new connections. If they are invalid, log it and keep the old ones."""
        try:
            self._loaded = certificates.load(self._files, SERVER)
        except ConfigError as error:
            logger.error("keeping the old TLS certificates: %s", error)
            return
        self._log()

    def _log(self) -> None:
        asked = "; clients need a certificate" if self._files.ca else ""
        logger.info("TLS: certificate %s, valid until %s%s", self._files.cert, self._loaded.valid_until, asked)

    def accept(self, sock: socket.socket, admit: Callable[[Stream], None]) -> None:
        """Do the handshake in a thread of its own, which then calls `admit`. Raises OSError if the client is gone,
        RuntimeError if no thread can be started."""
        stream = TlsStream(sock, _Session(self._loaded.context))
        with self._lock:
            self._shaking[stream] = None
            if len(self._shaking) > HANDSHAKES_MAX:
                oldest = next(iter(self._shaking))
                del self._shaking[oldest]
                oldest.abort()
        try:
            threading.Thread(target=self._shake_hands, args=(stream, admit), name="kvtier-tls", daemon=True).start()
        except RuntimeError:
            self._forget(stream)
            raise

    def _shake_hands(self, stream: TlsStream, admit: Callable[[Stream], None]) -> None:
        deadline = time.monotonic() + HANDSHAKE_SECONDS
        try:
            stream.shake_hands(deadline)
        except OSError as error:
            if stream.has_received or not isinstance(error, ConnectionResetError):  # otherwise it was a probe
                self._complain(error)
            stream.refuse(error, deadline)
            return
        finally:
            self._forget(stream)
        admit(stream)

    def _forget(self, stream: TlsStream) -> None:
        with self._lock:
            self._shaking.pop(stream, None)

    def _complain(self, error: OSError) -> None:
        """Log it, rate-limited."""
        with self._lock:
            self.refused += 1
            if not self._complains():
                return
            count = self.refused
        late = isinstance(error, TimeoutError)
        reason = f"TLS: no handshake within {HANDSHAKE_SECONDS:g} s" if late else str(error)
        logger.warning("closing a connection: %s (%d so far)", reason, count)


class ClientTls:
    """The CAs that a client trusts, and its own certificate; reloaded when the files change. Thread-safe."""

    def __init__(self, files: Files):
        """Raises ConfigError."""
        self._files = files
        self._stamps = self._look()
        self._context = certificates.load(files, CLIENT).context
        self._lock = threading.Lock()
        self._look_at = time.monotonic() + RELOAD_SECONDS

    def connect(self, address: str, deadline: float) -> TlsStream:
        """A stream to `host:port`, whose certificate must be valid for that host. The caller must call
        `shake_hands`."""
        host, _ = transport.split_address(address)
        sock = transport.connected(address, deadline)
        try:
            return TlsStream(sock, _Session(self._current(), host))
        except BaseException:
            sock.close()
            raise

    def _current(self) -> ssl.SSLContext:
        with self._lock:
            if time.monotonic() >= self._look_at:
                self._look_at = time.monotonic() + RELOAD_SECONDS
                self._reload()
            return self._context

    def _reload(self) -> None:
        """With the lock held."""
        stamps = self._look()
        if stamps == self._stamps:
            return
        self._stamps = stamps
        try:
            self._context = certificates.load(self._files, CLIENT).context
        except ConfigError as error:
            logger.error("keeping the old TLS certificates: %s", error)
            return
        logger.info("TLS: new certificates from %s", ", ".join(path for path in self._files if path))

    def _look(self) -> list[tuple[int, ...]]:
        return [private.stamp(Path(path)) for path in self._files if path]


def open_server(files: Files, carrier: str = "") -> ServerTls | None:
    """A target's TLS; None if no file is given. Raises ConfigError."""
    return ServerTls(files) if _asked(files, SERVER, carrier) else None


def open_client(files: Files, carrier: str = "") -> ClientTls | None:
    """A client's TLS; None if no file is given. Raises ConfigError."""
    return ClientTls(files) if _asked(files, CLIENT, carrier) else None


def _asked(files: Files, names: certificates.Names, carrier: str) -> bool:
    if not certificates.checked(files, names):
        return False
    if carrier:
        option = names.cert if names is SERVER else names.ca
        expected = "one of the two: a carrier moves values without TLS"
        raise ConfigError.conflicting("carrier", carrier, f"--{option}", expected)
    return True
