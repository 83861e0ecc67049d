"""Tokenizers as people have them: each is right, or refused in a line; begin and end by the model's own names."""

import base64
import json
import pickle
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Engine

from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.data.tokenizer_files import convert
from dsv3_megatron.data.tokenizer_files.read import PROBE
from dsv3_megatron.data.tokenizer_files.spelling import _MARK_TO_BYTE
from parallel.errors import DataError, PackageError, UserError
from testing.lanes import examples

CORPUS = ["def f(x):\n    return naïve('café') + 123\n" * 20, "Hello world, it's I'LL we're. " * 20, "你好世界abc" * 20]
TEXT = "def f(x):\n    return 'naïve ✓ 你好' # it's  12345\n" * 9


def byte_level(special=("<s>", "</s>"), size=380, split=None, alphabet=True):
    """Return byte-level BPE as the library makes it."""
    engine = Engine(models.BPE())
    marks = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [*([pre_tokenizers.Split(Regex(split), "isolated")] if split else []), marks]
    )
    engine.decoder = decoders.ByteLevel()
    initial = sorted(pre_tokenizers.ByteLevel.alphabet()) if alphabet else []
    engine.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=size, special_tokens=list(special), initial_alphabet=initial)
    )
    return engine


@pytest.fixture(scope="module")
def content():
    return byte_level().to_str()


def saved(folder, content, change=lambda content: None, name="tokenizer.json"):
    """Write a tokenizer.json that is changed in place; return its path."""
    content = json.loads(content)
    change(content)
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder / name


def truncated(content):
    content["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}


def padded(content):
    content["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<s>",
    }  # fmt: skip


def dropping(content):
    content["model"]["dropout"] = 0.3


@pytest.mark.parametrize(
    ("change", "said"),
    [(truncated, "truncation to 16 tokens"), (padded, "padding"), (dropping, "BPE dropout of 0.3")],
)
def test_what_is_stored_for_a_model_in_use_is_switched_off_and_said(tmp_path, content, change, said):
    plain = Tokenizer.load(saved(tmp_path, content))
    changed = Tokenizer.load(saved(tmp_path, content, change, "other.json"))
    (line,) = changed.notes
    assert f"{said} is switched off" in line and "\n" not in line and not plain.notes
    assert changed.encode(TEXT).tolist() == plain.encode(TEXT).tolist()
    (document,) = changed.encode_documents([TEXT])
    assert document.tolist() == [*plain.encode(TEXT).tolist(), plain.end]
    assert changed.sha256 == plain.sha256


def test_templates_are_not_applied(tmp_path, content):
    engine = Engine.from_str(content)
    engine.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    loaded = Tokenizer.load(saved(tmp_path, engine.to_str()))
    assert engine.encode("x").ids[0] == 0 and 0 not in loaded.encode("x")
    assert loaded.encode_documents(["x"])[0].tolist() == [*loaded.encode("x").tolist(), 1]


def with_hole(content):
    vocabulary = content["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] = 70_000


def test_ids_with_holes_count_up_to_the_largest(tmp_path, content):
    loaded = Tokenizer.load(saved(tmp_path, content, with_hole))
    assert loaded.vocab_size == 70_001 == len(loaded.token_bytes()) and "ids up to 70,000" in loaded.notes[0]


def far(content):
    with_hole(content)
    content["model"]["vocab"]["x" * 30] = 2**31


def moved(content):
    with_hole(content)
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 70_100, "content": "<late>"})


def doubled(content):
    """Two tokens of one id: the library takes it, and cannot read what it writes."""
    vocabulary = content["model"]["vocab"]
    *_, before, last = sorted(vocabulary, key=vocabulary.get)
    vocabulary[last] = vocabulary[before]


def word_again(content):
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 380, "content": "def", "special": False})


def taken(content):
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 300, "content": "<new>"})


def word_piece():
    engine = Engine(models.WordPiece(unk_token="[UNK]"))
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    engine.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "</s>"]))
    return engine


def unigram(byte_fallback):
    pieces = [("<unk>", 0.0), ("</s>", 0.0)] + [(f"<0x{byte:02X}>", -20.0) for byte in range(256)] * byte_fallback
    engine = Engine(models.Unigram([*pieces, *((mark, -3.0) for mark in "\u2581abcdef")], 0, byte_fallback))
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    engine.add_special_tokens(["</s>"])
    return engine


def cutting():
    engine = byte_level()
    marks = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), marks])
    return engine


