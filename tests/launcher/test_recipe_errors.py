"""Every mistake in a recipe is one line that names the field, the value and the fix."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_megatron.recipe import Recipe
from launcher.command_line.compose import compose, compose_config, load_resolved, resolved_yaml
from launcher.command_line.help import command_help
from launcher.command_line.hydra_flags import run_command
from launcher.command_line.multirun import sweep
from launcher.command_line.recipe_files import options
from launcher.command_line.schema import items_of, keys_of
from launcher.submit import main as submit
from parallel.errors import RecipeError, UserError

ROOT = Path(__file__).resolve().parents[2]

BAD = {  # override(s) -> what the line must hold
    "model.n_routed_expert=8": ["model.n_routed_expert", "did you mean model.n_routed_experts?"],
    "n_routed_experts=8": ["n_routed_experts", "did you mean model.n_routed_experts?"],
    "parallel.pipline=2": ["did you mean parallel.pipeline?"],
    "optim.zzz=1": ["optim.zzz", "one of: name, muon, micro_batch"],
    "optim.muon.query=head": ["optim.muon.query = head has no effect under optim.name = adamw; set optim.name=muon"],
    "optim.muon.coefficients=[2,-1.5,0.5]": [
        "optim.muon.coefficients = [2.0, -1.5, 0.5] has no effect",
        "leave it out",
    ],
    "optim.muon.coefficients=[nan,1,2]": ["optim.muon.coefficients[0] = nan", "finite number"],
    "optim.muon.coefficients=[3.4445,4.775,2.0315]": ["5 steps", "to inf, away from one", "[3.4445, -4.775, 2.0315]"],
    "optim.muon.coefficients=[0,0,0]": ["optim.muon.coefficients = [0, 0, 0]", "to 0, away from one"],
    "optim.muon.scale=inf": ["optim.muon.scale = inf", "finite number"],
    "optim.qk_clip=inf": ["optim.qk_clip = inf", "finite number"],
    "optim.learning_rate=inf": ["optim.learning_rate = inf", "finite number"],
    "optim.qk_clip=true": ["optim.qk_clip = True", "give a logit, such as 100, or null"],
    "optim.learning_rate=[{util: 9T, at: 1}]": ["optim.learning_rate[0].util", "mean optim.learning_rate[0].until?"],
    "+cluster.slurm.environment.X=1.10": ["cluster.slurm.environment.X = 1.1: it was read as a number; quote the text"],
    "cluster.slurm.account=true": ["cluster.slurm.account = True: it was read as true or false; quote the text"],
    "cluster.slurm.acount=x": ["did you mean cluster.slurm.account?"],
    "hydra.run.dir=x": ["hydra.run.dir has no effect", "hydra.searchpath"],
    "hydra.searchpath=[file:///nowhere]": ["hydra.searchpath = file:///nowhere is no folder"],
    "recipe=dsv3_671": ["recipe = dsv3_671", "did you mean dsv3_671b?"],
    "precision=fp9": ["precision = fp9", "did you mean fp8?", "bf16, fp32, fp8"],
    "run.steps": ["run.steps", "write key=value"],
    "run.steps=many": ["run.steps = many", "valid integer"],
    "run.steps=1.5": ["run.steps = 1.5", "integer"],
    "run.steps=0": ["run.steps = 0", "greater than 0"],
    "run.seed=-1": ["run.seed = -1", "greater than or equal to 0"],
    "run.tokens=5X": ["run.tokens = 5X", "469B"],
    "run.steps=null": ["run.steps and run.tokens are both null", "set one"],
    "run.abort_seconds=300": ["run.hang_seconds = 300 is not below run.abort_seconds = 300", "lower it"],
    "cluster.memory=80XB": ["cluster.memory = 80XB", "80GiB"],
    "backend=tee": ["backend = tee", "'te' or 'torch'"],
    "data.held_out=1.5": ["data.held_out = 1.5", "less than 1"],
    "optim.learning_rate=fast": ["optim.learning_rate = fast"],
    "optim.learning_rate=[]": ["optim.learning_rate = []", "at least one phase"],
    "optim.learning_rate=[{until: 9T}]": ["optim.learning_rate[0].at = null", "set optim.learning_rate[0].at"],
    "optim.learning_rate=[{until: 9T, shape: linear}]": ["optim.learning_rate[0].to = null", "linear"],
    "optim.learning_rate=[{until: 9T, at: 1}, {until: 8T}]": ["[1].until = 8T", "ends at 9T", "above 9T"],
    "optim.learning_rate=[{until: soon, at: 1}]": ["until", "soon"],
    "optim.learning_rate=[{until: true, at: 1}]": ["until", "is not a count", "such as 469B"],
    "optim.global_batch=[{until: 10 steps, at: 8}]": ["optim.global_batch", "use tokens"],
    "model.n_group=3": ["model.n_group = 3", "model.n_routed_experts = 16", "[2, 4]"],
    "model.topk_group=9": ["model.topk_group = 9", "model.n_group = 4"],
    "model.num_experts_per_tok=9": ["model.num_experts_per_tok = 9", "8 experts", "8 or less"],
    "model.qk_rope_head_dim=7": ["model.qk_rope_head_dim = 7", "8"],
    "model.moe_intermediate_size=65": ["model.moe_intermediate_size = 65", "use 72"],
    "model.first_k_dense_replace=5": ["model.first_k_dense_replace = 5", "4"],
    "parallel.expert=3": ["parallel.expert = 3", "model.n_routed_experts = 16", "2, 4"],
    "parallel.tensor=3": ["parallel.tensor = 3", "does not divide", "nearest that do"],
    "parallel.pipeline=5": ["model.num_hidden_layers = 4", "5 stages", "4 or less"],
    "parallel.stages=[1,3]": ["parallel.stages = [1, 3]", "2 stages", "1 number"],
    "parallel.chunks=2": ["parallel.chunks = 2", "interleaved"],
    "parallel.context=3": ["parallel.context = 3", "model.num_attention_heads = 4", "do: 2, 4"],
    "parallel.tensor=2 parallel.context=4": ["num_attention_heads / parallel.tensor = 2", "nearest that do: 1, 2"],
    "data.sequence_length=255 parallel.context=2": ["data.sequence_length = 255", "multiple of 4", "256"],
    "parallel.pipeline=2 parallel.stages=[1,1]": ["adds up to 2", "model.num_hidden_layers = 4"],
    "~model": ["model", "required"],
    "data.path=[1,2": ["data.path"],
    "model.num_hidden_layers=1000000000": ["model.num_hidden_layers = 1000000000", "less than or equal to 10000"],
    "model.n_routed_experts=1000000000": ["model.n_routed_experts = 1000000000", "less than or equal to 100000"],
    "parallel.pipeline=1000000000": ["parallel.pipeline = 1000000000", "less than or equal to 10000"],
    "parallel.tensor=1000000000 model.vocab_size=999999999": ["parallel.tensor = 1000000000", "nearest that do"],
    f"run.steps=1{400 * '0'}": ["run.steps = 1000", "is not a number up to 1,000,000,000,000,000,000"],
    f"run.steps=1{5000 * '0'}": ["run.steps=1000", "cannot be read"],
    "run.hang_seconds=inf": ["run.hang_seconds = inf is not a number up to"],
    "health.skip_sigma=nan": ["health.skip_sigma = nan"],
    "run.tokens=1e5000T": ["run.tokens = 1e5000T: it is more than 1,000,000,000,000,000,000"],
    "run.tokens=1e400": ["run.tokens = inf", "is not a whole number"],
    "cluster.memory=1e999GiB": ["cluster.memory = 1e999GiB: it is more than"],
    f"cluster.memory='{90 * '1'}GiB'": ["is not a size"],
    "optim.learning_rate=[{until: 1e400 steps, at: 1}]": ["until", "it is more than"],
    "optim.global_batch=[{until: 9T, at: 1}, {until: 10T, at: 2}] optim.learning_rate=[{until: 1T steps, at: 1}]": [
        "optim.global_batch takes more than 1,000,000 steps"
    ],
    "run.name=${oc.env:SECRET}": ["run.name = ${oc.env:SECRET} would be written", "or to HOME, USER"],
    "run.name=${oc.decode:x}": ["run.name = ${oc.decode:x} would be written"],
    "run.name=${hydra:runtime.cwd}": ["run.name = ${hydra:runtime.cwd} would be written"],
    "recipe=${oc.env:SECRET}": ["recipe = ${oc.env:SECRET} would be written"],
    "+cluster.slurm.environment.HF_TOKEN=abc": ["cluster.slurm.environment.HF_TOKEN would be", "leave it out: sbatch"],
    "cluster.slurm.setup=['export A=1 WANDB_API_KEY=abc']": ["cluster.slurm.setup sets WANDB_API_KEY", "$(cat FILE)"],
    "cluster.slurm.options=['--export=ALL,MY_SECRET=abc']": ["cluster.slurm.options sets MY_SECRET"],
    f"run.name=hf_{'abc' * 12}": ["run.name holds a token or a key", "leave it out"],
    f"cluster.slurm.setup=['curl -H \"PRIVATE: glpat-{'abc' * 7}\" x']": [
        "cluster.slurm.setup[0] holds a token or a key"
    ],
    f"cluster.slurm.image='docker://ghp_{'abc' * 12}@registry/image'": ["cluster.slurm.image holds a token or a key"],
    f"cluster.slurm.setup=[wandb login {'abc0' * 10}]": ["cluster.slurm.setup[0] holds a token or a key"],
    "cluster.slurm.image='docker://me:abc@registry/image'": ["cluster.slurm.image holds an address with a password"],
    "run.name=" + 150 * "[" + 150 * "]": ["run.name holds lists and mappings more than 32 deep in each other"],
    "run.name=" + 99_999 * "[": ["run.name holds lists and mappings more than 32 deep in each other"],
}
BAD_WORLDS = {  # (overrides, world size) -> what the line must hold
    ("parallel.pipeline=2", 3): ["parallel.pipeline = 2", "3 ranks", "start 4"],
    ("parallel.pipeline=2 parallel.expert=2", 2): ["parallel.expert = 2 x parallel.pipeline = 2", "start 4"],
    ("parallel.tensor=2 parallel.context=2", 6): ["parallel.tensor = 2 x parallel.context = 2", "start 8"],
    ("optim.micro_batch=3", 1): ["optim.global_batch = 16", "optim.micro_batch = 3", "15 or 18"],
    ("", 5): ["optim.global_batch = 16", "5 data-parallel ranks", "10 or 20"],
}


def one_line(error: UserError) -> str:
    text = str(error)
    assert "\n" not in text, text
    assert error.exit_code == 2
    return text


@pytest.mark.parametrize("overrides", BAD)
def test_a_mistake_is_one_line_with_field_value_and_mend(overrides):
    words = [overrides] if re.search(r"='|=\['", overrides) else re.split(r" (?=[\w.]+=)", overrides)
    with pytest.raises(UserError) as caught:
        compose(words)
    text = one_line(caught.value)
    for fragment in BAD[overrides]:
        assert fragment in text, text
    assert "abc" not in text or "abc" not in overrides  # what may be a secret is not repeated
    assert len(text) < 1000


@pytest.mark.parametrize(("overrides", "world"), BAD_WORLDS)
def test_a_world_that_does_not_fit_is_one_line_with_the_mend(overrides, world):
    recipe = compose(overrides.split())
    with pytest.raises(UserError) as caught:
        recipe.layout(world)
    text = one_line(caught.value)
    for fragment in BAD_WORLDS[overrides, world]:
        assert fragment in text, text


@pytest.mark.parametrize("name", options("recipe"))
def test_every_shipped_recipe_composes_and_survives_its_resolved_file(name, tmp_path):
    recipe = compose([f"recipe={name}"])
    (tmp_path / "recipe.yaml").write_text(resolved_yaml(recipe))
    assert load_resolved(tmp_path / "recipe.yaml") == recipe
    assert recipe.recipe == recipe.run.name == name


def test_harmless_references_and_shell_lines_are_taken_and_survive_the_resolved_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    lines = r"cluster.slurm.setup=['export A=\${B:-c}','export HF_TOKEN=$(cat ~/.token)']"
    recipe = compose(["run.directory=${oc.env:SCRATCH}/${run.name}", lines, "+cluster.slurm.environment.UCX_TLS=rc",
                      "+cluster.slurm.environment.HF_TOKEN_PATH=/home/me/token"])  # fmt: skip
    assert recipe.run.directory == "/scratch/me/dsv3_tiny"
    assert recipe.cluster.slurm.setup == ("export A=${B:-c}", "export HF_TOKEN=$(cat ~/.token)")
    stored = tmp_path / "recipe.yaml"
    stored.write_text(resolved_yaml(recipe))
    assert "hf_secret" not in stored.read_text()
    assert load_resolved(stored) == compose([f"recipe={stored}"]) == recipe
    stored.write_text(resolved_yaml(recipe).replace("directory: /scratch/me", "directory: ${oc.env:HF_TOKEN}"))
    with pytest.raises(UserError, match=r"run.directory = \$\{oc.env:HF_TOKEN\}/dsv3_tiny would be written"):
        load_resolved(stored)


HOSTILE = {  # a recipe file -> what its line must hold
    "name: ours\nname: theirs": [":2: name is given twice"],
    "name: ours\n---\nnodes: 2": [":2: a second document begins here"],
    "name: [": [": is not YAML"],
    "name: 'a": [": is not YAML"],
    "name: a\0b": [": is not YAML"],
    "nodes: !!python/object/apply:os.system [id]": [":1: the tag !!python/object/apply:os.system is not read"],
    "nodes: !!python/object/apply:pathlib.Path [id]": [":1: the tag !!python/object/apply:pathlib.Path is not read"],
    "a: &a [x, x, x, x, x, x, x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]\n" for a, b in zip("abcdefgh", "bcdefghi")): ["50,000 values"],
    "a: &a [*a]": [":1: it holds itself"],
    100_000 * "[": [":1: lists and mappings lie more than 32 deep"],
    "nodes: 1e400": [":1: nodes = 1e400 is more than a number can be"],
    f"nodes: {'9' * 9000}": [":1: nodes is a number of 9,000 characters"],
    f"name: {'x' * 300_000}": ["has more than 262,144 bytes"],
    "? [a]\n: b": [":1: a key is a list or a mapping"],
    "- a": ["holds no keys"],
    "partition: ${oc.env:SECRET}": [": partition = ${oc.env:SECRET} would be written"],
    "defaults:\n  - local@x: ${oc.env:SECRET}": ["would be written"],
}


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("group", ["cluster", "elsewhere"])
def test_a_hostile_recipe_file_is_one_line_wherever_hydra_finds_it(text, group, tmp_path, monkeypatch):
    """``elsewhere``: a folder that no group names, which a file's defaults lead to."""
    monkeypatch.chdir(tmp_path)
    for folder in ("cluster", "elsewhere"):
        (tmp_path / "recipes" / folder).mkdir(parents=True)
    (tmp_path / "recipes" / group / "theirs.yaml").write_text(text + "\n")
    (tmp_path / "recipes" / "cluster" / "ours.yaml").write_text(
        f"defaults:\n  - {'' if group == 'cluster' else '/elsewhere/'}theirs\nname: ours\n"
    )
    with pytest.raises(UserError) as caught:
        compose(["recipe=dsv3_tiny", "cluster=ours"])
    said = one_line(caught.value)
    assert "theirs.yaml" in said and len(said) < 1000
    for fragment in HOSTILE[text]:
        assert fragment in said, said


