"""What `python -m build` makes installs, and runs the demo away from the checkout."""

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_bytes
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
SOURCES = ("app", "dycoke_core", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, and a wheel that was made of it."""
    tree, output = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", output, tree]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel; its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.check_output(command, text=True).strip())
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages]
    subprocess.run([*pip, wheel], check=True)
    # Links that lead to a checkout, as editable installs have, are not followed from here.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_the_sdist_holds_what_a_build_needs(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "app/store/lua/prelude.lua"} <= names


def test_the_version_is_the_newest_of_the_changelog(built: Path) -> None:
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    newest = next(version for version in versions if version != "Unreleased")
    (wheel,) = built.glob("*.whl")
    assert wheel.name.split("-")[1] == newest
    images = (ROOT / "deploy" / "k8s" / "kustomization.yaml").read_text()
    assert set(re.findall(r"newTag: (\S+)", images)) == {newest}


def test_the_demo_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    where = "import app, dycoke_core; print(app.__file__, dycoke_core.__file__)"
    files = subprocess.check_output([installed, "-c", where], cwd=tmp_path, text=True).split()
    assert all(str(installed.parent.parent) in file for file in files)
    done = subprocess.run(
        [installed, "-m", "app.demo"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^[1-8] of 8 answers are wholly right", done.stdout, re.MULTILINE)


def test_every_file_of_the_page_is_in_the_wheel(built: Path) -> None:
    page = ROOT / "app" / "api" / "page" / "static"
    files = {str(path.relative_to(ROOT)) for path in page.rglob("*") if path.is_file()}
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert len(files) > 25 and files <= set(archive.namelist())


def test_types_are_published(installed: Path) -> None:
    where = "import app, dycoke_core; print(app.__path__[0], dycoke_core.__path__[0])"
    folders = subprocess.check_output([installed, "-c", where], text=True, cwd="/").split()
    assert all((Path(folder) / "py.typed").exists() for folder in folders)


def test_every_import_is_of_a_package_that_the_wheel_asks_for(built: Path) -> None:
    """Directly, or through one of those: the environment here has the tests' packages too."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    assert "Framework :: FastAPI" in metadata.get_all("Classifier", [])
    asked_for = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    extras = {"worker", "embedded", "kernels", "tracing", "loadtest"}
    known: set[tuple[str, frozenset[str]]] = set()
    for requirement in asked_for:
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
            _add_with_its_own(requirement, known)
    distributions = packages_distributions()
    names = {name for name, _ in known}
    for module in _third_party_imports():
        owners = {canonicalize_name(owner) for owner in distributions.get(module, ())}
        # lmms-eval is the host of the plugin: it is what imports it.
        assert owners & names or module == "lmms_eval", f"{module} is of {owners}"


def _add_with_its_own(requirement: Requirement, known: set[tuple[str, frozenset[str]]]) -> None:
    """Adds the package and what it asks for in turn, with the extras that are asked for."""
    key = canonicalize_name(requirement.name), frozenset(requirement.extras)
    if key in known:
        return
    known.add(key)
    try:
        asked_for = distribution(requirement.name).requires or ()
    except PackageNotFoundError:
        return  # an extra that this environment has not
    for text in asked_for:
        inner = Requirement(text)
        extras = ("", *requirement.extras)
        if not inner.marker or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
            _add_with_its_own(inner, known)


def _third_party_imports() -> set[str]:
    """The top-level packages that the sources import, anywhere in a module."""
    found = set()
    for source in (*ROOT.glob("app/**/*.py"), *ROOT.glob("dycoke_core/**/*.py")):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"app", "dycoke_core"}
