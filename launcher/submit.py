"""Submit a recipe to SLURM, and look after it.

    python launcher/submit.py recipe=dsv3_671b cluster=slurm cluster.nodes=256     check, plan, write the script, sbatch
    python launcher/submit.py recipe=R cluster=C dry_run=true    print the script (dry_run=test: let SLURM judge it)
    python launcher/submit.py recipe=R cluster=C chain=5         five jobs, each when the one before has ended
    python launcher/submit.py --multirun recipe=R cluster=C optim.learning_rate=1e-4,3e-4      a job array
    python launcher/submit.py status run=RUN_DIRECTORY           the jobs' states beside the run's last step
    python launcher/submit.py logs run=RUN_DIRECTORY [lines=20]  the same, and the tail of every node's log
    python launcher/submit.py cancel run=RUN_DIRECTORY           end them; the newest checkpoint stays

A job saves before its time limit and requeues itself until the run is finished; a failure is tried again from the
newest checkpoint; a mistake in the recipe is not. Beside its own keys all others are overrides of the recipe,
cluster.slurm.* among them. docs/slurm.md tells the whole story.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from dsv3_megatron.data.tasks.read import check_tasks
from dsv3_megatron.planning.memory.formulae import estimate_stages
from dsv3_megatron.planning.plan import make_plan
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.files import write_atomically
from dsv3_megatron.run.made import for_owner
from launcher.command_line.arguments import Arguments, takes, takes_recipe
from launcher.command_line.compose import compose
from launcher.command_line.console import guarded
from launcher.command_line.multirun import recipes_of_sweep
from launcher.command_line.typed import command
from launcher.slurm import client
from launcher.slurm.job import Job, Point, job_of
from launcher.slurm.mounts import paths_of
from launcher.slurm.script import render
from launcher.slurm.watch import SCRIPT, active_jobs, jobs_of, log_text, note_job, status_text
from parallel.errors import ClusterError, DoesNotFitError, RecipeError
from parallel.units import show_bytes


class SubmitArguments(Arguments):
    """Keys of the command."""

    dry_run: bool | Literal["test"] = Field(False, description="print the script; test: let SLURM judge it")
    chain: int = Field(1, ge=1, le=100, description="jobs to submit, each for when the one before has ended")


class OneRun(Arguments):
    """Keys of status and cancel."""

    run: Path = Field(description="run directory")


class OneLog(OneRun):
    """Keys of logs."""

    lines: PositiveInt = Field(20, description="of each log")


def main(arguments: Sequence[str]) -> int:
    """Submit, or do what a sub-command says; return the exit code."""
    if arguments and arguments[0] in LOOK_AFTER:
        return LOOK_AFTER[arguments[0]](arguments[1:])
    return submit(arguments)


@takes_recipe(SubmitArguments, __doc__)
def submit(given: SubmitArguments, overrides: list[str]) -> int:
    """Check, plan, write the script and submit it; return the exit code."""
    recipes = _recipes(overrides)
    for_owner(recipes[0][0].run.readable_by)
    chained = given.chain > 1
    if len(recipes) > 1 and chained:
        raise ClusterError(
            f"chain = {given.chain} with --multirun is not offered: every point requeues itself; drop chain"
        )
    jobs = [_job(recipe, words, chained) for recipe, words in recipes]  # every point is checked
    job = _job(recipes[0][0], recipes[0][1], chained, [point for one in jobs for point in one.points])
    plan(job)
    if setup := job.recipe.cluster.slurm.setup:
        print(
            f"cluster.slurm.setup: {len(setup)} shell lines of the recipe run first (dry_run=true shows them)",
            file=sys.stderr,
        )
    text = render(job)
    if given.dry_run is True:
        print(text, end="")
        return 0
    return send(job, text, given.chain, test_only=given.dry_run == "test")


def _recipes(arguments: list[str]) -> list[tuple[Recipe, list[str]]]:
    """Return each run's recipe with the overrides that make it again."""
    flags = [a for a in arguments if a.startswith("-")]
    overrides = [a for a in arguments if not a.startswith("-")]
    if unknown := [flag for flag in flags if flag not in ("--multirun", "-m")]:
        raise RecipeError(f"{unknown[0]} is not a flag of this command; there are: --help, --multirun")
    return recipes_of_sweep(overrides) if flags else [(compose(overrides), overrides)]


