"""Whole runs over token shards, growing batches, other runs' weights: the same in every layout and after a resume."""

import json

import numpy as np
import pytest

from dsv3_megatron.data.prepare.shard import PrepareOptions, prepare
from dsv3_megatron.data.tokenizer import Tokenizer
from testing.lanes import in_lanes
from testing.ranks import run_ranks
from testing.training.whole_runs import refusal, run_here, steps, train

FIELDS = ("lm_loss", "mtp_loss", "balance_loss", "grad_norm", "max_violation", "global_batch", "tokens")


def assert_same(mine, theirs, where, rel=1e-5):
    assert len(mine) == len(theirs), where
    for a, b in zip(mine, theirs):
        for field in FIELDS:
            assert a[field] == pytest.approx(b[field], rel=rel), (where, a["step"], field)


def held_out(run):
    return json.loads((run / "summary.json").read_text())["after"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two sources of random words, weighted 3 to 1."""
    folder, random = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    words = ["alpha", "beta(", "gamma\n", "delta;", "42"]
    for name in ("a", "b"):
        rows = [" ".join(random.choice(words, random.integers(3, 60))) + f" {name}{n}" for n in range(150)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    Tokenizer.train(words * 9, 262).save(folder / "tokenizer.json")
    inputs = (str(folder / "a.jsonl"), str(folder / "b.jsonl"))
    prepare(
        PrepareOptions(inputs, (3.0, 1.0), str(folder / "out"), str(folder / "tokenizer.json"), held_out=0.1), workers=1
    )
    return folder / "out"


DUAL = ("parallel.pipeline=2", "parallel.schedule=dualpipe", "optim.micro_batch=1")


@pytest.mark.parametrize(
    ("layouts", "lives"),
    [
        # Stopped after every step, and each time in another number of ranks.
        ({"dual": (2, DUAL)}, [(1, 2), (3, 1)]),
        pytest.param({"dp4": (4, ())}, [(1, 2), (2, 1), (3, 4)], marks=pytest.mark.full),
    ],
    ids=["few", "rest"],
)
def test_a_run_over_shards_reads_the_same_in_any_layout_and_after_a_resume(shards, tmp_path, layouts, lives):
    over = (
        "data=indexed", f"data.path={shards}", "data.fim_rate=0.3", "data.isolate_documents=true",
        f"data.cache={tmp_path}/cache", "model.vocab_size=320", "run.steps=3", "checkpoint.every_steps=1",
        "optim.learning_rate=0.01", "checkpoint.keep=9",
    )  # fmt: skip
    assert refusal(train(1, *over, f"run.directory={tmp_path}/one")) is None
    one = steps(tmp_path / "one")
    assert len({line["lm_loss"] for line in one}) == 3
    for name, (world, layout) in layouts.items():
        assert refusal(train(world, *over, *layout, f"run.directory={tmp_path}/{name}")) is None
        assert_same(steps(tmp_path / name), one, name)
        assert held_out(tmp_path / name) == pytest.approx(held_out(tmp_path / "one"), rel=1e-5)
    losses = held_out(tmp_path / "one")
    assert min(losses[f"held_out/{name}"] for name in ("00_a", "01_b")) < losses["held_out_loss"]
    assert max(losses[f"held_out/{name}"] for name in ("00_a", "01_b")) > losses["held_out_loss"]
    for step, world in lives:
        train(world, *over, f"run.steps={step}", f"run.directory={tmp_path}/torn")
    assert_same(steps(tmp_path / "torn"), one, "stopped and resumed")


RAMP = ("optim.global_batch=[{until: 300, at: 8}, {until: 600, at: 16}, {until: 90000, at: 24}]", "run.steps=4",
        "optim.batch_multiple=8", "optim.micro_batch=1", "optim.learning_rate=0.001")  # fmt: skip
RAMPED = {
    "dualpipe x EP2": (4, ("parallel.pipeline=2", "parallel.schedule=dualpipe", "parallel.expert=2")),
    "interleaved": (2, ("parallel.pipeline=2", "parallel.schedule=interleaved", "parallel.chunks=2")),
    "zb1p": (2, ("parallel.pipeline=2", "parallel.schedule=zb1p")),
    "dualpipev": (2, ("parallel.pipeline=2", "parallel.schedule=dualpipev")),
    "DP2": (2, ()),
    "CP2": (2, ("parallel.context=2",)),
}


@pytest.mark.parametrize("layouts", in_lanes(RAMPED, "dualpipev", "CP2"))
def test_a_batch_that_grows_in_the_run_works_under_every_layout(tmp_path, layouts):
    assert refusal(train(1, *RAMP, f"run.directory={tmp_path}/one")) is None
    one = steps(tmp_path / "one")
    assert [line["global_batch"] for line in one] == [8, 8, 16, 24]
    for ranks in (2, 4):
        cases = {n: layout for n, (many, layout) in layouts.items() if many == ranks}
        words = [[*RAMP, *layout, f"run.directory={tmp_path}/{n}"] for n, layout in cases.items()]
        for name, (notes, *_) in zip(cases, run_ranks(ranks, run_here, words) if words else ()):
            assert refusal(notes) is None, name
            assert_same(steps(tmp_path / name), one, name, rel=1e-4)


def test_a_new_run_starts_from_anothers_weights_and_counts_anew(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert refusal(train(1, "run.steps=3", "optim.learning_rate=0.01", f"run.directory={first}")) is None
    longer = ("data.sequence_length=64", "model.rope_scaling={factor: 2.0, original_max_position_embeddings: 32}")
    start = (f"run.start_from={first}", f"run.directory={second}", "run.steps=2")
    assert refusal(train(2, *start)) is None  # on other ranks
    summaries = [json.loads((d / "summary.json").read_text()) for d in (first, second)]
    assert summaries[1]["before"]["held_out_loss"] == pytest.approx(summaries[0]["after"]["held_out_loss"], rel=1e-6)
    assert [line["tokens"] for line in steps(second)] == [8 * 32, 16 * 32]
    assert refusal(train(1, *start, "run.steps=3")) is None  # goes on from its own checkpoint
    assert [line["step"] for line in steps(second)] == [1, 2, 3]
    assert refusal(train(1, *start, *longer, f"run.directory={tmp_path}/long")) is None
    assert steps(tmp_path / "long")[0]["tokens"] == 8 * 64
    (refused,) = train(1, *start, "model.hidden_size=72", f"run.directory={tmp_path}/other")
    assert "model.hidden_size = 64, not 72" in refused and "run.start_from" in refused
    (refused,) = train(1, f"run.start_from={tmp_path}/none", f"run.directory={tmp_path}/x")
    assert "holds no checkpoint" in refused
