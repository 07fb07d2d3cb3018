"""The service's commands.

    python -m app serve     everything on this machine; with its own Redis unless DYCOKE_REDIS_URL
                            names one
    python -m app api       this machine's API processes for a shared Redis; supervised if several
    python -m app worker    this machine's workers for a shared Redis, one per GPU, supervised
    python -m app keys      who may use the service: add, list, rotate, revoke

Settings come from the environment (`app.settings`). A setting that cannot be used ends the command
with one line on standard error and exit code 2.
"""

import argparse
import asyncio
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from app.api.listener import bind
from app.api.pool import Inherited, api_specs, num_processes
from app.embedded_redis import EmbeddedRedis, EmbeddedRedisError
from app.keys import command as keys_command
from app.keys.access import check_open_door
from app.keys.command import KeyCommandError
from app.keys.file import KeyFile, KeyFileError
from app.logs import configure_logging
from app.process_table import ProcessTable
from app.settings import ENV_PREFIX, Settings, load_settings
from app.store.client import connect
from app.supervisor import EXIT_BAD_SETTINGS, ChildSpec, Supervisor
from app.worker.pool import worker_specs
from dycoke_core.errors import ModelLoadError
from dycoke_core.model_config import check_config, is_directory

# The API answers its last streams from the workers, and both write to Redis until they are gone.
STOP_API, STOP_WORKERS, STOP_REDIS = 0, 1, 2


class SettingsError(Exception):
    """The command cannot run like this; the message says in one line why."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    try:
        settings = _settings(args.command)
        if args.command == "keys":
            return keys_command.run(args, KeyFile(settings.data_dir), settings.api_keys)
        if args.command == "serve":
            return _serve(settings)
        if args.command == "api":
            return _api(settings, args)
        return _worker(settings, args.child)
    except (SettingsError, KeyCommandError) as error:
        print(f"dycoke: {error}", file=sys.stderr)
        return EXIT_BAD_SETTINGS


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m app", description="DyCoke Serve")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help="everything on this machine")
    api = commands.add_parser("api", help="this machine's API processes for a shared Redis")
    api.add_argument("--child", type=int, metavar="N", help="run process N, unsupervised")
    api.add_argument("--listener", type=int, metavar="FD", help="the socket that it inherits")
    api.add_argument("--table", type=int, metavar="FD", help="the table of processes, likewise")
    worker = commands.add_parser("worker", help="this machine's workers for a shared Redis")
    worker.add_argument(
        "--child", type=int, metavar="N", help="run worker N in this process, unsupervised"
    )
    keys_command.add_parser(commands)
    return parser.parse_args(argv)


def _settings(command: str) -> Settings:
    """Raises SettingsError: one line that names what is wrong."""
    try:
        settings = load_settings()
    except ValidationError as error:
        problems = map(_problem, error.errors(include_input=False))
        raise SettingsError("; ".join(problems)) from error
    except ValueError as error:
        raise SettingsError(str(error)) from error
    if settings.redis_url is not None:
        try:
            connect(settings.redis_url)  # does no more than read it yet
        except ValueError:  # its text may hold a part of the password
            message = (
                "write a URL such as redis://:password@host:6379/0, with reserved characters of "
                "the password percent-encoded"
            )
            raise SettingsError(f"{ENV_PREFIX}REDIS_URL: {message}") from None
    elif command not in ("serve", "keys"):
        raise SettingsError(f"'{command}' needs {ENV_PREFIX}REDIS_URL; 'serve' brings its own")
    return settings


def _problem(error: ErrorDetails) -> str:
    """A setting's name and what is wrong with it; what concerns several names them itself."""
    message = error["msg"].removeprefix("Value error, ")
    name = "_".join(map(str, error["loc"])).upper()
    return f"{ENV_PREFIX}{name}: {message}" if name else message


def _serve(settings: Settings) -> int:
    configure_logging(settings.log_level, "supervisor")
    _check_keys(settings)
    _check_model(settings)
    count = num_processes(settings, is_whole_service=True)
    with _listening(settings) as listener:
        if settings.redis_url is not None:
            return _supervise(
                [*_worker_specs(settings, {}), *_api_specs(settings, listener, count, {})],
                listener,
            )
        try:
            redis = EmbeddedRedis(
                settings.data_dir, max_frame_store_bytes=settings.max_frame_store_bytes
            )
        except EmbeddedRedisError as error:
            raise SettingsError(str(error)) from error
        try:
            env = {f"{ENV_PREFIX}REDIS_URL": redis.url}
            return _supervise(
                [
                    redis.child_spec(stop_order=STOP_REDIS),
                    *_worker_specs(settings, env),
                    *_api_specs(settings, listener, count, env),
                ],
                listener,
            )
        finally:
            redis.close()


def _check_model(settings: Settings) -> None:
    """Before anything is started, if the model is a directory; a hub's is checked by the worker."""
    try:
        if is_directory(settings.model):
            check_config(Path(settings.model))
    except ModelLoadError as error:
        raise SettingsError(f"{ENV_PREFIX}MODEL: {error.message}") from error


def _check_keys(settings: Settings) -> None:
    """Before anything is started; the API checks it again."""
    try:
        has_keys = bool(settings.api_keys or KeyFile(settings.data_dir).read())
        check_open_door(settings, has_keys=has_keys)
    except (KeyFileError, ValueError) as error:
        raise SettingsError(str(error)) from error


def _api(settings: Settings, args: argparse.Namespace) -> int:
    if args.child is not None:
        configure_logging(settings.log_level, f"api-{args.child}")
        return _run_api(settings, Inherited(args.child, args.listener, args.table))
    count = num_processes(settings, is_whole_service=False)
    if count == 1:
        configure_logging(settings.log_level, "api")
        return _run_api(settings, None)
    configure_logging(settings.log_level, "supervisor")
    _check_keys(settings)
    with _listening(settings) as listener:
        return _supervise(_api_specs(settings, listener, count, {}), listener)


def _run_api(settings: Settings, inherited: Inherited | None) -> int:
    from app.api.server import run

    return run(settings, inherited)


def _worker(settings: Settings, child: int | None) -> int:
    _check_model(settings)
    if child is None:
        configure_logging(settings.log_level, "supervisor")
        return _supervise(_worker_specs(settings, {}))

    from app.worker.process import run

    return run(settings, child)


def _worker_specs(settings: Settings, env: Mapping[str, str]) -> list[ChildSpec]:
    return worker_specs(settings, env=env, stop_order=STOP_WORKERS)


def _listening(settings: Settings) -> socket.socket:
    try:
        return bind(settings.host, settings.port)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}; "
            f"set {ENV_PREFIX}HOST or {ENV_PREFIX}PORT"
        ) from error


def _api_specs(
    settings: Settings, listener: socket.socket, count: int, env: Mapping[str, str]
) -> list[ChildSpec]:
    table = ProcessTable.create(count)
    return api_specs(settings, listener, table, env=env, stop_order=STOP_API)


def _supervise(specs: Sequence[ChildSpec], listener: socket.socket | None = None) -> int:
    """Args:
    listener: only the API's processes keep it open once they are asked to stop.
    """
    on_stop = listener.close if listener is not None else None
    return asyncio.run(Supervisor(specs, on_stop=on_stop).run())


if __name__ == "__main__":
    sys.exit(main())
