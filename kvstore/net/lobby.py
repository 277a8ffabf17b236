"""Where clients of several namespaces come in: each proves its namespace's credential, and is served by its target.

Both sides prove themselves (wire.md): a client that it belongs to the namespace, the target that it is one of the
namespace's own. A wrong credential and a namespace that is not served get one answer, after the same work.
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
# Whoever was not greeted yet belongs to no namespace. When there are more, the one that came first has to go: a flood
# of connections that say nothing keeps nobody out who is quick.
GREETINGS_MAX = 256
_REFUSED = "the namespace is not served here, or the credential is not its own"


class Member(NamedTuple):
    """A namespace's target, and what its clients must know."""

    target: Target
    credential: Credential


class Lobby(Acceptor):
    """Listens for the targets of several namespaces. Thread-safe."""

    def __init__(self, unix_uids: Collection[int] | None = None, tls: ServerTls | None = None) -> None:
        super().__init__(unix_uids, tls)
        self._members: dict[str, Member] = {}
        self._nobody = Credential.random()  # of namespaces that are not served: a proof of it costs the same
        self._greeting: dict[Stream, None] = {}  # the first that came is first
        self._lock = threading.Lock()
        self.refused = 0  # greetings
        self._complains = Rarely(COMPLAIN_SECONDS)

    @property
    def members(self) -> dict[str, Member]:
        with self._lock:
            return dict(self._members)

    def admit(self, namespace: str, target: Target, credential: Credential) -> None:
        """From now on clients with this credential are served. If it was another one, those that proved that have to
        come again."""
        with self._lock:
            before = self._members.get(namespace)
            self._members[namespace] = Member(target, credential)
        if before is not None and before.credential != credential:
            before.target.disconnect()

    def expel(self, namespace: str) -> None:
        """Serve the namespace no more, and end its connections. What waits to be written is dropped: nobody can ask for
        it, and the other namespaces' changes wait for this. Its shelf is the caller's to close."""
        with self._lock:
            member = self._members.pop(namespace)
        member.target.disconnect()
        member.target.stop(flush_seconds=0.0)

    def stop(self) -> None:
        """Stop accepting, let every request under way finish, and close."""
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
            logger.error("a client cannot be served: %s", error)
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
        credential = self._nobody if member is None else member.credential
        proved = credential.signed(proof, wire.transcript(hello, challenge))
        if member is None or not proved:
            raise ProtocolError(_REFUSED)
        return header, hello, challenge, member

    def _complain(self, error: ProtocolError) -> None:
        """Log it, but not so often that it would fill a disk."""
        with self._lock:
            self.refused += 1
            if not self._complains():
                return
            count = self.refused
        logger.warning("closing a connection: %s (%d so far)", shown(error), count)


def _expect(stream: Stream, op: Op, deadline: float) -> Header:
    header = stream.receive_header(deadline)
    if header.op is not op:
        raise ProtocolError(f"{op.name} was expected, not {header.op.name}")
    if header.control_bytes > GREETING_BYTES_MAX:
        raise ProtocolError(f"{op.name} of {header.control_bytes} bytes, at most {GREETING_BYTES_MAX}")
    return header
