"""Byte-level BPE in DeepSeek's manner: trained here, or loaded from any tokenizer.json.

Special tokens and the split before merging follow the published tokenizer of DeepSeek-V3: digits in runs of at most
three, punctuation joined with the line breaks that follow it, everything else by words. Any text survives a round
trip, because what no merge covers is spelled in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from parallel.errors import DataError

BEGIN, END, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
SPECIAL = (BEGIN, END, PAD, FIM_HOLE, FIM_BEGIN, FIM_END)

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
        self.vocab_size = engine.get_vocab_size()
        self.begin, self.end, self.pad = (self._special(name) for name in (BEGIN, END, PAD))

    def _special(self, name: str) -> int | None:
        return self._engine.token_to_id(name)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Return the tokenizer of a tokenizer.json. Raises DataError when it cannot be read."""
        try:
            return cls(Engine.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"tokenizer {path} cannot be read ({error}); name a Hugging Face tokenizer.json") from None

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Return a tokenizer of exactly ``vocab_size`` tokens (fewer where the texts have no more pairs to merge)."""
        least = 256 + len(SPECIAL)
        if vocab_size < least:
            raise DataError(
                f"model.vocab_size = {vocab_size} cannot hold 256 bytes and {len(SPECIAL)} special tokens; "
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

    def encode(self, text: str) -> np.ndarray:
        """Return the ids [T] int32 of a text, without special tokens."""
        return np.asarray(self._engine.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text followed by the end token, on all cores."""
        found = self._engine.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray([*encoding.ids, self.end], dtype=np.int32) for encoding in found]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special tokens are left out."""
        return self._engine.decode(list(map(int, ids)), skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        """Return how many bytes of text each token stands for: [vocabulary] int32, 0 for special tokens."""
        special = set(SPECIAL)
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token, number in self._engine.get_vocab().items():
            lengths[number] = 0 if token in special else len(token)  # byte-level: one character a byte
        return lengths
