"""Begin and end of the batch script: whether there is anything to do, and whether and where to try again."""

from __future__ import annotations

import shlex

from launcher.slurm.job import Job

SLURMS_STARTS = 10  # so many times cluster.slurm.max_starts a job may start without a new checkpoint in all


def before(job: Job) -> list[str]:
    """Return the lines that end a job which has nothing to do, and that count its starts."""
    slurm = job.recipe.cluster.slurm
    limit = SLURMS_STARTS * slurm.max_starts
    lines = _BEFORE.format(starts=limit, exclude=shlex.quote(slurm.exclude or "")).strip("\n").splitlines()
    return [*lines, *(_KEEP_AWAY.strip("\n").splitlines() if slurm.exclude_after or slurm.exclude_slow_after else [])]


def after(job: Job) -> list[str]:
    """Return the lines that judge what the run has left, once srun has left with ``rc``."""
    slurm = job.recipe.cluster.slurm
    lines = _JUDGE.strip("\n").splitlines()
    if job.chained:
        lines += _CHAINED.strip("\n").splitlines()
    lines += _COUNT.format(max_starts=slurm.max_starts).strip("\n").splitlines()
    if slurm.exclude_after or slurm.exclude_slow_after:
        asked = f"failures={slurm.exclude_after} slow={slurm.exclude_slow_after}"
        lines += _EXCLUDE.format(python=shlex.quote(job.python), asked=asked).strip("\n").splitlines()
    return [*lines, *_AGAIN.strip("\n").splitlines()]


_BEFORE = """
mkdir -p "$run/checkpoints" "$run/logs"
# A later job of a chain, or a requeue that came too late: nothing to do, or nothing that could go well.
[ -e "$run/finished" ] && exit 0
[ -f "$run/refused" ] && {{ head -c 2000 "$run/refused" >&2; exit 2; }}
refuse() {{
  rm -f "$run/refused" # which may be a link to something else
  echo "$1" | tee "$run/refused" >&2
  exit 1
}}

# What the run has come to: its newest checkpoint, and the step of the newest state in memory that it has resumed from.
look() {{
  newest=$(find "$run/checkpoints" -maxdepth 1 -type d -regex '.*/step_[0-9]+' -printf '%f\\n' | sort | tail -n 1)
  kept=
  [ -f "$run/memory.json" ] &&
    kept=$(head -c 2000 "$run/memory.json" | grep -Eo '"step": [0-9]{{1,15}}' | grep -Eo '[0-9]+' | head -n 1)
  progress="${{newest:-nothing}}${{kept:++$kept}}"
}}
# Requeued for as long as that changes. Since it has, all starts are counted, and those that have failed: neither a
# preemption nor the end of a slot nor the loss of a node is one, for SLURM ends this shell then. A limit on
# SLURM_RESTART_COUNT alone would end a long run in short slots.
look
seen=none starts=0 failures=0
[ -f "$run/starts" ] && read -r seen starts failures <"$run/starts"
# Numbers and nothing else: bash's arithmetic runs commands that it finds in a text.
case $starts in ??????* | *[!0-9]* | "") starts=0 ;; esac
case $failures in ??????* | *[!0-9]* | "") failures=0 ;; esac
[ "$seen" = "$progress" ] || starts=0 failures=0
note() {{
  rm -f "$run/starts"
  echo "$progress $((10#$starts)) $((10#$failures))" >"$run/starts"
}}
starts=$((10#$starts + 1))
note
[ "$starts" -gt {starts} ] && refuse \\
  "cluster: {starts} starts without a new checkpoint (newest: ${{newest:-none}}); save more often, ask for more time"

# Try again, on other hosts than the excluded ones. SLURM ends this shell with TERM as it requeues the job, and takes
# the exclusion once the job is pending. No trap for TERM before this: scancel ends this shell, and the job stays
# cancelled.
excluded={exclude}
again() {{
  trap "" TERM
  scontrol requeue "$job"
  [ -z "$excluded" ] || scontrol update "JobId=$job" "ExcNodeList=$excluded"
  exit 1
}}
"""

_KEEP_AWAY = """
# Hosts that this run keeps away from, for a job that was submitted before that was known.
if [ -f "$run/excluded" ]; then
  found=$(head -c 60000 "$run/excluded" | tr -cd 'A-Za-z0-9_.,-')
  for host in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    case ",$found," in *",$host,"*)
      echo "$host is excluded from this run (docs/slurm.md); requeue without it" >&2
      excluded="$found${excluded:+,$excluded}"
      again
      ;;
    esac
  done
fi
"""

_JUDGE = """
# Judged by what the run left, never by a code of its own: torchrun turns every failure into 1.
[ -e "$run/finished" ] && exit 0
[ -f "$run/refused" ] && { head -c 2000 "$run/refused" >&2; exit 2; }
"""

_CHAINED = """
# A job of a chain: after the warning before the time limit the next job resumes; a failure is tried again here.
[ "$rc" -eq 0 ] && exit 0
"""

_COUNT = """
started="$progress"
look
[ "$progress" = "$started" ] || starts=0 failures=0
# The start has failed, unless SLURM had warned of its end.
[ -e "${{DSV3_WARNED_FILE:?}}" ] || [ "$progress" != "$started" ] || failures=$((10#$failures + 1))
note
[ "$failures" -ge {max_starts} ] && refuse \\
  "cluster: {max_starts} failed starts without a new checkpoint (newest: ${{newest:-none}}); fix the run, submit again"
"""

_EXCLUDE = """
# Who failed first becomes an event of the run; a host that has failed too often is not used again.
found=$(once {python} -m launcher.slurm.after "run=$run" {asked} | tail -n 1)
if [ -n "$found" ]; then
  rm -f "$run/excluded"
  echo "$found" >"$run/excluded"
  excluded="$found${{excluded:+,$excluded}}"
fi
"""

_AGAIN = """
echo "srun left with $rc before the run was finished; requeue (start $starts since ${newest:-the beginning})" >&2
again
"""
