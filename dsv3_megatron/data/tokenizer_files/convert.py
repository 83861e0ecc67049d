"""Tokenizer files that are no tokenizer.json: converted by transformers, and compared with the library they are of.

No code that comes with a model is run. A tiktoken file does not say how text is split before merging; for Kimi and
Moonlight, whose Python files say it, that pattern is here, and other files are refused.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, normalizers
from tokenizers import Tokenizer as Engine

from dsv3_megatron.data.tokenizer_files.bounds import MOST_TOKENS
from dsv3_megatron.data.tokenizer_files.names import CONFIG, is_id, read_configuration
from dsv3_megatron.run.handed import inside, read_bytes
from dsv3_megatron.run.reasons import why_unread
from parallel.errors import DataError, PackageError

_RANK = re.compile(rb"[A-Za-z0-9+/=]+ \d+\r?\n?")
_UPPER, _LOWER = (
    rf"[{kinds}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for kinds in (r"\p{Lu}\p{Lt}", r"\p{Ll}")
)  # what a word begins and goes on with, Chinese apart
_BEFORE, _AFTER = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_PARTS = (
    r"[\p{Han}]+",
    f"{_BEFORE}{_UPPER}*{_LOWER}+{_AFTER}",
    f"{_BEFORE}{_UPPER}+{_LOWER}*{_AFTER}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)
KIMI_SPLIT = "|".join(KIMI_PARTS)
_KIMI_MODULES = ("tokenization_kimi.", "tokenization_moonshot.")  # as auto_map names the Python file


def convert(path: Path, probe: str) -> Engine:
    """Return the tokenizer of a tiktoken or SentencePiece file, whose ids of ``probe`` are those of its own library.

    Raises: DataError: it cannot be read, or converted exactly. PackageError: a package is missing.
    """
    try:
        data = read_bytes(path)
    except (OSError, ValueError) as error:
        raise DataError(f"tokenizer {path} cannot be read ({why_unread(error)}); name another") from None
    first = data[: 1 << 16].partition(b"\n")[0]
    converter = _from_tiktoken if _RANK.fullmatch(first) else _from_sentencepiece
    engine, reference = converter(path, data, probe)
    ours = engine.encode(probe, add_special_tokens=False).ids
    if ours != reference:
        place = next((n for n, pair in enumerate(zip(ours, reference)) if pair[0] != pair[1]), len(reference))
        raise DataError(
            f"tokenizer {path} cannot be converted exactly: token {place} of a test text is another one in the library "
            f"it is of; convert it to {path.with_name('tokenizer.json')} by the model's own means"
        )
    return engine


def _needing(path: Path, kind: str, packages: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except ImportError as error:
        raise PackageError(
            f"tokenizer {path} is a {kind} file, and converting it needs packages ({error}); pip install {packages}"
        ) from None


def _from_tiktoken(path: Path, data: bytes, probe: str) -> tuple[Engine, list[int]]:
    def load() -> tuple[Any, Any]:
        import tiktoken  # optional packages, seconds to import: for such files alone
        from transformers.convert_slow_tokenizer import TikTokenConverter

        return tiktoken, TikTokenConverter

    configuration = read_configuration(path)
    _check_split(path, configuration)
    tiktoken, converter = _needing(path, "tiktoken", "tiktoken transformers", load)
    ranks = _read_ranks(path, data)

    class Converter(converter):  # type: ignore[misc, valid-type]
        @staticmethod
        def load_tiktoken_bpe(_: str) -> dict[bytes, int]:
            # tiktoken's own reader keeps files by their path, and gives the old one when another takes its place
            return ranks

    engine = Converter(vocab_file=str(path), pattern=KIMI_SPLIT).converted()
    tokens = _added_tokens(path, configuration, len(ranks))
    for token in tokens.values():
        (engine.add_special_tokens if token.special else engine.add_tokens)([token])
    for number, token in tokens.items():
        if engine.token_to_id(token.content) != number:
            raise DataError(f"{path.with_name(CONFIG)}: token {number} = {token.content} is in {path.name} already")
    engine.encode_special_tokens = True
    special = {token.content: number for number, token in tokens.items()}
    original = tiktoken.Encoding(path.name, pat_str=KIMI_SPLIT, mergeable_ranks=ranks, special_tokens=special)
    return engine, original.encode_ordinary(probe)


def _check_split(path: Path, configuration: dict[str, Any]) -> None:
    """Raise DataError unless a tiktoken file splits text as Kimi's do."""
    named = configuration.get("auto_map")
    modules = str(named.get("AutoTokenizer") if isinstance(named, dict) else named)
    refused = DataError(
        f"tokenizer {path} does not say how text is split, and only Kimi's and Moonlight's way is known here "
        f"({CONFIG} beside it does not name theirs); convert it to tokenizer.json by the model's own means"
    )
    if not any(module in modules for module in _KIMI_MODULES):
        raise refused
    for source in path.parent.glob("tokenization_*.py"):  # read, never run
        try:
            text = read_bytes(inside(path.parent, source.name)).decode(errors="replace")
        except (OSError, ValueError):
            raise refused from None
        if "pat_str" in text and not all(part in text for part in KIMI_PARTS):
            raise refused


