"""The calls to SLURM's own commands, each with a time limit and one line for what goes wrong."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from parallel.errors import ClusterError

_PATIENCE_SECONDS = 60  # while its controller is away, sbatch blocks
_KNOWN = {  # what sbatch says -> the key to fix
    r"invalid partition": "cluster.partition names no partition of this cluster (`sinfo -s` lists them)",
    r"[Ii]nvalid account": "cluster.slurm.account is not one of yours (`sacctmgr show assoc user=$USER`)",
    r"[Ii]nvalid qos": "cluster.slurm.qos is not one of this cluster's",
    r"[Rr]equested time limit is invalid|[Ii]nvalid --time": "cluster.time_limit is not a time or exceeds the limit of "
    "the partition (`sinfo -o '%P %l'`)",
    r"[Nn]ode count specification invalid|More processors requested than permitted|[Rr]equested node configuration is "
    "not available": "cluster.nodes, cluster.gpus_per_node or cluster.slurm.memory ask for more than the partition has "
    "(`sinfo -o '%P %D %c %m %G'`)",
    r"[Ii]nvalid feature": "cluster.slurm.constraint names no feature of this cluster's nodes",
    r"establish a configuration source": "SLURM is installed here but belongs to no cluster; log in to the cluster, or "
    "set SLURM_CONF",
    r"[Rr]eservation": "cluster.slurm.reservation is not one that you may use (`scontrol show reservation`)",
}


def call(command: Sequence[str]) -> str:
    """Return what a SLURM command prints.

    Raises: ClusterError: no such command here, the controller does not answer, or it refuses.
    """
    if shutil.which(command[0]) is None:
        raise ClusterError(
            f"{command[0]} is not on PATH: this machine has no SLURM; log in to the cluster, or use dry_run=true to "
            "see the script"
        )
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        raise ClusterError(
            f"{command[0]} got no answer from the controller in {_PATIENCE_SECONDS} s; running jobs go on; try later"
        ) from None
    if done.returncode:
        raise ClusterError(_explained(command[0], done.stderr or done.stdout))
    return done.stdout if command[0] != "sbatch" else done.stdout + done.stderr


def _explained(command: str, complaint: str) -> str:
    lines = [line.strip() for line in complaint.splitlines() if line.strip()] or ["no reason given"]
    said = "; ".join(
        dict.fromkeys(re.sub(r"^(sbatch|scontrol|squeue|scancel): (error: )?", "", line) for line in lines)
    )
    for pattern, fix in _KNOWN.items():
        if re.search(pattern, complaint):
            return f"{fix}; {command} said: {said}"
    if re.search(r"Unable to contact slurm controller|Connection refused|communication connection", complaint):
        return f"{command} cannot reach the controller; running jobs go on; try later (it said: {said})"
    return f"{command} refused: {said}"


def submit(script: Path, *, dependency: str | None = None, test_only: bool = False) -> str:
    """Hand a script in; return the job's number, or with ``test_only`` what SLURM would do with it."""
    options = [f"--dependency={dependency}"] if dependency else []
    if test_only:
        return call(["sbatch", "--test-only", *options, str(script)]).strip()
    return call(["sbatch", "--parsable", *options, str(script)]).strip().splitlines()[-1].split(";")[0]


def job_facts(job: str) -> list[dict[str, str]]:
    """Return what the controller knows of a job (of an array: of each task); [] when it has forgotten it."""
    try:
        text = call(["scontrol", "--oneliner", "show", "job", job])
    except ClusterError as error:
        if "Invalid job id" in str(error):
            return []
        raise
    return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines() if "JobId=" in line]


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs. Those that have ended are no error."""
    call(["scancel", "--quiet", *jobs])
