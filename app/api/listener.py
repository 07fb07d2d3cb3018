"""The socket that the API listens on; several processes may inherit it."""

import socket

# A peer that acknowledges nothing, or keeps its window shut, for this long is gone.
PEER_TIMEOUT_MS = 60_000
BACKLOG = 512  # connections waiting to be accepted, for all processes on the port


def bind(host: str, port: int) -> socket.socket:
    """Returns a listening socket; port 0 takes any free one. Raises: OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, PEER_TIMEOUT_MS)
    return listener
