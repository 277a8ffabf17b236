"""The health check of a container: `python -m kvstore.healthy ADDRESS [PATH TEXT]`.

Exit code 0 if ADDRESS accepts a connection and, with a PATH, if the HTTP response there contains TEXT; otherwise 1.
It runs every few seconds, so it imports only sockets. A target with TLS counts a silent connection as a probe, not as a
failed handshake.
"""

import socket
import sys

TIMEOUT_SECONDS = 4.0
_ANSWER_BYTES_MAX = 1 << 20


def is_healthy(address: str, path: str = "", text: str = "") -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_SECONDS) as connection:
            if not path:
                return True
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
            answer = b""
            while len(answer) < _ANSWER_BYTES_MAX and (piece := connection.recv(65536)):
                answer += piece
            return answer.split(b" ", 2)[1:2] == [b"200"] and text.encode() in answer
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(not is_healthy(*sys.argv[1:4]))
