"""What a run tells of its sources: which it will read again, where one begins anew, and where the text ends."""

import json

import pytest

from dsv3_megatron.data.prepare.shard import PrepareOptions, prepare
from dsv3_megatron.data.source.build import build
from dsv3_megatron.data.tokenizer import Tokenizer
from testing.training.tiny import small_recipe
from testing.training.whole_runs import refusal, steps, train


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two sources, one of them ten times the other."""
    folder = tmp_path_factory.mktemp("sources")
    for name, rows in (("large", 400), ("small", 40)):
        lines = [json.dumps({"text": f"{name} row {n} with a number\n"}) + "\n" for n in range(rows)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    Tokenizer.train(["large small row with a number 0123456789\n"] * 9, 264).save(folder / "tokenizer.json")
    inputs = (str(folder / "large.jsonl"), str(folder / "small.jsonl"))
    options = PrepareOptions(inputs, None, str(folder / "out"), str(folder / "tokenizer.json"), held_out=0.1)
    prepare(options, workers=1)
    return folder / "out"


def keys(shards, directory, *more):
    return (
        "data=indexed", f"data.path={shards}", f"data.cache={directory}/cache", "model.vocab_size=320",
        "data.weights={00_large: 1, 01_small: 1}", f"run.directory={directory}", *more,
    )  # fmt: skip


def small_count(shards, directory):
    recipe = small_recipe(*keys(shards, directory))
    data = build(recipe.data, vocab_size=320, seed=recipe.run.seed).train
    return data.sources[data.names.index("01_small")].count


def events(directory, name):
    lines = map(json.loads, (directory / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


def test_a_source_that_is_read_again_is_told_before_and_where_it_begins_anew(shards, tmp_path):
    count = small_count(shards, tmp_path)
    over = 2 * count // 8 + 2  # every second of 8 samples is of the small source
    notes = train(1, *keys(shards, tmp_path, f"run.steps={over}"))
    assert refusal(notes) is None
    (told,) = [note for note in notes if "source 01_small is read" in note]
    assert "its second epoch begins after" in told
    (epoch,) = events(tmp_path, "epoch")
    assert (epoch["source"], epoch["epoch"]) == ("01_small", 2) and epoch["step"] in (
        2 * count // 8,
        2 * count // 8 + 1,
    )
    assert len(steps(tmp_path)) == over


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_run_that_must_not_repeat_a_source_ends_there_evaluated_and_saved(shards, tmp_path, world):
    count = small_count(shards, tmp_path)
    notes = train(world, *keys(shards, tmp_path, "run.steps=1000", "data.at_source_end=stop"))
    assert refusal(notes) is None
    done = len(steps(tmp_path))
    assert done == 2 * count // 8 and steps(tmp_path)[-1]["samples"] == 8 * done
    assert any(note.startswith("ended: source 01_small is read to its end after") for note in notes)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "source 01_small is read to its end" in summary["ended"] and summary["after"]["held_out_loss"] > 0
    assert (tmp_path / "finished").exists() and (tmp_path / "checkpoints" / f"step_{done:08d}").is_dir()
    again = train(world, *keys(shards, tmp_path, "run.steps=1000", "data.at_source_end=stop"))
    assert refusal(again) is None and len(steps(tmp_path)) == done, "nothing is left to do"


def test_samples_that_are_excluded_are_stepped_over_and_what_said_so_is_kept(shards, tmp_path):
    leave_out = tmp_path / "leave_out.jsonl"
    leave_out.write_text('{"samples": [8, 16]}\n{"samples": [20, 21]}\n')
    for name, more in (("all", ()), ("some", (f"data.exclude={leave_out}",))):
        assert refusal(train(1, *keys(shards, tmp_path / name, "run.steps=3", *more))) is None
    every, some = steps(tmp_path / "all"), steps(tmp_path / "some")
    assert [line["samples"] for line in every] == [8, 16, 24]
    assert [line["samples"] for line in some] == [8, 25, 33]
    assert some[0]["lm_loss"] == every[0]["lm_loss"] and some[1]["lm_loss"] != every[1]["lm_loss"]
    (event,) = events(tmp_path / "some", "excluded")
    assert event["path"] == str(leave_out) and len(event["sha256"]) == 64
    assert (tmp_path / "some" / f"excluded_{event['sha256'][:8]}.jsonl").read_text() == leave_out.read_text()


def test_a_resume_tells_of_sources_that_do_not_go_on_where_they_stand(shards, tmp_path):
    assert refusal(train(1, *keys(shards, tmp_path, "run.steps=2"))) is None
    notes = train(1, *keys(shards, tmp_path, "run.steps=3", "data.weights={00_large: 3, 01_small: 1}"))
    told = [note for note in notes if note.startswith("warning: data.weights is another")]
    assert [note.split("read: ")[1].split(";")[0] for note in told] == [
        "4 sequences of source 00_large are left out", "4 sequences of source 01_small are read again",
    ]  # fmt: skip
    assert len(events(tmp_path, "source_moved")) == 2
