"""`python -m app keys`: adds, lists, limits, rotates and revokes stored keys.

When a key is made, its secret is printed once, alone on standard output; messages for people go to
standard error. A change takes effect within `auth.REFRESH_S` in every API that sees the file,
without a restart.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from app.keys.entries import (
    DEFAULT_SCOPES,
    NAME,
    ConfiguredKey,
    Scope,
    StoredKey,
    digest_of,
    new_owner,
    new_secret,
)
from app.keys.file import Change, KeyFile, KeyFileError
from app.keys.limits import MAX_LIMIT, MAX_WEIGHT, MIN_WEIGHT, KeyLimits
from dycoke_core.config import PRIORITIES

LIMITS = {
    "max_jobs": "jobs under way at a time",
    "max_queued_jobs": "jobs at a time that wait for a worker",
    "tokens_per_minute": "tokens of prompts and answers",
    "frames_per_minute": "frames asked about",
    "max_stored_bytes": "bytes of videos; beyond them its least recently used ones go",
    "max_stored_videos": "videos; beyond them its least recently used ones go",
}


class KeyCommandError(Exception):
    """The command cannot be carried out; the message says in one line why."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("keys", help="who may use the service")
    actions = parser.add_subparsers(dest="action", required=True)
    add = actions.add_parser("add", help="make a key and print its secret, once")
    add.add_argument("name")
    add.add_argument(
        "--scopes",
        type=_scopes,
        default=DEFAULT_SCOPES,
        metavar="SCOPE,...",
        help=f"of {', '.join(Scope)}; default: {','.join(sorted(DEFAULT_SCOPES))}",
    )
    _add_limits(add)
    limit = actions.add_parser("limit", help="change some of a key's limits; the others stay")
    limit.add_argument("name")
    _add_limits(limit)
    listing = actions.add_parser("list", help="all keys, without their secrets")
    listing.add_argument("--json", action="store_true")
    rotate = actions.add_parser("rotate", help="give a key another secret; its holder stays")
    rotate.add_argument("name")
    revoke = actions.add_parser("revoke", help="revoke a key; it cannot be restored")
    revoke.add_argument("name")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    for name, meaning in LIMITS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=_limit,
            metavar="N",
            help=f"{meaning}; 0: no limit; default: what DYCOKE_KEY_{name.upper()} says",
        )
    parser.add_argument(
        "--weight",
        type=_weight,
        metavar="X",
        help="its share of the workers where others wait too; default: 1",
    )
    parser.add_argument(
        "--max-priority",
        choices=PRIORITIES,
        help="the highest that its jobs may have; default: what DYCOKE_KEY_MAX_PRIORITY says",
    )


def run(args: argparse.Namespace, file: KeyFile, configured: Sequence[ConfiguredKey]) -> int:
    """Raises: KeyCommandError."""
    try:
        if args.action == "list":
            _list(file.read(), configured, as_json=args.json)
            return 0
        with file.change() as change:
            made = _carry_out(change, args, configured)
    except KeyFileError as error:
        raise KeyCommandError(str(error)) from error
    print(made.said, file=sys.stderr)
    if made.secret is not None:
        print("It is shown this once:", file=sys.stderr)
        print(made.secret)
    return 0


@dataclass(frozen=True, slots=True)
class _Made:
    said: str
    secret: str | None = None


def _carry_out(
    change: Change, args: argparse.Namespace, configured: Sequence[ConfiguredKey]
) -> _Made:
    if args.action == "add":
        return _add(change, args, configured)
    key = _known(change, args.name)
    if args.action == "revoke":
        change.put(key.model_copy(update={"revoked_at_s": time.time()}), "revoke")
        return _Made(f"key '{key.name}' is revoked")
    if args.action == "limit":
        limits = _limits(args).or_else(key.limits)
        change.put(key.model_copy(update={"limits": limits}), "limit")
        return _Made(f"key '{key.name}' has the limits {_limits_text(limits)}")
    secret = new_secret()
    change.put(key.model_copy(update={"digest": digest_of(secret)}), "rotate")
    return _Made(f"key '{key.name}' has another secret, the last one is good no longer", secret)


