"""Counts what a stranger opens to follow one request: the files and classes whose code runs.

    python -m tests.docs.request_path [--checkout DIR] [--list]

Starts `python -m app serve` of a checkout with the bundled model, waits until it is ready, and
notes each function of `app` and `dycoke_core` that runs in any of its processes while one video and
question are posted and answered. Not counted: what only runs meanwhile by the clock
(`BY_THE_CLOCK`: heartbeats, clean-up), the sandboxed readers, which start as isolated programs, and
classes that only hold fields for pydantic.
"""

import argparse
import mmap
import tempfile
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.docs.documents import ROOT
from tests.serving import running_service

CLIP = "dycoke_core/tiny/clips/shapes.mp4"
# Loops that run whether or not there is a request; what they call counts where a request calls it.
BY_THE_CLOCK = (
    ("app.api.auth", "ApiKeys.run"),
    ("app.api.server", "ApiServer.on_tick"),
    ("app.api.upkeep.janitor", "_every"),
    ("app.api.upkeep.janitor", "Janitor._watch_loop_lag"),
    ("app.worker.lease_keeper", "LeaseKeeper.run"),
)

# Runs at the start of every process of the service. Notes a function once per process; a byte of a
# shared file says whether to.
_SITE = """
import mmap, os, sys, threading
_root, _file = os.environ["REQUEST_PATH_ROOT"], os.environ["REQUEST_PATH_NOTES"]
_switch = mmap.mmap(os.open(os.environ["REQUEST_PATH_SWITCH"], os.O_RDWR), 1)
_notes = os.open(_file, os.O_WRONLY | os.O_APPEND)
_by_the_clock = set(os.environ["REQUEST_PATH_CLOCK"].split())
_seen = set()

def _is_by_the_clock(frame):
    while frame is not None:
        if frame.f_code.co_qualname in _by_the_clock:
            return True
        frame = frame.f_back
    return False

def _note(frame, event, argument):
    if event != "call" or _switch[0] == 0:
        return
    code = frame.f_code
    if code in _seen or _is_by_the_clock(frame):
        return
    _seen.add(code)
    path, name = code.co_filename, code.co_qualname
    if path == "<string>" and code.co_name == "__init__":  # of a dataclass
        own = type(frame.f_locals.get(code.co_varnames[0]))
        module = sys.modules.get(own.__module__)
        path, name = getattr(module, "__file__", None) or "", own.__qualname__ + ".__init__"
    if path.startswith((_root + "/app/", _root + "/dycoke_core/")):
        os.write(_notes, f"{path[len(_root) + 1:]} {name}\\n".encode())

threading.setprofile(_note)
sys.setprofile(_note)
"""


@dataclass(frozen=True, slots=True)
class RequestPath:
    functions: frozenset[tuple[str, str]]  # file, qualified name

    @property
    def files(self) -> frozenset[str]:
        return frozenset(file for file, _ in self.functions)

    @property
    def classes(self) -> frozenset[tuple[str, str]]:
        """Classes with a method that ran, and the classes around them."""
        parents = {
            (file, name.split(".<locals>")[0].rpartition(".")[0]) for file, name in self.functions
        }
        return frozenset((file, name) for file, name in parents if name)


def follow(checkout: Path = ROOT) -> RequestPath:
    """Answers one question with the checkout's service, and returns what ran meanwhile."""
    checkout = checkout.resolve()
    with tempfile.TemporaryDirectory(prefix="dycoke-path-") as folder:
        notes, switch_file = Path(folder, "notes"), Path(folder, "switch")
        notes.touch()
        switch_file.write_bytes(b"\0")
        Path(folder, "sitecustomize.py").write_text(_SITE)
        environment = {
            "PYTHONPATH": f"{folder}:{checkout}",
            "REQUEST_PATH_ROOT": str(checkout),
            "REQUEST_PATH_NOTES": str(notes),
            "REQUEST_PATH_SWITCH": str(switch_file),
            "REQUEST_PATH_CLOCK": " ".join(name for _, name in BY_THE_CLOCK),
        }
        with (
            switch_file.open("r+b") as file,
            mmap.mmap(file.fileno(), 1) as switch,
            running_service(checkout, environment) as url,
        ):
            switch[0] = 1
            _ask(url, checkout / CLIP)
            switch[0] = 0
        noted = {tuple(line.split(" ", 1)) for line in notes.read_text().splitlines()}
    return RequestPath(frozenset((file, name) for file, name in noted))


def _ask(url: str, clip: Path) -> None:
    form = {"question": "Describe the clip.", "max_tokens": "8"}
    with (
        clip.open("rb") as video,
        httpx.stream("POST", f"{url}/v1/video/chat", data=form, files={"video": video}) as answer,
    ):
        events = answer.read().decode()
    assert answer.status_code == httpx.codes.OK and "event: done" in events, events


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.docs.request_path",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkout", type=Path, default=ROOT)
    parser.add_argument("--list", action="store_true", help="each file with its classes")
    arguments = parser.parse_args()
    path = follow(arguments.checkout)
    if arguments.list:
        for file in sorted(path.files):
            names = sorted(name for of, name in path.classes if of == file)
            print(f"{file}: {', '.join(names)}")
    print(f"{len(path.files)} files, {len(path.classes)} classes, {len(path.functions)} functions")


if __name__ == "__main__":
    main()
