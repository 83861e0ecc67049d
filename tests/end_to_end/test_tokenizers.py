"""A run, a checkpoint and an import belong to a tokenizer: another one is refused by name, and an export keeps it."""

import json
import shutil

import pytest
from tokenizers import AddedToken

from dsv3_megatron.checkpoint.manifest import newest_valid, read_content
from dsv3_megatron.data.prepare.shard import PrepareOptions, prepare
from dsv3_megatron.data.source import shards as shard_files
from dsv3_megatron.data.source.build import build
from dsv3_megatron.data.source.shard_table import open_table
from dsv3_megatron.data.source.shards import ShardWriter, open_shard, read_manifest
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.inference.trained_model import trained_model
from launcher import evaluate, export_hf, generate, import_hf, prepare_data
from launcher.command_line.compose import compose, load_resolved
from parallel.errors import CheckpointError, DataError
from testing.training.whole_runs import refusal, train

ROWS = [f"def function_{n}(value):\n    return value + {n}  # naïve ✓\n" * 3 for n in range(40)]
TEXT = "def function(x):\n    return 12345  # naïve ✓ <|user|> [EOS]"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Rows, and two models' tokenizers in folders as they are published: names of their own, a token that is text."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    for name, size in (("one", 300), ("other", 310)):
        tokenizer = Tokenizer.train(ROWS, size)
        engine = tokenizer._engine
        engine.add_special_tokens(["[BOS]", "[EOS]", "[PAD]"])
        engine.add_tokens([AddedToken("<|user|>", special=False)])
        (folder / name).mkdir()
        engine.save(str(folder / name / "tokenizer.json"))
        names = {
            "bos_token": "[BOS]",
            "eos_token": {"content": "[EOS]"},
            "pad_token": "[PAD]",
            "chat_template": "{{x}}",
        }
        (folder / name / "tokenizer_config.json").write_text(json.dumps(names))
        prepared(folder, name, folder / f"shards_{name}")
    return folder


def prepared(folder, name, output):
    options = PrepareOptions((str(folder / "rows.jsonl"),), None, str(output), str(folder / name), held_out=0.2)
    return prepare(options, workers=1)


def keys(place, shards, directory, *more):
    return (
        "data=indexed", f"data.path={shards}", f"data.cache={place}/cache", "model.vocab_size=320", "run.steps=1",
        "data.sequence_length=64", f"run.directory={directory}", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(place):
    assert refusal(train(1, *keys(place, place / "shards_one", place / "run"))) is None
    return place / "run"


@pytest.fixture(scope="module")
def exported(place, run):
    assert export_hf.main([f"run={run}", f"output={place / 'exported'}", "dtype=fp32", "processes=1"]) == 0
    return place / "exported"


def test_shards_a_run_and_its_checkpoint_keep_the_names_of_the_model(place, run):
    published = Tokenizer.load(place / "one")
    assert published.names.end == "[EOS]"
    for folder in (place / "shards_one", run):
        kept = Tokenizer.load(folder)
        assert kept.names == published.names and kept.sha256 == published.sha256
    manifest = read_manifest(place / "shards_one")
    shard = open_table(place / "shards_one", manifest).row(0)
    data = open_shard(place / "shards_one", shard)
    assert all(data.get(number)[-1] == published.end for number in range(shard.documents))
    content = read_content(newest_valid(run / "checkpoints")[0])
    assert content["tokenizer"] == {"sha256": published.sha256, "name": published.name}


def test_an_export_has_the_ids_and_names_of_the_model_in_transformers(place, run, exported):
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.load(place / "one"), AutoTokenizer.from_pretrained(exported)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("[BOS]", "[EOS]", "[PAD]")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.begin, ours.end, ours.pad)
    text = TEXT.removesuffix(" [EOS]")  # which transformers takes for the token, unless it is told not to
    assert theirs(text)["input_ids"] == ours.encode(text).tolist()
    assert theirs(TEXT, split_special_tokens=True)["input_ids"] == ours.encode(TEXT).tolist()
    assert theirs.chat_template == "{{x}}"
    for name in ("config.json", "generation_config.json"):
        content = json.loads((exported / name).read_text())
        assert (content["bos_token_id"], content["eos_token_id"]) == (ours.begin, ours.end)


