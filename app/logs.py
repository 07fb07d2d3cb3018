"""Logs: one JSON object per line on standard error.

Job ids, and trace ids if there are any, are passed as `extra` (`JobRequest.log_fields`).
"""

import json
import logging
import os
import sys
import time
from typing import Any

# Of a log record, what is written under another name or not at all; the rest came as `extra`.
_STANDARD_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {
    "message",
    "asctime",
    "color_message",  # uvicorn's
}


_ENCODER = json.JSONEncoder(default=str)


class JsonFormatter(logging.Formatter):
    """Args:
    process: which of the service's processes this is, such as `api` or `worker-0`.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process
        self._second = (0, "")  # the last one that was written, and as what

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": f"{self._to_the_second(int(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "process": self._process,
            "pid": os.getpid(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry.update((k, v) for k, v in record.__dict__.items() if k not in _STANDARD_FIELDS)
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return _ENCODER.encode(entry)

    def _to_the_second(self, unix_s: int) -> str:
        if unix_s != self._second[0]:
            self._second = (unix_s, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix_s)))
        return self._second[1]


def configure_logging(level: str, process: str) -> None:
    """Sends everything that this process logs to standard error, as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    # What no line says need not be found out: https://docs.python.org/3/howto/logging.html
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # warns of each malformed body
