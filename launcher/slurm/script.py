"""The batch script: plain text that a cluster engineer can read, edit and submit by hand.

Each line of it is there for a fault that was seen on a real SLURM; the comments in the script say which.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from launcher.command_line.overrides import quoted
from launcher.command_line.typed import as_typed
from launcher.slurm.job import Job
from launcher.slurm.starts import after, before
from launcher.slurm.step import environment, training
from parallel.errors import ClusterError, one_line


def render(job: Job) -> str:
    """Return the script. Every value that a user wrote is quoted for the shell."""
    parts = [
        "#!/bin/bash",
        *_directives(job),
        "",
        *_what(job),
        "# shellcheck disable=SC2016  # what stands in single quotes is meant literally",
        "",
        "set -uo pipefail",
        f"umask {'077' if job.recipe.run.readable_by == 'owner' else '027'}  # run.readable_by",
        *job.recipe.cluster.slurm.setup,
        *_point(job),
        *before(job),
        "",
        *environment(job),
        "",
        *training(job),
        *after(job),
    ]
    return "\n".join(parts) + "\n"


def _directives(job: Job) -> list[str]:
    cluster, slurm = job.recipe.cluster, job.recipe.cluster.slurm
    values = {
        "job-name": job.name,
        "partition": cluster.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "reservation": slurm.reservation,
        "exclude": slurm.exclude,
        "nodes": f"{job.nodes}-{job.nodes + slurm.spares}" if slurm.spares else job.nodes,
        "segment": _segment(job),
        "ntasks-per-node": 1,
        "gpus-per-node": cluster.gpus_per_node or None,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.memory,
        "time": cluster.time_limit,
        "signal": f"USR1@{slurm.warning_seconds}",
        "open-mode": "append",
        "chdir": job.working_directory,
        "output": _log_pattern(job.directory / ("slurm-%A_%a.out" if len(job.points) > 1 else "slurm-%j.out")),
    }
    lines = [f"#SBATCH --{name}={_directive(str(value))}" for name, value in values.items() if value is not None]
    lines.append("#SBATCH --requeue")
    if slurm.exclusive:
        lines.append("#SBATCH --exclusive")
    if len(job.points) > 1:
        limit = f"%{slurm.array_limit}" if slurm.array_limit else ""
        lines.append(f"#SBATCH --array=0-{len(job.points) - 1}{limit}")
    return lines + [f"#SBATCH {option}" for option in slurm.options]


def _segment(job: Job) -> int | None:
    """Return the nodes that must lie in one NVLink domain, of which SLURM knows as blocks (its topology/block plugin;
    docs.coreweave.com, "Topology/Block Scheduling in Slurm"): as many at a time as a domain has. None: of one node."""
    cluster = job.recipe.cluster
    if cluster.nvlink_domain is None or not cluster.gpus_per_node:
        return None
    nodes = min(job.nodes, cluster.nvlink_domain // cluster.gpus_per_node)
    return nodes if nodes > 1 and job.nodes % nodes == 0 else None


def _directive(value: str) -> str:
    """Return a value as an #SBATCH line takes it: sbatch knows double quotes and the backslash.

    Raises ClusterError: it would begin another line, which is run.
    """
    if one_line(value) != value:
        raise ClusterError(f"{value!r:.80} holds a control character, which a #SBATCH line cannot; name another")
    if all(c.isalnum() or c in "-_.,:/@%=+[]*" for c in value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _log_pattern(path: Path) -> str:
    """Return the path of a log with SLURM's own percent signs only in the file's name."""
    return f"{str(path.parent).replace('%', '%%')}/{path.name}"


_WRITTEN = "# Written by launcher/submit.py. `sbatch FILE` submits it by hand; `submit.py status run=...` tells of it."


def _what(job: Job) -> list[str]:
    world = job.nodes * job.ranks_per_node
    return [
        f"# {one_line(job.recipe.recipe)}: {job.nodes} nodes x {job.ranks_per_node} ranks = {world:,} ranks; "
        f"{job.recipe.layout(world).describe()}.",
        as_typed(_WRITTEN),
    ]


def _point(job: Job) -> list[str]:
    """Return where the run lives and what makes it; of a sweep, by the number in the array."""
    if len(job.points) == 1:
        return ["job=$SLURM_JOB_ID", *_assignments(job.points[0].directory, job.points[0].overrides, "")]
    lines = [
        "# The last task of an array has the array's own number: requeueing that would restart every point.",
        "job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID",
        'case "$SLURM_ARRAY_TASK_ID" in',
    ]
    for number, point in enumerate(job.points):
        lines += [f"  {number})", *_assignments(point.directory, point.overrides, "    "), "    ;;"]
    return [*lines, '  *) echo "no point $SLURM_ARRAY_TASK_ID in this sweep" >&2; exit 2 ;;', "esac"]


def _assignments(directory: Path, overrides: tuple[str, ...], indent: str) -> list[str]:
    return [
        f"{indent}run={shlex.quote(str(directory))}",
        f"{indent}overrides=(",
        *(f"{indent}  {shlex.quote(word)}" for word in (*overrides, f"run.directory={quoted(directory)}")),
        f"{indent})",
    ]
