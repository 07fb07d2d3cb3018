"""The files of hashes against constraints.txt and pyproject.toml, without a network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

from deploy.requirements.generate import render
from deploy.requirements.images import (
    IMAGES,
    ROOT,
    TORCH_CPU_HASHES,
    Image,
    Pin,
    constraints,
    read_pins,
    wanted,
)

by_image = pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
API, CUDA, CPU = IMAGES[1:]


def names(image: Image) -> set[str]:
    return {pin.name for pin in read_pins(image.file)}


@by_image
def test_every_package_has_the_pinned_version_and_hashes(image: Image) -> None:
    pins = list(read_pins(image.file))
    assert pins and [pin.name for pin in pins] == sorted({pin.name for pin in pins})
    lines = image.file.read_text().splitlines()
    assert len(pins) == sum("==" in line for line in lines), "a line that is not read"
    versions = constraints()
    for pin in pins:
        assert Version(Version(pin.version).public) == Version(versions[pin.name]), pin.name
        assert pin.hashes


@by_image
def test_what_pyproject_names_is_there_and_everything_else_is_wanted_by_something(
    image: Image,
) -> None:
    pins = {pin.name: pin for pin in read_pins(image.file)}
    for requirement in wanted(image):
        pin = pins[canonicalize_name(requirement.name)]
        assert "pyproject.toml" in pin.wanted_by and Version(pin.version) in requirement.specifier
    for pin in pins.values():
        assert set(pin.wanted_by) <= {*pins, "pyproject.toml"}, pin.name


def test_api_image_has_no_torch_and_no_image_has_development_tools() -> None:
    assert "torch" not in names(API) and names(API) < names(CPU)
    for image in (API, CUDA, CPU):
        assert not {"pytest", "ruff", "mypy", "hypothesis", "locust"} & names(image)


def test_worker_images_differ_in_torch_and_what_cuda_wants() -> None:
    torches = {
        image.name: next(pin for pin in read_pins(image.file) if pin.name == "torch")
        for image in (CUDA, CPU)
    }
    assert Version(torches["worker-cuda"].version).local is None
    assert Version(torches["worker-cpu"].version).local == "cpu"
    known = {line.split()[0] for line in TORCH_CPU_HASHES.read_text().splitlines()}
    assert torches["worker-cpu"].hashes == known
    of_cuda = names(CUDA) - names(CPU)
    assert names(CPU) < names(CUDA)
    assert of_cuda and all(name.startswith(("nvidia-", "cuda-", "triton")) for name in of_cuda)


def test_a_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    pins = [
        Pin("a-b", "1.0", frozenset({"0" * 64, "f" * 64}), ("c", "pyproject.toml")),
        Pin("torch", "2.0+cpu", frozenset({"1" * 64}), ("a-b",)),
    ]
    file = tmp_path / "x.txt"
    file.write_text(render(pins))
    assert list(read_pins(file)) == pins


def test_the_sbom_names_what_the_image_installs(tmp_path: Path) -> None:
    """As `make sbom` has it written, without a network, and valid by CycloneDX's schema."""
    output = tmp_path / "api.cdx.json"
    tool = Path(sys.executable).parent / "cyclonedx-py"
    options = ["--pyproject", str(ROOT / "pyproject.toml"), "--output-reproducible", "--validate"]
    command = [tool, "requirements", *options, "--output-file", output, API.file]
    subprocess.run(command, check=True, timeout=100, capture_output=True)
    document = json.loads(output.read_text())
    listed = {
        (canonicalize_name(part["name"]), part["version"]): {
            digest["content"]
            for reference in part["externalReferences"]
            for digest in reference.get("hashes", [])
        }
        for part in document["components"]
    }
    assert listed == {(pin.name, pin.version): pin.hashes for pin in read_pins(API.file)}
    assert document["metadata"]["component"]["name"] == "dycoke-serve"
