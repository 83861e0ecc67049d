"""A kill after any step on the disk: the same command makes what an undisturbed one does, another hears what was begun.

Before each change that a command makes on the disk, a copy of its output is taken: what a kill at that moment leaves,
with half of what was being written in a copy more. The command is run again in each.
"""

import json
import os
import random
import shutil
import sys
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest

from dsv3_megatron.data.prepare import encode, farm, finish
from dsv3_megatron.data.prepare.merge import merge
from dsv3_megatron.data.prepare.pack import PackAhead
from dsv3_megatron.data.prepare.shard import PrepareOptions, prepare
from dsv3_megatron.data.source.shards import read_manifest
from dsv3_megatron.data.tokenizer import Tokenizer
from parallel.errors import DataError

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
NOBODY = 2**22 + 1  # no process has that number
_watch = []  # who is told of each change; a hook cannot be removed


def _hook(event, args):
    if _watch and (event in CHANGES or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR))):
        _watch[0](event, args)


sys.addaudithook(_hook)


def tree(folder):
    """Return what is in a folder: path -> bytes, or None of a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    } | ({"": None} if folder.exists() else {})


def restore(folder, state):
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in sorted(state.items()):
        if content is None:
            (folder / name).mkdir(parents=True, exist_ok=True)
        else:
            (folder / name).write_bytes(content)


def of_nobody(name):
    """Return a name that this process gives to a file as one that is killed would have given it."""
    return name.replace(f".{os.getpid()}.", f".{NOBODY}.")


def without_locks(state):
    return {name: content for name, content in state.items() if not Path(name).name.startswith("lock")}


@contextmanager
def states_of(folder):
    """Collect what a kill can leave of a folder while the block works in it."""
    states, opened = [], set()

    def look(event, args):
        watching = _watch.pop()
        try:
            state = {of_nobody(name): content for name, content in tree(folder).items()}
            if lock := state.get(".prepare/lock"):
                state[".prepare/lock"] = json.dumps({**json.loads(lock), "process": NOBODY}).encode()
            if not states or states[-1] != state:
                states.append(state)
                for path in opened & state.keys():  # it may as well have been killed half way through
                    if content := state[path]:
                        states.append({**state, path: content[: len(content) // 2]})
                opened.clear()
            if event == "open" and str(args[0]).startswith(f"{folder}/"):
                opened.add(of_nobody(os.path.relpath(args[0], folder)))
        finally:
            _watch.append(watching)

    _watch.append(look)
    try:
        yield states
    finally:
        _watch.clear()


class InThisProcess:
    """A pool whose worker is this process, so that what it writes is seen."""

    def __init__(self, processes, context, start, given):
        start(*given)

    def submit(self, do, task):
        future = Future()
        future.set_result(do(task))
        return future

    def shutdown(self, **_):
        pass


@pytest.fixture(autouse=True)
def one_after_another(monkeypatch):
    for name in ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"):  # which a worker sets
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(farm, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(encode, "end_with_parent", lambda: None)
    monkeypatch.setattr(finish, "_LINKS_AT_ONCE", 1)


def document(number):
    chance = random.Random(number)
    return " ".join(chance.choice(["the", "fox", "f(x):\n", "wörld"]) for _ in range(chance.randrange(3, 40))) + str(
        number
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tokenizer and two inputs, with copies in each and across them."""
    folder = tmp_path_factory.mktemp("kills")
    Tokenizer.train([document(n) for n in range(60)], 400).save(folder / "tokenizer.json")
    for name, numbers in {"a": range(30), "b": range(20, 45)}.items():
        rows = [document(n % 40) for n in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (folder / "none.jsonl").write_text('{"txt": "x"}\n')
    return folder


def options(place, names, output, **more):
    inputs = tuple(str(place / f"{name}.jsonl") for name in names)
    base = {"held_out": 1e-9, "split_share": 0.0, "shard_tokens": 500, "deduplicate": True}
    return PrepareOptions(inputs, None, str(output), str(place / "tokenizer.json"), **{**base, **more})


def prepared(place, names, output, ahead=None, **more):
    return prepare(options(place, names, output, **more), workers=1, ahead=ahead)


def joined(inputs, output, ahead=None):
    return merge([str(each) for each in inputs], str(output), memory=5000, workers=1, ahead=ahead)


AHEAD = PackAhead((64, 100))
STEPS = pytest.mark.parametrize(
    "every", [pytest.param(7, id="some"), pytest.param(1, id="all", marks=pytest.mark.full)]
)


def check(folder, run, other, began, every):
    """Kill ``run`` after steps on the disk.

    Args:
        other: another command on the folder. began: what it is told, and a reader.
        every: how many steps to go on by.
    """
    with states_of(folder) as states:
        run()
    whole = tree(folder)
    assert len(states) > 100 and not any(name.startswith(".prepare") or "partial" in name for name in whole)
    for number, state in list(enumerate(states))[::every]:
        restore(folder, state)
        begun, made = ".prepare/begun.json" in state, "manifest.json" in state
        assert begun or made or all(name.startswith((".prepare", "parts")) for name in state if name), number
        if not made:
            with pytest.raises(DataError) as told:
                read_manifest(folder)
            assert not begun or (f"is not finished; run the same command again: {began}" in str(told.value)), number
        if begun or made:
            with pytest.raises(DataError) as told:
                other()
            assert made or began in str(told.value), number
            assert without_locks(tree(folder)) == without_locks(state), "what is refused changes nothing"
            restore(folder, state)
        run()
        assert tree(folder) == whole, f"killed after step {number} of {len(states)}"


@STEPS
def test_preparing_killed_after_any_step(place, tmp_path, every):
    out = tmp_path / "out"
    check(
        out,
        lambda: prepared(place, "ab", out, AHEAD),
        lambda: prepared(place, "ab", out, AHEAD, held_out=0.5),
        f"python launcher/prepare_data.py input={place}/a.jsonl,{place}/b.jsonl output={out} tokenizer={place}/",
        every,
    )


@STEPS
def test_merging_parts_killed_after_any_step(place, tmp_path, every):
    out = tmp_path / "out"
    for number in (1, 2):
        prepared(place, "ab", out, part=(number, 2))
    check(
        out,
        lambda: joined([out], out, AHEAD),
        lambda: prepared(place, "ab", out),
        f"python launcher/data.py merge input={out} output={out}",
        every,
    )


@STEPS
def test_merging_folders_killed_after_any_step(place, tmp_path, every):
    out, folders = tmp_path / "out", [tmp_path / name for name in "abc"]
    for name, folder in zip("aba", folders):
        prepared(place, name, folder)
    check(
        out,
        lambda: joined(folders, out, AHEAD),
        lambda: joined(folders[:2], out, AHEAD),
        f"python launcher/data.py merge input={folders[0]},{folders[1]},{folders[2]} output={out}",
        every,
    )


@pytest.mark.full
def test_a_command_that_resumes_can_be_killed_too(place, tmp_path):
    out = tmp_path / "out"
    for number in (1, 2):
        prepared(place, "ab", out, part=(number, 2))
    with states_of(out) as states:
        joined([out], out, AHEAD)
    whole = tree(out)
    for number in range(0, len(states), 23):
        restore(out, states[number])
        with states_of(out) as later:
            joined([out], out, AHEAD)
        for second in range(0, len(later), 9):
            restore(out, later[second])
            joined([out], out, AHEAD)
            assert tree(out) == whole, f"killed after step {number}, and after step {second} of what resumed"
