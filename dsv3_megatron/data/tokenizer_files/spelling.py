"""The bytes that each token of a vocabulary stands for, in the two ways in which published tokenizers write bytes."""

from __future__ import annotations

import re

from tokenizers import Tokenizer as Engine

_BYTE_FALLBACK = re.compile("<0x([0-9A-F]{2})>")  # a byte in SentencePiece's vocabularies
UTF8_BYTES = [byte for byte in range(256) if byte not in (0xC0, 0xC1) and byte < 0xF5]  # all that text is made of


class Spelling:
    """How a tokenizer spells bytes: byte-level BPE by a mark for each byte, SentencePiece by tokens such as <0x0A>."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.model = type(engine.model).__name__
        self.unknown: str | None = getattr(engine.model, "unk_token", None)
        # Asked of the parts: the whole as JSON takes seconds where there are 160,000 tokens.
        parts = [part.__getstate__() for part in (engine.pre_tokenizer, engine.normalizer) if part is not None]
        self.is_byte_level = any(b"ByteLevel" in part for part in parts)

    def token_of_byte(self, byte: int) -> int | None:
        """Return the token that stands for one byte and nothing else, None where there is none."""
        return self._engine.token_to_id(_BYTE_TO_MARK[byte] if self.is_byte_level else f"<0x{byte:02X}>")

    def bytes_of_tokens(self) -> list[bytes]:
        """Return the bytes of every id up to the largest; b"" for special tokens and for ids that no token has."""
        vocabulary = self._engine.get_vocab()
        added = self._engine.get_added_tokens_decoder()
        found = [b""] * (1 + max(vocabulary.values(), default=-1))
        for token, number in vocabulary.items():
            if number not in added:
                found[number] = self._bytes_of_token(token)
            elif not added[number].special:
                found[number] = added[number].content.encode()
        return found

    def text_of_normalised(self, text: str) -> str:
        """Return the text that a normaliser's result stands for."""
        if self.is_byte_level:
            spelled = bytes(_MARK_TO_BYTE[mark] for mark in text) if set(text) <= _MARK_TO_BYTE.keys() else None
            return text if spelled is None else spelled.decode("utf-8", "replace")
        return text.replace("\u2581", " ")

    def _bytes_of_token(self, token: str) -> bytes:
        if self.is_byte_level:
            # A token with another character in it is none that text can become.
            return bytes(_MARK_TO_BYTE[m] for m in token) if _MARK_TO_BYTE.keys() >= set(token) else token.encode()
        if byte := _BYTE_FALLBACK.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace("\u2581", " ").encode()


def _byte_marks() -> dict[int, str]:
    """Return the character by which byte-level BPE writes each byte: printable ones as they are (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


_BYTE_TO_MARK = _byte_marks()
_MARK_TO_BYTE = {mark: byte for byte, mark in _BYTE_TO_MARK.items()}