def _job(recipe: Recipe, overrides: list[str], chained: bool, points: list[Point] | None = None) -> Job:
    own = [word for word in overrides if not word.startswith("run.directory=")]
    points = points or [Point(tuple(own), Path(recipe.run.directory).absolute(), paths_of(recipe, own))]
    return job_of(recipe, points, chained=chained, working_directory=Path.cwd())


def plan(job: Job) -> None:
    """Say what the job takes. Raises DoesNotFitError: a rank would hold more than its device."""
    asked = job.recipe.cluster.nodes
    why = "" if asked else " (the least its layout needs; cluster.nodes= asks for more)"
    print(f"{job.nodes} nodes x {job.ranks_per_node} ranks{why}", file=sys.stderr)
    if not (limit := job.recipe.cluster.memory):
        print("not planned: cluster.memory is not known (docs/planning.md)", file=sys.stderr)
        return
    made = make_plan(job.recipe, job.nodes * job.ranks_per_node, measure=estimate_stages)
    most = made.tightest
    if not made.fits:
        raise DoesNotFitError(
            f"pipeline rank {most.pipeline_rank} would hold {show_bytes(most.total_bytes)} of "
            f"{show_bytes(limit)}; `launcher/plan.py` with the same keys tells what would help, "
            "cluster.memory=0 submits without asking"
        )
    verdict = f"fits by formulae: at most {show_bytes(most.total_bytes)} of {show_bytes(limit)}"
    verdict += f"; {made.step.seconds:.1f} s a step as planned" if made.step else ""
    print(verdict, file=sys.stderr)


def send(job: Job, text: str, chain: int, *, test_only: bool) -> int:
    """Write the script and submit it, ``chain`` times; return the exit code.

    Raises: DataError: it would have nothing to read, or a task file is none. ClusterError: another job of the run is
    there, or SLURM refuses.
    """
    job.recipe.data.check_source()
    check_tasks(job.recipe.evaluate)
    for point in job.points:
        if not test_only and (active := active_jobs(point.directory)):
            raise ClusterError(
                f"run.directory = {point.directory} is in use by job {', '.join(active)}; see `submit.py status "
                f"run={point.directory}`, cancel it first, or name another run.name"
            )
        RunDirectory(point.directory).create()
    job.directory.mkdir(parents=True, exist_ok=True)
    script = job.directory / SCRIPT
    write_atomically(script, text)
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
    print(f"script  {script}\nwatch   {command('submit')} status run={job.points[0].directory}")
    return 0


@takes(OneRun, __doc__)
def status(asked: OneRun) -> int:
    """Show the jobs of a run; return the exit code."""
    print(status_text(asked.run.absolute()))
    return 0


@takes(OneLog, __doc__)
def logs(asked: OneLog) -> int:
    """Show the jobs of a run and the tail of every node's log; return the exit code."""
    run = asked.run.absolute()
    print(f"{status_text(run)}\n\n{log_text(run, asked.lines)}")
    return 0


@takes(OneRun, __doc__)
def cancel(asked: OneRun) -> int:
    """End the jobs of a run; return the exit code."""
    run = asked.run.absolute()
    jobs_of(run)
    if not (active := active_jobs(run)):
        print("no job of this run waits or runs")
        return 0
    client.cancel(active)
    print(f"cancelled {', '.join(active)}\n{status_text(run)}")
    return 0


LOOK_AFTER = {"status": status, "logs": logs, "cancel": cancel}


if __name__ == "__main__":
    sys.exit(guarded(main))
