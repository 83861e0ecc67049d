"""Tokenizer, sources and the order of samples."""

import json
import multiprocessing
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from dsv3_megatron.data.settings import DataSettings
from dsv3_megatron.data.source import stdlib
from dsv3_megatron.data.source.build import build
from dsv3_megatron.data.source.samples import (
    Recall,
    Synthetic,
    TokenWindows,
    evaluation_batches,
    permuted,
    step_batches,
)
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.data.tokenizer_files.names import SPECIAL
from parallel.errors import DataError
from testing.lanes import examples

CORPUS = ["def f(x):\n    return x + 1\n\n", "héllo wörld 12345 67 世界!\r\n\tend", "print('a');\n\n\n"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CORPUS, 400)


@settings(deadline=None, max_examples=examples(200))
@given(st.text())
def test_any_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=examples(100))
@given(st.text())
def test_token_bytes_add_up_to_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_special_tokens_come_first_and_stand_for_no_text(tokenizer):
    assert (tokenizer.begin, tokenizer.end, tokenizer.pad) == (0, 1, 2)
    assert tokenizer.token_bytes()[: len(SPECIAL)].sum() == 0
    assert tokenizer.decode([0, *tokenizer.encode("x"), 1]) == "x"


def test_digits_go_in_threes_and_line_breaks_join_punctuation():
    many = Tokenizer.train(["x = 123456;\n" * 50], 500)
    pieces = [many.decode([i]) for i in many.encode("x = 123456;\n")]
    assert "123456" not in pieces and "123" in pieces and ";\n" in pieces


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(DataError, match="model.vocab_size = 100"):
        Tokenizer.train(CORPUS, 100)


def test_a_damaged_tokenizer_is_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.load(tmp_path / "tokenizer.json")


@settings(deadline=None)
@given(st.integers(1, 3000), st.text(max_size=5))
def test_a_permutation_visits_every_index_once(count, key):
    assert sorted(permuted(i, count, key) for i in range(count)) == list(range(count))


@settings(deadline=None, max_examples=examples(30))
@given(st.integers(20, 400), st.integers(2, 16), st.integers(0, 9))
def test_every_token_is_a_target_once_an_epoch(length, sequence, seed):
    windows = TokenWindows(np.arange(length), sequence, seed)
    targets = np.concatenate([windows.sample(i).labels for i in range(windows.count)])
    assert sorted(targets) == list(range(1, windows.count * sequence + 1))


def test_epochs_differ_and_repeat_with_the_seed():
    windows = TokenWindows(np.arange(1000), 8, seed=3)
    first = [int(windows.sample(i).tokens[0]) for i in range(windows.count)]
    second = [int(windows.sample(i + windows.count).tokens[0]) for i in range(windows.count)]
    again = TokenWindows(np.arange(1000), 8, seed=3)
    assert first != second and sorted(first) == sorted(second)
    assert [int(again.sample(i).tokens[0]) for i in range(windows.count)] == first
    assert first != [int(TokenWindows(np.arange(1000), 8, seed=4).sample(i).tokens[0]) for i in range(windows.count)]


def rows_of_step(source, first, dp, micro):
    """Return the samples of a step as all ranks see them, rank after rank."""
    batches = [
        step_batches(source, first=first, global_batch=16, micro_batch=micro, dp_rank=r, dp=dp) for r in range(dp)
    ]
    return torch.cat([b["tokens"] for rank in batches for b in rank])


@pytest.mark.parametrize(("dp", "micro"), [(1, 1), (1, 8), (2, 4), (4, 2), (16, 1)])
def test_the_samples_of_a_step_do_not_depend_on_ranks_or_microbatches(dp, micro):
    source = TokenWindows(np.arange(5000), 8, seed=1)
    for first in (0, 48):  # also where a run resumes
        expected = torch.tensor(np.stack([source.sample(first + i).tokens for i in range(16)]))
        assert torch.equal(rows_of_step(source, first, dp, micro), expected)


def test_labels_are_the_next_tokens():
    (batch,) = step_batches(Synthetic(100, 8, 0), first=0, global_batch=2, micro_batch=2, dp_rank=0, dp=1)
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert batch["loss_mask"].shape == batch["position_ids"].shape == (2, 8)


@pytest.mark.parametrize(("count", "dp", "micro"), [(64, 2, 2), (5, 2, 2), (7, 3, 4), (1, 4, 1)])
def test_evaluation_counts_every_held_out_sample_once(count, dp, micro):
    source = TokenWindows(np.arange(1000), 8, seed=0, shuffle=False)
    seen = []
    for rank in range(dp):
        for batch in evaluation_batches(source, count=count, micro_batch=micro, dp_rank=rank, dp=dp):
            assert batch["tokens"].shape[0] == micro
            seen += [int(row[0]) for row, mask in zip(batch["tokens"], batch["loss_mask"]) if mask[0]]
    assert sorted(seen) == [8 * i for i in range(count)]


def test_synthetic_samples_follow_their_rule_and_their_number():
    source = Synthetic(97, 16, seed=2)
    sample = source.sample(123).tokens
    steps = np.diff(sample) % 97
    assert (steps == steps[0]).all() and sample.shape == (16,)
    assert (sample == Synthetic(97, 16, seed=2).sample(123).tokens).all()
    assert any((source.sample(i).tokens != sample).any() for i in range(5))


def load_in_child(folder, queue):
    queue.put([int(x[:500].sum()) for x in stdlib.load(folder, 300, 0.05)[1:]])


