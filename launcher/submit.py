"""Submit a recipe to SLURM, and look after it.

    python launcher/submit.py recipe=dsv3_671b cluster=slurm cluster.nodes=256     check, plan, write the script, sbatch
    python launcher/submit.py recipe=R cluster=C dry_run=true    print the script (dry_run=test: let SLURM judge it)
    python launcher/submit.py recipe=R cluster=C chain=5         five jobs, each when the one before has ended
    python launcher/submit.py --multirun recipe=R cluster=C optim.learning_rate=1e-4,3e-4      a job array
    python launcher/submit.py status run=RUN_DIRECTORY           the jobs' states beside the run's last step
    python launcher/submit.py logs run=RUN_DIRECTORY [lines=20]  the same, and the tail of every node's log
    python launcher/submit.py cancel run=RUN_DIRECTORY           end them; the newest checkpoint stays

A job saves before its time limit and requeues itself until the run is finished; a failure is tried again from the
newest checkpoint; a mistake in the recipe is not. Keys of its own are dry_run and chain; all others are overrides of
the recipe, cluster.slurm.* among them. docs/slurm.md tells the whole story.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from dsv3_megatron.planning.memory.formulae import estimate_stages
from dsv3_megatron.planning.plan import make_plan
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run import shell as typed
from dsv3_megatron.run.directory import RunDirectory
from launcher.arguments import parse_arguments
from launcher.compose import compose
from launcher.console import guarded
from launcher.hydra_flags import help_text, recipes_of_sweep
from launcher.slurm import client
from launcher.slurm.job import Job, Point, job_of
from launcher.slurm.script import render
from launcher.slurm.watch import active_jobs, jobs_of, log_text, note_job, status_text
from parallel.errors import ClusterError, DoesNotFitError, RecipeError
from parallel.units import show_bytes


class OneRun(BaseModel):
    """Keys of status, logs and cancel."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: Path = Field(description="run directory")
    lines: PositiveInt = Field(20, description="of each log")


def main(arguments: Sequence[str]) -> int:
    """Submit, or do what a sub-command says; return the exit code."""
    arguments = list(arguments)
    if {"--help", "-h"} & set(arguments):
        print(help_text(__doc__))
        return 0
    if arguments and arguments[0] in ("status", "logs", "cancel"):
        return look_after(arguments[0], parse_arguments(OneRun, arguments[1:]))
    own, overrides = _own_keys(arguments)
    chain, dry_run = _chain(own.get("chain", "1")), own.get("dry_run", "false")
    if dry_run not in ("true", "false", "test"):
        raise RecipeError(f"dry_run = {dry_run} is not known; write dry_run=true, dry_run=test or dry_run=false")
    recipes = _recipes(overrides)
    if len(recipes) > 1 and chain > 1:
        raise ClusterError(f"chain = {chain} with --multirun is not offered: every point requeues itself; drop chain")
    jobs = [_job(recipe, words, chain > 1) for recipe, words in recipes]  # every point is checked
    job = _job(recipes[0][0], recipes[0][1], chain > 1, [point for one in jobs for point in one.points])
    plan(job)
    text = render(job)
    if dry_run == "true":
        print(text, end="")
        return 0
    return send(job, text, chain, test_only=dry_run == "test")


def _own_keys(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    own, overrides = {}, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in ("dry_run", "chain"):
            own[key] = value
        else:
            overrides.append(argument)
    return own, overrides


def _chain(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 100:
        raise ClusterError(f"chain = {text} is not a number of jobs from 1 to 100; write chain=5")
    return int(text)


def _recipes(arguments: list[str]) -> list[tuple[Recipe, list[str]]]:
    """Return each run's recipe with the overrides that make it again."""
    flags = [a for a in arguments if a.startswith("-")]
    overrides = [a for a in arguments if not a.startswith("-")]
    if unknown := [flag for flag in flags if flag not in ("--multirun", "-m")]:
        raise RecipeError(f"{unknown[0]} is not a flag of this command; there are: --help, --multirun")
    return recipes_of_sweep(overrides) if flags else [(compose(overrides), overrides)]


def _job(recipe: Recipe, overrides: list[str], chained: bool, points: list[Point] | None = None) -> Job:
    own = [word for word in overrides if not word.startswith("run.directory=")]
    points = points or [Point(tuple(own), Path(recipe.run.directory).absolute())]
    return job_of(recipe, points, chained=chained, working_directory=Path.cwd())


def plan(job: Job) -> None:
    """Say what the job takes. Raises DoesNotFitError: a rank would hold more than its device."""
    asked = job.recipe.cluster.nodes
    why = "" if asked else " (the least its layout needs; cluster.nodes= asks for more)"
    print(f"{job.nodes} nodes x {job.ranks_per_node} ranks{why}", file=sys.stderr)
    if not job.recipe.cluster.memory:
        print("not planned: cluster.memory is not known (docs/planning.md)", file=sys.stderr)
        return
    made = make_plan(job.recipe, job.nodes * job.ranks_per_node, measure=estimate_stages)
    most = made.tightest
    if not made.fits:
        raise DoesNotFitError(
            f"pipeline rank {most.pipeline_rank} would hold {show_bytes(most.total_bytes)} of "
            f"{show_bytes(most.limit_bytes)}; `launcher/plan.py` with the same keys tells what would help, "
            "cluster.memory=0 submits without asking"
        )
    told = f"fits by formulae: at most {show_bytes(most.total_bytes)} of {show_bytes(most.limit_bytes)}"
    told += f"; {made.step.seconds:.1f} s a step as planned" if made.step else ""
    print(told, file=sys.stderr)


def send(job: Job, text: str, chain: int, *, test_only: bool) -> int:
    """Write the script and submit it, ``chain`` times; return the exit code.

    Raises: DataError: it would have nothing to read. ClusterError: another job of the run is there, or SLURM refuses.
    """
    job.recipe.data.check_source()
    for point in job.points:
        if not test_only and (active := active_jobs(point.directory)):
            raise ClusterError(
                f"run.directory = {point.directory} is in use by job {', '.join(active)}; see `submit.py status "
                f"run={point.directory}`, cancel it first, or name another run.name"
            )
        RunDirectory(point.directory).create()
    job.directory.mkdir(parents=True, exist_ok=True)
    script = job.directory / "submit.sbatch"
    script.write_text(text)
    if test_only:
        print(client.submit(script, test_only=True))
        return 0
    for point in job.points:
        RunDirectory(point.directory).forget_end()
    before = None
    for number in range(chain):
        # By its name a job waits for others of the run that this file does not know: submitted twice, from elsewhere.
        dependency = f"afterany:{before}" if before else "singleton" if len(job.points) == 1 else None
        before = client.submit(script, dependency=dependency)
        for point in job.points:
            note_job(point.directory, before, dependency)
        print(f"submitted job {before}" + (f" ({number + 1} of {chain})" if chain > 1 else ""))
    watch = f"{typed.program('python')} {typed.script('launcher/submit.py')} status run={job.points[0].directory}"
    print(f"script  {script}\nwatch   {watch}")
    return 0


def look_after(what: str, asked: OneRun) -> int:
    """Show or cancel the jobs of a run; return the exit code."""
    run = asked.run.absolute()
    if what == "status":
        print(status_text(run))
    elif what == "logs":
        print(f"{status_text(run)}\n\n{log_text(run, asked.lines)}")
    else:
        jobs_of(run)
        if not (active := active_jobs(run)):
            print("no job of this run waits or runs")
            return 0
        client.cancel(active)
        print(f"cancelled {', '.join(active)}\n{status_text(run)}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