def _read_ranks(path: Path, data: bytes) -> dict[bytes, int]:
    """Return the merge rank of every token of a tiktoken file, which is its id."""
    try:
        pairs = [line.split() for line in data.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise DataError(f"tokenizer {path} cannot be read ({error}); fetch it again") from None
    if sorted(ranks.values()) != list(range(len(pairs))):
        raise DataError(f"tokenizer {path} has ranks that are missing or given twice; fetch it again")
    if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise DataError(f"tokenizer {path} has no token for byte 0x{lacking[0]:02X}; fetch it again")
    return ranks


def _added_tokens(path: Path, configuration: dict[str, Any], first: int) -> dict[int, AddedToken]:
    """Return the tokens after the ranks, without a hole: Kimi's Python names the ids that are not listed like this."""
    listed = configuration.get("added_tokens_decoder")
    if not isinstance(listed, dict) or not listed:
        raise DataError(f"{path.with_name(CONFIG)} lists no added_tokens_decoder, and without it no document can end")
    if odd := [number for number in listed if not is_id(number)]:
        raise DataError(f"{path.with_name(CONFIG)}: {odd[0][:40]!r} of added_tokens_decoder is no id of a token")
    given = {int(number): token for number, token in listed.items()}
    if before := [number for number in given if number < first]:
        raise DataError(
            f"{path.with_name(CONFIG)}: token {before[0]} of added_tokens_decoder is one of the {first} tokens of "
            f"{path.name}; they do not belong together"
        )
    if max(given) >= MOST_TOKENS:
        raise DataError(
            f"{path.with_name(CONFIG)}: token {max(given)} of added_tokens_decoder is above {MOST_TOKENS:,}"
        )
    found = {}
    for number in range(first, max(given) + 1):
        token = given.get(number, {"content": f"<|reserved_token_{number}|>", "special": True})
        name = token.get("content") if isinstance(token, dict) else None
        if not isinstance(name, str) or not name or not isinstance(special := token.get("special", True), bool):
            raise DataError(f"{path.with_name(CONFIG)}: token {number} of added_tokens_decoder has no content")
        found[number] = AddedToken(name, special=special, normalized=False)
    return found


def _from_sentencepiece(path: Path, data: bytes, probe: str) -> tuple[Engine, list[int]]:
    def load() -> tuple[Any, Any, Any]:
        import sentencepiece  # optional packages, seconds to import: for such files alone
        from google.protobuf import message  # noqa: F401  transformers reads the file with it
        from transformers.convert_slow_tokenizer import SentencePieceExtractor, SpmConverter

        return sentencepiece, SentencePieceExtractor, SpmConverter

    packages = "sentencepiece protobuf transformers"
    sentencepiece, extractor_of, converter = _needing(path, "SentencePiece", packages, load)
    try:
        original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise DataError(f"tokenizer {path} cannot be read ({' '.join(str(error).split())}); fetch it again") from None
    extractor = extractor_of(str(path))
    found = extractor.extract(None)
    engine = converter.build_tokenizer_from_spm_proto(extractor.proto, found["vocab"], found.get("merges"))
    engine.add_tokens(found["additional_special_tokens"])
    if extractor.proto.normalizer_spec.add_dummy_prefix:  # the converter leaves it to each model's own class
        engine.normalizer = normalizers.Sequence([engine.normalizer, normalizers.Prepend("\u2581")])
        engine.decoder = decoders.Sequence([engine.decoder, decoders.Strip(" ", 1, 0)])
    engine.encode_special_tokens = True
    return engine, original.encode(probe)
