"""A container sees every place that a recipe names, or the job is refused."""

import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

from dsv3_megatron.recipe import Recipe
from launcher.command_line.compose import compose
from launcher.slurm.mounts import MEMORY, PATH_KEYS, mounts_of, paths_of
from launcher.submit import main
from parallel.errors import ClusterError

HERE = Path("/home/me/work")
NO_PATHS = {
    "recipe", "run.name", "run.directory", "data.source", "cluster.name", "cluster.device", "cluster.partition",
    "logging.wandb_project", "logging.wandb_group", "model.freeze", "parallel.recompute", "cluster.time_limit",
    "precision.name", "cluster.racks",
}  # fmt: skip


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """A checkout's own place would be one mount more."""
    monkeypatch.setattr("launcher.slurm.mounts.IS_CHECKOUT", False)


def mounts(words=(), given=(), runs=("/home/me/work/runs/a",)):
    recipe = compose(["recipe=dsv3_tiny", *words])
    return mounts_of(given, HERE, [Path(run) for run in runs], [paths_of(recipe, words)])


def text_keys(model, prefix=""):
    """Yield the keys of a recipe that take a text which is none of a list of words."""

    def is_text(kind):
        return kind is str or any(
            is_text(part) for part in typing.get_args(kind) if typing.get_origin(kind) is not dict
        )

    for name, field in model.model_fields.items():
        kinds = [field.annotation, *typing.get_args(field.annotation)]
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        for section in sections:
            yield from text_keys(section, f"{prefix}{name}.")
        if not sections and is_text(field.annotation):
            yield prefix + name


def test_every_key_that_names_a_place_is_known():
    """A key that is added says here, or in PATH_KEYS, whether it names one."""
    found = {key for key in text_keys(Recipe) if not key.startswith("cluster.slurm.")}
    assert set(PATH_KEYS) <= found
    assert not found - {*PATH_KEYS, MEMORY} - NO_PATHS


def test_memory_that_outlives_a_container_is_the_hosts():
    assert "/dev/shm:/dev/shm" in mounts(["checkpoint.memory_every_steps=5"])[0]
    assert "/dev/shm:/dev/shm" not in mounts()[0]


def test_places_of_the_recipe_are_mounted_by_their_own_names(tmp_path):
    words = [
        "data.source=indexed", "data.path=/data/tokens", "data.cache=/scratch/cache", "data.tokenizer=/models/t.json",
        "data.exclude=lists/bad.jsonl", "evaluate.tasks=[/tasks/a.jsonl,/tasks/b.jsonl]", "checkpoint.load=../old/c",
        "run.start_from=/data/tokens/../runs/x",
    ]  # fmt: skip
    found, left_out = mounts(words)
    assert [mount.split(":") for mount in found] == [
        [place, place]
        for place in (
            "/home/me/work", "/data/runs/x", "/data/tokens", "/scratch/cache", "/models/t.json", "/tasks/a.jsonl",
            "/tasks/b.jsonl", "/home/me/old/c",
        )
    ]  # fmt: skip
    assert not left_out
    recipe = compose(["recipe=dsv3_tiny"])
    assert paths_of(recipe, ["recipe=/a/r.yaml", "hydra.searchpath=[file:///x,pkg://y,'file:///z z']"]) == {
        "data.cache": ".cache/dsv3", "recipe": "/a/r.yaml", "hydra.searchpath[0]": "/x", "hydra.searchpath[1]": "/z z",
    }  # fmt: skip


def test_parents_and_duplicates_are_merged_and_what_the_user_mounts_wins():
    indexed = ["data.source=indexed"]
    assert mounts([*indexed, "data.path=/home/me/work/data"])[0] == ["/home/me/work:/home/me/work"]
    assert mounts([*indexed, "data.path=/home/me"])[0] == ["/home/me:/home/me"]
    assert mounts([*indexed, "data.path=/data/x"], ["/data"])[0] == ["/home/me/work:/home/me/work", "/data:/data"]
    # By the name that the container has for it; the host's is none there.
    there = [*indexed, "data.path=/data/x"]
    assert mounts(there, ["/lustre/set:/data:ro"])[0] == ["/home/me/work:/home/me/work", "/lustre/set:/data:ro"]
    assert "/data/x:/data/x" in mounts(there, ["/data:/mnt"])[0]


def test_a_run_elsewhere_is_mounted_at_every_point():
    assert mounts(runs=["/home/me/work/a", "/scratch/b"])[1]
    assert not mounts(given=["/scratch"], runs=["/home/me/work/a", "/scratch/b"])[1]


@pytest.mark.parametrize(
    ("words", "runs", "line"),
    [
        (["data.path='/data/a,b'"], ["a"], "data.path = /data/a,b cannot be mounted into a container: ',' ends a path"),
        (["data.path=/data/a:b"], ["a"], "data.path = /data/a:b cannot be mounted into a container: ':' ends a path"),
        ([], ["/scratch/a:b"], "run.directory = /scratch/a:b cannot be mounted"),
        (["data.path=/"], ["a"], "data.path = / is / here, and mounting that would hide the container"),
    ],
)
def test_what_cannot_be_mounted_is_named(words, runs, line):
    with pytest.raises(ClusterError) as caught:
        mounts(["data.source=indexed", *words], runs=runs)
    assert str(caught.value).startswith(f"cluster: {line}") and "\n" not in str(caught.value)


def test_a_sweep_mounts_what_any_point_names_and_the_run_of_the_task(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["recipe=dsv3_tiny", "cluster=slurm", "cluster.nodes=1", "cluster.gpus_per_node=2", "data=indexed",
             "cluster.slurm.container=pyxis", "cluster.slurm.image=x", "run.directory='/runs/${data.path}'",
             "--multirun", "data.path=/one,/two"]  # fmt: skip
    assert main([*words, "dry_run=true"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert {"/one:/one", "/two:/two", f"{tmp_path}:{tmp_path}", '"$run:$run"'} <= set(lines)
