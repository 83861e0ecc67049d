"""Tokenizers of which one file was changed: what is loaded encodes text, and gives it back or says that it does not."""

import base64
import json

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.data.tokenizer_files.convert import KIMI_SPLIT, _read_ranks
from testing.fuzz.mutate import binary, json_text

TEXT = "def f(x):\n    return 'naïve ✓ 你好' # it's  12345\n"


def byte_level():
    engine = Engine(models.BPE())
    engine.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("\r\n", "\n")])
    split = pre_tokenizers.Split(Regex(KIMI_SPLIT), "isolated")
    engine.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    engine.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    engine.train_from_iterator([TEXT] * 9, trainer)
    return engine.to_str()


def sentencepiece():
    pieces = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256)), *((m, -3.0) for m in "\u2581abcd")]
    engine = Engine(models.Unigram(pieces, 0, byte_fallback=True))
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    engine.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    engine.add_special_tokens(["</s>"])
    return engine.to_str()


def load(folder):
    tokenizer = Tokenizer.load(folder)
    assert len(tokenizer.token_bytes()) == tokenizer.vocab_size
    found = tokenizer.encode(TEXT)
    assert found.max(initial=0) < tokenizer.vocab_size
    tokenizer.decode(found)
    assert tokenizer.name and tokenizer.files()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_level())
    return tmp_path


def changing(folder, name):
    def read(data):
        (folder / name).write_bytes(data)
        load(folder)

    return read


def test_a_tokenizer(fuzz, folder):
    fuzz(json_text, [byte_level().encode(), sentencepiece().encode()], changing(folder, "tokenizer.json"))


def test_its_parts(fuzz, folder):
    """Its steps and added tokens alone: most of a file is vocabulary, and most of the damage would be there."""
    whole = json.loads(byte_level())
    parts = {key: whole[key] for key in ("normalizer", "pre_tokenizer", "decoder", "post_processor", "added_tokens")}

    def read(data):
        try:
            changed = json.loads(data)
        except (ValueError, RecursionError):
            changed = None
        text = json.dumps({**whole, **changed}) if isinstance(changed, dict) else data.decode(errors="replace")
        (folder / "tokenizer.json").write_text(text)
        load(folder)

    fuzz(json_text, [json.dumps(parts).encode()], read)


def test_a_configuration_beside(fuzz, folder):
    token = {"content": "</s>", "special": True}
    content = {"bos_token": "<s>", "eos_token": token, "pad_token": None, "added_tokens_decoder": {"1": token}}
    fuzz(json_text, [json.dumps(content).encode()], changing(folder, "tokenizer_config.json"))


def test_a_models_configuration_beside(fuzz, folder):
    content = {"eos_token_id": [1, 2], "bos_token_id": 0, "vocab_size": 300, "text_config": {"vocab_size": 300}}
    fuzz(json_text, [json.dumps(content).encode()], changing(folder, "config.json"))


def test_a_tiktoken_file(fuzz, tmp_path):
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)]
    fuzz(binary, ["".join(lines).encode()], lambda data: _read_ranks(tmp_path / "tiktoken.model", data))