REFUSED = {
    "an id no model has a row for": (lambda c: saved_content(c, far), "ids up to 2,147,483,648"),
    "added tokens whose ids the library changes": (lambda c: saved_content(c, moved), "<late> is token 70100, but"),
    "WordPiece": (lambda c: word_piece().to_str(), r"WordPiece\) has no tokens for bytes: .* becomes \[UNK\]"),
    "Unigram": (lambda c: unigram(False).to_str(), r"Unigram\) has no tokens for bytes"),
    "a text that spells the end": (lambda c: unigram(True).to_str(), "encodes the text </s> as the special token"),
    "bytes that are missing": (lambda c: byte_level(alphabet=False).to_str(), "no token for .* of the 243 bytes"),
    "blanks thrown away": (lambda c: cutting().to_str(), "loses text"),
    "no end": (lambda c: byte_level(special=()).to_str(), "no token that ends a document; name it as eos_token"),
    "no tokenizer": (lambda c: "[1]", "cannot be read .it holds no tokenizer"),
    "an object of something else": (lambda c: '{"version": "1.0"}', "cannot be read .it holds no tokenizer"),
    "no model": (lambda c: '{"model": null}', "cannot be read .it holds no tokenizer"),
    "a pointer to it": (
        lambda c: "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "Git LFS .*pull",
    ),
    "two tokens of one id": (lambda c: saved_content(c, doubled), "'.*' and '.*' both have the id 321"),
    "a word added under another id": (lambda c: saved_content(c, word_again), "def is token 380.* vocabulary .*it is "),
    "an added token of an id that is taken": (lambda c: saved_content(c, taken), "<new> is token 300.*that id is "),
    "one that the library panics at": (
        lambda c: saved_content(c, lambda content: content["model"].update(continuing_subword_prefix="####")),
        "cannot be read",
    ),
}


def saved_content(content, change):
    content = json.loads(content)
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize("case", REFUSED)
def test_what_loses_text_is_refused_in_a_line(tmp_path, content, case):
    make, match = REFUSED[case]
    (tmp_path / "tokenizer.json").write_text(make(content))
    with pytest.raises(DataError, match=match) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("normalizer", "kind"),
    [
        (normalizers.NFC(), "NFC"),
        (normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]), "NFKC, Lowercase"),
        (normalizers.Strip(), "Strip"),
    ],
)
def test_a_normaliser_is_applied_and_told(tmp_path, content, normalizer, kind):
    engine = Engine.from_str(content)
    engine.normalizer = normalizer
    loaded = Tokenizer.load(saved(tmp_path, engine.to_str()))
    (line,) = loaded.notes
    assert f"its normalizer ({kind}) changes text" in line
    assert loaded.decode(loaded.encode(PROBE)) == normalizer.normalize_str(PROBE)


def test_tokens_that_take_blanks_away_are_told(tmp_path, content):
    engine = Engine.from_str(content)
    engine.add_tokens([AddedToken("<mask>", lstrip=True, special=False), AddedToken("<plain>", special=False)])
    (line,) = Tokenizer.load(saved(tmp_path, engine.to_str())).notes
    assert line.endswith("blanks beside <mask> are lost")


def kept_as_text(content):
    content["added_tokens"][1]["special"] = False


def made_by_merges(content):
    """The end is a token of the vocabulary that merges lead to, and no added one."""
    del content["added_tokens"][1]
    content["model"]["merges"] = [["<", "/"], ["</", "s"], ["</s", ">"]]
    content["pre_tokenizer"]["pretokenizers"][0]["use_regex"] = False
    content["model"]["vocab"] |= {"</": 1000, "</s": 1001}


def test_a_text_that_spells_the_end_is_text_whatever_the_file_calls_it(tmp_path, content):
    path, text = saved(tmp_path, content, kept_as_text), "a </s> b</s>"
    assert 1 in Engine.from_file(str(path)).encode(text).ids
    tokenizer = Tokenizer.load(path)
    assert tokenizer.end == 1 and 1 not in tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    path = saved(tmp_path, content, made_by_merges)
    assert 1 in Engine.from_file(str(path)).encode(text).ids
    with pytest.raises(DataError, match="encodes the text </s> as the special token"):
        Tokenizer.load(path)


# -- names -------------------------------------------------------------------------------------------------------------

