"""Authenticates the clients of several namespaces on one address, then hands each to its namespace's target.

Authentication is mutual (docs/wire.md): the client and the target each prove that they know the namespace's credential.
A wrong credential and an unknown namespace get the same answer after the same work, so a client cannot tell them apart.
"""

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Collection
from typing import NamedTuple

from kvstore.credentials import Credential
from kvstore.net import wire
from kvstore.net.accept import Acceptor
from kvstore.net.target import Target
from kvstore.net.tls import ServerTls
from kvstore.net.transport import Stream
from kvstore.net.wire import Header, Op, ProtocolError
from kvstore.rarely import COMPLAIN_SECONDS, Rarely
from kvstore.text import shown

logger = logging.getLogger(__name__)

GREETING_SECONDS = 5.0
GREETING_BYTES_MAX = 8 << 10  # of a frame: four names of 256 characters, and the nonces
# Connections that have not authenticated. Beyond this the lobby closes the oldest: a flood of silent connections does
# not block a client that authenticates quickly.
GREETINGS_MAX = 256
_REFUSED = "unknown namespace, or wrong credential for it"


class Member(NamedTuple):
    """A namespace's target, and the credential of its clients."""

    target: Target
    credential: Credential


class Lobby(Acceptor):
    """Listens for the targets of several namespaces. Thread-safe."""

    def __init__(self, unix_uids: Collection[int] | None = None, tls: ServerTls | None = None) -> None:
        super().__init__(unix_uids, tls)
        self._members: dict[str, Member] = {}
        self._unknown = Credential.random()  # checked for unknown namespaces, so that the check takes as long
        self._greeting: dict[Stream, None] = {}  # not authenticated yet; the oldest first
        self._lock = threading.Lock()
        self.refused = 0  # greetings
        self._complains = Rarely(COMPLAIN_SECONDS)

    @property
    def members(self) -> dict[str, Member]:
        with self._lock:
            return dict(self._members)

    def admit(self, namespace: str, target: Target, credential: Credential) -> None:
        """Serve clients with this credential from now on. If the namespace had another one, its clients are
        disconnected and must authenticate again."""
        with self._lock:
            before = self._members.get(namespace)
            self._members[namespace] = Member(target, credential)
        if before is not None and before.credential != credential:
            before.target.disconnect()

    def expel(self, namespace: str) -> None:
        """Stop serving the namespace and close its connections. Chunks that wait to be written are dropped: no client
        can read them, and changes to other namespaces wait for this call. The caller closes the shelf."""
        with self._lock:
            member = self._members.pop(namespace)
        member.target.disconnect()
        member.target.stop(flush_seconds=0.0)

    def stop(self) -> None:
        """Stop accepting, let running requests finish, and close."""
        self.stop_accepting()
        with self._lock:
            greeting, members = list(self._greeting), list(self._members.values())
        for stream in greeting:
            stream.abort()
        stopping = [threading.Thread(target=member.target.stop) for member in members]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()

    def _admit(self, stream: Stream) -> None:
        with self._lock:
            self._greeting[stream] = None
            if len(self._greeting) > GREETINGS_MAX:
                next(iter(self._greeting)).abort()
        try:
            threading.Thread(target=self._session, args=(stream,), name="kvtier-session", daemon=True).start()
        except RuntimeError as error:
            logger.error("cannot serve a client: %s", error)
            self._forget(stream)
            stream.close()

    def _forget(self, stream: Stream) -> None:
        with self._lock:
            self._greeting.pop(stream, None)

    def _session(self, stream: Stream) -> None:
        deadline = time.monotonic() + GREETING_SECONDS
        try:
            header, hello, challenge, member = self._greet(stream, deadline)
        except ProtocolError as error:
            self._complain(error)
            with contextlib.suppress(OSError):
                stream.send([wire.encode(Header(Op.ERROR), wire.Failure(str(error)))], deadline)
            stream.close()
            return
        except OSError as error:
            logger.debug("a greeting ended: %r", error)
            stream.close()
            return
        finally:
            self._forget(stream)
        target, credential = member
        target.adopt(stream, header, hello, lambda welcome: credential.sign(wire.transcript(hello, challenge, welcome)))

    def _greet(self, stream: Stream, deadline: float) -> tuple[Header, wire.Hello, wire.Challenge, Member]:
        header = _expect(stream, Op.HELLO, deadline)
        hello = wire.decode_control(stream.receive_control(header, deadline), wire.Hello)
        challenge = wire.Challenge(secrets.token_bytes(wire.NONCE_BYTES))
        proof = b""
        if len(hello.nonce) == wire.NONCE_BYTES:
            stream.send([wire.encode(Header(Op.CHALLENGE, header.request), challenge)], deadline)
            header = _expect(stream, Op.PROVE, deadline)
            proof = wire.decode_control(stream.receive_control(header, deadline), wire.Prove).proof
        with self._lock:
            member = self._members.get(hello.namespace)
        credential = self._unknown if member is None else member.credential
        proved = credential.signed(proof, wire.transcript(hello, challenge))
        if member is None or not proved:
            raise ProtocolError(_REFUSED)
        return header, hello, challenge, member

    def _complain(self, error: ProtocolError) -> None:
        """Log it, rate-limited."""
        with self._lock:
            self.refused += 1
            if not self._complains():
                return
            count = self.refused
        logger.warning("closing a connection: %s (%d so far)", shown(error), count)


def _expect(stream: Stream, op: Op, deadline: float) -> Header:
    header = stream.receive_header(deadline)
    if header.op is not op:
        raise ProtocolError(f"got {header.op.name}, expected {op.name}")
    if header.control_bytes > GREETING_BYTES_MAX:
        raise ProtocolError(f"{op.name} of {header.control_bytes} bytes, at most {GREETING_BYTES_MAX}")
    return header
