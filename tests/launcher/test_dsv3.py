"""dsv3: every command under one name, recipes of one's own, torchrun after the recipe is known to be right."""

import os
import subprocess
import sys

import pytest

from launcher import dsv3
from launcher.command_line import start_ranks, typed
from launcher.command_line.compose import compose, resolved_yaml
from launcher.command_line.recipe_files import RECIPES, options
from launcher.command_line.start_ranks import split_torchrun, world_size
from parallel.errors import UserError


def test_help_names_every_command(capsys):
    assert dsv3.main(["--help"]) == 0
    told = capsys.readouterr().out
    for name in typed.COMMANDS:
        assert f"  {name} " in told
    assert dsv3.main([]) == 2


@pytest.mark.parametrize("name", [name for name in typed.COMMANDS if name != "train"])
def test_every_command_tells_of_itself(name, capsys):
    assert dsv3.main([name, "--help"]) == 0
    assert "Keys" in capsys.readouterr().out


def test_a_command_that_is_none_is_one_line():
    with pytest.raises(UserError, match=r"trian is not a command; did you mean train\? there are: train, plan"):
        dsv3.main(["trian"])


def test_torchruns_options_are_told_from_overrides_and_from_hydras_flags():
    words = [
        "--nproc-per-node",
        "4",
        "recipe=dsv3_tiny",
        "--nnodes=2",
        "--no-python",
        "run.steps=1",
        "-m",
        "--cfg",
        "job",
    ]
    options, rest = split_torchrun(words)
    assert options == ["--nproc-per-node", "4", "--nnodes=2", "--no-python"]
    assert rest == ["recipe=dsv3_tiny", "run.steps=1", "-m", "--cfg", "job"]


@pytest.mark.parametrize(
    ("options", "size"),
    [(["--nproc-per-node=4"], 4), (["--nproc_per_node", "2", "--nnodes", "3"], 6), (["--nproc-per-node=auto"], None)],
)
def test_the_world_is_known_where_torchrun_is_told_it(options, size):
    assert world_size(options) == size


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model.n_routed_expert=8"], "did you mean model.n_routed_experts?"),
        (["parallel.expert=3"], "parallel.expert = 3 does not divide"),
        (["parallel.expert=4", "parallel.pipeline=2"], "start 8"),
        (["data=indexed"], "data.path = null"),
        (["--multirun", "run.seed=1,2"], "--multirun has no effect beside --nproc-per-node"),
    ],
)
def test_a_mistake_is_found_once_before_any_rank_starts(words, says, monkeypatch):
    monkeypatch.setattr(os, "execv", lambda *arguments: pytest.fail("started"))
    with pytest.raises(UserError) as caught:
        dsv3.main(["train", "--nproc-per-node", "4", *words])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_right_recipe_becomes_torchrun_with_its_options(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda program, words: started.append(words))
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0")  # put back afterwards
    monkeypatch.setattr(start_ranks, "at_home", lambda options: ["--local-addr=127.0.0.1"])
    dsv3.main(["train", "--nproc-per-node", "4", "--max-restarts=1", "parallel=pp2_ep2"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--local-addr=127.0.0.1"]
    options = ["--nproc-per-node", "4", "--max-restarts=1"]
    assert started == [[*torchrun, *options, str(start_ranks.PRETRAIN), "parallel=pp2_ep2"]]
    assert os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


@pytest.mark.parametrize(
    ("options", "is_ours"),
    [
        (["--nproc-per-node", "4"], True),
        (["--nproc-per-node=4", "--nnodes=1"], True),
        (["--nproc_per_node=4", "--nnodes", "1", "--max-restarts", "2"], True),
        (["--nproc-per-node=4", "--nnodes=2", "--node-rank=0"], False),
        (["--nproc-per-node=4", "--nnodes", "1:4"], False),
        (["--nproc-per-node=4", "--standalone"], False),
        (["--nproc-per-node=4", "--master_port", "29500"], False),
        (["--nproc-per-node=4", "--rdzv-endpoint=host:1"], False),
    ],
)
def test_ranks_of_one_host_meet_by_a_file_unless_the_user_says_how(options, is_ours):
    meeting = start_ranks.at_home(options)
    assert ("--rdzv-conf=store_type=file" in meeting and "--local-addr=127.0.0.1" in meeting) is is_ours
    assert bool(meeting) is is_ours


def test_recipe_files_of_the_current_folder_and_of_a_search_path_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, group, name, text in (
        ("recipes", "recipe", "mine", "# @package _global_\ndefaults:\n  - dsv3_tiny\n  - _self_\nrecipe: mine\n"),
        ("else where", "cluster", "ours", "name: ours\nnodes: 2\ngpus_per_node: 4\n"),
    ):
        (tmp_path / place / group).mkdir(parents=True)
        (tmp_path / place / group / f"{name}.yaml").write_text(text)
    assert "mine" in options("recipe") and "mine" not in options("recipe", folders=[])
    assert compose(["recipe=mine"]).recipe == "mine"
    both = compose(["recipe=mine", f"hydra.searchpath=['file://{tmp_path / 'else where'}']", "cluster=ours"])
    assert (both.recipe, both.cluster.world_size) == ("mine", 8)
    with pytest.raises(UserError, match=r"did you mean mine\?"):
        compose(["recipe=mien"])


def test_a_file_of_ones_own_never_silently_loses_to_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "recipes" / "precision" / "bf16.yaml"
    own.parent.mkdir(parents=True)
    own.write_bytes((RECIPES / "precision" / "bf16.yaml").read_bytes())
    compose(["recipe=dsv3_tiny"])  # a copy is no contradiction
    own.write_text("name: bf16\n")
    with pytest.raises(UserError, match="has the name of a shipped file"):
        compose(["recipe=dsv3_tiny"])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("time_limit: 4:00:00", "time_limit = 4:00:00 is the number 14400 to YAML; write time_limit: '4:00:00'"),
        ("slurm: {memory: 1:30}", "slurm.memory = 1:30 is the number 90 to YAML; write memory: '1:30'"),
        ("slurm: {setup: [echo, 010]}", "slurm.setup.1 = 010 is the number 8 to YAML; write '010', or 10 without"),
        ("slurm:\n  memory: 0_20", "slurm.memory = 0_20 is the number 16 to YAML"),
        (
            "slurm: {environment: {NCCL_IB_TC: 0x6a}}",
            "slurm.environment.NCCL_IB_TC = 0x6a is the number 106 to YAML; write NCCL_IB_TC: '0x6a', or 106",
        ),
    ],
)
def test_a_number_that_yaml_reads_otherwise_than_people_is_refused_by_its_line(tmp_path, monkeypatch, line, says):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "recipes" / "cluster" / "ours.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(f"name: ours\nnodes: 2\ngpus_per_node: 4\n{line}\n")
    for words in (["recipe=dsv3_tiny", "cluster=ours"], ["recipe=dsv3_tiny"]):
        with pytest.raises(UserError) as caught:
            compose(words)
        assert f"{own}:{line.count(chr(10)) + 4}: {says}" in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_that_mean_the_same_to_yaml_and_to_people_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "recipes" / "cluster" / "ours.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("name: ours\nnodes: 02\ngpus_per_node: 4\ntime_limit: '4:00:00'\nslurm: {memory: 4_000}\n")
    recipe = compose(["recipe=dsv3_tiny", "cluster=ours"])
    assert (recipe.cluster.nodes, recipe.cluster.time_limit, recipe.cluster.slurm.memory) == (2, "4:00:00", "4000")
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(resolved_yaml(recipe))
    assert compose([f"recipe={resolved}"]).cluster == recipe.cluster
    resolved.write_text(resolved_yaml(recipe).replace("'4:00:00'", "4:00:00"))
    with pytest.raises(UserError, match="cluster.time_limit = 4:00:00 is the number 14400 to YAML"):
        compose([f"recipe={resolved}"])


