"""No reader can run what a file or a peer says, and nothing is written but through what follows no link.

Found by reading the code of all packages; what is allowed nevertheless stands here by name, with its reason, and on
docs/security.md.
"""

import ast
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for package in ("dsv3_megatron", "launcher", "parallel") for path in (ROOT / package).rglob("*.py"))

# What runs what it is given, whoever gives it. No exceptions.
RUNS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "OmegaConf.load", "yaml.unsafe_load",
        "yaml.full_load", "pickle.load", "pickle.loads", "pickle.Unpickler", "runpy.run_path", "joblib.load",
        "hydra.utils.instantiate", "instantiate", "torch.jit.load", "shutil.unpack_archive"}  # fmt: skip
MODULES = {"marshal", "shelve", "dill", "cloudpickle", "xmlrpc", "tarfile"}
ALLOWED = {  # (file, what) -> why
    ("launcher/command_line/start_ranks.py", "runpy.run_module"): "this package's own pretrain, by its name",
    ("launcher/dsv3.py", "importlib.import_module"): "a command of this package, from its table",
    ("launcher/data.py", "importlib.import_module"): "a command of this package, from its table",
    (
        "dsv3_megatron/checkpoint/index.py",
        "pickle",
    ): "writes the index that torch's reader expects; run/pickled.py reads",
    ("dsv3_megatron/checkpoint/hugging_face/import_.py", "pickle"): "the same",
    ("dsv3_megatron/checkpoint/stored/saved_tensor.py", "zipfile"): "members of a torch.save file, their sizes first",
}
# Exchanges of Python objects, which torch pickles: between the ranks of one job, over its own connections.
PEERS = {
    "dsv3_megatron/checkpoint/find.py", "dsv3_megatron/checkpoint/index.py", "dsv3_megatron/checkpoint/save.py",
    "dsv3_megatron/checkpoint/memory/places.py", "dsv3_megatron/health/step_guard.py",
    "dsv3_megatron/health/stragglers.py", "dsv3_megatron/train/muon.py",
    "dsv3_megatron/train/run_directory.py", "parallel/agree.py",
}  # fmt: skip
# Programs that are started, each by a list of words and never by a shell.
STARTS = {
    "dsv3_megatron/nodes/health.py", "dsv3_megatron/report/writer.py", "dsv3_megatron/run/directory.py",
    "launcher/slurm/client.py",
}  # fmt: skip


def named(node):
    """Return the dotted name of what is called, as far as it is one: ``torch.load``, ``eval``."""
    if isinstance(node, ast.Attribute):
        return f"{named(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def nodes(path):
    return ast.walk(ast.parse(path.read_text()))


def calls(path):
    """Yield (name, call) of every call of a file."""
    for node in nodes(path):
        if isinstance(node, ast.Call):
            yield named(node.func), node


def keyword(call, name):
    return next((each.value for each in call.keywords if each.arg == name), None)


def is_true(value):
    return isinstance(value, ast.Constant) and value.value is True


def imported(path):
    """Yield the top names of what a file imports."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def is_exchange(name):
    """Return whether a call is one of torch.distributed's that send pickles."""
    return name.split(".")[-1] in {
        "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
        "recv_object_list",
    }  # fmt: skip


def complaints(path, place):
    """Return what a file does that may run what it reads."""
    found = []
    for name, call in calls(path):
        short = ".".join(name.split(".")[-2:])
        if short in RUNS or name in RUNS:
            found.append(f"{name} runs what it is given")
        if short in ("torch.load",) and not is_true(keyword(call, "weights_only")):
            found.append("torch.load without weights_only=True")
        if keyword(call, "allow_pickle") is not None:
            found.append(f"{name} with allow_pickle")
        if keyword(call, "shell") is not None:
            found.append(f"{name} by a shell")
        if keyword(call, "trust_remote_code") is not None:
            found.append(f"{name} with trust_remote_code")
        if short in ("yaml.load", "yaml.compose", "yaml.parse") and not named(keyword(call, "Loader")).endswith(
            "Loader"
        ):
            found.append(f"{name} without a loader")
        if is_exchange(name) and place not in PEERS:
            found.append(f"{name} unpickles what a peer sends")
        if short in ("runpy.run_module", "importlib.import_module") and (place, short) not in ALLOWED:
            found.append(f"{name} imports what it is given")
    for module in imported(path):
        if module in MODULES or (module in ("pickle", "zipfile") and (place, module) not in ALLOWED):
            found.append(f"imports {module}")
        if module == "subprocess" and place not in STARTS:
            found.append("starts programs")
    return found


def test_nothing_runs_what_a_file_or_a_peer_says():
    found = {place: said for path in FILES if (said := complaints(path, place := str(path.relative_to(ROOT))))}
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)", "import pickle\npickle.loads(data)", "torch.load(path)", "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)", "yaml.load(text)", "yaml.load(text, Loader=loader_of(path))",
        "subprocess.run(text, shell=True)", "import subprocess", "dist.all_gather_object(a, b)", "import marshal",
        "os.system(text)", "importlib.import_module(name)", "OmegaConf.load(path)", "from pickle import loads",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_each_kind_is_found(tmp_path, line):
    (tmp_path / "planted.py").write_text(line + "\n")
    assert complaints(tmp_path / "planted.py", "dsv3_megatron/planted.py")


def test_every_exception_is_still_there_and_on_the_page():
    page = (ROOT / "docs" / "security.md").read_text()
    for place, what in ALLOWED:
        path = ROOT / place
        names = {".".join(name.split(".")[-2:]) for name, _ in calls(path)} | set(imported(path))
        assert what in names, f"{place} does without {what}: take its exception out"
    for place in PEERS:
        assert any(is_exchange(name) for name, _ in calls(ROOT / place)), place
    for place in {*(place for place, _ in ALLOWED), *PEERS, *STARTS}:
        assert place in page, f"docs/security.md does not name {place}"


def writes(path):
    """Yield the ways in which a file opens others for writing."""
    for name, call in calls(path):
        method = name.split(".")[-1] if name else getattr(call.func, "attr", "")
        if method in ("write_text", "write_bytes"):
            yield method
        mode = keyword(call, "mode") or next(iter(call.args[1:] if name == "open" else call.args), None)
        if method == "open" and isinstance(mode, ast.Constant) and set(str(mode.value)) & set("wa+"):
            yield f"open {mode.value}"


# Files that are opened for writing otherwise than exclusively or by run/made.py -> why.
OTHERWISE = {
    "launcher/command_line/last_words.py": "in the folder that torchrun's agent has just made for its error files",
    "launcher/command_line/output.py": "a device or a pipe that the user named, such as /dev/stdout",
}


def test_nothing_is_written_through_a_link():
    found = {}
    for path in FILES:
        place = str(path.relative_to(ROOT))
        if place not in OTHERWISE and (ways := list(writes(path))):
            found[place] = ways
    assert not found


def test_shell_scripts_quote_what_they_are_given():
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here; install with: apt-get install shellcheck")
    scripts = [*ROOT.glob("docker/*.sh"), ROOT / ".ci" / "run"]
    done = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
