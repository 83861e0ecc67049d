"""Raw documents of every kind to shards: content, order, damage, kills."""

import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.data.checked.whole import verify_checksums
from dsv3_megatron.data.prepare.shard import PrepareOptions, prepare
from dsv3_megatron.data.raw.documents import Lost, Span, SpanReader
from dsv3_megatron.data.raw.inputs import files_of
from dsv3_megatron.data.source.shard_table import check_files, open_table
from dsv3_megatron.data.source.shards import open_shard, read_manifest
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.data.tokenizer_files.names import BEGIN, END, FIM_HOLE
from parallel.errors import DataError
from testing.lanes import examples

ROOT = Path(__file__).resolve().parents[4]
WORDS = [
    "the",
    "quick",
    "brown",
    "fox,",
    "jumps;\n",
    "over",
    "def",
    "f(x):\n",
    "",
    "",
    "",
    "return",
    "{x:",
    "'y'}\n\n1234",
    "wörld",
]


def document(number, words=40):
    chance = random.Random(number)
    return " ".join(chance.choice(WORDS) for _ in range(chance.randrange(1, words))) + f" #{number}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    Tokenizer.train([document(n) for n in range(300)], 420).save(path)
    return path


def write_rows(path, rows):
    data = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":  # two frames in a row, as pzstd writes them
        half = data.rfind(b"\n", 0, len(data) // 2) + 1
        data = b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:]))
    path.write_bytes(data)


def options(inputs, output, tokenizer, **more):
    base = {"weights": None, "held_out": 0.1, "split_share": 0.0}
    return PrepareOptions(
        inputs=tuple(map(str, inputs)), output=str(output), tokenizer=str(tokenizer), **{**base, **more}
    )


def documents_in(folder, tokenizer, split=None):
    """Return the texts of a folder's shards in order, and check each ends with the end token."""
    engine, found = Tokenizer.load(tokenizer), []
    for shard in open_table(folder, read_manifest(folder)):
        if split in (None, shard.split):
            data = open_shard(folder, shard)
            for number in range(len(data)):
                ids = data.get(number)
                assert ids[-1] == engine.end and (ids[:-1] != engine.end).all()
                found.append(engine.decode(ids))
    return found


def test_every_kind_of_input_gives_its_documents(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    rows = [document(n) for n in range(120)]
    write_rows(tmp_path / "plain.jsonl", rows[:30])
    write_rows(tmp_path / "packed.jsonl.gz", rows[30:60])
    write_rows(tmp_path / "packed.jsonl.zst", rows[60:90])
    pyarrow.parquet.write_table(pyarrow.table({"text": rows[90:110]}), tmp_path / "table.parquet", row_group_size=7)
    folder = tmp_path / "code"
    (folder / "deep").mkdir(parents=True)
    for number, row in enumerate(rows[110:118]):
        (folder / ("deep" if number % 2 else ".") / f"{number}.py").write_text(row)
    (folder / "note.txt").write_text(rows[118])
    (folder / "page.md.gz").write_bytes(gzip.compress(rows[119].encode()))
    (folder / "image.png").write_bytes(b"\x89PNG")
    inputs = [tmp_path / "plain.jsonl", tmp_path / "packed.jsonl.gz", tmp_path / "packed.jsonl.zst"]
    inputs += [tmp_path / "table.parquet", folder]
    manifest = prepare(options(inputs, tmp_path / "out", tokenizer), workers=2)
    assert sorted(documents_in(tmp_path / "out", tokenizer)) == sorted(rows)
    assert [s.documents for s in manifest.sources] == [30, 30, 30, 20, 10]
    assert manifest.sources[-1].ignored_files == 1
    out = documents_in(tmp_path / "out", tokenizer, "held_out")
    assert 0 < len(out) < 40 and not set(out) & set(documents_in(tmp_path / "out", tokenizer, "train"))
    verify_checksums(tmp_path / "out", manifest)
    shard = open_table(tmp_path / "out", manifest).row(0)
    path = tmp_path / "out" / f"{shard.name}.bin"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="sha256"):
        verify_checksums(tmp_path / "out", manifest)


def test_workers_do_not_change_the_shards(tmp_path, tokenizer):
    write_rows(tmp_path / "rows.jsonl", [document(n) for n in range(400)])
    common = {"split_share": 0.3, "shard_tokens": 2000}  # pieces of 8 KB
    for name, workers in (("one", 1), ("three", 3)):
        prepare(options([tmp_path / "rows.jsonl"], tmp_path / name, tokenizer, **common), workers=workers)
    one, three = (read_manifest(tmp_path / name) for name in ("one", "three"))
    assert one.sources == three.sources and one.table_sha256 == three.table_sha256
    assert one.sources[0].shards["train"].shards > 3


