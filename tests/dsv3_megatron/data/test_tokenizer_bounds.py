"""Tokenizers made to exhaust who loads them: each is refused in a line, in a second, and published ones are not."""

import base64
import json
import os
import time

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from dsv3_megatron.data.tokenizer import _NUMBERS, _WORDS, Tokenizer
from dsv3_megatron.data.tokenizer_files.convert import KIMI_SPLIT
from dsv3_megatron.data.tokenizer_files.patterns import slow_part
from parallel.errors import DataError

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PUBLISHED = {
    "ours": f"{_NUMBERS}|{_WORDS}",
    "Kimi": KIMI_SPLIT,
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "Llama 3": CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": rf"[^\r\n\p{{L}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n]?{UPPER}+{LOWER}*|\p{{N}}{{1,3}}|\s+(?!\S)",
    "BLOOM": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "DeepSeek-V3": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    "DeepSeek's Chinese": "[一-龥぀-ゟ゠-ヿ]+",
    "DeepSeek-Coder": r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
    "digits from the right": r"(?=(\d{3})+(?!\d))",
    "Falcon": "[0-9][0-9][0-9]",
    "XLM-R": " {2,}",
    "possessive": r"[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}?",
}
SLOW = (
    "(a+)+$", "(a|a)*$", "(?:a|ab)*c", "(?:a*)*", "(x+x+)+y", "a*a*a*a*b", "(a?){30}a{30}", "(?:a{1,3}){2}",
    "((a{900}){900}){900}", "a{9}{9}", "a{100000}", r"(a)\1*", r"\g<0>", r"(?<n>a)\k<n>", "(?~abc)", "(?(1)a|b)",
    "(*COUNT)", "(?x) a", "[a", "(a", "a)", r"(?:\p{L}\p{M}*)+", "(?=(a+)+$)", "(?:(?:a|b)c)*", "a" * 20_000,
)  # fmt: skip


@pytest.mark.parametrize("pattern", PUBLISHED.values(), ids=PUBLISHED)
def test_expressions_of_published_tokenizers_are_taken(pattern):
    assert slow_part(pattern) is None
    Regex(pattern)


@pytest.mark.parametrize("pattern", SLOW)
def test_expressions_that_can_take_for_ever_are_refused(pattern):
    assert slow_part(pattern)


@pytest.fixture(scope="module")
def content():
    engine = Engine(models.BPE())
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    engine.train_from_iterator(["abc abc"] * 9, trainer)
    return engine.to_str()


def normalizing(*steps):
    return lambda content: content.update(normalizer={"type": "Sequence", "normalizers": list(steps)})


def replace(text, by, kind="String"):
    return {"type": "Replace", "pattern": {kind: text}, "content": by}


def splitting(pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return lambda content: content["pre_tokenizer"].update(
        {"type": "Sequence", "pretokenizers": [split, dict(content["pre_tokenizer"])]}
    )


def charsmap(longest):
    """Return SentencePiece's map of nothing, with a string as long as that."""
    return base64.b64encode((4).to_bytes(4, "little") + bytes(4) + b"x" * longest + b"\0").decode()


def nested(levels):
    step = {"type": "NFC"}
    for _ in range(levels):
        step = {"type": "Sequence", "normalizers": [step]}
    return step


def added(count):
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [token | {"id": 1000 + number, "content": f"<{number}>"} for number in range(count)]


MARKS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
BOMBS = {
    "a letter that becomes a megabyte": (normalizing(replace("e", "x" * (1 << 20))), "normalizer puts in 1,048,576"),
    "letters that become more, again": (normalizing(*[replace("e", "ee")] * 30), "2,147,483,648 times as long"),
    "nothing that becomes something": (normalizing(replace("", "x")), "splits or replaces by nothing"),
    "a megabyte before every text": (
        normalizing({"type": "Prepend", "prepend": "x" * (1 << 20)}), "normalizer puts in 1,048,576 characters",
    ),
    "marks of marks": (normalizing(*[{"type": "ByteLevel"}] * 30), "times as long"),
    "SentencePiece's map": (
        normalizing({"type": "Precompiled", "precompiled_charsmap": charsmap(1 << 20)}), "2,097,152 times as long",
    ),
    "SentencePiece's map of nothing": (
        normalizing({"type": "Precompiled", "precompiled_charsmap": "!"}), "cannot be read",
    ),
    "many steps": (normalizing(*[{"type": "NFC"}] * 1000), "its normalizer has 1,001 steps"),
    "steps in steps": (lambda content: content.update(normalizer=nested(60)), "nested too deeply"),
    "steps in steps without end": (lambda content: content.update(normalizer=nested(300)), "nested too deeply"),
    "a decoder that grows": (
        lambda content: content.update(decoder={"type": "Sequence", "decoders": [replace("e", "x" * 60)] * 5}),
        "its decoder can make a text 777,600,000 times as long",
    ),
    "an expression that matches for ever": (splitting("(e+)+$"), "can take for ever: a group that can match"),
    "one of the normalizer": (normalizing(replace("(e|e)*$", "x", "Regex")), "can take for ever"),
    "marks between words": (
        lambda content: content["model"].update(end_of_word_suffix="x" * 1000),
        "end_of_word_suffix has 1,000 characters",
    ),
    "added tokens": (lambda content: content["added_tokens"].extend(added(70_000)), "it has 70,002 added tokens"),
    "a long one": (
        lambda content: content["added_tokens"].append(added(1)[0] | {"content": "x" * 9000}), "has 9,000 characters",
    ),
    "a far id": (lambda content: content["model"]["vocab"].update(zz=1 << 23), "ids up to 8,388,608: a model"),
    "an id that no number holds": (lambda content: content["model"]["vocab"].update(zz=1 << 70), "cannot be read"),
    "truncation that is none": (lambda content: content.update(truncation=[1]), "cannot be read"),
    "pieces of a tree": (
        lambda content: content["model"].update(type="Unigram", unk_id=0, vocab=[["x" * 99_999, 0.0]] * 99),
        "its pieces have 9,899,901 characters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_tokenizer_that_would_exhaust_its_reader_is_refused(tmp_path, content, name):
    change, line = BOMBS[name]
    changed = json.loads(content)
    change(changed)
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    started = time.process_time()
    with pytest.raises(DataError) as error:
        Tokenizer.load(tmp_path)
    assert line in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500
    assert time.process_time() - started < 3


TEXTS = {
    "deep": '{"a":' * 200_000,
    "large": '{"model": {"vocab": {}}, "x": "' + " " * (1 << 26) + '"}',
    "NUL": "\0",
    "torn": '{"model": {"type": "BPE", "vocab": {"a": ',
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_is_none_is_refused(tmp_path, name):
    (tmp_path / "tokenizer.json").write_text(TEXTS[name])
    with pytest.raises(DataError, match=r"tokenizer .*/tokenizer.json cannot be read") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_what_two_readers_could_read_differently_is_read_once(tmp_path, content):
    padding = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    padding |= {"pad_type_id": 0, "pad_token": "<s>"}
    doubled = content.rstrip()[:-1] + f', "padding": {json.dumps(padding)}, "padding": null}}'
    (tmp_path / "tokenizer.json").write_text(doubled)
    assert len(Tokenizer.load(tmp_path).encode("abc")) < 5


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json", "chat_template.jinja"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "link out"])
def test_files_of_a_folder_are_regular_and_its_own(tmp_path, content, name, kind):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(content)
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (tmp_path / "secret").write_text(content)
        (folder / name).symlink_to("/dev/zero" if kind == "device" else tmp_path / "secret")
    with pytest.raises(DataError) as error:
        Tokenizer.load(folder)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"added_tokens_decoder": {"²": {"content": "x"}}}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"9" * 5000: {"content": "x"}}}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"4294967299": {"content": "x"}}}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"3": None}}},
        {"tokenizer_config.json": {"eos_token": {"content": [1]}}},
        {"config.json": {"eos_token_id": 1 << 40}},
        {"config.json": {"eos_token_id": [1 << 70]}},
    ],
)
def test_ids_and_names_that_are_none_are_refused(tmp_path, content, files):
    (tmp_path / "tokenizer.json").write_text(content.replace("</s>", "[done]"))
    for name, held in files.items():
        (tmp_path / name).write_text(json.dumps(held))
    with pytest.raises(DataError) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [-1, True, None, "1", 1.5, []])
