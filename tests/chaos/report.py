"""The report of a run: a summary, and for each problem the job's history among the faults."""

import json
from collections import Counter
from pathlib import Path

from tests.chaos.ledger import JobEntry, Ledger

MAX_SHOWN_PROBLEMS = 10
MAX_SHOWN_LINES = 60


def report(ledger: Ledger, *, name: str, logs: Path) -> str:
    outcomes = Counter(entry.outcome or "unknown" for entry in ledger.jobs.values())
    lines = [
        f"{name}: {ledger.num_faults.total()} faults, {len(ledger.jobs)} accepted jobs, "
        f"{ledger.num_unknown_jobs} nobody heard of, {ledger.num_resumes} resumes, "
        f"{len(ledger.problems)} problems",
        f"ended: {dict(outcomes.most_common())}",
        f"refused: {dict(ledger.refusals.most_common())}",
        f"faults: {dict(ledger.num_faults.most_common())}",
    ]
    for job_id, problem in ledger.problems[:MAX_SHOWN_PROBLEMS]:
        lines += ["", f"PROBLEM {job_id or ''}: {problem}"]
        entry = ledger.jobs.get(job_id or "")
        if entry is not None:
            lines += _history(entry, ledger, logs)
    return "\n".join(lines)


def _history(entry: JobEntry, ledger: Ledger, logs: Path) -> list[str]:
    """What happened to a job and around it: its client's notes, the faults, the logs."""
    ends_at_s = entry.history[-1][0] + 1.0
    told = [(at_s, f"client: {text}") for at_s, text in entry.history]
    told += [
        (at_s, f"FAULT {text}")
        for at_s, text in ledger.faults
        if entry.accepted_at_s - 2.0 < at_s < ends_at_s
    ]
    lines = [f"  {entry.question}"]
    lines += [f"  {at_s:8.2f} {text}" for at_s, text in sorted(told)]
    logged = []
    for path in sorted(logs.iterdir()):
        for text in path.read_text().splitlines():
            if entry.job_id in text and text.startswith("{"):
                line = json.loads(text)
                said = {k: v for k, v in line.items() if k not in ("time", "message")}
                logged.append(f"  {line['time']} {path.name}: {line['message']} {said}")
    return lines + sorted(logged)[:MAX_SHOWN_LINES]