NAMES = ["[BOS]", "[EOS]", "<|im_end|>", "[gMASK]", "<pad>", "<|user|>"]
IDS = {name: number for number, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def many():
    """A tokenizer with names of several models."""
    return byte_level(special=NAMES).to_str()


def beside(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.json").write_text(json.dumps(text))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ("[BOS]", "[EOS]", "<pad>")),
        ({"tokenizer_config": {"bos_token": "[gMASK]", "eos_token": {"content": "<|im_end|>", "lstrip": False}}},
         ("[gMASK]", "<|im_end|>", "<pad>")),
        ({"tokenizer_config": {"bos_token": None, "eos_token": None, "pad_token": "<|user|>"}},
         (None, "[EOS]", "<|user|>")),
        ({"special_tokens_map": {"eos_token": "<|user|>"}, "config": {"eos_token_id": 2, "bos_token_id": 3}},
         ("[gMASK]", "<|user|>", "<pad>")),
        ({"config": {"eos_token_id": [5, 2], "bos_token_id": None}}, ("[BOS]", "<|user|>", "<pad>")),
        ({"config": {"text_config": {"eos_token_id": 2}}, "generation_config": {"eos_token_id": 1, "bos_token_id": 5}},
         ("<|user|>", "<|im_end|>", "<pad>")),
    ],
)  # fmt: skip
def test_begin_and_end_are_those_that_the_files_beside_name(tmp_path, many, files, expected):
    saved(tmp_path, many)
    beside(tmp_path, **files)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.names.begin, loaded.names.end, loaded.names.pad) == expected
    assert (loaded.begin, loaded.end, loaded.pad) == tuple(name and IDS[name] for name in expected)
    again = tmp_path / "again"
    again.mkdir()
    loaded.save(again / "tokenizer.json")
    for copy in (Tokenizer.load(again), pickle.loads(pickle.dumps(loaded))):
        assert copy.names == loaded.names and copy.sha256 == loaded.sha256
        assert copy.encode("a [EOS] b").tolist() == loaded.encode("a [EOS] b").tolist()


def test_the_digest_counts_the_names_only_where_files_beside_change_them(tmp_path, many):
    alone = Tokenizer.load(saved(tmp_path, many))
    beside(tmp_path, tokenizer_config={"eos_token": "[EOS]"})
    assert Tokenizer.load(tmp_path).sha256 == alone.sha256, "shards made before keep their tokenizer"
    beside(tmp_path, tokenizer_config={"eos_token": "<|im_end|>"})
    assert Tokenizer.load(tmp_path).sha256 != alone.sha256
    other = saved(tmp_path, many, name="mine.json")
    assert Tokenizer.load(other).sha256 == alone.sha256, "files beside belong to the file of the published name"
    alone.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path).names.end == "[EOS]", "the names of another tokenizer do not stay"


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"tokenizer_config": {"eos_token": "<gone>"}}, "eos_token = <gone> is no token"),
        ({"tokenizer_config": {"eos_token": 7}}, "eos_token = 7 is no token; write its text"),
        ({"config": {"eos_token_id": 99_999}}, "eos_token_id = 99999 is no token"),
        ({"config": {"vocab_size": 100}}, "vocab_size = 100, but tokenizer.json has ids up to"),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": {"content": "<x>"}}}}, r"calls it \[EOS\]; they do not"),
        ({"tokenizer_config": [1]}, "holds no object"),
    ],
)
def test_files_beside_that_belong_to_another_tokenizer_are_refused(tmp_path, many, files, match):
    saved(tmp_path, many)
    beside(tmp_path, **files)
    with pytest.raises(DataError, match=match) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer_says_what_it_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"holds none of tokenizer.json, tiktoken.model, tokenizer.model"):
        Tokenizer.load(tmp_path)


# -- other libraries' files --------------------------------------------------------------------------------------------

KIMI = {
    "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    "bos_token": "[BOS]",
    "eos_token": "[EOS]",
    "pad_token": {"content": "[PAD]"},
}


def write_kimi(folder):
    """Write a small tokenizer as Kimi-K2 publishes its own; return its ranks."""
    folder.mkdir(exist_ok=True)
    engine = byte_level(special=(), size=600, split=convert.KIMI_SPLIT)
    tokens = sorted(engine.get_vocab(), key=engine.get_vocab().get)
    ranks = {bytes(_MARK_TO_BYTE[mark] for mark in token): number for number, token in enumerate(tokens)}
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (folder / "tiktoken.model").write_text("".join(lines))
    listed = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 5: "<think>", 9: "[PAD]"}
    special = {str(len(ranks) + n): {"content": name, "special": name != "<think>"} for n, name in listed.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(KIMI | {"added_tokens_decoder": special}))
    return ranks