def _add(change: Change, args: argparse.Namespace, configured: Sequence[ConfiguredKey]) -> _Made:
    if not NAME.fullmatch(args.name):
        raise KeyCommandError(
            "a key's name is 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-', a letter or digit first"
        )
    if any(key.name == args.name for key in configured):
        raise KeyCommandError(f"DYCOKE_API_KEYS has a key '{args.name}' already: take another name")
    if _active(change, args.name) is not None:
        raise KeyCommandError(f"there is a key '{args.name}'; 'keys rotate' exchanges its secret")
    secret = new_secret()
    key = StoredKey(
        owner=new_owner(),
        name=args.name,
        digest=digest_of(secret),
        scopes=args.scopes,
        limits=_limits(args),
        created_at_s=time.time(),
    )
    change.put(key, "add")
    return _Made(
        f"key '{key.name}' is made, with the scopes {', '.join(sorted(key.scopes))}", secret
    )


def _limits(args: argparse.Namespace) -> KeyLimits:
    return KeyLimits(**{name: getattr(args, name) for name in KeyLimits.model_fields})


def _limits_text(limits: KeyLimits) -> str:
    said = limits.model_dump(exclude_none=True)
    return " ".join(f"{name}={value}" for name, value in said.items()) or "-"


def _known(change: Change, name: str) -> StoredKey:
    key = _active(change, name)
    if key is None:
        raise KeyCommandError(f"there is no key '{name}' that is in force; see 'keys list'")
    return key


def _active(change: Change, name: str) -> StoredKey | None:
    found = (key for key in change.keys if key.name == name and key.revoked_at_s is None)
    return next(found, None)


def _list(keys: Sequence[StoredKey], configured: Sequence[ConfiguredKey], *, as_json: bool) -> None:
    rows = [_row(key) for key in sorted(keys, key=lambda key: key.created_at_s)]
    rows += [
        {"name": key.name, "scopes": sorted(DEFAULT_SCOPES), "source": "DYCOKE_API_KEYS"}
        for key in configured
    ]
    if as_json:
        print(json.dumps(rows))
        return
    print(f"{'NAME':24}{'SCOPES':24}{'CREATED':22}{'REVOKED':22}LIMITS")
    for row in rows:
        created = _date(row["created_at_s"]) if "created_at_s" in row else row["source"]
        revoked = _date(row["revoked_at_s"]) if "revoked_at_s" in row else "-"
        limits = _limits_text(KeyLimits(**row.get("limits", {})))
        print(f"{row['name']:24}{','.join(row['scopes']):24}{created:22}{revoked:22}{limits}")


def _row(key: StoredKey) -> dict[str, Any]:
    row = key.model_dump(mode="json", exclude={"digest", "owner"}, exclude_none=True)
    return {**row, "scopes": sorted(key.scopes), "source": "file"}


def _date(at_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at_s))


def _scopes(text: str) -> frozenset[Scope]:
    try:
        scopes = frozenset(Scope(word.strip()) for word in text.split(",") if word.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(Scope)}") from None
    if not scopes:
        raise argparse.ArgumentTypeError(f"must have at least one of {', '.join(Scope)}")
    return scopes


def _weight(text: str) -> float:
    with suppress(ValueError):
        weight = float(text)
        if MIN_WEIGHT <= weight <= MAX_WEIGHT:
            return weight
    raise argparse.ArgumentTypeError(f"must be a number from {MIN_WEIGHT} to {MAX_WEIGHT}")


def _limit(text: str) -> int:
    with suppress(ValueError):
        number = int(text)
        if 0 <= number <= MAX_LIMIT:
            return number
    raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {MAX_LIMIT}")