def test_other_shards_at_the_same_place_do_not_resume_a_run(place, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(place / "shards_other", tmp_path / "shards")
    names = [Tokenizer.load(place / name).name for name in ("one", "other")]
    again = keys(place, tmp_path / "shards", tmp_path / "run", "run.steps=2")
    said = refusal(train(1, *again))
    assert f"was trained with tokenizer {names[0]}, not {names[1]}; " in said and "\n" not in said
    notes = train(1, *again, "data.allow_other=true")
    assert refusal(notes) is None and any("data.allow_other = true" in note for note in notes)
    assert Tokenizer.load(tmp_path / "run").name == names[1], "the run goes on with the other one"
    assert refusal(train(1, *again, "run.steps=3")) is None, "and need not be told again"


def test_weights_of_another_tokenizer_do_not_begin_a_run(place, run, tmp_path):
    new = keys(place, place / "shards_other", tmp_path / "new", f"run.start_from={run}")
    said = refusal(train(1, *new))
    assert f"run.start_from = {run} was trained with tokenizer" in said and "data.allow_other=true" in said
    assert refusal(train(1, *new, "data.allow_other=true")) is None
    same = keys(place, place / "shards_one", tmp_path / "same", f"run.start_from={run}")
    assert refusal(train(1, *same)) is None


def imported(folder, output, *more):
    return import_hf.main([f"input={folder}", f"output={output}", "processes=1", *more])


def test_an_export_names_what_it_was_trained_with_and_an_import_takes_no_other_tokenizer(
    place, run, exported, tmp_path, capsys
):
    content = read_content(newest_valid(run / "checkpoints")[0])
    metadata = json.loads((exported / "model.safetensors.index.json").read_text())["metadata"]
    assert metadata["trained_with"] == {"tokenizer": content["tokenizer"], "data": content["data"]}
    shutil.copytree(exported, tmp_path / "changed")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(place / "other" / file, tmp_path / "changed" / file)
    names = [Tokenizer.load(place / name).name for name in ("one", "other")]
    with pytest.raises(CheckpointError) as refused:
        imported(tmp_path / "changed", tmp_path / "refused")
    assert f"its weights were trained with tokenizer {names[0]}, not {names[1]}; " in str(refused.value)
    assert imported(tmp_path / "changed", tmp_path / "wanted", "allow_other=true") == 0
    assert "allow_other = true" in capsys.readouterr().out
    assert imported(exported, tmp_path / "run") == 0
    stored = read_content(newest_valid(tmp_path / "run" / "checkpoints")[0])
    assert stored["trained_on"] == content["data"] and stored["tokenizer"] == content["tokenizer"]


def test_an_import_knows_its_tokenizer(place, run, exported, tmp_path, capsys):
    assert imported(exported, tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "end with [EOS] (tokenizer_config.json)" in said and "rows have no token" in said
    model = load_resolved(run / "recipe.yaml").model.vocab_size
    assert f"of the model's {model} rows" in said
    kept = Tokenizer.load(tmp_path / "run")
    assert kept.names == Tokenizer.load(place / "one").names and kept.names.chat_template == "{{x}}"
    capsys.readouterr()
    assert evaluate.main([f"run={tmp_path / 'run'}", f"data={place / 'shards_one'}"]) == 0
    assert generate.main([f"run={tmp_path / 'run'}", "prompt=def", "tokens=3"]) == 0, "which needs no data"
    with pytest.raises(DataError, match="data.path = null"):  # where it was trained is no place of this machine's
        evaluate.main([f"run={tmp_path / 'run'}"])
    with pytest.raises(DataError, match="gone"):
        evaluate.main([f"run={tmp_path / 'run'}", f"data={tmp_path / 'gone'}"])


def test_an_import_with_another_models_tokenizer_is_not_evaluated_on_the_data(place, exported, tmp_path):
    wrong = shutil.copytree(exported, tmp_path / "wrong")
    shutil.copyfile(place / "other" / "tokenizer.json", wrong / "tokenizer.json")
    assert imported(wrong, tmp_path / "run", "allow_other=true") == 0
    with pytest.raises(CheckpointError, match="was trained with tokenizer .*, not ") as error:
        evaluate.main([f"run={tmp_path / 'run'}", f"data={place / 'shards_one'}"])
    assert "\n" not in str(error.value)
    text = (tmp_path / "run" / "tokenizer.json").read_text()
    (tmp_path / "run" / "tokenizer.json").write_text((place / "one" / "tokenizer.json").read_text())
    for command in (generate.main, export_hf.main):
        words = ["prompt=def"] if command is generate.main else [f"output={tmp_path / 'out'}"]
        with pytest.raises(CheckpointError, match="was trained with tokenizer"):
            command([f"run={tmp_path / 'run'}", *words])
    (tmp_path / "run" / "tokenizer.json").write_text(text)
    assert export_hf.main([f"run={tmp_path / 'run'}", f"output={tmp_path / 'out'}", "dtype=bf16", "processes=1"]) == 0
    assert Tokenizer.load(tmp_path / "out").sha256 == Tokenizer.load(tmp_path / "run").sha256


def large(place, folder):
    content = json.loads((place / "one" / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 70_000
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content | {"added_tokens": content["added_tokens"][:-4]}))
    return folder


def test_ids_outside_the_model_are_refused_at_every_door(place, run, exported, tmp_path):
    folder = large(place, tmp_path / "large")
    both = shutil.copytree(exported, tmp_path / "both")
    shutil.copyfile(place / "rows.jsonl", tmp_path / "rows.jsonl")
    (both / "tokenizer_config.json").unlink()
    shutil.copyfile(folder / "tokenizer.json", both / "tokenizer.json")
    with pytest.raises(DataError, match="vocab_size = 320, but tokenizer.json has ids up to 70000"):
        imported(both, tmp_path / "imported")
    with pytest.raises(DataError, match="vocab_size = 320, but tokenizer.json has ids up to 70000"):
        prepared(tmp_path, "both", tmp_path / "never")
    assert not newest_valid(tmp_path / "imported" / "checkpoints")[0]
    kept = shutil.copytree(run, tmp_path / "run")
    shutil.copyfile(folder / "tokenizer.json", kept / "tokenizer.json")
    (kept / "tokenizer_config.json").unlink()
    recipe = load_resolved(kept / "recipe.yaml")
    wrong = pytest.raises(DataError, match=r"model.vocab_size = 320, but the tokenizer of .* has ids up to 70000")
    with wrong, trained_model(recipe, kept):
        raise AssertionError("not reached")


def test_large_ids_are_written_as_they_are_and_old_narrow_shards_are_refused(place, tmp_path):
    large(place, tmp_path / "large")
    shutil.copyfile(place / "rows.jsonl", tmp_path / "rows.jsonl")
    manifest = prepared(tmp_path, "large", tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "large")
    assert manifest.vocab_size == tokenizer.vocab_size == 70_001
    table = open_table(tmp_path / "out", manifest)
    (shard,) = map(table.row, table.range_of(0, "train"))
    stored = open_shard(tmp_path / "out", shard)
    text = {tokenizer.decode(stored.get(number)) for number in range(shard.documents)}
    assert text <= set(ROWS) and len(text) > 20
    data = compose(keys(place, tmp_path / "out", tmp_path / "run")).data
    with pytest.raises(DataError, match="has ids up to 70000; set model.vocab_size=70016"):
        build(data, vocab_size=320, seed=1)
    narrow = shutil.copytree(place / "shards_one", tmp_path / "narrow")
    (narrow / "tokenizer_config.json").unlink()
    shutil.copyfile(tmp_path / "out" / "tokenizer.json", narrow / "tokenizer.json")
    manifest = json.loads((narrow / shard_files.MANIFEST).read_text())
    ids, manifest["tokenizer_sha256"] = manifest["vocab_size"], tokenizer.sha256
    (narrow / shard_files.MANIFEST).write_text(json.dumps(manifest))
    data = compose(keys(place, narrow, tmp_path / "run")).data
    with pytest.raises(DataError, match=f"was prepared for {ids} ids, and its tokenizer has ids up to 70000"):
        build(data, vocab_size=70_016, seed=1)


def test_an_id_that_a_shard_cannot_hold_is_never_wrapped(tmp_path):
    import numpy as np

    writer = ShardWriter(tmp_path, "a/train_00000", 300)
    with pytest.raises(DataError, match="token 300 is none of the tokenizer's 300 ids"):
        writer.add([np.asarray([1, 300])])


def test_the_command_says_what_it_switched_off_and_how_documents_end(place, tmp_path, capsys):
    folder = shutil.copytree(place / "one", tmp_path / "one")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    words = [f"input={place / 'rows.jsonl'}", f"output={tmp_path / 'out'}", f"tokenizer={folder}", "workers=1"]
    assert prepare_data.main([*words, "held_out=0.2"]) == 0
    said = capsys.readouterr().err
    assert "truncation to 16 tokens is switched off" in said and "end with [EOS] (tokenizer_config.json)" in said
    assert read_manifest(tmp_path / "out").table_sha256 == read_manifest(place / "shards_one").table_sha256
