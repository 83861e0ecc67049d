"""The middle of the batch script: what every process finds in its environment, and the ranks on all nodes."""

from __future__ import annotations

import shlex

from dsv3_megatron.health.stop_signals import WARNED_FILE
from launcher.command_line.recipe_files import IS_CHECKOUT, ROOT
from launcher.slurm.job import Job
from launcher.slurm.mounts import absolute_caches, mounts_of
from parallel.world import NOT_SHARED

# A checkout is run from its place, in the container too; what is installed is found by the job's interpreter.
PRETRAIN = shlex.quote(str(ROOT / "launcher" / "pretrain.py")) if IS_CHECKOUT else "-m launcher.pretrain"
_CODE = (
    "# The checkout that the job was submitted from, whatever its interpreter or container has installed.",
    f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
)


def environment(job: Job) -> list[str]:
    """Return the lines that set what every process of the job finds in its environment."""
    slurm = job.recipe.cluster.slurm
    return [
        *_meeting(slurm.interface, job),
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


def _meeting(interface: str | None, job: Job) -> list[str]:
    """Return where the ranks meet: at the first node, on the fabric where its interface is named."""
    port = [
        "# No port that follows from the job's number; one that is taken ends this start, and the next has another.",
        "MASTER_PORT=$((20000 + RANDOM % 12000))",
        "export MASTER_ADDR",
    ]
    if job.recipe.cluster.slurm.spares:
        port += [
            f"# The ranks are on {job.nodes} of the nodes; the others are spares, and take the place of excluded ones.",
            f'nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n {job.nodes} | paste -sd,)',
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


def training(job: Job) -> list[str]:
    """Return the lines that start the ranks on all nodes, and leave srun's code in ``rc``."""
    slurm = job.recipe.cluster.slurm
    binding = slurm.numa_binding if job.recipe.cluster.device == "cuda" else None
    # In apptainer's image there is another numactl, which torchrun looks for itself.
    looks = _NUMACTL[1:] if binding and slurm.container != "apptainer" else ""
    return [
        "# One agent a node; ranks meet at the first node, anew at every start. A static rendezvous: with one",
        "# of torch's c10d kind, agents unpickle what whoever reaches their port has written there (docs/security.md).",
        "agent=(",
        f"  {shlex.quote(job.python)} -m torch.distributed.run",
        f"  --nnodes={job.nodes if slurm.spares else _ALL_NODES} --nproc-per-node={job.ranks_per_node}"
        f" --max-restarts={slurm.restarts}",
        '  --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT"',
        '  --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"',
        f"  --tee=3{f' --numa-binding={binding}' if binding else ''}",
        ")",
        "# SLURM's warning goes to every process of the step. The agent would die of it, so it ignores it; the ranks",
        "# set a handler of their own: they finish the step, save and leave with 0. A warning that comes before there",
        "# are ranks is kept in a file that they read. TERM is the agent's business, too: it gives the ranks time.",
        "# Agents number their nodes as SLURM does (PET_: torchrun's options), so rank 0 is on the first, and ranks of",
        "# neighbouring nodes are neighbours. Ranks have no use for a credential. A name that a node cannot resolve is",
        "# found here: torchrun would wait for it in silence.",
        f"on_each_node='{_ON_EACH_NODE.replace('@NUMA@', looks)}'",
        *_functions(job),
        *(_CHECK if slurm.check_nodes else ()),
        f'{"checked && " if slurm.check_nodes else ""}ranks {PRETRAIN} "${{overrides[@]}}"',
        "rc=$?",
    ]


_ALL_NODES = '"$SLURM_JOB_NUM_NODES"'
_CHECK = (
    "# Whether the nodes are fit: a minute, against a day beside a slow link, or on two versions of the code.",
    "checked() {",
    '  SLURM_TIMELIMIT=5 DSV3_NODES_FILE="$run/logs/nodes-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}.json" \\',
    '    ranks --master-port="$((MASTER_PORT + 1))" --max-restarts=0 -m launcher.slurm.check_nodes "${overrides[@]}"',
    "}",
)


def _functions(job: Job) -> list[str]:
    """Return bash functions that run a command in the job's container, if it has one: ``ranks`` the agent on every
    node, whose last words it takes, ``once`` any command on one node."""
    slurm = job.recipe.cluster.slurm
    step = [
        "  srun",
        "--kill-on-bad-exit=1",  # the first node to fail ends the others in seconds, not after NCCL's timeout
        *([f'--nodes={job.nodes} --nodelist="$nodes"'] if slurm.spares else []),
        '--cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}"',
        "--cpu-bind=none",
    ]
    log = '    --open-mode=append --output="${run//%/%%}/logs/%N-%n-$SLURM_JOB_ID.log"'
    shell, command = 'bash -c "$on_each_node" torchrun', '"${agent[@]}" "$@"'
    before = _mounts(job)
    where, image = shlex.quote(str(job.working_directory)), shlex.quote(str(slurm.image))
    if slurm.container == "pyxis":
        options = [f"--container-image={image}", '--container-mounts="$(IFS=, && echo "${mounts[*]}")"']
        before += ["container=(", *(f"  {word}" for word in (*options, f"--container-workdir={where}")), ")"]
        inside, once = '"${container[@]}" ' + shell, 'srun --nodes=1 --ntasks=1 "${container[@]}" "$@"'
    elif slurm.container == "apptainer":
        nv = " --nv" if job.recipe.cluster.device == "cuda" else ""
        before += ["container=(", f'  apptainer exec{nv} --pwd={where} "${{mounts[@]/#/--bind=}}" {image}', ")"]
        # Inside the shell: apptainer, too, must not die of USR1.
        inside, once = shell + ' "${container[@]}"', '"${container[@]}" "$@"'
    else:
        inside, once = shell, '"$@"'
    lines = [" ".join(step), log, f"    {inside} {command}"]
    return [*before, "ranks() {", *(f"{line} \\" for line in lines[:-1]), lines[-1], "}", f"once() {{ {once}; }}"]


def _mounts(job: Job) -> list[str]:
    """Return the lines that say what a container sees; none where there is none."""
    slurm = job.recipe.cluster.slurm
    if slurm.container == "none":
        return []
    directories = [point.directory for point in job.points]
    mounts, left_out = mounts_of(slurm.mounts, job.working_directory, directories, [p.paths for p in job.points])
    return [
        "# The container sees the places that the recipe names, by the same names.",
        *(f"mkdir -p {shlex.quote(cache)}" for cache in absolute_caches(p.paths for p in job.points)),
        "mounts=(",
        *(f"  {shlex.quote(mount)}" for mount in mounts),
        *(['  "$run:$run"'] if left_out else []),
        ")",
    ]
