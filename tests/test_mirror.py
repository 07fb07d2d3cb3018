"""Tests stand where their modules do: `app/x/y.py` has `tests/app/x/test_y.py`.

The core's packages stand at the top: `dycoke_core/engine/y.py` has `tests/engine/test_y.py`, and
the modules beside them `tests/dycoke_core/test_y.py`. What has no test of its name is listed here,
with what tests it instead: a change that adds to the list has to argue with this.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parent.parent
PACKAGES = ("app", "dycoke_core", "loadtest", "deploy")
MOST = 94  # modules without a test of their name, of about 350

# By what tests them: paths below tests/, of which each must be there.
TESTED_BY: Mapping[tuple[str, ...], tuple[str, ...]] = {
    # Routes, and what joins the parts, over HTTP.
    ("integration/test_api_chat.py", "integration/test_api_videos.py"): (
        "app/api/context.py",
        "app/api/post/chat_intake.py",
        "app/api/post/submissions.py",
        "app/api/routes/chat.py",
        "app/api/routes/uploading.py",
        "app/api/routes/videos.py",
    ),
    ("integration/test_openai_chat.py", "integration/test_openai_frame_lists.py"): (
        "app/api/openai/intake.py",
        "app/api/openai/media.py",
        "app/api/routes/completions.py",
    ),
    ("integration/test_openai_files.py",): ("app/api/routes/files.py",),
    ("integration/test_api_jobs.py", "integration/test_api_kept.py"): ("app/api/routes/jobs.py",),
    ("app/api/test_signed_links.py",): ("app/api/routes/links.py",),
    ("integration/test_page.py",): ("app/api/routes/docs.py", "app/api/routes/page.py"),
    ("integration/test_api_health.py",): (
        "app/api/routes/health.py",
        "app/api/routes/models.py",
    ),
    ("integration/test_api_tenants.py",): ("app/api/routes/usage.py",),
    ("app/api/test_app.py", "security/test_contract.py"): ("app/api/openapi.py",),
    # Processes, with signals and exit codes.
    ("integration/test_api_shutdown.py",): ("app/api/server.py", "app/event_loop.py"),
    ("integration/test_worker_process.py",): ("app/worker/process.py",),
    ("test_package.py", "docs/test_commands.py"): (
        "dycoke_core/tiny/__main__.py",
        "loadtest/accuracy/__main__.py",
        "loadtest/gpu/__main__.py",
        "loadtest/path/__main__.py",
    ),
    # The backends, each as a whole: every test of the engine runs on both.
    ("engine/conftest.py", "engine/test_invariants.py", "engine/test_engine.py"): (
        "dycoke_core/engine/admission.py",
        "dycoke_core/engine/executor.py",
        "dycoke_core/engine/report.py",
        "dycoke_core/engine/backends/cpu/backend.py",
        "dycoke_core/engine/backends/cpu/kv_cache.py",
        "dycoke_core/engine/backends/cpu/step_attention.py",
        "dycoke_core/engine/backends/cuda/backend.py",
        "dycoke_core/engine/backends/cuda/decode.py",
        "dycoke_core/engine/backends/cuda/passes.py",
        "dycoke_core/engine/backends/cuda/prompts.py",
        "dycoke_core/engine/backends/cuda/seats.py",
        "dycoke_core/engine/backends/cuda/step_writer.py",
    ),
    ("engine/test_host_cache.py",): ("dycoke_core/engine/backends/cuda/host_tier.py",),
    ("engine/test_gemma3.py",): (
        "dycoke_core/engine/backends/cuda/windows.py",
        "dycoke_core/model/gemma3.py",
    ),
    ("engine/test_letting_frames_go.py", "engine/test_vision_memory.py"): (
        "dycoke_core/engine/vision_encoder.py",
    ),
    ("gpu_kernels/test_selection.py", "gpu_kernels/test_attention.py"): (
        "dycoke_core/gpu_kernels/columns.py",
        "dycoke_core/gpu_kernels/rows.py",
    ),
    # Models: the adapters of a family against transformers.
    ("model/test_loader.py", "model/test_published_layouts.py"): (
        "dycoke_core/model/checkpoint.py",
    ),
    ("model/test_adapter.py", "engine/test_families.py"): (
        "dycoke_core/model/layer_attention.py",
        "dycoke_core/model/transformers_model.py",
    ),
    ("engine/test_qwen_vl.py", "model/test_qwen_vl.py"): (
        "dycoke_core/model/qwen2_5_vl.py",
        "dycoke_core/model/qwen3_vl.py",
    ),
    ("lmms_plugin/test_plugin.py",): ("dycoke_core/lmms_plugin/model.py",),
    ("tiny/training/test_run.py",): (
        "dycoke_core/tiny/architecture.py",
        "dycoke_core/tiny/training/alignment.py",
        "dycoke_core/tiny/training/curves.py",
        "dycoke_core/tiny/training/vision_stage.py",
    ),
    # What runs in a confined child, tried from inside a real one.
    ("video/test_sandbox.py",): (
        "dycoke_core/video/landlock.py",
        "dycoke_core/video/seccomp.py",
        "dycoke_core/video/thread_limit.py",
    ),
    ("video/test_fork_server.py",): (
        "dycoke_core/video/child.py",
        "dycoke_core/video/fork_client.py",
        "dycoke_core/video/forked_child.py",
    ),
    ("video/test_frame_readers.py", "video/test_same_pixels.py", "video/test_refusals.py"): (
        "dycoke_core/video/decord_reader.py",
        "dycoke_core/video/pyav_reader.py",
    ),
    ("video/test_frame_list.py",): ("dycoke_core/video/picture_reader.py",),
    ("video/test_threads.py",): ("dycoke_core/video/pyav_frames.py",),
    # What is generated, by what it generates.
    ("deploy/test_dashboards.py",): (
        "deploy/grafana/boards/compression.py",
        "deploy/grafana/boards/service.py",
        "deploy/grafana/boards/workers.py",
        "deploy/grafana/generate.py",
    ),
    ("deploy/test_kubernetes.py",): ("deploy/k8s/generate.py",),
    ("integration/test_open_webui.py",): ("deploy/open-webui/dycoke_pipe.py",),
    ("deploy/requirements/test_generate.py",): ("deploy/requirements/images.py",),
    ("loadtest/accuracy/test_evaluation.py",): (
        "loadtest/accuracy/charts.py",
        "loadtest/accuracy/pictures.py",
        "loadtest/accuracy/processes.py",
        "loadtest/accuracy/report.py",
    ),
    ("loadtest/auto/test_report.py",): ("loadtest/auto/plot.py",),
    ("deploy/test_dashboards.py", "loadtest/test_runs.py"): (
        "loadtest/locustfile.py",
        "loadtest/running.py",
    ),
    ("loadtest/gpu/test_kit.py",): (
        "loadtest/gpu/kernel_cases.py",
        "loadtest/gpu/sections/decode.py",
        "loadtest/gpu/sections/device.py",
        "loadtest/gpu/sections/kernels.py",
        "loadtest/gpu/sections/peers.py",
        "loadtest/gpu/sections/serving.py",
        "loadtest/gpu/workbench.py",
        "loadtest/llava_onevision.py",
    ),
}

# Measurements of a machine, run by hand: a wrong time shows in no assertion.
MEASUREMENTS = (
    "loadtest/before_after.py",
    "loadtest/bench.py",
    "loadtest/engine.py",
    "loadtest/new_video.py",
    "loadtest/path/stack.py",
    "loadtest/path/worker.py",
    "loadtest/refreshes.py",
    "loadtest/scrape.py",
    "loadtest/transformers_baseline.py",
)


def place_of(module: str) -> Path:
    """Where a module's test stands."""
    package, *folders, file = PurePosixPath(module).parts
    if package == "dycoke_core" and folders:
        package, *folders = folders
    name = f"test_{PurePosixPath(file).stem.strip('_')}.py"
    return ROOT.joinpath("tests", package, *folders, name)


def modules() -> set[str]:
    files = (file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    return {file.relative_to(ROOT).as_posix() for file in files if file.name != "__init__.py"}


def listed() -> list[str]:
    return [*MEASUREMENTS, *(module for group in TESTED_BY.values() for module in group)]


def test_every_module_has_a_test_of_its_name_or_is_listed() -> None:
    without = {module for module in modules() if not place_of(module).is_file()}
    assert sorted(without - set(listed())) == []
    assert len(without) <= MOST


def test_nothing_is_listed_twice_or_for_nothing() -> None:
    names = listed()
    assert len(names) == len(set(names))
    assert sorted(set(names) - modules()) == [], "of modules that are gone"
    assert [name for name in names if place_of(name).is_file()] == [], "they have a test now"


def test_what_tests_the_listed_is_there() -> None:
    files = {file for files in TESTED_BY for file in files}
    assert sorted(file for file in files if not (ROOT / "tests" / file).is_file()) == []


def test_no_test_file_hides_another() -> None:
    """Without `__init__.py`, two of the same name in two folders are one module to pytest."""
    folders = {file.parent for file in (ROOT / "tests").rglob("test_*.py")}
    assert sorted(str(folder) for folder in folders if not (folder / "__init__.py").is_file()) == []
