"""The images, what each takes of pyproject.toml, and how its file of hashes is read back.

Knows no network: the tests and the SBOM work from here.
"""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
PYTHON = "3.12"  # of the images
MACHINES = ("x86_64", "aarch64")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TORCH_CPU_HASHES = FOLDER / "torch-cpu.sha256"


@dataclass(frozen=True, slots=True)
class Image:
    """One file of hashes.

    `extras` are pyproject.toml's beside its dependencies; None: what builds the wheel instead.
    `has_cuda`: torch as PyPI has it, with NVIDIA's libraries, instead of PyTorch's own CPU build.
    """

    name: str
    extras: tuple[str, ...] | None
    has_cuda: bool = False

    @property
    def file(self) -> Path:
        return FOLDER / f"{self.name}.txt"


IMAGES = (
    Image("build", None),
    Image("api", ("tracing",)),
    Image("worker-cuda", ("worker", "tracing"), has_cuda=True),
    Image("worker-cpu", ("worker", "tracing")),
)


@dataclass(frozen=True, slots=True)
class Pin:
    """A package in a file of hashes."""

    name: str
    version: str
    hashes: frozenset[str]  # SHA-256 of each of its published wheels
    wanted_by: tuple[str, ...]  # names, or "pyproject.toml"


def wanted(image: Image) -> list[Requirement]:
    """What pyproject.toml names for an image."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    if image.extras is None:
        names = project["build-system"]["requires"]
    else:
        extras = project["project"]["optional-dependencies"]
        names = [*project["project"]["dependencies"], *(n for e in image.extras for n in extras[e])]
    return [Requirement(name) for name in names]


def constraints() -> dict[str, str]:
    """The version of each package that constraints.txt pins, by normalised name."""
    lines = (ROOT / "constraints.txt").read_text().split()
    return {canonicalize_name(name): version for name, version in (s.split("==") for s in lines)}


def read_pins(file: Path) -> Iterator[Pin]:
    """The packages of a file of hashes, in its order."""
    joined = file.read_text().replace("\\\n", " ").replace("\n    # via ", " # via ")
    for line in joined.splitlines():
        found = re.fullmatch(r"(\S+)==(\S+) ((?: *--hash=sha256:[0-9a-f]{64})+) # via (.+)", line)
        if found:
            name, version, hashes, via = found.groups()
            digests = frozenset(re.findall(r"sha256:([0-9a-f]{64})", hashes))
            yield Pin(name, version, digests, tuple(via.split(", ")))
