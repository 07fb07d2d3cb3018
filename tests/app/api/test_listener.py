"""The socket that several processes accept from."""

import socket

import pytest

from app.api.listener import PEER_TIMEOUT_MS, bind


def test_a_free_port_is_listened_on_and_dead_peers_are_noticed() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert port > 0
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) != 0
        timeout = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert timeout == PEER_TIMEOUT_MS
        with socket.create_connection(("127.0.0.1", port), timeout=20):
            accepted, _ = listener.accept()
            accepted.close()


def test_a_port_that_is_taken_is_not_shared_by_chance() -> None:
    with bind("127.0.0.1", 0) as listener, pytest.raises(OSError, match="in use"):
        bind("127.0.0.1", listener.getsockname()[1])
