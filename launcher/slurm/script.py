"""The batch script: plain text that a cluster engineer can read, edit and submit by hand.

Each line of it is there for a fault that was seen on a real SLURM; the comments in the script say which.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from dsv3_megatron.health.stop_signals import WARNED_FILE
from launcher.command_line.overrides import quoted
from launcher.command_line.recipe_files import IS_CHECKOUT, ROOT
from launcher.command_line.typed import as_typed
from launcher.slurm.job import Job
from launcher.slurm.mounts import absolute_caches, mounts_of
from parallel.errors import ClusterError, one_line
from parallel.world import NOT_SHARED

# A checkout is run from its place, in the container too; what is installed is found by the job's interpreter.
PRETRAIN = shlex.quote(str(ROOT / "launcher" / "pretrain.py")) if IS_CHECKOUT else "-m launcher.pretrain"
_CODE = (
    "# The checkout that the job was submitted from, whatever its interpreter or container has installed.",
    f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
)


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
        _BEFORE.format(max_starts=job.recipe.cluster.slurm.max_starts).strip("\n"),
        "",
        *_environment(job),
        "",
        *_training(job),
        (_AFTER_CHAINED if job.chained else _AFTER).strip("\n"),
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
        "nodes": job.nodes,
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


_BEFORE = """
mkdir -p "$run/checkpoints" "$run/logs"
# A later job of a chain, or a requeue that came too late: nothing to do, or nothing that could go well.
[ -e "$run/finished" ] && exit 0
[ -f "$run/refused" ] && {{ head -c 2000 "$run/refused" >&2; exit 2; }}

# Requeued for as long as the run makes progress: starts are counted since the newest checkpoint changed. A limit on
# SLURM_RESTART_COUNT alone would end a long run in short slots.
newest=$(find "$run/checkpoints" -maxdepth 1 -type d -regex '.*/step_[0-9]+' -printf '%f\\n' | sort | tail -n 1)
# A state in memory is one too: memory.json has the step of the one that the last start has resumed from.
kept=
[ -f "$run/memory.json" ] &&
  kept=$(head -c 2000 "$run/memory.json" | grep -Eo '"step": [0-9]{{1,15}}' | grep -Eo '[0-9]+' | head -n 1)
