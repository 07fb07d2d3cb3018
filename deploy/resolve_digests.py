"""Finds what the tags of the images stand for: `python -m deploy.resolve_digests`.

Asks each image's registry for its digest (the index of all machines) and writes
digests.env, one NAME_DIGEST=@sha256:... a line, as Dockerfile and docker-compose.yml take
them. Tags can be moved; a digest cannot. With --check it compares instead, and fails if a tag has
moved since.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
OUTPUT = ROOT / "digests.env"
DOCKER_HUB = "https://registry-1.docker.io"
_MEDIA_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class RegistryError(Exception):
    """A registry did not say what a tag stands for."""


@dataclass(frozen=True, slots=True)
class TaggedImage:
    variable: str  # that takes the digest
    repository: str
    tag: str


def images() -> Iterator[TaggedImage]:
    """The base image and the services, as Dockerfile and docker-compose.yml name them."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    tags = dict(re.findall(r"^ARG (\w+)_TAG=(\S+)$", dockerfile, re.MULTILINE))
    for variable, tag in tags.items():
        yield TaggedImage(f"{variable}_DIGEST", f"library/{variable.lower()}", tag)
    compose = (ROOT / "docker-compose.yml").read_text()
    found = re.findall(r"^    image: (\S+):(\S+)\$\{(\w+_DIGEST):-\}$", compose, re.MULTILINE)
    for name, tag, variable in found:
        yield TaggedImage(variable, name if "/" in name else f"library/{name}", tag)


def resolve(image: TaggedImage, client: httpx.Client) -> str:
    """The digest that a tag stands for now.

    Raises:
        RegistryError
    """
    path = f"/v2/{image.repository}/manifests/{image.tag}"
    headers = {"Accept": ", ".join(_MEDIA_TYPES)}
    try:
        reply = client.head(path, headers=headers)
        if reply.status_code == 401:
            token = _token(reply.headers.get("www-authenticate", ""), client)
            reply = client.head(path, headers=headers | {"Authorization": f"Bearer {token}"})
        reply.raise_for_status()
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise RegistryError(f"{image.repository}:{image.tag}: {error or 'no answer'}") from error
    digest = reply.headers.get("docker-content-digest", "")
    if not _DIGEST.fullmatch(digest):
        raise RegistryError(f"{image.repository}:{image.tag}: the registry names no digest")
    return str(digest)


def _token(challenge: str, client: httpx.Client) -> str:
    """From where the registry sends anonymous readers for one."""
    parameters = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    realm = parameters.pop("realm")
    reply = client.get(realm, params=parameters)
    reply.raise_for_status()
    return str(reply.json()["token"])


def main(client: httpx.Client | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    is_check = parser.parse_args().check
    with client or httpx.Client(base_url=DOCKER_HUB, timeout=30, follow_redirects=True) as client:
        try:
            lines = [f"{i.variable}=@{resolve(i, client)}  # {i.tag}" for i in images()]
        except RegistryError as error:
            print(error, file=sys.stderr)
            return 1
    text = "\n".join(lines) + "\n"
    if is_check:
        is_same = OUTPUT.is_file() and OUTPUT.read_text() == text
        print("as before" if is_same else f"now:\n{text}", end="\n" if is_same else "")
        return 0 if is_same else 1
    OUTPUT.write_text(text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
