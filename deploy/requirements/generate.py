"""Writes the files of hashes from constraints.txt: `python -m deploy.requirements.generate`.

Asks PyPI's index (its JSON form, PEP 691) for the wheels of every pinned version and the metadata
of one of them (PEP 658), follows what that requires under the images' Python on Linux, on every
machine that images are made for, and writes the SHA-256 of every wheel. Chooses no version: what
constraints.txt does not pin is named, and nothing is written.

PyTorch's wheels for CPUs are not on PyPI. Their hashes are in `torch-cpu.sha256`, which
`--torch-index` rewrites from PyTorch's own index.
"""

import argparse
import json
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from zipfile import ZipFile

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.tags import Tag
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from deploy.requirements.images import (
    IMAGES,
    MACHINES,
    PYTHON,
    TORCH_CPU_HASHES,
    TORCH_CPU_INDEX,
    Image,
    Pin,
    constraints,
    wanted,
)

PYPI = "https://pypi.org/simple"
_TIMEOUT_S = 60
_SIMPLE_JSON = "application/vnd.pypi.simple.v1+json"
_HEAD = """\
# Written by `python -m deploy.requirements.generate` from constraints.txt: every published wheel of
# each package, for `pip install --require-hashes --only-binary :all:`.
"""


class NotPinnedError(Exception):
    """Packages that constraints.txt does not pin, or not as they are wanted."""


@dataclass(frozen=True, slots=True)
class Wheel:
    filename: str
    sha256: str
    url: str | None  # None: on an index that is not asked

    @property
    def version(self) -> Version:
        return parse_wheel_filename(self.filename)[1]

    @property
    def tags(self) -> frozenset[Tag]:
        return parse_wheel_filename(self.filename)[3]


def pins(image: Image) -> list[Pin]:
    """Everything that an image installs, by name.

    Raises:
        NotPinnedError
    """
    versions = constraints()
    parents: dict[str, set[str]] = {}
    missing = set()
    waiting = [(requirement, "pyproject.toml", "") for requirement in wanted(image)]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement, parent, extra = waiting.pop()
        if not _applies(requirement, extra):
            continue
        name = canonicalize_name(requirement.name)
        parents.setdefault(name, set()).add(parent)
        if not requirement.specifier.contains(versions.get(name, "0"), prereleases=True):
            missing.add(f"{requirement} (of {parent})")
            continue
        for wanted_extra in {"", *requirement.extras} - {e for n, e in seen if n == name}:
            seen.add((name, wanted_extra))
            needed = _requirements(name, versions[name], image)
            waiting += [(each, name, wanted_extra) for each in needed]
    if missing:
        raise NotPinnedError("constraints.txt has to pin " + "; ".join(sorted(missing)))
    return [_pin(name, versions[name], image, parents[name]) for name in sorted(parents)]


def _applies(requirement: Requirement, extra: str) -> bool:
    """On any of the machines."""
    if requirement.marker is None:
        return True
    environment = {
        "python_version": PYTHON,
        "python_full_version": f"{PYTHON}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
        "extra": extra,
    }
    evaluate = requirement.marker.evaluate
    return any(evaluate(environment | {"platform_machine": machine}) for machine in MACHINES)


def _pin(name: str, version: str, image: Image, parents: set[str]) -> Pin:
    wheels = _wheels(name, version, image)
    hashes = frozenset(wheel.sha256 for wheel in wheels)
    return Pin(name, str(wheels[0].version), hashes, tuple(sorted(parents)))


def _requirements(name: str, version: str, image: Image) -> list[Requirement]:
    """Of a wheel that an image can install."""
    wheels = list(_published(name, version))  # of torch for CPUs, too, which is not asked for
    wheel = max(wheels, key=lambda wheel: _suits(wheel.tags))
    found = Metadata.from_email(_metadata(wheel), validate=False).requires_dist or []
    if name == "torch" and not image.has_cuda:  # what it wants on one system alone is CUDA's
        return [each for each in found if "platform_system" not in str(each.marker)]
    return found


