"""The commands in the documents: finding them, parsing them, and checking their words."""

import argparse
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

from tests.docs.documents import DOCUMENTS, ROOT, blocks

OUR_PACKAGES = ("app", "dycoke_core", "deploy", "loadtest", "tests")
PROGRAMS = (
    *("make", "python", "docker", "kubectl", "curl", "git", "apt-get", "export"),
    *("pip", "pip-audit", "pre-commit", "prometheus", "promtool"),
)
_VARIABLE = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)", flags=re.DOTALL)
_INLINE = re.compile(
    rf"`((?:[A-Z][A-Z0-9_]*=|(?:\.venv/bin/)?(?:{'|'.join(PROGRAMS)})\s)[^`]*)`",
)
_OF_SOURCES = (".py", ".md", ".yml", ".yaml", ".json", ".toml", ".sh", ".acl", ".env")


@dataclass(frozen=True)
class Command:
    """Args:
    variables: set before it, for it alone.
    words: the program and its arguments; none where variables stand alone.
    is_whole: False of one within a sentence, which may leave out what is required.
    """

    document: Path
    text: str
    variables: tuple[tuple[str, str], ...]
    words: tuple[str, ...]
    is_whole: bool

    @property
    def program(self) -> str:
        return Path(self.words[0]).name if self.words else ""

    @property
    def module(self) -> str | None:
        """What `python -m` names."""
        words = self.words
        return words[words.index("-m") + 1] if self.program == "python" and "-m" in words else None

    @property
    def arguments(self) -> tuple[str, ...]:
        """After the program, or after the module."""
        return self.words[self.words.index("-m") + 2 if self.module else 1 :]


def parse(document: Path, text: str, *, is_whole: bool) -> Iterator[Command]:
    """One command, or one for each of the alternatives in `add|list`."""
    words = shlex.split(text.removesuffix("&"))
    for place, word in enumerate(words):
        if re.fullmatch(r"[a-z]+(\|[a-z]+)+", word):
            for choice in word.split("|"):
                chosen = shlex.join([*words[:place], choice, *words[place + 1 :]])
                yield from parse(document, chosen, is_whole=is_whole)
            return
    variables = []
    while words and (match := _VARIABLE.fullmatch(words[0])):
        variables.append((match[1], match[2]))
        words.pop(0)
    yield Command(document, text, tuple(variables), tuple(words), is_whole)


@cache
def all_commands() -> tuple[Command, ...]:
    """After a prompt in fenced blocks, and in the prose where they begin as commands do."""
    found: list[Command] = []
    for document in DOCUMENTS:
        for block in blocks(document):
            if block.language == "console":
                for text in block.commands:
                    found += parse(document, text, is_whole=True)
        for text in _INLINE.findall(document.read_text()):
            if "<" not in text:
                found += parse(document, " ".join(text.split()), is_whole=False)
    unique = {(c.variables, c.words, c.is_whole): c for c in reversed(found)}
    return tuple(reversed(unique.values()))


def expanded(command: Command) -> Iterator[Command]:
    """The Python commands that `make` would run: its recipe with the variables filled in."""
    dry_run = ["make", "--dry-run", *command.arguments]
    done = subprocess.run(dry_run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command.text}: {done.stderr}"
    for line in done.stdout.replace("\\\n", " ").splitlines():
        if re.search(r"python -m (?!pip |venv )", line):
            yield from parse(command.document, line, is_whole=command.is_whole)


def main_module(command: Command) -> ModuleType:
    """What `python -m` runs."""
    assert command.module is not None
    spec = find_spec(command.module)
    assert spec is not None, f"there is no {command.module}"
    is_package = spec.submodule_search_locations is not None
    return importlib.import_module(command.module + ".__main__" * is_package)


class _ParsedError(BaseException):
    """Raised instead of running the program with its arguments."""


def check_arguments(command: Command) -> None:
    """Gives the arguments to the module's own parser, subcommands and types included.

    Raises AssertionError: the module or an argument is unknown, or one is missing.
    """
    main = main_module(command)
    if "parse_args" not in inspect.getsource(main):
        assert not command.arguments, f"{command.module} takes no arguments"
        return

    parse_args = argparse.ArgumentParser.parse_args

    def refuse(_: argparse.ArgumentParser, message: str) -> None:
        is_left_out = message.startswith("the following arguments are required")
        assert is_left_out and not command.is_whole, f"{command.text}: {message}"

    def only_parse(parser: argparse.ArgumentParser, words: list[str] | None = None) -> None:
        parse_args(parser, words)
        raise _ParsedError

    with (
        patch.object(argparse.ArgumentParser, "error", refuse),
        patch.object(argparse.ArgumentParser, "parse_args", only_parse),
        patch.object(sys, "argv", [command.module, *command.arguments]),
        redirect_stdout(StringIO()),
    ):
        try:
            main.main()
        except (_ParsedError, SystemExit):  # which `--help` raises
            return
    raise AssertionError(f"{command.module} did not look at its arguments")


def paths_in(command: Command) -> Iterator[str]:
    """The words, or parts of them, that can only be paths of ours: not a user's own, nor a URL."""
    previous = ""
    for word in (*command.words[1:], *(f"{n}={v}" for n, v in command.variables)):
        for part in re.split(r"[ ,]", word):
            name, _, value = part.rpartition("=")
            is_model = (name or previous).lower().endswith(("model", "pretrained"))
            path = value.lstrip("@").strip("'\"")
            is_path = "/" in path or path.endswith(_OF_SOURCES)
            if is_path and not is_model and not _is_the_users(path):
                yield path
        previous = word


def _is_the_users(path: str) -> bool:
    return path.startswith(("/", "../")) or "://" in path or bool(re.search(r"[{}$:\\()]", path))


@cache
def ignored_by_git() -> tuple[str, ...]:
    return tuple((ROOT / ".gitignore").read_text().split())


def exists_or_is_made(path: str) -> bool:
    """In the tree, or written by what the documents tell to run."""
    if (ROOT / path).exists() or any(f"{path}/".startswith(name) for name in ignored_by_git()):
        return True
    return f'"{path}"' in sources()


@cache
def sources() -> str:
    """All Python of the project but the tests."""
    folders = (ROOT / package for package in OUR_PACKAGES if package != "tests")
    return "".join(path.read_text() for folder in folders for path in sorted(folder.rglob("*.py")))


@cache
def makefile() -> str:
    return (ROOT / "Makefile").read_text()


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", makefile(), flags=re.MULTILINE))


def make_variables() -> set[str]:
    return set(re.findall(r"\$\((?:or \$\()?([A-Z_]+)\)", makefile()))