progress="${{newest:-nothing}}${{kept:++$kept}}"
seen=none starts=0
[ -f "$run/starts" ] && read -r seen starts <"$run/starts"
# A number and nothing else: bash's arithmetic runs commands that it finds in a text.
case $starts in ??????* | *[!0-9]* | "") starts=0 ;; esac
[ "$seen" = "$progress" ] || starts=0
starts=$((10#$starts + 1))
rm -f "$run/starts" # which may be a link to something else
echo "$progress $starts" >"$run/starts"
if [ "$starts" -gt {max_starts} ]; then
  rm -f "$run/refused"
  echo "cluster: {max_starts} starts without a new checkpoint (newest: ${{newest:-none}}); fix the run, submit again" |
    tee "$run/refused" >&2
  exit 1
fi
"""


def _environment(job: Job) -> list[str]:
    slurm = job.recipe.cluster.slurm
    return [
        *_meeting(slurm.interface),
        *(_CODE if IS_CHECKOUT else ()),
        "export PYTHONSAFEPATH=1  # python -m would run a file of this folder that has the name of a module",
        "# A mistake in the recipe is written there, and ends the job for good.",
        'export DSV3_REFUSED_FILE="$run/refused"',
        f'export {WARNED_FILE}="$run/logs/warned-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"',
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}",
        f"export {NOT_SHARED}=1",
        *_REPORTS,
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(slurm.environment.items())),
        "# What this start ran with; no secrets: only variables of these families, and none that names a credential.",
        'noted="$run/logs/environment-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}.txt"',
        'rm -f "$noted"',
        'env | grep -E "^(SLURM|NCCL|UCX|GLOO|NVSHMEM|CUDA|TORCH|PYTORCH|OMP|MASTER)_" |',
        '  grep -vE "^[A-Za-z0-9_]*(JWT|TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH)[A-Za-z0-9_]*=" | sort >"$noted"',
    ]


_REPORTS = (
    "# What a rank says begins with its number. A crash in C++ shows where Python was; what Python raises gets into",
    "# torch's error file without @record (launcher/command_line/last_words.py), and the collectives of a hang into",
    "# a file of each rank.",
    "export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='${rank}: '",
    "export PYTHONFAULTHANDLER=1",
    'export TORCH_FR_DUMP_TEMP_FILE="$run/logs/collectives-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-rank-"',
)


def _meeting(interface: str | None) -> list[str]:
    """Return where the ranks meet: at the first node, on the fabric where its interface is named."""
    port = [
        "# No port that follows from the job's number; one that is taken ends this start, and the next has another.",
        "MASTER_PORT=$((20000 + RANDOM % 12000))",
        "export MASTER_ADDR",
    ]
    if interface is None:
        return ['MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)', *port]
    return [
        "# This is the first node. Ranks meet at its address on the fabric, and gloo and NCCL listen there alone.",
        f"interface={shlex.quote(interface)}",
        'MASTER_ADDR=$(PATH=$PATH:/usr/sbin:/sbin ip -o -4 addr show dev "$interface" |',
        """  awk '{sub("/.*", "", $4); print $4; exit}')""",
        'if [ -z "$MASTER_ADDR" ]; then',
        '  echo "cluster: cluster.slurm.interface = $interface has no address on $(hostname)" >&2',
        "  exit 1",
        "fi",
        *port,
        'export GLOO_SOCKET_IFNAME="$interface" NCCL_SOCKET_IFNAME="$interface"',
    ]


# A shell waits for its child again after every signal that it takes; it ignores the warning while the child is made.
# getent asks as torch does. An address is one, too: an interface's is not looked up.
_ON_EACH_NODE = f"""
  trap "" USR1; unset SLURM_JWT; export PET_NODE_RANK=$SLURM_NODEID
  getent ahosts "$MASTER_ADDR" >/dev/null || {{
    echo "cluster: $SLURMD_NODENAME finds no address for $MASTER_ADDR, the first node of the job; set" \\
      "cluster.slurm.interface, whose address is taken instead, or have the name put into DNS or /etc/hosts" >&2
    exit 1
  }}
@NUMA@  "$@" & trap ": >\\"\\${WARNED_FILE}\\"" USR1; trap : TERM
  wait $!; rc=$?; while kill -0 $! 2>/dev/null; do wait $!; rc=$?; done; exit $rc
"""
_NUMACTL = """
  command -v numactl >/dev/null || {
    echo "cluster: numactl is not installed on $SLURMD_NODENAME, and cluster.slurm.numa_binding needs it; install" \\
      "it, or set cluster.slurm.numa_binding=null" >&2
    exit 1
  }
"""


def _training(job: Job) -> list[str]:
    slurm = job.recipe.cluster.slurm
    binding = slurm.numa_binding if job.recipe.cluster.device == "cuda" else None
    # In apptainer's image there is another numactl, which torchrun looks for itself.
    looks = _NUMACTL[1:] if binding and slurm.container != "apptainer" else ""
    before, container = _container(job)
    step = [
        "srun",
        "--kill-on-bad-exit=1",  # the first node to fail ends the others in seconds, not after NCCL's timeout
        '--cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}"',
        "--cpu-bind=none",
        "--open-mode=append",
        '--output="${run//%/%%}/logs/%N-%n-$SLURM_JOB_ID.log"',
    ]
    return [
        "# One agent a node; ranks meet at the first node, anew at every start. A static rendezvous: with one",
        "# of torch's c10d kind, agents unpickle what whoever reaches their port has written there (docs/security.md).",
        "train=(",
        f"  {shlex.quote(job.python)} -m torch.distributed.run",
        f'  --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node={job.ranks_per_node} --max-restarts={slurm.restarts}',
        '  --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT"',
        '  --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"',
        f"  --tee=3{f' --numa-binding={binding}' if binding else ''}",
        f'  {PRETRAIN} "${{overrides[@]}}"',
        ")",
        "# SLURM's warning goes to every process of the step. The agent would die of it, so it ignores it; the ranks",
        "# set a handler of their own: they finish the step, save and leave with 0. A warning that comes before there",
        "# are ranks is kept in a file that they read. TERM is the agent's business, too: it gives the ranks time.",
        "# Agents number their nodes as SLURM does (PET_: torchrun's options), so rank 0 is on the first, and ranks of",
        "# neighbouring nodes are neighbours. Ranks have no use for a credential. A name that a node cannot resolve is",
        "# found here: torchrun would wait for it in silence.",
        f"on_each_node='{_ON_EACH_NODE.replace('@NUMA@', looks)}'",
        *before,
        " \\\n  ".join([" ".join(step[:4]), " ".join(step[4:]), *container]),
        "rc=$?",
    ]


def _container(job: Job) -> tuple[list[str], list[str]]:
    """Return the lines before the step, and those that end its command: srun's options of a container, what it runs."""
    slurm, image = job.recipe.cluster.slurm, shlex.quote(str(job.recipe.cluster.slurm.image))
    shell, train = 'bash -c "$on_each_node" torchrun', '"${train[@]}"'
    if slurm.container == "none":
        return [], [f"{shell} {train}"]
    directories = [point.directory for point in job.points]
    mounts, left_out = mounts_of(slurm.mounts, job.working_directory, directories, [p.paths for p in job.points])
    before = [
        "# The container sees the places that the recipe names, by the same names.",
        *(f"mkdir -p {shlex.quote(cache)}" for cache in absolute_caches(p.paths for p in job.points)),
        "mounts=(",
        *(f"  {shlex.quote(mount)}" for mount in mounts),
        *(['  "$run:$run"'] if left_out else []),
        ")",
    ]
    where = shlex.quote(str(job.working_directory))
    if slurm.container == "pyxis":
        options = [f"--container-image={image}", '--container-mounts="$(IFS=, && echo "${mounts[*]}")"']
        return before, [*options, f"--container-workdir={where}", f"{shell} {train}"]
    nv = " --nv" if job.recipe.cluster.device == "cuda" else ""
    # Inside the shell: apptainer, too, must not die of USR1.
    return before, [shell, f'apptainer exec{nv} --pwd={where} "${{mounts[@]/#/--bind=}}"', f"{image} {train}"]


_AFTER = """
# Judged by what the run left, never by a code of its own: torchrun turns every failure into 1.
[ -e "$run/finished" ] && exit 0
[ -f "$run/refused" ] && { head -c 2000 "$run/refused" >&2; exit 2; }
# No trap for TERM anywhere above: scancel ends this shell before the next line, and the job stays cancelled.
echo "srun left with $rc before the run was finished; requeue (start $starts since ${newest:-the beginning})" >&2
scontrol requeue "$job"
"""

_AFTER_CHAINED = """
# Judged by what the run left, never by a code of its own: torchrun turns every failure into 1.
[ -e "$run/finished" ] && exit 0
[ -f "$run/refused" ] && { head -c 2000 "$run/refused" >&2; exit 2; }
# A job of a chain: after the warning before the time limit the next job goes on; a failure is tried again here.
[ "$rc" -eq 0 ] && exit 0
# No trap for TERM anywhere above: scancel ends this shell before the next line, and the job stays cancelled.
echo "srun left with $rc before the run was finished; requeue (start $starts since ${newest:-the beginning})" >&2
scontrol requeue "$job"
"""
