"""Commands in the documents are real: programs, subcommands, options, variables and paths."""

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from app.settings import ENV_PREFIX, Settings
from dycoke_core import lmms_plugin
from dycoke_core.config import CompressionConfig
from dycoke_core.lmms_plugin.arguments import compression_of
from tests.docs.commands import (
    OUR_PACKAGES,
    PROGRAMS,
    Command,
    all_commands,
    check_arguments,
    exists_or_is_made,
    expanded,
    main_module,
    make_targets,
    make_variables,
    makefile,
    paths_in,
    sources,
)
from tests.docs.documents import ROOT

COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE = yaml.safe_load(COMPOSE_TEXT)


def by_command(is_chosen: Callable[[Command], bool]) -> pytest.MarkDecorator:
    found = [command for command in all_commands() if is_chosen(command)]
    assert found
    return pytest.mark.parametrize("command", found, ids=lambda command: command.text[:70])


def runs(program: str) -> Callable[[Command], bool]:
    return lambda command: command.program == program


def is_ours(command: Command) -> bool:
    return command.module is not None and command.module.split(".")[0] in OUR_PACKAGES


def test_programs_are_known() -> None:
    assert {command.program for command in all_commands()} <= {*PROGRAMS, ""}


@by_command(is_ours)
def test_our_modules_take_the_arguments(command: Command) -> None:
    check_arguments(command)


@by_command(runs("make"))
def test_make_takes_the_variables_and_runs_what_exists(command: Command) -> None:
    target, *variables = command.arguments
    assert target in make_targets()
    assert {word.split("=")[0] for word in variables} <= make_variables()
    for inner in expanded(command):
        assert all(map(exists_or_is_made, paths_in(inner))), inner.text
        if is_ours(inner):
            check_arguments(inner)


def test_make_help_names_every_target() -> None:
    documented = set(re.findall(r"^([a-z][\w-]*):.*?## ", makefile(), flags=re.MULTILINE))
    assert make_targets() == documented


@by_command(lambda command: bool(list(paths_in(command))))
def test_paths_exist(command: Command) -> None:
    for path in paths_in(command):
        assert exists_or_is_made(path), f"there is no {path}"


def test_paths_of_a_user_of_a_model_and_of_the_tree_are_told_apart() -> None:
    words = ("x", "/models/mine", "--model", "org/name", "-F", "video=@tests/none.mp4", "../before")
    command = Command(ROOT / "README.md", "", (("DYCOKE_MODEL", "org/name"),), words, True)
    assert list(paths_in(command)) == ["tests/none.mp4"]
    assert not exists_or_is_made("tests/none.mp4") and exists_or_is_made("digests.env")


def test_variables_are_read_by_something() -> None:
    settings = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    compose = set(re.findall(r"\$\{(\w+)", COMPOSE_TEXT))
    for command in all_commands():
        names = {name for name, _ in command.variables}
        if command.program == "export":
            names = {word.split("=")[0] for word in command.arguments if "=" in word}
            assert names <= compose, command.text  # nothing else asks for one
        if command.program == "docker":
            assert names <= compose | settings, command.text
        for name in names - settings - compose - make_variables():
            assert f'"{name}"' in sources(), f"nothing reads {name}"


def compose_parser() -> argparse.ArgumentParser:
    """The options of `docker compose` that the documents use."""
    services = COMPOSE["services"].values()
    profiles = {name for service in services for name in service.get("profiles", [])}
    parser = argparse.ArgumentParser()
    parser.add_argument("--profile", choices=profiles)
    parser.add_argument("--env-file", action="append")
    parser.add_argument("-f", action="append")
    commands = parser.add_subparsers()
    commands.add_parser("up").add_argument("--build", action="store_true")
    return parser


@by_command(runs("docker"))
def test_compose_has_the_profiles(command: Command) -> None:
    compose, *arguments = command.arguments
    assert compose == "compose"
    compose_parser().parse_args(arguments)


@by_command(runs("kubectl"))
def test_kubectl_applies_a_folder_that_is_one(command: Command) -> None:
    verb, option, folder = command.arguments
    assert (verb, option) == ("apply", "-k") and (ROOT / folder / "kustomization.yaml").exists()


def test_locust_knows_its_options_and_its_class() -> None:
    (command,) = (c for c in all_commands() if c.module == "locust")
    words = [sys.executable, *command.words[1:], "--show-task-ratio"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert command.words[-1] in done.stdout


def test_lmms_eval_finds_the_model_and_its_arguments() -> None:
    (command,) = (c for c in all_commands() if c.module == "lmms_eval")
    options = dict(zip(command.arguments[::2], command.arguments[1::2], strict=True))
    given = dict(pair.split("=") for pair in options["--model_args"].split(","))
    assert options["--model"] == lmms_plugin.MODEL_ID and given.pop("pretrained")
    values = {name: yaml.safe_load(value) for name, value in given.items()}
    assert compression_of(policy=None, **values) == CompressionConfig()  # the defaults, written out


def runs_as_it_stands(command: Command) -> bool:
    """Ends within seconds and needs nothing of the user's own."""
    arguments = command.arguments
    if command.module == "dycoke_core":
        return command.is_whole and (ROOT / arguments[0]).exists()
    return command.module == "app" and command.is_whole and arguments[0] == "keys"


@by_command(runs_as_it_stands)
def test_cheap_commands_run(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv(f"{ENV_PREFIX}DATA_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(command.module), *command.arguments])
    assert not main_module(command).main()
    assert capsys.readouterr().out.strip()
    assert (tmp_path / "keys.json").exists() is (command.module == "app")


def test_some_commands_run() -> None:
    assert {c.module for c in filter(runs_as_it_stands, all_commands())} == {"app", "dycoke_core"}
