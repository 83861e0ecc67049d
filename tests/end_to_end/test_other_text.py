"""A run's sample numbers count in its text: the same shards anywhere resume it, others at their place are refused."""

import json
import shutil

import pytest

from dsv3_megatron.checkpoint.manifest import newest_valid, read_content
from dsv3_megatron.data.identity import DataIdentity, check_counted_in
from dsv3_megatron.data.prepare.shard import PrepareOptions, prepare
from dsv3_megatron.data.source.samples import ORDER
from dsv3_megatron.data.tokenizer import Tokenizer
from launcher import evaluate
from parallel.errors import CheckpointError
from testing.training.whole_runs import refusal, train


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two folders of shards, of other rows and the same tokenizer, and a run of one step over the first."""
    folder = tmp_path_factory.mktemp("text")
    rows = [f"row {n} is here\n" * 9 for n in range(80)]
    Tokenizer.train(rows, 280).save(folder / "tokenizer.json")
    for name, some in (("one", rows), ("other", rows[:60])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in some))
        options = PrepareOptions(
            (str(folder / f"{name}.jsonl"),), None, str(folder / name), str(folder / "tokenizer.json"), held_out=0.2
        )
        prepare(options, workers=1)
    shutil.copytree(folder / "one", folder / "shards")
    assert refusal(train(1, *keys(folder, "shards", folder / "run"))) is None
    return folder


def keys(folder, shards, run, *more):
    return (
        "data=indexed", f"data.path={folder / shards}", f"data.cache={folder}/cache", "model.vocab_size=320",
        "run.steps=1", "data.sequence_length=64", f"run.directory={run}", *more,
    )  # fmt: skip


def again(place, tmp_path, shards, *more):
    if not (tmp_path / "run").exists():
        shutil.copytree(place / "run", tmp_path / "run")
    return train(1, *keys(place, shards, tmp_path / "run", "run.steps=2", *more))


def test_a_checkpoint_names_its_text(place):
    text = read_content(newest_valid(place / "run" / "checkpoints")[0])["data"]
    assert text["order"] == ORDER and text["name"].startswith(f"shards {text['sha256'][:8]} (")


def test_the_same_shards_elsewhere_resume_a_run(place, tmp_path):
    notes = again(place, tmp_path, "one")
    assert refusal(notes) is None and not any("was trained on" in note for note in notes)


def test_other_shards_are_refused_by_name_and_taken_where_they_are_wanted(place, tmp_path):
    said = refusal(again(place, tmp_path, "other"))
    assert "was trained on shards " in said and "restore those, or set data.allow_other=true" in said
    assert "\n" not in said and said.count("tokens)") == 2
    notes = again(place, tmp_path, "other", "data.allow_other=true")
    assert refusal(notes) is None and any("data.allow_other = true, continuing at sample" in note for note in notes)
    assert refusal(again(place, tmp_path, "other", "run.steps=3")) is None, "the run goes on with them"
    assert "was trained on" in refusal(again(place, tmp_path, "one", "run.steps=4"))


def test_shards_exchanged_at_their_place_are_seen_in_evaluating(place, tmp_path, capsys):
    shutil.rmtree(place / "shards")
    shutil.copytree(place / "other", place / "shards")
    try:
        with pytest.raises(CheckpointError, match=r"was trained on shards .*name the folder to evaluate on: data="):
            evaluate.main([f"run={place / 'run'}"])
        assert evaluate.main([f"run={place / 'run'}", f"data={place / 'other'}"]) == 0
    finally:
        shutil.rmtree(place / "shards")
        shutil.copytree(place / "one", place / "shards")
    assert evaluate.main([f"run={place / 'run'}"]) == 0


def test_other_weights_begin_with_other_text_and_nothing_is_said(place, tmp_path):
    notes = train(1, *keys(place, "other", tmp_path / "new", f"run.start_from={place / 'run'}"))
    assert refusal(notes) is None and not any("was trained on" in note for note in notes)


def test_another_order_of_samples_is_said_where_samples_were_consumed():
    now = DataIdentity("ab", "shards ab", 3)
    (line,) = check_counted_in("run", {**now.described(), "order": 2}, now, samples=8, allowed=False)
    assert "order 2" in line and "order 3" in line and "some sequences are read again" in line
    assert check_counted_in("run", {**now.described(), "order": 2}, now, samples=0, allowed=False) == []
    (line,) = check_counted_in("run", None, now, samples=8, allowed=False)
    assert "saved by an earlier version, which ordered samples otherwise" in line
    assert check_counted_in("run", None, None, samples=8, allowed=False) == [], "made from a seed"


def test_recipes_that_runs_have_stored_are_still_read():
    from dsv3_megatron.data.settings import DataSettings

    assert DataSettings(allow_other_tokenizer=True).allow_other
    assert not DataSettings(allow_other_tokenizer=False).allow_other
