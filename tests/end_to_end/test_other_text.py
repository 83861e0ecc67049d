"""A run's sample numbers count in its text: the same shards anywhere resume it, others at their place are refused."""

import json
import shutil

import pytest

from dsv3_megatron.checkpoint.manifest import newest_valid, read_content
from dsv3_megatron.data.identity import DataIdentity, check_counted_in
from dsv3_megatron.data.prepare.shard import PrepareOptions, prepare
from dsv3_megatron.data.source.samples import ORDER
from dsv3_megatron.data.tokenizer import Tokenizer
from launcher import data, evaluate
from parallel.errors import CheckpointError, DataError, RecipeError
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


def test_shards_exchanged_at_their_place_are_seen_in_tracing(place, tmp_path, capsys):
    """The documents of others would be named as those that the step has read."""
    run = f"run={place / 'run'}"
    assert data.main(["trace", run, "step=1"]) == 0
    read = capsys.readouterr().out
    shutil.rmtree(place / "shards")
    shutil.copytree(place / "other", place / "shards")
    try:
        for where in ("step=1", "sequence=0", "tokens=0", "sequence=100"):
            with pytest.raises(
                DataError, match=r"step reads shards .*, not shards .*name the folder: data.path=FOLDER"
            ):
                data.main(["trace", run, where])
        assert data.main(["trace", run, "step=1", f"data.path={place / 'one'}"]) == 0
        assert capsys.readouterr().out == read
        with pytest.raises(RecipeError, match="data.fim_rate=0.1 has no effect beside run="):
            data.main(["trace", run, "step=1", "data.fim_rate=0.1"])
    finally:
        shutil.rmtree(place / "shards")
        shutil.copytree(place / "one", place / "shards")


def test_each_start_of_a_run_is_traced_in_its_own_text(place, tmp_path):
    assert refusal(again(place, tmp_path, "other", "data.allow_other=true")) is None
    run = f"run={tmp_path / 'run'}"
    for step, right, wrong in ((1, "one", "other"), (2, "other", "one")):
        assert data.main(["trace", run, f"step={step}"]) == 0
        assert data.main(["trace", run, f"step={step}", f"data.path={place / right}"]) == 0
        with pytest.raises(DataError, match="this step reads shards"):
            data.main(["trace", run, f"step={step}", f"data.path={place / wrong}"])


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
