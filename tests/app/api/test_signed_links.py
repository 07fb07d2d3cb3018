"""What a signed link opens, for whom, and until when."""

from pathlib import Path

import pytest

from app.api.auth import ApiKeys
from app.api.signed_links import LINK_LIFE_S, SignedLinks
from app.errors import UnauthorizedError
from app.keys.entries import EVERYBODY, Principal, parse_configured_keys
from app.keys.file import KeyFile
from app.store.link_secret import LinkSecret

ALICE, BOB = "a" * 32, "b" * 32
CONTENT = "/v1/videos/vid_1/content"
FRAME = "/v1/videos/vid_1/frames/3?job_id=j"


class Secret(LinkSecret):
    def __init__(self, value: bytes = b"s" * 32) -> None:
        self.value = value

    async def get(self) -> bytes:
        return self.value


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def keys_of(folder: Path, text: str) -> ApiKeys:
    return ApiKeys(parse_configured_keys(text) if text else (), KeyFile(folder))


def principal(keys: ApiKeys, secret: str) -> Principal:
    return keys.principal(f"Bearer {secret}")


@pytest.fixture
def keys(tmp_path: Path) -> ApiKeys:
    return keys_of(tmp_path, f"alice:{ALICE},bob:{BOB}")


@pytest.mark.parametrize("target", [CONTENT, FRAME])
async def test_link_says_whose_it_is(keys: ApiKeys, target: str) -> None:
    links = SignedLinks(keys, Secret())
    for secret in (ALICE, BOB):
        holder = principal(keys, secret)
        (link,) = await links.sign([target], holder)
        assert link.startswith(target) and secret not in link
        assert await links.principal(link) == holder


async def test_link_expires_after_ten_minutes(keys: ApiKeys) -> None:
    clock = Clock()
    links = SignedLinks(keys, Secret(), now=clock)
    (link,) = await links.sign([CONTENT], principal(keys, ALICE))
    assert LINK_LIFE_S == 600
    clock.now += LINK_LIFE_S - 1
    await links.principal(link)
    clock.now += 1
    with pytest.raises(UnauthorizedError):
        await links.principal(link)


async def test_nothing_of_a_link_can_be_exchanged(keys: ApiKeys) -> None:
    links = SignedLinks(keys, Secret())
    (link,) = await links.sign([FRAME], principal(keys, ALICE))
    bob = principal(keys, BOB)
    signed, _, signature = link.rpartition("&signature=")
    expires = signed.partition("expires=")[2].partition("&")[0]
    changed = [
        link.replace("frames/3", "frames/4"),
        link.replace("job_id=j", "job_id=k"),
        link.replace("vid_1", "vid_2"),
        link.replace(expires, str(int(expires) + 1)),
        link.replace(expires, "9" * 400),
        link.replace(expires, "-1"),
        link.replace(expires, "٣" * 10),
        link.replace(principal(keys, ALICE).owner, bob.owner),
        f"{signed}&expires=99999999999&signature={signature}",
        f"{signed}&holder={bob.owner}&signature={signature}",
        link[:-1],
        link + "0",
        f"{signed}&signature=",
        f"{signed}&signature=ä",
        signed,
        f"{FRAME}&signature=",
        "",
    ]
    for other in changed:
        assert other != link
        with pytest.raises(UnauthorizedError):
            await links.principal(other)
    await links.principal(link)


async def test_link_ends_with_its_key(keys: ApiKeys, tmp_path: Path) -> None:
    (link,) = await SignedLinks(keys, Secret()).sign([CONTENT], principal(keys, ALICE))
    later = {
        "the same": f"alice:{ALICE}",
        "another secret": f"alice:{'c' * 32}",
        "revoked": f"bob:{BOB}",
    }
    for case, text in later.items():
        links = SignedLinks(keys_of(tmp_path, text), Secret())
        if case == "the same":
            assert (await links.principal(link)).name == "alice"
            continue
        with pytest.raises(UnauthorizedError):
            await links.principal(link)


async def test_link_of_another_deployment_is_nobodys(keys: ApiKeys) -> None:
    (link,) = await SignedLinks(keys, Secret(b"t" * 32)).sign([CONTENT], principal(keys, ALICE))
    with pytest.raises(UnauthorizedError):
        await SignedLinks(keys, Secret()).principal(link)


async def test_where_there_are_no_keys_paths_stay_as_they_are(tmp_path: Path) -> None:
    links = SignedLinks(keys_of(tmp_path, ""), Secret())
    assert await links.sign([CONTENT, FRAME], EVERYBODY) == [CONTENT, FRAME]
