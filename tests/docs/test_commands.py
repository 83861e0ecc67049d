"""Every command of README and docs is run: small, and in a temporary folder. What cannot be run here is taken in as far
as it goes without its work being done; each such kind stands in ``NOT_RUN`` with its reason."""

import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import zstandard

from dsv3_megatron.preflight.world import check_world
from launcher.command_line.compose import compose
from launcher.command_line.recipe_files import RECIPES
from launcher.command_line.start_ranks import split_torchrun, world_size
from parallel.errors import ClusterError
from parallel.world import World
from testing.pages import DOCKER_FILES, PAGES, commands
from testing.trained_elsewhere import old_text, own_text, publish
from testing.training.tiny import SMALL

ROOT = RECIPES.parent
KEPT = ("data=", "model.vocab_size=")  # the text and its tokenizer stay those of the recipe
TINY = (
    *(word for word in SMALL if not word.startswith(KEPT)),
    "data.sequence_length=32", "data.held_out=0.001", "logging.report_every_seconds=0",
)  # fmt: skip
NOT_RUN = {
    r"make ": "installs, or takes minutes, or is what runs this test; make -n says what it would do",
    r"dsv3 train .*--nproc-per-node \d": "tests/end_to_end starts ranks; composed, and laid out over them",
    r"torchrun ": "no command but a mention of a flag",
    r"python -m benchmarks\.gpu_check ": "minutes, tests/benchmarks rehearses it; refused where there is no GPU",
    r"python -m benchmarks\.": "minutes to hours, some on a GPU; compiled",
    r"python launcher/pretrain\.py recipe=dsv3_150m": "hours, and gigabytes; composed",
    r"python launcher/submit\.py (status|logs|cancel)": "needs a job: tests/slurm; refused for want of one",
    r"python launcher/submit\.py$": "no command but a mention; its help",
    r"python launcher/submit\.py": "tests/slurm submits; dry_run=true",
    r"python launcher/plan\.py .*search=true": "minutes, and writes into recipes/; composed",
    r"python launcher/plan\.py (?!.*(show=|--fast))": "measures for a minute, tests/launcher does; by formulae",
    r"python launcher/dashboard\.py .*entity=": "needs a server; without entity",
    r"python launcher/views/reference\.py": "rewrites a page of the repository, which a test compares; its help",
}
STAND_INS = (  # what a page leaves to the reader, or takes too many steps for
    (r"\bNAME\b", "dsv3_tiny"), (r"input=FOLDER", "input=exported"), (r"run\.steps=\d+", "run.steps=2"),
    (r"(every_steps|\bstep)=50\b", r"\1=1"), (r"tokens=80", "tokens=4"), (r"vocab_size=2048", "vocab_size=300"),
)  # fmt: skip
EVERY = list(dict.fromkeys(command for page in [*PAGES, *DOCKER_FILES] for command in commands(page)))


def lane(command):
    """Return a command as a parameter: of those that really work, the fast lane takes the first of each program."""
    words = shlex.split(command, comments=True)
    script = next((word for word in words if word.endswith(".py")), None)
    if any(re.match(pattern, shlex.join(words)) for pattern in NOT_RUN) or script not in SEEN:
        SEEN.add(script)
        return command
    return pytest.param(command, marks=pytest.mark.full)


SEEN = set()


def in_process(script, words):
    """Run a script of ours, told by its path, on arguments."""
    return importlib.import_module(script.removesuffix(".py").replace("/", ".")).main(words)


