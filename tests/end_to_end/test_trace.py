"""dsv3 data trace names the very documents that a run was fed, and data.exclude takes them out of it."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv3_megatron.data.prepare.shard import PrepareOptions, prepare
from dsv3_megatron.data.source.build import build
from dsv3_megatron.data.source.fim import Middle, restored
from dsv3_megatron.data.source.origins import document_origin
from dsv3_megatron.data.source.shard_folder import ShardFolder
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.tracing.documents import Tracer
from dsv3_megatron.train.data import batches as reading
from launcher.command_line.compose import compose
from launcher.data import main
from parallel.errors import DataError, RecipeError
from testing.ranks import run_ranks
from testing.training.tiny import SMALL
from testing.training.whole_runs import refusal, run_here, steps

LENGTH = 32
WORDS = ["alpha", "beta(", "gamma\n", "delta;", "42"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three sources: JSON lines, a folder of two files of them, and plain files, each a document."""
    folder, random = tmp_path_factory.mktemp("traced"), np.random.default_rng(0)

    def text(name):
        return " ".join(random.choice(WORDS, random.integers(1, 12))) + f" {name}"

    def rows(name, count):
        return "".join(json.dumps({"text": text(f"{name}{n}")}) + "\n" for n in range(count))

    (folder / "a.jsonl").write_text(rows("a", 120))
    for part in ("x", "y"):
        (folder / "b").mkdir(exist_ok=True)
        (folder / "b" / f"{part}.jsonl").write_text(rows(part, 60))
    (folder / "c").mkdir()
    for number in range(40):
        (folder / "c" / f"{number}.py").write_text(text(f"c{number}"))
    Tokenizer.train([" ".join(WORDS)] * 9, 300).save(folder / "tokenizer.json")
    inputs = tuple(str(folder / name) for name in ("a.jsonl", "b", "c"))
    options = PrepareOptions(
        inputs,
        None,
        str(folder / "out"),
        str(folder / "tokenizer.json"),
        held_out=0.1,
        shard_tokens=900,
        split_share=0.0,
    )
    prepare(options, workers=1)
    return folder


MIXTURE = "data.mixture=[{until: 1K, at: {00_a: 2, 01_b: 1}}, {until: 3K, shape: linear, to: {01_b: 1, 02_c: 2}}]"


def keys(shards, directory, *more):
    return [
        "data=indexed", f"data.path={shards}/out", "model.vocab_size=320", f"data.sequence_length={LENGTH}", MIXTURE,
        f"data.cache={shards}/cache", f"run.directory={directory}", "optim.micro_batch=1", "checkpoint.keep=9", *more,
    ]  # fmt: skip


def run_and_record(case):
    """Train on this rank; return what it says, and step, labels and weights [samples, S] of all that it was given."""
    overrides, places = case
    fed, original = [], reading.BatchReader.take

    def take(self, progress):
        read = original(self, progress)
        rows = [torch.cat([batch[key] for batch in read.microbatches]).numpy() for key in ("labels", "loss_mask")]
        fed.append((progress.step + 1, *rows))
        return read

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reading.BatchReader, "take", take)
        notes = run_here([*overrides, *places])
    return notes, fed


def train(world, overrides, *more):
    """Return what each step was given, by its number, the samples of all ranks in order: step -> (labels, weights)."""
    found = run_ranks(world, run_and_record, [(overrides, more)])[0]
    assert refusal(found[0][0]) is None
    whole = {}
    for parts in zip(*(fed for _, fed in found)):
        labels, weights = (np.concatenate([part[n] for part in parts]) for n in (1, 2))
        whole[parts[0][0]] = (labels, weights)
    return whole


def trace(*words):
    """Return the lines that the command prints, and its notes."""
    out, notes = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(notes):
        assert main(["trace", *map(str, words)]) == 0
    return [json.loads(line) for line in out.getvalue().splitlines()], notes.getvalue()


def document(shards, line, tokenizer):
    """Return the tokens of the document that a line names, encoded from the raw file."""
    path = shards / {"00_a": ".", "01_b": "b", "02_c": "c"}[line["source"]] / Path(line["file"]).name
    text = path.read_text()
    if line["row"]:
        text = json.loads(text.splitlines()[line["row"] - 1])["text"]
    else:
        assert path.suffix == ".py"
    return np.append(tokenizer.encode(text), tokenizer.end)