def test_two_processes_prepare_the_library_at_once_and_agree(tmp_path, monkeypatch):
    context, files = multiprocessing.get_context("fork"), stdlib.source_files()
    monkeypatch.setattr(stdlib, "source_files", lambda: files[:60])
    queue = context.Queue()
    children = [context.Process(target=load_in_child, args=(tmp_path, queue)) for _ in range(2)]
    for child in children:
        child.start()
    first, second = queue.get(timeout=60), queue.get(timeout=60)
    for child in children:
        child.join()
    assert first == second
    assert len(list(tmp_path.iterdir())) == 1  # one complete cache, nothing half-written


def test_held_out_files_are_never_trained_on(tmp_path, monkeypatch):
    files = stdlib.source_files()[:60]
    monkeypatch.setattr(stdlib, "source_files", lambda: files)
    tokenizer, train, held_out = stdlib.load(tmp_path, 300, 0.2)
    texts = tokenizer.decode(train), tokenizer.decode(held_out)
    root = Path(sysconfig.get_path("stdlib"))
    out = [f for f in files if stdlib.is_held_out(f.relative_to(root).as_posix(), 0.2)]
    assert 0 < len(out) < len(files)
    for file in {f.read_text(): f for f in reversed(files)}.values():  # the first of identical files is kept
        mark = file.read_text()[-300:]
        assert mark in texts[file in out], file
        assert mark not in texts[file not in out], file


@pytest.mark.parametrize("damage", ["flip", "cut", "meta"])
def test_a_damaged_cache_of_tokens_is_named(tmp_path, monkeypatch, damage):
    files = stdlib.source_files()[:30]
    monkeypatch.setattr(stdlib, "source_files", lambda: files)
    stdlib.load(tmp_path, 300, 0.2)
    (path,) = tmp_path.rglob("meta.json" if damage == "meta" else "train.npy")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"flip": data, "cut": data[:-4], "meta": b"{}"}[damage])
    with pytest.raises(DataError, match=r"train.npy cannot be read \(.*; remove .* to have it made again"):
        stdlib.load(tmp_path, 300, 0.2)


def test_a_sequence_longer_than_the_data_is_refused(tmp_path):
    with pytest.raises(DataError, match="data.sequence_length"):
        build(DataSettings(cache=str(tmp_path), sequence_length=10**9), vocab_size=2048, seed=0)


@pytest.mark.parametrize("length", [64, 256])
def test_recall_asks_for_facts_that_stand_in_the_context_once(length):
    source = Recall(100, length, seed=3)
    for number in (0, 77):
        sample = source.sample(number)
        assert (sample.tokens == Recall(100, length, seed=3).sample(number).tokens).all()
        facts = sample.tokens[: length // 8][sample.tokens[: length // 8] < Recall.FIRST_QUESTION]
        assert sorted(facts // Recall.VALUES) == list(range(Recall.SLOTS)), "each slot once"
        assert (sample.tokens[length // 8 :] >= Recall.FIRST_QUESTION).all(), "no fact stands later"
        asked = sample.weights > 0
        assert asked.sum() > length // 8 and not asked[: length // 8].any()
        slots = sample.tokens[asked] - Recall.FIRST_QUESTION
        assert (np.sort(facts)[slots] == sample.labels[asked]).all()


@pytest.mark.parametrize("vocab, length, key", [(72, 256, "model.vocab_size = 72"), (100, 32, "sequence_length = 32")])
def test_recall_refuses_what_it_does_not_fit_into(vocab, length, key):
    with pytest.raises(DataError, match=key):
        build(DataSettings(source="recall", sequence_length=length), vocab_size=vocab, seed=1)


@pytest.mark.parametrize("names", [("<s>", "</s>"), ("<|begin_of_text|>", "<|end_of_text|>"), (None, "<|endoftext|>")])
def test_a_tokenizer_of_others_is_read_by_its_own_names(tmp_path, names):
    special = [name for name in ("<unk>", *names, "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>") if name]
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    engine.train_from_iterator(CORPUS, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    engine.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.begin, loaded.end) == tuple(name and engine.token_to_id(name) for name in names)
    assert loaded.fim_hole == engine.token_to_id("<|fim_suffix|>") and loaded.pad is None
    (document,) = loaded.encode_documents(["a </s> b"])
    assert document[-1] == loaded.end and loaded.end not in document[:-1]
    assert loaded.decode(document) == "a </s> b"


def test_a_tokenizer_that_cannot_end_a_document_is_refused(tmp_path):
    engine = Engine(models.BPE())
    engine.train_from_iterator(CORPUS, trainers.BpeTrainer(special_tokens=["<unk>"]))
    engine.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no token that ends a document"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_sentencepiece_vocabulary_is_read_to_the_byte(tmp_path):
    engine = Engine(models.BPE(byte_fallback=True, unk_token="<unk>"))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    fallback = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    engine.decoder = decoders.Sequence(fallback)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    engine.train_from_iterator(CORPUS, trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"], vocab_size=500))
    engine.add_tokens(bytes_)
    model = json.loads(engine.to_str())
    model["added_tokens"] = [t for t in model["added_tokens"] if t["special"]]  # bytes are the model's, as published
    vocabulary = model["model"]["vocab"]
    vocabulary.update({byte: len(vocabulary) + n for n, byte in enumerate(bytes_)})
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    text = "def f(x):\n    return '\u00e9\U0001f600 x'\n"
    (document,) = loaded.encode_documents([text])
    assert loaded.decode(document) == text
    assert loaded.token_bytes()[document].sum() == len(text.encode()) + 1  # the blank that it puts first
    assert loaded.decode_bytes(loaded.encode_bytes(b"\xff")).strip() == b"\xff"
    assert loaded.split_joined(document, 1.0, 1).tolist() == document.tolist()
