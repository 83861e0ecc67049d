"""Byte-level BPE in DeepSeek's manner: trained here, or loaded from any tokenizer.json.

Special tokens and the split before merging follow the published tokenizer of DeepSeek-V3: digits in runs of at most
three, punctuation joined with the line breaks that follow it, everything else by words. Any text survives a round
trip, because what no merge covers is spelled in bytes, and text that happens to spell a special token is text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from parallel.errors import DataError

BEGIN, END, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
SPECIAL = (BEGIN, END, PAD, FIM_HOLE, FIM_BEGIN, FIM_END)
# What other published tokenizers call the same: SentencePiece's, Llama 3's, GPT-2's, StarCoder's and Qwen's names.
ALSO_CALLED = {
    BEGIN: ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>"),
    END: ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>"),
    PAD: ("<pad>", "<|pad|>", "[PAD]"),
    FIM_BEGIN: ("<fim_prefix>", "<|fim_prefix|>"),
    FIM_HOLE: ("<fim_suffix>", "<|fim_suffix|>"),
    FIM_END: ("<fim_middle>", "<|fim_middle|>"),
}

_JOINED = re.compile(r"( ?[^\w\s]+)([\r\n]+)")  # marks with the line breaks after them: one token, or two
_LONE = re.compile("[\udc80-\udcff]")  # how surrogateescape shows a byte that is no UTF-8
_BYTE_FALLBACK = re.compile("<0x([0-9A-F]{2})>")  # a byte in SentencePiece's vocabularies
_NUMBERS = r"\p{N}{1,3}"
_WORDS = "|".join(
    (
        r"[\p{P}\p{S}][A-Za-z]+",  # one mark and the letters after it: .join, _name
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",  # a word, with the blank before it
        r" ?[\p{P}\p{S}]+[\r\n]*",  # marks, with the line breaks after them
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class Tokenizer:
    """Text to token ids and back, with the byte length of every token."""

    def __init__(self, engine: Engine):
        self._engine = engine
        engine.encode_special_tokens = True  # a document that spells <｜end▁of▁sentence｜> must not end there
        self.vocab_size = engine.get_vocab_size()
        self.begin, self.end, self.pad = (self._special(name) for name in (BEGIN, END, PAD))
        self.fim_begin, self.fim_hole, self.fim_end = (self._special(n) for n in (FIM_BEGIN, FIM_HOLE, FIM_END))

    def _special(self, name: str) -> int | None:
        found = (self._engine.token_to_id(n) for n in (name, *ALSO_CALLED[name]))
        return next((number for number in found if number is not None), None)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Return the tokenizer of a tokenizer.json. Raises DataError when it cannot be read or knows no end of text."""
        try:
            engine = Engine.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"tokenizer {path} cannot be read ({error}); name a Hugging Face tokenizer.json") from None
        if (tokenizer := cls(engine)).end is None:
            names = ", ".join((END, *ALSO_CALLED[END]))
            raise DataError(f"tokenizer {path} has no token that ends a document; add one of {names} to its vocabulary")
        return tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, key: str = "model.vocab_size") -> Tokenizer:
        """Return a tokenizer of exactly ``vocab_size`` tokens (fewer where the texts have no more pairs to merge).

        Raises: DataError: naming ``key``, when the vocabulary is too small for the bytes.
        """
        least = 256 + len(SPECIAL)
        if vocab_size < least:
            raise DataError(
                f"{key} = {vocab_size} cannot hold 256 bytes and {len(SPECIAL)} special tokens; "
                f"set it to {least} or more"
            )
        engine = Engine(models.BPE())
        engine.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_NUMBERS), "isolated"),
                pre_tokenizers.Split(Regex(_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        engine.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        engine.train_from_iterator(texts, trainer)
        return cls(engine)

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json."""
        self._engine.save(str(path))

    @cached_property
    def sha256(self) -> str:
        """A digest of all that decides which ids a text becomes."""
        return hashlib.sha256(json.dumps(json.loads(self._engine.to_str()), sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Return the ids [T] int32 of a text, without special tokens."""
        return np.asarray(self._engine.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text followed by the end token, on all cores."""
        found = self._engine.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray([*encoding.ids, self.end], dtype=np.int32) for encoding in found]

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Return the ids [T] int32 of any bytes: UTF-8 as text, a byte that is none as the token of that byte."""
        text = data.decode("utf-8", errors="surrogateescape")
        ids, start = [], 0
        for lone in _LONE.finditer(text):
            ids += self._engine.encode(text[start : lone.start()], add_special_tokens=False).ids
            byte = ord(lone[0]) - 0xDC00
            mark = _BYTE_TO_MARK[byte] if self._is_byte_level else f"<0x{byte:02X}>"
            token = self._engine.token_to_id(mark)
            assert token is not None, f"the tokenizer has no token {mark}"  # checked when it was loaded
            ids.append(token)
            start = lone.end()
        ids += self._engine.encode(text[start:], add_special_tokens=False).ids
        return np.asarray(ids, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special tokens are left out."""
        return self._engine.decode(list(map(int, ids)), skip_special_tokens=True)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes that ids stand for, whether or not they are text; special tokens are left out."""
        return b"".join(self._bytes_of_tokens[int(number)] for number in ids)

    def split_joined(self, ids: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
        """Return ids where about ``share`` of the tokens that join marks with line breaks are spelled in two.

        Without it a prompt that ends in a line break after a mark would be spelled as the model has never seen it
        (arXiv 2412.19437 section 4.1; the share is not published). The text does not change.
        """
        if not share or not len(ids):
            return ids
        joined = np.flatnonzero(self._is_joined[ids])
        chosen = joined[random.random(len(joined)) < share]
        if not len(chosen):
            return ids
        pieces = np.split(ids, chosen)
        parts = [pieces[0]]
        for piece in pieces[1:]:
            parts += [np.asarray(self._halves[int(piece[0])], dtype=ids.dtype), piece[1:]]
        return np.concatenate(parts)

    def token_bytes(self) -> np.ndarray:
        """Return how many bytes of text each token stands for: [vocabulary] int32, 0 for special tokens."""
        return np.asarray([len(text) for text in self._bytes_of_tokens], dtype=np.int32)

    @cached_property
    def _bytes_of_tokens(self) -> list[bytes]:
        added = self._engine.get_added_tokens_decoder()
        found = [b""] * (1 + max(self._engine.get_vocab().values()))
        for token, number in self._engine.get_vocab().items():
            if number not in added:
                found[number] = self._bytes_of_token(token)
            elif not added[number].special:
                found[number] = added[number].content.encode()
        return found

    def _bytes_of_token(self, token: str) -> bytes:
        """Return what a token spells: in the marks of byte-level BPE, or as SentencePiece writes it."""
        if self._is_byte_level:
            return bytes(_MARK_TO_BYTE[mark] for mark in token)
        if byte := _BYTE_FALLBACK.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace("\u2581", " ").encode()

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in json.dumps(json.loads(self._engine.to_str())["decoder"])

    @cached_property
    def _halves(self) -> dict[int, list[int]]:
        """The tokens that join marks with line breaks, and each spelled as marks, then breaks."""
        found = {}
        for number, data in enumerate(self._bytes_of_tokens):
            match = _JOINED.fullmatch(data.decode("utf-8", errors="replace"))
            if match and "\ufffd" not in match[0]:
                halves = [i for half in match.groups() for i in self._engine.encode(half, add_special_tokens=False).ids]
                if self.decode_bytes(halves) == data:  # SentencePiece begins every text with a blank of its own
                    found[number] = halves
        return found

    @cached_property
    def _is_joined(self) -> np.ndarray:
        joined = np.zeros(len(self._bytes_of_tokens), dtype=bool)
        joined[list(self._halves)] = True
        return joined


def _byte_marks() -> dict[int, str]:
    """Return the character by which byte-level BPE writes each byte: printable ones as they are (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


_BYTE_TO_MARK = _byte_marks()
_MARK_TO_BYTE = {mark: byte for byte, mark in _BYTE_TO_MARK.items()}