def assert_is_what_was_fed(shards, lines, fed, first_sample=None):
    """Compare every token and weight of a step with the documents that the lines name."""
    tokenizer = Tokenizer.load(shards / "out" / "tokenizer.json")
    marks = Middle(tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end)
    labels, weights = fed
    samples = list(dict.fromkeys(line["sample"] for line in lines))
    assert len(samples) == len(labels)
    seen = {"whole": 0, "rearranged": 0, "excluded": 0}
    for sample, row, weight in zip(samples, labels, weights):
        here = [line for line in lines if line["sample"] == sample]
        expected = np.zeros(LENGTH)
        at = 0
        for line in here:
            assert line["at"] == at
            at += line["length"]
            stretch = row[line["at"] : at]
            if line["excluded"]:
                seen["excluded"] += 1
                assert (stretch == tokenizer.pad).all()
                continue
            expected[line["at"] : at] = 1
            tokens = document(shards, line, tokenizer)
            if not line["rearranged"]:
                seen["whole"] += 1
                np.testing.assert_array_equal(stretch, tokens[line["offset"] : line["offset"] + line["length"]])
            elif line["length"] == len(tokens) + 3:
                seen["rearranged"] += 1
                np.testing.assert_array_equal(restored(stretch, marks), tokens)
            else:  # a piece of a rearranged document: all but the marks is the document's
                own = stretch[~np.isin(stretch, (marks.begin, marks.hole, marks.end))]
                assert not set(own.tolist()) - set(tokens.tolist())
        np.testing.assert_array_equal(weight, expected)
    return seen


RAMP = "optim.global_batch=[{until: 600, at: 4}, {until: 1200, at: 8}, {until: 90000, at: 12}]"