def test_an_id_that_some_write_for_none_is_none(tmp_path, content, number):
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "config.json").write_text(json.dumps({"pad_token_id": number}))
    assert Tokenizer.load(tmp_path).pad is None


def test_steps_of_published_tokenizers_are_taken(tmp_path, content):
    changed = json.loads(content)
    normalizing({"type": "NFC"}, replace(" {2,}", " ", "Regex"), {"type": "Lowercase"})(changed)
    splitting(PUBLISHED["Llama 3"])(changed)
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    assert Tokenizer.load(tmp_path).decode_bytes(Tokenizer.load(tmp_path).encode("abc abc")) == b"abc abc"
    assert normalizers.NFC()


def a_tokenizer(folder, **model):
    engine = Engine(models.BPE())
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(False, use_regex=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    engine.train_from_iterator(["naïve text, naïve text"] * 9, trainer)
    content = json.loads(engine.to_str())
    content["model"] |= model
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_a_prefix_that_merges_lack_is_refused_before_the_library_ends_the_process(tmp_path):
    assert Tokenizer.load(a_tokenizer(tmp_path, continuing_subword_prefix="")).vocab_size > 258
    with pytest.raises(DataError, match=r"merges whose second part lacks model\.continuing_subword_prefix"):
        Tokenizer.load(a_tokenizer(tmp_path, continuing_subword_prefix="."))


def test_a_tokenizer_that_cannot_encode_is_one_line(tmp_path):
    pieces = [["<unk>", 0.0], *([f"<0x{byte:02X}>", -20.0] for byte in range(256))]
    model = {"type": "Unigram", "unk_id": None, "vocab": pieces, "byte_fallback": False}
    added = [{"id": 257, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True}]  # fmt: skip
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    content = {"version": "1.0", "added_tokens": added, "decoder": decoder, "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="tokenizer .* (cannot encode text|has no token|has no tokens)") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)