def test_a_tiktoken_file_is_converted_to_the_ids_of_tiktoken(tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = write_kimi(tmp_path)
    theirs = tiktoken.Encoding("kimi", pat_str=convert.KIMI_SPLIT, mergeable_ranks=ranks, special_tokens={})
    loaded = Tokenizer.load(tmp_path)
    first = len(ranks)
    assert (loaded.begin, loaded.end, loaded.pad, loaded.vocab_size) == (first, first + 1, first + 9, first + 10)
    (tmp_path / "kept").mkdir()
    loaded.save(tmp_path / "kept" / "tokenizer.json")
    kept = Tokenizer.load(tmp_path / "kept")
    assert kept.sha256 == loaded.sha256 and not loaded.notes

    @settings(deadline=None, max_examples=examples(300))
    @given(
        st.one_of(st.text(max_size=60), st.text("ab' sStTrRvVmMlLdDſK\n\r\t12é\u0301中文〇々\u3000\x85", max_size=60))
    )
    def same(text):
        assert kept.encode(text).tolist() == theirs.encode_ordinary(text)
        assert kept.decode_bytes(kept.encode(text)) == text.encode()

    same()
    assert kept.encode("<think>").tolist() == [first + 5], "an added token that is not special is text"
    assert first + 1 not in kept.encode("a [EOS] b")


def test_a_tiktoken_file_that_takes_the_place_of_another_is_read_anew(tmp_path):
    pytest.importorskip("tiktoken")
    ranks = write_kimi(tmp_path)
    before = Tokenizer.load(tmp_path).encode("ab").tolist()
    *_, a, b = (next(t for t in ranks if t == mark) for mark in (b"a", b"b"))
    ranks[a], ranks[b] = ranks[b], ranks[a]
    lines = sorted(ranks.items(), key=lambda pair: pair[1])
    (tmp_path / "tiktoken.model").write_text("".join(f"{base64.b64encode(t).decode()} {n}\n" for t, n in lines))
    assert Tokenizer.load(tmp_path).encode("ab").tolist() == before[::-1]


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda f: (f / "tokenizer_config.json").unlink(), "does not say how text is split"),
        (
            lambda f: rewrite(f, lambda c: c["auto_map"].update(AutoTokenizer="tokenization_other.X")),
            "how text is split",
        ),
        (lambda f: (f / "tokenization_kimi.py").write_text('pat_str = "[0-9]+"'), "does not say how text is split"),
        (lambda f: rewrite(f, lambda c: c.pop("added_tokens_decoder")), "no added_tokens_decoder"),
        (lambda f: rewrite(f, lambda c: c["added_tokens_decoder"].update({"3": {"content": "x"}})), "token 3 of"),
        (lambda f: (f / "tiktoken.model").write_text("IQ== 0\nIg== 2\n"), "ranks that are missing"),
        (lambda f: (f / "tiktoken.model").write_text("IQ== 0\nIg== 1\n"), "no token for byte 0x00"),
        (lambda f: (f / "tiktoken.model").write_text("IQ== 0\n!!\n"), "cannot be read"),
    ],
)
def test_a_tiktoken_file_that_cannot_be_converted_exactly_is_refused(tmp_path, spoil, match):
    pytest.importorskip("tiktoken")
    write_kimi(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=match) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def rewrite(folder, change):
    content = json.loads((folder / "tokenizer_config.json").read_text())
    change(content)
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def test_without_the_packages_the_line_says_what_to_install(tmp_path, monkeypatch):
    write_kimi(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x00")
    for package in ("tiktoken", "sentencepiece"):
        monkeypatch.setitem(sys.modules, package, None)
    for name, package in (("tiktoken.model", "tiktoken"), ("tokenizer.model", "sentencepiece")):
        with pytest.raises(PackageError, match=f"pip install {package} .*transformers") as error:
            Tokenizer.load(tmp_path / name)
        assert "\n" not in str(error.value)


def sentencepiece_file(folder, **options):
    sentencepiece = pytest.importorskip("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join(line for text in CORPUS for line in text.splitlines()))
    settled = {"model_type": "bpe", "normalization_rule_name": "identity", "byte_fallback": True,
               "remove_extra_whitespaces": False, "vocab_size": 350, "minloglevel": 2}  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), **settled | options
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_a_sentencepiece_file_is_converted_to_the_ids_of_sentencepiece(tmp_path):
    theirs = sentencepiece_file(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.begin, loaded.end, loaded.vocab_size) == (theirs.bos_id(), theirs.eos_id(), 350)

    @settings(deadline=None, max_examples=examples(200))
    @given(st.text(st.characters(exclude_characters="\u2581\0", exclude_categories=["Cs"]), min_size=1, max_size=60))
    def same(text):
        assert loaded.encode(text).tolist() == theirs.encode(text)
        assert loaded.decode_bytes(loaded.encode(text)) == b" " + text.encode()

    same()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"remove_extra_whitespaces": True}, "cannot be converted exactly"),
        ({"model_type": "unigram", "hard_vocab_limit": False}, "encodes the text <s> as the special token"),
        ({"byte_fallback": False, "vocab_size": 110}, "has no tokens for bytes: what it does not know becomes <unk>"),
    ],
)
def test_a_sentencepiece_file_that_does_not_convert_or_loses_text_is_refused(tmp_path, options, match):
    sentencepiece_file(tmp_path, **options)
    with pytest.raises(UserError, match=match) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)