def _metadata(wheel: Wheel) -> bytes:
    assert wheel.url is not None
    try:
        return _get(f"{wheel.url}.metadata")
    except FileNotFoundError:  # of an older upload: it is in the wheel alone
        with ZipFile(BytesIO(_get(wheel.url))) as archive:
            (name,) = (
                n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)
            )
            return archive.read(name)


def _suits(tags: frozenset[Tag]) -> tuple[bool, bool]:
    """The more, the better the images' Python on Linux can install it."""
    is_linux = any(re.search(r"linux.*x86_64|^any$", tag.platform) for tag in tags)
    interpreter = f"cp{PYTHON.replace('.', '')}"
    return is_linux, any(tag.interpreter in (interpreter, "py3") for tag in tags)


def _wheels(name: str, version: str, image: Image) -> Sequence[Wheel]:
    of_cpus = name == "torch" and not image.has_cuda
    wheels = list(_torch_for_cpus(version) if of_cpus else _published(name, version))
    if not wheels:
        raise NotPinnedError(f"there is no wheel of {name} {version}")
    return wheels


def _published(name: str, version: str) -> Iterator[Wheel]:
    for file in json.loads(_get(f"{PYPI}/{name}/"))["files"]:
        if file["filename"].endswith(".whl"):
            wheel = Wheel(file["filename"], file["hashes"]["sha256"], file["url"])
            with suppress(InvalidWheelFilename):  # of the early days
                if wheel.version == Version(version):
                    yield wheel


def _torch_for_cpus(version: str) -> Iterator[Wheel]:
    for line in TORCH_CPU_HASHES.read_text().splitlines():
        digest, filename = line.split()
        wheel = Wheel(filename, digest, None)
        if wheel.version.public == version:
            yield wheel


def write_torch_hashes() -> None:
    """From PyTorch's index, which links every wheel with its hash."""
    page = _get(f"{TORCH_CPU_INDEX}/torch/").decode()
    links = re.findall(r'href="[^"#]*/(torch-[^"#/]+\.whl)#sha256=([0-9a-f]{64})"', page)
    wheels = [Wheel(urllib.parse.unquote(name), digest, None) for name, digest in links]
    wanted_version = f"{constraints()['torch']}+cpu"
    lines = [f"{w.sha256}  {w.filename}\n" for w in wheels if str(w.version) == wanted_version]
    if not lines:
        raise NotPinnedError(f"{TORCH_CPU_INDEX} has no torch {wanted_version}")
    TORCH_CPU_HASHES.write_text("".join(lines))


@cache
def _get(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"Accept": f"{_SIMPLE_JSON}, text/html;q=0.1"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
            content: bytes = reply.read()
    except urllib.error.HTTPError as error:
        raise (FileNotFoundError if error.code == 404 else OSError)(f"{url}: {error}") from error
    except OSError as error:
        raise OSError(f"{url}: {error}") from error
    return content


def render(found: Sequence[Pin]) -> str:
    """The file, as pip reads it."""
    lines = [_HEAD]
    if any(Version(pin.version).local for pin in found):
        lines.append(f"--extra-index-url {TORCH_CPU_INDEX}\n")
    for pin in found:
        hashes = " \\\n".join(f"    --hash=sha256:{digest}" for digest in sorted(pin.hashes))
        via = ", ".join(pin.wanted_by)
        lines.append(f"{pin.name}=={pin.version} \\\n{hashes}\n    # via {via}\n")
    return "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch-index", action="store_true", help="ask PyTorch's index first")
    try:
        if parser.parse_args().torch_index:
            write_torch_hashes()
        files = {image.file: pins(image) for image in IMAGES}
    except (NotPinnedError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    for file, found in files.items():
        file.write_text(render(found))
        print(f"{file.name}: {len(found)} packages, {sum(len(p.hashes) for p in found)} wheels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
