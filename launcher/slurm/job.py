"""Recipe -> the batch job it asks for: nodes, ranks, names. Checked before SLURM hears of it."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsv3_megatron.preflight.layout import smallest_world
from dsv3_megatron.preflight.world import check_queues, check_schedule
from dsv3_megatron.recipe import Recipe
from parallel.errors import ClusterError, DoesNotFitError


@dataclass(frozen=True)
class Point:
    """One run: the overrides that make it, where it lives, and what else it reads (see :func:`mounts.paths_of`)."""

    overrides: tuple[str, ...]
    directory: Path
    paths: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """All that the script needs."""

    recipe: Recipe
    points: tuple[Point, ...]
    nodes: int
    ranks_per_node: int
    python: str
    working_directory: Path
    chained: bool

    @property
    def name(self) -> str:
        """The job's name: the run's (of a sweep, the recipe's), in the letters that SLURM's filters take."""
        name = self.recipe.run.name if len(self.points) == 1 else f"{self.recipe.recipe}-sweep"
        return re.sub(r"[^A-Za-z0-9._=+-]+", "_", name)

    @property
    def directory(self) -> Path:
        """Where script and log of the job lie: the run directory, or the folder above those of a sweep."""
        if len(self.points) == 1:
            return self.points[0].directory
        return self.points[0].directory.parent / self.name


def job_of(recipe: Recipe, points: Sequence[Point], *, chained: bool, working_directory: Path) -> Job:
    """Return the job of a checked recipe (of a sweep: its first point's).

    Raises: ClusterError: the cluster section says too little. DoesNotFitError: fewer GPUs than the layout needs.
    LayoutError, ScheduleError: degrees that do not fit the world; variables that a pipeline can hang with.
    """
    cluster, slurm = recipe.cluster, recipe.cluster.slurm
    if cluster.launcher != "slurm":
        raise ClusterError(
            f"cluster = {cluster.name} is started by {cluster.launcher}, not by SLURM; add cluster=slurm, or a "
            "recipes/cluster/ file with launcher: slurm"
        )
    if slurm.container != "none" and not slurm.image:
        raise ClusterError(
            f"cluster.slurm.container = {slurm.container} needs an image; set cluster.slurm.image=, or container=none"
        )
    check_queues(recipe, slurm.environment)
    ranks = slurm.ranks_per_node or cluster.gpus_per_node
    if not ranks:
        raise ClusterError(
            "cluster.gpus_per_node = 0 and cluster.slurm.ranks_per_node is null; set the latter to the processes of a "
            "CPU node"
        )
    smallest = smallest_world(recipe)
    nodes = cluster.nodes or -(-smallest // ranks)
    if nodes * ranks < smallest:
        raise DoesNotFitError(
            f"cluster.nodes = {nodes} x {ranks} a node = {nodes * ranks:,} ranks, but parallel (PP "
            f"{recipe.parallel.pipeline} x EP {recipe.parallel.expert}) needs at least {smallest:,}; "
            f"set cluster.nodes={-(-smallest // ranks)}"
        )
    layout = recipe.layout(nodes * ranks)
    check_schedule(recipe, layout)
    python = slurm.python or (sys.executable if slurm.container == "none" else "python")
    for point in points:
        if re.search(r"[\x00-\x1f]", str(point.directory)):
            raise ClusterError(f"run.directory = {point.directory!s:.80} holds a control character; name another")
    return Job(recipe, tuple(points), nodes, ranks, python, working_directory, chained)