def without_work(reason, command, words):
    """Take a command in as its entry in NOT_RUN says."""
    script = next((word for word in words if word.endswith(".py")), None)
    arguments = words[words.index(script) + 1 :] if script else []
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif "laid out" in reason:
        options, overrides = split_torchrun(words[2:])
        recipe, ranks = compose(overrides), world_size(options)
        check_world(recipe, World(rank=0, size=ranks, local_rank=0))
        recipe.data.check_source()
    elif "refused where" in reason:
        words = [word for word in words[3:] if not word.startswith("device=")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.cuda.is_available", lambda: False)
            assert in_process("benchmarks/gpu_check/__main__.py", words) == 2
    elif "compiled" in reason:
        file = (ROOT / words[2].replace(".", "/")).with_suffix(".py")
        compile(file.read_text(), str(file), "exec")
    elif "want of one" in reason:
        with pytest.raises(ClusterError, match=r"has no jobs\.jsonl"):
            in_process(script, arguments)
    elif "its help" in reason:
        assert in_process(script, ["--help"]) == 0
    elif "dry_run" in reason:
        compose([word for word in arguments if not word.startswith(("dry_run=", "chain="))]).data.check_source()
        assert in_process(script, [*(w for w in arguments if not w.startswith("dry_run=")), "dry_run=true"]) == 0
    elif "composed" in reason:
        compose([word for word in arguments if word.split("=")[0] not in ("search", "save")])
    elif "by formulae" in reason:
        assert in_process(script, [*arguments, "--fast"]) == 0
    elif "without entity" in reason:
        assert in_process(script, [word for word in arguments if not word.startswith("entity=")]) == 0
    else:
        assert "mention" in reason, command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as a reader has it: a trained run under the names that the pages use, documents, an exported model, a
    published one and its import."""
    folder = tmp_path_factory.mktemp("reader")
    (ROOT / ".cache").mkdir(exist_ok=True)
    (folder / ".cache").symlink_to(ROOT / ".cache")  # the standard library's tokens: made once
    (folder / "code").mkdir()
    for module in (importlib, shlex, shutil):
        shutil.copy(module.__file__, folder / "code" / f"{module.__name__}.py")
    (folder / "quiz.jsonl").write_text('{"context": "import ", "choices": ["os", "sys"], "answer": 0}\n')
    text = b'{"text": "' + b"a few words of the web " * 40 + b'"}\n'
    (folder / "web.jsonl.zst").write_bytes(zstandard.compress(text * 20))
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ["recipe=dsv3_tiny", "run.steps=2", "run.name=demo", "checkpoint.every_steps=1", *TINY]
        assert in_process("launcher/pretrain.py", words) == 0
        assert in_process("launcher/export_hf.py", ["run=runs/demo", "output=exported"]) == 0
        publish(folder / "Moonlight-16B-A3B", old_text(folder / "general"), steps=2)
        own_text(folder / "own")
        words = ["input=code,web.jsonl.zst", "output=tokenizer.json", "vocab_size=300"]
        assert in_process("launcher/train_tokenizer.py", words) == 0
        published = "runs/moonlight_16b_published"
        words = ["input=Moonlight-16B-A3B", f"output={published}", "recipe=moonlight_16b", "processes=1"]
        assert in_process("launcher/import_hf.py", words) == 0
        for text in ("own", "general"):
            words = [f"input={text}", f"output={text}_shards", f"tokenizer={published}", "held_out=0.1"]
            assert in_process("launcher/prepare_data.py", words) == 0
        words = ["input=code,web.jsonl.zst", "output=shards", "tokenizer=tokenizer.json", "held_out=0.03"]
        assert in_process("launcher/prepare_data.py", words) == 0
        words = ["recipe=dsv3_tiny", "data=indexed", "data.path=shards", "run.steps=2", "run.name=mine", *TINY]
        assert in_process("launcher/pretrain.py", words) == 0
    shutil.copytree(folder / "shards", folder / "shards_of_mine")
    (folder / "leave_out.jsonl").write_text('{"samples": [3, 5]}\n')
    shutil.copytree(folder / published, folder / "runs" / "moonlight_16b")
    shutil.copytree(folder / "runs" / "demo", folder / "runs" / "dsv3_tiny")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", [lane(command) for command in EVERY], ids=lambda command: command[:70])
def test_the_command_runs(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for pattern, word in STAND_INS:
        command = re.sub(pattern, word, command)
    words = shlex.split(command, comments=True)
    command = shlex.join(words)
    if reason := next((why for pattern, why in NOT_RUN.items() if re.match(pattern, command)), None):
        without_work(reason, command, words)
        return
    assert words[0] == "python"
    script, *arguments = words[1:]
    if script == "launcher/pretrain.py" and not {"--help", "--cfg"} & set(arguments):
        of_another_model = not {"recipe=dsv3_tiny", "recipe=dsv3_tiny_2k"} & set(arguments)
        arguments += [word for word in TINY if not (of_another_model and word.startswith("model."))]
        arguments += [] if "run.steps=2" in arguments else ["run.steps=2"]
    output = next((word.partition("=")[2] for word in arguments if word.startswith("output=")), None)
    if output and (folder / output).is_dir() and (output != "exported" or script == "launcher/export_hf.py"):
        shutil.rmtree(folder / output)
    assert in_process(script, arguments) == 0
    assert output is None or Path(output).exists()
    if output == "shards":  # of another page, perhaps: the run "mine" has read these
        shutil.rmtree(folder / output)
        shutil.copytree(folder / "shards_of_mine", folder / output)


def test_every_reason_is_needed():
    """A kind of command that no page holds any longer needs no exception."""
    for pattern in NOT_RUN:
        assert any(re.match(pattern, shlex.join(shlex.split(c, comments=True))) for c in EVERY), pattern