def test_duplicates_are_dropped_and_copies_never_straddle_the_split(tmp_path, tokenizer):
    rows = [document(n % 25) for n in range(100)]
    write_rows(tmp_path / "rows.jsonl", rows)
    kept = prepare(options([tmp_path / "rows.jsonl"], tmp_path / "all", tokenizer, held_out=0.3), workers=1)
    assert kept.sources[0].documents == 100
    split = {name: set(documents_in(tmp_path / "all", tokenizer, name)) for name in ("train", "held_out")}
    assert split["train"] and split["held_out"] and not split["train"] & split["held_out"]
    once = prepare(options([tmp_path / "rows.jsonl"], tmp_path / "once", tokenizer, deduplicate=True), workers=2)
    assert once.sources[0].documents == 25 and once.sources[0].duplicates == 75
    assert sorted(documents_in(tmp_path / "once", tokenizer)) == sorted(set(rows))


def bad_of(path, field="text"):
    rows = [row for file in files_of(path).files for row in SpanReader(Span(file), field)]
    bad = [str(row).removeprefix(f"{path}") for row in rows if isinstance(row, Lost)]
    return [row.text for row in rows if not isinstance(row, Lost)], bad


def test_damage_is_told_by_file_and_line_and_the_rest_is_kept(tmp_path):
    good = json.dumps({"text": "good"}).encode()
    lines = [
        good,
        b"{nonsense",
        b'{"txt": "x"}',
        b'{"text": 3}',
        b'{"text": "\xff"}',
        b"",
        b"[1]",
        b'{"text": "\\ud800"}',
        good,
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    found, bad = bad_of(path)
    assert found == ["good", "good"]
    assert [line.split(":")[1] for line in bad] == ["2", "3", "4", "5", "7", "8"]
    assert "no field 'text'; it has 'txt'" in bad[1] and "not UTF-8" in bad[3]


@pytest.mark.parametrize("pack", ["gz", "zst"])
def test_a_truncated_file_keeps_its_whole_lines_and_is_counted(tmp_path, pack):
    rows = [document(n) for n in range(400)]
    path = tmp_path / f"rows.jsonl.{pack}"
    write_rows(path, rows)
    path.write_bytes(path.read_bytes()[:-200])
    found, bad = bad_of(path)
    assert found == rows[: len(found)] and 100 < len(found) < 400
    assert bad[0].startswith(f":{len(found) + 1}: cut short: its last compressed stream has no end") and len(bad) == 1


@settings(deadline=None, max_examples=examples(60))
@given(st.binary(max_size=300), st.sampled_from(["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "t.parquet", "a.py"]))
def test_any_bytes_are_read_or_reported_but_never_crash(tmp_path_factory, data, name):
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(data)
    found, bad = bad_of(path)
    assert found or bad or re.fullmatch(r"[\s\0\ufeff,\[\]]*", data.decode("utf-8", "replace"))


def test_too_many_bad_documents_stop_the_run(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n' + "no\n" * 30)
    with pytest.raises(DataError, match=r"max_bad = 5 .*rows.jsonl:2: is not JSON"):
        prepare(options([tmp_path / "rows.jsonl"], tmp_path / "out", tokenizer, max_bad=5), workers=1)
    with pytest.raises(DataError, match="is not finished"):
        read_manifest(tmp_path / "out")


def test_a_limit_that_was_passed_stays_passed_when_the_command_is_run_again(tmp_path, tokenizer):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x"}\n' + "no\n" * 4)
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for _ in range(3):  # each task alone is within it
        with pytest.raises(DataError, match=r"more than max_bad = 5 documents could not be read"):
            prepare(options(inputs, tmp_path / "out", tokenizer, max_bad=5), workers=1)
    made = prepare(options(inputs, tmp_path / "out", tokenizer, max_bad=8), workers=1)
    assert [source.bad for source in made.sources] == [4, 4]


def test_an_output_of_other_options_is_refused_and_a_finished_one_is_left(tmp_path, tokenizer):
    write_rows(tmp_path / "rows.jsonl", [document(n) for n in range(20)])
    first = prepare(options([tmp_path / "rows.jsonl"], tmp_path / "out", tokenizer), workers=1)
    stamp = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert prepare(options([tmp_path / "rows.jsonl"], tmp_path / "out", tokenizer), workers=1) == first
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match="other inputs, options or another tokenizer"):
        prepare(options([tmp_path / "rows.jsonl"], tmp_path / "out", tokenizer, held_out=0.2), workers=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="not empty"):
        prepare(options([tmp_path / "rows.jsonl"], tmp_path / "mine", tokenizer), workers=1)
    table = open_table(tmp_path / "out", first)
    shard = table.row(0)
    (tmp_path / "out" / f"{shard.name}.bin").write_bytes(b"short")
    with pytest.raises(DataError, match="has 5 bytes"):
        check_files(tmp_path / "out", table)


@pytest.mark.slow
@pytest.mark.parametrize(("least", "most"), [(1, 1), pytest.param(2, 3, marks=pytest.mark.full)])
def test_a_run_killed_at_random_moments_writes_what_an_undisturbed_one_does(tmp_path, tokenizer, least, most):
    write_rows(tmp_path / "a.jsonl.zst", [document(n % 2000, 400) for n in range(3000)])
    write_rows(tmp_path / "b.jsonl", [document(n, 400) for n in range(5000, 6500)])
    common = [f"input={tmp_path}/a.jsonl.zst,{tmp_path}/b.jsonl", f"tokenizer={tokenizer}", "held_out=0.1"]
    common += ["shard_tokens=100K", "deduplicate=true", "workers=2"]

    def start(output):
        return subprocess.Popen(
            [sys.executable, "launcher/prepare_data.py", *common, f"output={tmp_path / output}"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    assert start("whole").wait(timeout=120) == 0
    chance, kills = random.Random(4), 0

    def committed():
        return len(list((tmp_path / "killed").glob("*/*.idx")))

    for _ in range(40):
        before, process = committed(), start("killed")
        deadline = time.monotonic() + 60
        # Wait for work to be under way, then kill at any moment of it; in the end let it finish.
        while kills < most and process.poll() is None and time.monotonic() < deadline:
            if committed() > before:
                time.sleep(chance.uniform(0, 0.2))
                if process.poll() is None:
                    kills += 1
                    os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.01)
        if process.wait(timeout=120) == 0:
            if kills >= least:
                break
            shutil.rmtree(tmp_path / "killed")  # a busy machine let it finish before it was killed: once more
    assert kills >= least
    whole, killed = (read_manifest(tmp_path / name) for name in ("whole", "killed"))
    assert killed.sources == whole.sources
    assert killed.table_sha256 == whole.table_sha256, "the same shards to the byte: the table holds their checksums"
    verify_checksums(tmp_path / "killed", killed)


@settings(deadline=None, max_examples=examples(200))
@given(st.binary(max_size=200))
def test_arbitrary_bytes_survive_a_round_trip(tokenizer, data):
    engine = Tokenizer.load(tokenizer)
    assert engine.decode_bytes(engine.encode_bytes(data)) == data


def test_text_that_spells_a_special_token_is_text(tokenizer):
    engine = Tokenizer.load(tokenizer)
    text = f"a {END} b {BEGIN}{FIM_HOLE}"
    ids = engine.encode(text)
    assert engine.decode(ids) == text and not {engine.begin, engine.end, engine.fim_hole} & set(ids.tolist())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_joined_tokens_is_split_and_the_text_stays(share):
    engine = Tokenizer.train(["f(x);\ng(y);\n" * 50], 330)
    text = "h(z);\n" * 400
    ids = engine.encode(text)
    joined = sum(engine.decode([i]).endswith(";\n") for i in ids)
    assert joined == 400
    split = engine.split_joined(ids, share, 0)
    assert engine.decode(split) == text
    left = sum(engine.decode([i]).endswith(";\n") for i in split)
    assert abs(1 - left / joined - share) < 0.08


def test_a_published_tokenizer_loads_and_round_trips(tmp_path):
    """Llama-style byte-level BPE with added tokens that are no special ones, as DeepSeek's file has."""
    from tokenizers import AddedToken

    engine = Tokenizer.train([document(n) for n in range(50)], 400)
    engine._engine.add_tokens([AddedToken("<|User|>", special=False, normalized=False)])
    engine.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    text = "x <|User|> y\n"
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.token_bytes()[loaded.encode(text)].sum() == len(text.encode())
    assert loaded.decode_bytes(loaded.encode(text)) == text.encode()
