"""Which addresses are public, and which of a name's are dialled, without a network."""

import asyncio
import socket
import threading
from collections.abc import Sequence
from typing import Any

import httpcore
import pytest

from app.api.openai.dialling import MAX_LOOKUPS_OF_A_KEY, CheckedBackend, Resolver, is_global

PUBLIC, OTHER = "93.184.215.14", "2606:4700::1111"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",  # where clouds keep secrets
        "100.64.0.1",
        "192.0.0.192",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "240.0.0.1",
        "192.88.99.1",
        "::1",
        "::",
        "fe80::1%eth0",
        "fd00:ec2::254",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001::1",
        "ff02::1",
    ],
)
def test_addresses_that_lead_elsewhere_are_not_public(address: str) -> None:
    assert not is_global(address)


class Dialled:
    """Notes what is dialled; some addresses do not answer."""

    def __init__(self, *silent: str) -> None:
        self.addresses: list[str] = []
        self._silent = silent

    async def __call__(
        self, address: str, port: int, timeout: float | None
    ) -> httpcore.AsyncNetworkStream:
        self.addresses.append(address)
        if address in self._silent:
            raise httpcore.ConnectTimeout
        return httpcore.AsyncNetworkStream()


def backend(dial: Dialled, *addresses: str) -> CheckedBackend:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return addresses

    return CheckedBackend(resolve, dial)


async def test_the_first_address_that_answers_is_taken() -> None:
    dial = Dialled(PUBLIC)
    await backend(dial, PUBLIC, OTHER).connect_tcp("cdn.example.com", 443)
    assert dial.addresses == [PUBLIC, OTHER]


async def test_the_last_ones_failure_is_the_failure() -> None:
    dial = Dialled(PUBLIC, OTHER)
    with pytest.raises(httpcore.ConnectTimeout):
        await backend(dial, PUBLIC, OTHER).connect_tcp("cdn.example.com", 443)


@pytest.mark.parametrize("addresses", [(), ("10.0.0.1",), (PUBLIC, "127.0.0.1")])
async def test_one_address_that_is_not_public_keeps_all_from_being_dialled(
    addresses: tuple[str, ...],
) -> None:
    dial = Dialled()
    with pytest.raises(httpcore.ConnectError):
        await backend(dial, *addresses).connect_tcp("cdn.example.com", 443)
    assert not dial.addresses


class Names:
    """The system's resolver, which answers when a test says so."""

    def __init__(self) -> None:
        self.may_answer = threading.Event()
        self.asked: list[str] = []

    def __call__(self, host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        self.asked.append(host)
        self.may_answer.wait(60)
        entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "", (PUBLIC, port))
        return [entry, entry]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    names = Names()
    monkeypatch.setattr("app.api.openai.dialling.socket.getaddrinfo", names)
    return names


async def test_an_address_that_is_found_twice_is_one(names: Names) -> None:
    names.may_answer.set()
    assert await Resolver().of("key")("cdn.example.com", 443) == [PUBLIC]


async def test_a_key_has_few_lookups_at_a_time_and_others_have_theirs(names: Names) -> None:
    resolver = Resolver()
    greedy = [
        asyncio.create_task(resolver.of("greedy")(f"host-{i}", 443))
        for i in range(MAX_LOOKUPS_OF_A_KEY + 3)
    ]
    other = asyncio.create_task(resolver.of("other")("its-host", 443))
    while len(names.asked) < MAX_LOOKUPS_OF_A_KEY + 1:
        await asyncio.sleep(0.001)
    assert "its-host" in names.asked
    names.may_answer.set()
    assert await other == [PUBLIC]
    assert await asyncio.gather(*greedy) == [[PUBLIC]] * len(greedy)
    assert len(names.asked) == len(greedy) + 1
