"""Byte-level BPE in DeepSeek's manner: trained here, or loaded from a published tokenizer.

Special tokens and the split before merging follow the published tokenizer of DeepSeek-V3: digits in runs of at most
three, punctuation joined with the line breaks that follow it, everything else by words. Any text survives a round
trip, because what no merge covers is spelled in bytes, and text that happens to spell a special token is text. What is
loaded keeps its own split and the names that its own files give the tokens that begin and end a document.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from dsv3_megatron.data.source.hashing import uniform
from dsv3_megatron.data.tokenizer_files.names import (
    ALSO_CALLED,
    CONFIG,
    END,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    SPECIAL,
    Names,
    known_names,
    known_token,
    names_beside,
)
from dsv3_megatron.data.tokenizer_files.read import (
    TOKENIZER,
    check_size,
    check_text,
    has_files_beside,
    mark_special,
    read_engine,
    rows_of,
    tokenizer_file,
)
from dsv3_megatron.data.tokenizer_files.spelling import Spelling
from dsv3_megatron.run.files import write_atomically, write_json
from parallel.errors import DataError

_JOINED = re.compile(r"( ?[^\w\s]+)([\r\n]+)")  # marks with the line breaks after them: one token, or two
_LONE = re.compile("[\udc80-\udcff]")  # how surrogateescape shows a byte that is no UTF-8
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

    def __init__(self, engine: Engine, names: Names | None = None, notes: tuple[str, ...] = ()):
        """Take the library's tokenizer.

        Args:
            names: its tokens that begin, end and fill up; None = by the names that published tokenizers use.
            notes: what a person should know of it, in a line each.
        """
        self._engine = engine
        engine.encode_special_tokens = True  # a document that spells <｜end▁of▁sentence｜> must not end there
        self.names, self.notes = names or known_names(engine), notes
        self.vocab_size = rows_of(engine)
        self.begin, self.end, self.pad = map(self._id, (self.names.begin, self.names.end, self.names.pad))
        found = (known_token(engine, name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END))
        self.fim_begin, self.fim_hole, self.fim_end = map(self._id, found)

    def _id(self, name: str | None) -> int | None:
        return None if name is None else self._engine.token_to_id(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self._engine.to_str(), self.names, self.notes)

    @classmethod
    def load(cls, given: str | Path) -> Tokenizer:
        """Return the tokenizer of a file or of a folder: tokenizer.json, a tiktoken or a SentencePiece file.

        Files with the names of published ones are read with those beside them (tokenizer_config.json, ...), which name
        the tokens that begin and end a document.
        Raises: DataError: it cannot be read, loses text, or knows no end of text. PackageError: a package is missing
        that converts it.
        """
        path = tokenizer_file(given)
        engine, notes = read_engine(path)
        notes += check_size(path, engine)
        names = names_beside(path, engine) if has_files_beside(path) else known_names(engine)
        mark_special(engine, (names.begin, names.end, names.pad))
        tokenizer = cls(engine, names, notes)
        if tokenizer.end is None:
            known = ", ".join((END, *ALSO_CALLED[END]))
            raise DataError(
                f"tokenizer {path} has no token that ends a document; name it as eos_token in a {CONFIG} beside a "
                f"{TOKENIZER}, or add one of {known} to its vocabulary"
            )
        try:
            tokenizer.notes += check_text(path, engine, tokenizer._spelling, tokenizer._bytes_of_tokens)
        except (DataError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exception, and where it panics not even that
            raise DataError(f"tokenizer {path} cannot encode text ({error}); name another") from None
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
        """Write tokenizer.json, and beside it the names of its tokens where the file alone does not tell them.

        Raises: OSError: a file cannot be written.
        """
        write_atomically(Path(path), self._engine.to_str(pretty=True))
        beside = Path(path).with_name(CONFIG)
        said = self.names != known_names(self._engine) or self.names.chat_template is not None
        if Path(path).name != TOKENIZER:
            assert not said, f"names are read beside {TOKENIZER} alone"
        elif said or beside.exists():  # one of another tokenizer must not stay
            write_json(beside, self.names.as_config())

    def files(self) -> dict[str, str]:
        """Return what a folder keeps of it: file name -> text."""
        names = json.dumps(self.names.as_config(), indent=1, ensure_ascii=False) + "\n"
        return {TOKENIZER: self._engine.to_str(pretty=True), CONFIG: names}

    @cached_property
    def sha256(self) -> str:
        """A digest of all that decides which ids a document becomes: the tokenizer, and the names of its tokens where
        they are not those that the file alone tells."""
        content: Any = json.loads(self._engine.to_str())
        if self.names != known_names(self._engine):
            content = [content, [self.names.begin, self.names.end, self.names.pad]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        """What a message calls it: the beginning of its digest, its size, and how its documents end."""
        return f"{self.sha256[:8]} ({self.vocab_size:,} ids, documents end with {self.names.end})"

    def encode(self, text: str) -> np.ndarray:
        """Return the ids [T] int32 of a text, without special tokens."""
        return np.asarray(self._engine.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text followed by the end token, on all cores."""
        found = self._engine.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray([*encoding.ids, self.end], dtype=np.int32) for encoding in found]

    def encode_prompts(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids [T] int32 of each text, in which the name of a special token is that token: what transformers
        makes of it with an export's tokenizer. Nothing is put before or after it."""
        found = self._of_prompts.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in found]

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Return the ids [T] int32 of any bytes: UTF-8 as text, a byte that is none as the token of that byte.

        Raises: DataError: the tokenizer has no token for a byte.
        """
        text = data.decode("utf-8", errors="surrogateescape")
        ids, start = [], 0
        for lone in _LONE.finditer(text):
            ids += self._engine.encode(text[start : lone.start()], add_special_tokens=False).ids
            byte = ord(lone[0]) - 0xDC00
            if (token := self._spelling.token_of_byte(byte)) is None:
                raise DataError(f"the tokenizer has no token for byte 0x{byte:02X}, which is no part of any text")
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

    def split_joined(self, ids: np.ndarray, share: float, key: int) -> np.ndarray:
        """Return ids where about ``share`` of the tokens that join marks with line breaks are spelled in two.

        Without it a prompt that ends in a line break after a mark would be spelled as the model has never seen it
        (arXiv 2412.19437 section 4.1; the share is not published). The text does not change. Which ones is a function
        of ``key``, the document's.
        """
        if not share or not len(ids):
            return ids
        joined = np.flatnonzero(self._is_joined[ids])
        chosen = joined[uniform(key, np.arange(len(joined))) < share]
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
    def _of_prompts(self) -> Engine:
        return Engine.from_str(self._engine.to_str())  # which does not say that special tokens are encoded as text

    @cached_property
    def _spelling(self) -> Spelling:
        return Spelling(self._engine)

    @cached_property
    def _bytes_of_tokens(self) -> list[bytes]:
        return self._spelling.bytes_of_tokens()

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


def _rebuilt(content: str, names: Names, notes: tuple[str, ...]) -> Tokenizer:
    """Return a tokenizer that was sent to another process."""
    return Tokenizer(Engine.from_str(content), names, notes)