def test_a_recipe_file_takes_no_file_from_outside_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "recipe").mkdir(parents=True)
    (tmp_path / "leak.yaml").write_text("seed: 77\n")
    (tmp_path / "recipes" / "recipe" / "theirs.yaml").write_text(
        "# @package _global_\ndefaults: [dsv3_tiny, ../../leak@run]\n"
    )
    with pytest.raises(RecipeError, match=r"^recipe: defaults name .*leak.*, outside of .*"):
        compose(["recipe=theirs"])


@pytest.mark.parametrize("place", ["recipes/cluster/ours.yaml", "stored.yaml"])
def test_a_pipe_in_the_place_of_a_recipe_is_one_line(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(tmp_path / place)
    with pytest.raises(UserError, match="cannot be read"):
        compose(["cluster=ours" if "ours" in place else f"recipe={place}"])


def test_the_shipped_recipes_are_those_of_the_design():
    assert set(options("recipe")) == {
        "dsv3_671b", "dsv3_671b_32k", "dsv3_671b_128k", "dsv3_16b", "dsv3_1b", "dsv3_150m", "dsv3_one_gpu",
        "dsv3_tiny", "dsv3_article", "dsv3_article_tiny", "dsv3_tiny_2k", "moonlight_16b", "glm_4_7_flash", "kimi_k2",
    }  # fmt: skip


def test_a_group_on_the_command_line_wins_over_the_recipe():
    assert compose(["recipe=dsv3_671b", "precision=bf16"]).precision.name == "bf16"


def test_cfg_job_prints_what_composes(capsys):
    assert run_command(lambda recipe: 1, ["--cfg", "job", "run.steps=7"], "help") == 0
    assert "steps: 7" in capsys.readouterr().out


def test_help_shows_every_key_and_each_has_a_description():
    text = command_help("what it does", with_recipe=True)
    assert text.startswith("what it does")
    keys = [*keys_of(Recipe), *(key for model in items_of(Recipe) for key in keys_of(model))]
    assert len(keys) > 150
    text = " ".join(text.split())
    for key in keys:
        assert key.description, f"{key.name} has no description; add one in its settings.py"
        assert f" {key.name}{':' * key.is_section} {key.description}" in text, key.name
    names = {key.name for key in keys}
    assert {"cluster.slurm.account", "precision.fp8.accumulation", "model.rope_scaling.beta_fast", "until"} <= names


def test_multirun_runs_every_combination_in_a_directory_of_its_own(capsys):
    seen = []
    words = ["--multirun", "run.seed=1,2", "optim.learning_rate=0.1,0.2", "run.name=sweep"]
    run_command(lambda recipe: seen.append(recipe) or 0, words, "help")
    assert [(r.run.seed, r.optim.learning_rate) for r in seen] == [(1, 0.1), (1, 0.2), (2, 0.1), (2, 0.2)]
    assert len({r.run.directory for r in seen}) == 4
    assert all(r.run.directory.startswith("runs/sweep") for r in seen)


def test_points_of_a_sweep_never_share_a_directory_that_was_given():
    seen = []
    words = ["--multirun", "optim.name=adamw,muon", "run.directory=runs/mine"]
    assert run_command(lambda recipe: seen.append(recipe) or 0, words, "help") == 0
    assert [r.run.directory for r in seen] == ["runs/mine-optim.name=adamw", "runs/mine-optim.name=muon"]
    seen.clear()
    words = ["--multirun", "optim.name=adamw,muon", "run.directory=runs/of_${optim.name}"]
    assert run_command(lambda recipe: seen.append(recipe) or 0, words, "help") == 0
    assert [r.run.directory for r in seen] == ["runs/of_adamw", "runs/of_muon"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["optim.learning_rate=1e-4,1e-5,0.00001"],
            r"points 2 \(optim.learning_rate=1e-05\) and 3 \(optim.learning_rate=1e-05\) are the same run; leave one",
        ),
        (["run.seed=1,2,1"], r"points 1 \(run.seed=1\) and 3 \(run.seed=1\) are the same run"),
        (["run.tokens=1000,1K"], r"points 1 \(run.tokens=1000\) and 2 \(run.tokens=1K\) are the same run"),
        (["run.seed=1,1", "run.directory=mine"], r"points 1 \(run.seed=1\) and 2 \(run.seed=1\) are the same run"),
        (
            ["run.directory=a,./a"],
            r"points 1 \(run.directory=a\) and 2 \(run.directory=./a\) share run.directory = /.*/a;",
        ),
        (["run.directory=a,link"], "share run.directory = /.*/a;"),
        (["data.path=x/y,x_y"], r"points 1 \(data.path=x/y\) and 2 \(data.path=x_y\) share run.directory = "),
    ],
)
@pytest.mark.parametrize("command", ["pretrain", "submit"])
def test_two_points_of_a_sweep_that_would_be_one_run_are_refused(tmp_path, monkeypatch, words, line, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(RecipeError, match=line) as caught:
        if command == "submit":
            submit(["--multirun", "cluster=slurm", "recipe=dsv3_tiny", "dry_run=true", *words])
        else:
            run_command(lambda recipe: pytest.fail("ran"), ["--multirun", *words], "help")
    assert "\n" not in str(caught.value)


def test_multirun_checks_every_point_before_the_first_runs():
    with pytest.raises(UserError, match="parallel.expert = 3"):
        run_command(lambda recipe: pytest.fail("ran"), ["-m", "parallel.expert=2,3"], "help")


@pytest.mark.parametrize(
    "words", [["run.seed=range(0,1000000000)"], [f"run.{key}=range(1,99)" for key in ("seed", "steps")]]
)
def test_a_sweep_without_end_is_one_line(words):
    with pytest.raises(UserError, match="makes more than 1,000 runs"):
        sweep(words)


def test_a_sweep_leaves_lists_alone():
    assert sweep(["parallel.stages=[1,3]", "run.seed=1,2"]) == [
        ["parallel.stages=[1,3]", "run.seed=1"],
        ["parallel.stages=[1,3]", "run.seed=2"],
    ]


def test_an_unknown_flag_is_one_line():
    with pytest.raises(UserError, match="--steps is not a flag"):
        run_command(lambda recipe: 0, ["--steps"], "help")


def test_composition_keeps_hydra_groups():
    assert compose_config(["recipe=dsv3_tiny"]).model.n_routed_experts == 16


def test_a_typing_mistake_is_answered_without_torch_and_without_a_traceback():
    code = (
        "import sys; sys.argv = ['x', 'model.n_routed_expert=8']\n"
        "from launcher.pretrain import main; from launcher.command_line.console import guarded\n"
        "code = guarded(main); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."}
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "n_routed_experts" in done.stderr
