"""What became of submitted jobs: state beside the run's own last words."""

from __future__ import annotations

import json
import os
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dsv3_megatron.report.sound import is_number
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.files import last_json_line, read_json_lines
from dsv3_megatron.run.handed import open_regular
from dsv3_megatron.run.made import appended_file
from launcher.slurm.client import job_facts
from parallel.errors import ClusterError
from parallel.units import show_count, show_duration

SCRIPT = "submit.sbatch"  # of a job, in its directory
_TAIL_BYTES = 1 << 20
_JOBS_BYTES = 1 << 18  # of jobs.jsonl: some 3,000 jobs
ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "STOPPED", "REQUEUED", "RESIZING")


def jobs_file(directory: Path) -> Path:
    """Return where the jobs of a run are noted, an object a line."""
    return directory / "jobs.jsonl"


def note_job(directory: Path, job: str, dependency: str | None) -> None:
    """Keep the number of a submitted job."""
    line = {"job": job, "submitted": datetime.now(UTC).isoformat(timespec="seconds"), "dependency": dependency}
    with appended_file(jobs_file(directory)) as file:
        file.write(f"{json.dumps(line)}\n".encode())


def jobs_of(directory: Path) -> list[dict[str, Any]]:
    """Return the jobs noted, oldest first. Raises ClusterError when none was ever submitted from here."""
    if not jobs_file(directory).is_file():
        raise ClusterError(f"run = {directory} has no jobs.jsonl: no job was submitted for it; see launcher/submit.py")
    if jobs_file(directory).stat().st_size > _JOBS_BYTES:  # the controller is asked for each
        raise ClusterError(f"{jobs_file(directory)} has more than {_JOBS_BYTES:,} bytes; remove its oldest lines")
    jobs = read_json_lines(jobs_file(directory))
    for number, noted in enumerate(jobs, 1):
        if re.fullmatch(r"[0-9]{1,12}", str(noted.get("job"))) is None:  # a word that scancel takes for an option, say
            raise ClusterError(f"{jobs_file(directory)}: entry {number} names no job by its number; remove it")
    if not jobs:
        raise ClusterError(f"{jobs_file(directory)} names no job; submit the run with launcher/submit.py")
    return jobs


def active_jobs(directory: Path) -> list[str]:
    """Return the jobs of a run that wait or run. One that the file names and that runs another script is none of it."""
    if not jobs_file(directory).is_file():
        return []
    active = []
    for noted in jobs_of(directory):
        tasks = [facts for facts in job_facts(noted["job"]) if _is_of(facts, directory)]
        if any(facts.get("JobState") in ACTIVE for facts in tasks):
            active.append(noted["job"])
    return active


def _is_of(facts: dict[str, str], directory: Path) -> bool:
    """Return whether a job runs the script of this run, or of a sweep beside it."""
    script = Path(facts.get("Command", ""))
    return script.name == SCRIPT and script.parent.parent == directory.parent


def status_text(directory: Path) -> str:
    """Return the jobs of a run, their states, and where the run stands."""
    lines = []
    for noted in jobs_of(directory)[-10:]:
        facts = job_facts(noted["job"])
        if not facts:
            lines.append(f"job {noted['job']:<10} ended longer ago than the controller remembers")
        for task in facts:
            lines.append(_job_line(task))
    return "\n".join([*lines, *_run_lines(RunDirectory(directory))])


def _job_line(facts: dict[str, str]) -> str:
    parts = [f"job {facts.get('JobId', '?'):<10} {facts.get('JobState', '?'):<10}"]
    if facts.get("JobState") == "PENDING":
        parts.append(f"waits: {facts.get('Reason')}")
    elif facts.get("NodeList", "(null)") != "(null)":
        parts.append(f"{facts.get('RunTime')} of {facts.get('TimeLimit')} on {facts['NodeList']}")
    if facts.get("Restarts", "0") != "0":
        parts.append(f"restarts {facts['Restarts']}")
    if facts.get("JobState") in ("FAILED", "NODE_FAIL", "TIMEOUT", "CANCELLED"):
        parts.append(f"reason {facts.get('Reason')}, exit code {facts.get('ExitCode')}")
    return "  ".join(parts)


def _run_lines(run: RunDirectory) -> list[str]:
    lines = [_step_line(run)]
    saved = sorted(p.name for p in run.checkpoints.glob("step_*") if p.name[5:].isdigit())
    lines.append(f"newest checkpoint: {saved[-1] if saved else 'none'}")
    if run.finished.exists():
        lines.append("finished")
    if run.refused.exists():
        lines += [f"stopped for good: {line}" for line in _tail(run.refused, 1)]
    return lines


def _step_line(run: RunDirectory) -> str:
    """Return where the run stands by the last row of its metrics, which may be of somebody else's making."""
    try:
        last = last_json_line(run.metrics)
        age = show_duration(max(0.0, time.time() - run.metrics.stat().st_mtime)) if last else ""
    except OSError as error:
        return f"{run.metrics} cannot be read ({error.strerror})"
    if last is None:
        return "no step yet"
    values: list[Any] = [last.get(key) for key in ("step", "tokens", "tokens_per_second", "skipped")]
    step, tokens, speed, skipped = values
    loss = float("nan") if last.get("lm_loss") is None else last["lm_loss"]
    if not all(map(is_number, values)) or not (type(loss) is float or is_number(loss)):
        return f"{run.metrics} ends with a row that is no step"
    return (
        f"step {step}  loss {loss:.4f}  {show_count(tokens)} tokens  {show_count(speed)} tok/s  skipped {skipped}  "
        f"({age} ago)"
    )


def log_text(directory: Path, lines: int) -> str:
    """Return the tail of the newest log of the job and of every node that wrote one in the newest start."""
    newest = jobs_of(directory)[-1]["job"]
    files = sorted(directory.glob(f"slurm-{newest}*.out")) + sorted((directory / "logs").glob(f"*-{newest}.log"))
    if not files:
        raise ClusterError(f"job {newest} of run = {directory} has written no log yet; ask status for its state")
    parts = []
    for file in files:
        parts.append(f"==> {file} <==\n" + "\n".join(_tail(file, lines)))
    return "\n\n".join(parts)


def _tail(file: Path, lines: int) -> list[str]:
    """Return the last lines of a log, of its last megabyte."""
    try:
        with open_regular(file) as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - _TAIL_BYTES))
            return log.read(_TAIL_BYTES).decode(errors="replace").splitlines()[-lines:]
    except OSError as error:
        return [f"cannot be read ({error.strerror})"]