def test_a_step_is_traced_to_what_it_was_fed_over_ramp_mixture_fim_skips_and_resumes(shards, tmp_path):
    run, leave_out = tmp_path / "run", tmp_path / "leave_out.jsonl"
    words = keys(
        shards, run, RAMP, "optim.batch_multiple=4", "data.fim_rate=0.4", "run.steps=9", "checkpoint.every_steps=3",
    )  # fmt: skip
    fed = train(2, words, "run.steps=4")
    lines, notes = trace(f"run={run}", "step=2")
    assert not notes and {line["step"] for line in lines} == {2}
    before = {step: trace(f"run={run}", f"step={step}")[0] for step in range(1, 5)}
    for step, found in before.items():
        assert_is_what_was_fed(shards, found, fed[step])
    # A resume that leaves out documents of a step to come, of which trace has told, and some samples.
    coming, _ = trace(*SMALL, *words, "step=6")
    numbers = sorted({line["sample"] for line in coming})
    chosen = [coming[0], coming[len(coming) // 2], coming[-1]]
    skipped = {"samples": [numbers[2], numbers[4]]}
    leave_out.write_text("".join(json.dumps(line) + "\n" for line in (*chosen, skipped)))
    fed |= train(1, words, "run.steps=7", f"data.exclude={leave_out}")
    leave_out.unlink()  # the run keeps what it has left out
    # Another resume, without the exclusion, and with another share of rearranged documents.
    fed |= train(1, words, "run.steps=9", "data.fim_rate=0.1")
    rows = steps(run)
    assert [row["global_batch"] for row in rows] == [4, 4, 4, 4, 4, 8, 8, 8, 12]
    seen = {step: assert_is_what_was_fed(shards, trace(f"run={run}", f"step={step}")[0], fed[step]) for step in fed}
    assert before == {step: trace(f"run={run}", f"step={step}")[0] for step in before}, "what is done stays as it was"
    assert all(seen[step]["excluded"] == 0 for step in (1, 2, 3, 4, 8, 9))
    assert sum(row["excluded_tokens"] or 0 for row in rows) > 0
    for row in rows:
        if row["step"] in (5, 6, 7):
            found = trace(f"run={run}", f"step={row['step']}")[0]
            assert row["excluded_tokens"] == sum(line["length"] for line in found if line["excluded"])
            assert not {line["sample"] for line in found} & set(range(*skipped["samples"]))
        else:
            assert row["excluded_tokens"] is None
    assert {line["source"] for step in fed for line in trace(f"run={run}", f"step={step}")[0]} == {
        "00_a",
        "01_b",
        "02_c",
    }
    assert sum(each["rearranged"] for each in seen.values()) > 10 < sum(each["whole"] for each in seen.values())


def test_after_a_roll_back_a_step_is_traced_to_what_it_was_fed_the_second_time(shards, tmp_path):
    words = keys(
        shards, tmp_path, "optim.global_batch=4", "run.steps=6", "checkpoint.every_steps=2", "health.skip_limit=2",
        "health.rollbacks=1",
    )  # fmt: skip
    found = run_ranks(1, run_with_bad_steps, [words])[0]
    (notes, fed) = found[0]
    assert refusal(notes) is None and any("went back to" in note for note in notes)
    rows = steps(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and rows[-1]["samples"] > 4 * 6
    last = {step: (labels, weights) for step, labels, weights in fed}  # of a step that was done again, the second time
    for step in range(1, 7):
        assert_is_what_was_fed(shards, trace(f"run={tmp_path}", f"step={step}")[0], last[step])
    skipped = sorted(set(range(rows[-1]["samples"])) - {s for r in rows for s in range(r["samples"] - 4, r["samples"])})
    lines, note = trace(f"run={tmp_path}", f"sequence={skipped[0]}")
    assert f"sample {skipped[0]} was stepped over" in note and {line["step"] for line in lines} == {None}


def run_with_bad_steps(words):
    """Train on this rank, with two steps in a row whose loss is no number."""
    from dsv3_megatron.train import trainer

    original, calls = trainer.train_step, []

    def train_step(parts, batches, values, may_update, *more):
        calls.append(1)
        bad = len(calls) in (3, 4)
        return original(
            parts, batches, values, lambda loss, norm: may_update(float("nan") if bad else loss, norm), *more
        )

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "train_step", train_step)
        return run_and_record((words, ()))


def test_places_are_named_by_step_tokens_or_sample(shards, tmp_path):
    words = keys(shards, tmp_path, "optim.global_batch=4", "run.steps=2", "data.isolate_documents=true")
    planned = {n: trace(*SMALL, *words, f"step={n}")[0] for n in (1, 2)}
    train(1, words)
    run = f"run={tmp_path}"
    assert {n: trace(run, f"step={n}")[0] for n in (1, 2)} == planned, "before the run it is known what it will read"
    by_tokens = [trace(run, f"tokens={tokens}")[0] for tokens in (0, 4 * LENGTH - 1, 4 * LENGTH)]
    assert by_tokens == [planned[1], planned[1], planned[2]]
    assert trace(run, "sequence=5")[0] == [line for line in planned[2] if line["sample"] == 5]
    lines, notes = trace(run, "sequence=8")
    assert lines and "no step has read sample 8 yet" in notes and lines[0]["step"] is None
    with_text = trace(run, "step=1", "text=true")[0]
    assert [{key: line[key] for key in line if key != "text"} for line in with_text] == planned[1]
    assert all(any(word.strip() in line["text"] for word in (*WORDS, line["source"][-1])) for line in with_text)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ("no place is named", "step=N")),
        (["step=1", "tokens=5"], ("step and tokens name several places",)),
        (["run=RUN", "step=3"], ("the run ends with step 2",)),
        (["run=RUN", "step=1", "run.seed=3"], ("run.seed=3 has no effect beside run=",)),
        (["step=0"], ("step = 0",)),
        (["sequence=99999999999999999999"], ("sequence = 99999999999999999999", "less than 281474976710656")),
        (["run=nowhere", "step=1"], ("nowhere/recipe.yaml does not exist",)),
        (
            ["data=indexed", "data.path=SHARDS", "data.mixture=[{until: 1K, at: {zz: 1}}]", "step=1"],
            ("data.mixture names zz, but the sources are: 00_a, 01_b, 02_c",),
        ),
        (
            ["data=indexed", "data.path=SHARDS", "data.weights={zz: 1}", "step=1"],
            ("data.weights names zz, but the sources are: 00_a, 01_b, 02_c",),
        ),
        (["recipe=dsv3_tiny", "step=1"], ("data.source = stdlib keeps no names",)),
    ],
)
def test_what_cannot_be_traced_is_one_line(shards, tmp_path_factory, words, parts):
    run = tmp_path_factory.getbasetemp() / "two_steps"
    if not run.exists():
        train(1, keys(shards, run, "optim.global_batch=4", "run.steps=2"))
    with pytest.raises((RecipeError, DataError)) as caught:
        main(["trace", *(word.replace("RUN", str(run)).replace("SHARDS", f"{shards}/out") for word in words)])
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_excluded_document_is_fed_nowhere_in_an_epoch_and_all_others_stay(shards, tmp_path):
    words = [*SMALL, *keys(shards, tmp_path, "data.mixture=null", "data.fim_rate=0.3", "data.isolate_documents=true")]
    plain = build(compose(words).data, vocab_size=320, seed=1)
    count = sum(source.count for source in plain.train.sources)
    tracer = Tracer(compose(words).data, vocab_size=320, seed=1)
    lines = [{"sample": n, **line} for n in range(count) for line in tracer.sample(n)]
    names = sorted({(line["source"], line["file"], line["row"]) for line in lines})
    chosen = set(names[::9])
    file = tmp_path / "leave_out.jsonl"
    file.write_text("".join(json.dumps(dict(zip(("source", "file", "row"), name))) + "\n" for name in sorted(chosen)))
    left = build(compose([*words, f"data.exclude={file}"]).data, vocab_size=320, seed=1)
    for number in range(count):
        before, after = plain.train.sample(number), left.train.sample(number)
        out = np.zeros(LENGTH, bool)
        for line in (line for line in lines if line["sample"] == number):
            if (line["source"], line["file"], line["row"]) in chosen:
                out[line["at"] : line["at"] + line["length"]] = True
        assert (after.weights[out] == 0).all() and len(set(after.tokens[out])) <= 1
        for mine, theirs in (
            (before.tokens, after.tokens),
            (before.labels, after.labels),
            (before.weights, after.weights),
        ):
            np.testing.assert_array_equal(mine[~out], theirs[~out])
        np.testing.assert_array_equal(before.documents, after.documents)
        assert left.train.excluded_tokens([number]) == out.sum()