def test_what_is_installed_names_its_commands_dsv3(monkeypatch):
    monkeypatch.setattr(typed, "IS_CHECKOUT", False)
    assert typed.as_typed("python launcher/plan.py recipe=R") == "dsv3 plan recipe=R"
    torchrun = "torchrun --nproc-per-node N launcher/pretrain.py recipe=NAME"
    assert typed.as_typed(torchrun) == "dsv3 train --nproc-per-node N recipe=NAME"
    assert typed.as_typed("a folder that launcher/prepare_data.py wrote") == "a folder that dsv3 prepare-data wrote"
    assert typed.as_typed("/home/me/plan.py and other.py") == "/home/me/plan.py and other.py"
    assert typed.command("train", ranks=2).endswith("dsv3 train --nproc-per-node 2")


def test_a_file_whose_name_is_a_command_does_not_reach_the_shell_that_completes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "recipe").mkdir(parents=True)
    for name in ("mine", "$(touch ran)", "`touch ran`", 'a"; touch ran; "', "a b", "-x", "${HOME}"):
        (tmp_path / "recipes" / "recipe" / f"{name}.yaml").write_text("recipe: mine\n")
    assert dsv3.main(["completion"]) == 0
    script = capsys.readouterr().out
    typed = 'COMP_WORDS=(dsv3 train recipe =) COMP_CWORD=3; compopt() { :; }; _dsv3; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{typed}"], capture_output=True, text=True, check=True)
    assert "mine" in done.stdout.split() and "touch" not in script and not (tmp_path / "ran").exists()


def test_bash_completes_commands_groups_and_keys(capsys):
    assert dsv3.main(["completion"]) == 0
    script = capsys.readouterr().out

    def completed(*words):
        typed = f"COMP_WORDS=({' '.join(words)}) COMP_CWORD={len(words) - 1}"
        ask = typed + '; compopt() { :; }; _dsv3; echo "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("dsv3", "tra") == ["train", "train-tokenizer"]
    assert completed("dsv3", "train", "cluster.slurm.acc") == ["cluster.slurm.account="]
    assert completed("dsv3", "train", "recipe", "=", "dsv3_671b_") == ["dsv3_671b_128k", "dsv3_671b_32k"]
    assert completed("dsv3", "train", "precision", "=") == ["bf16", "fp32", "fp8", "fp8_held"]