def test_a_held_out_document_can_be_excluded_too(shards, tmp_path):
    words = [*SMALL, *keys(shards, tmp_path, "data.held_out_sequences=1000")]
    settings = compose(words).data
    folder = ShardFolder.of(settings)
    shard = folder.table.range_of(1, "held_out")[0]
    origin = document_origin(folder.path, folder.manifest, folder.table, shard, 0)
    file = tmp_path / "leave_out.jsonl"
    file.write_text(json.dumps({"source": origin.source, "file": origin.file, "row": origin.row}) + "\n")
    every, some = (build(compose(w).data, vocab_size=320, seed=1) for w in (words, [*words, f"data.exclude={file}"]))
    assert every.held_out.count == some.held_out.count
    numbers = range(every.held_out.count)
    lost = sum(every.held_out.sample(n).weights.sum() - some.held_out.sample(n).weights.sum() for n in numbers)
    tokenizer = Tokenizer.load(shards / "out" / "tokenizer.json")
    assert lost == len(document(shards, {"source": origin.source, "file": origin.file, "row": origin.row}, tokenizer))


def test_gradients_of_steps_with_excluded_documents_are_those_of_one_process(shards, tmp_path):
    file = tmp_path / "leave_out.jsonl"
    words = keys(shards, tmp_path / "one", "optim.global_batch=4", "run.steps=3", "optim.learning_rate=0.01")
    first = trace(*SMALL, *words, "step=1")[0]
    file.write_text("".join(json.dumps(line) + "\n" for line in first[: len(first) // 2]))  # of rank 0's share alone
    train(1, words, f"data.exclude={file}")
    train(2, words, f"data.exclude={file}", f"run.directory={tmp_path}/two")
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert one[0]["excluded_tokens"] > 0
    for a, b in zip(one, two, strict=True):
        assert a["excluded_tokens"] == b["excluded_tokens"]
        for key in ("lm_loss", "grad_norm", "mtp_loss"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), (a["step"], key)
