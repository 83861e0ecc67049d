"""A tokenizer file -> the library's tokenizer that encodes whole texts, the same way every time.

What a tokenizer.json keeps for a model in use (truncation, padding, BPE dropout) is switched off, and said. What would
lose text in silence is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Engine

from dsv3_megatron.data.tokenizer_files.bounds import MOST_TOKENS, check_bounds
from dsv3_megatron.data.tokenizer_files.convert import convert
from dsv3_megatron.data.tokenizer_files.names import vocabulary_beside
from dsv3_megatron.data.tokenizer_files.spelling import UTF8_BYTES, Spelling
from dsv3_megatron.run.handed import inside, parse_json, read_text
from parallel.errors import DataError

TOKENIZER = "tokenizer.json"
FILES = (TOKENIZER, "tiktoken.model", "tokenizer.model")  # the first that a folder has is read
_POINTER = "version https://git-lfs."
# Letters with and apart from their accents, ligatures, full width, blanks in a row and at the end, line breaks, rare
# characters: what a normaliser changes, and what a vocabulary without bytes does not know.
PROBE = (
    "Def f(X):\n\treturn  'caf\u00e9 cafe\u0301'   # \ufb01ne \uff21\uff22\u2460 1234567\r\n\n"
    "\u4f60\u597d\uff0cworld\u3002 \u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0e2a\u0e27\u0e31\u0e2a"
    "\u0e14\u0e35 na\u00efve It's I'LL \U0001f600\U0001f469\u200d\U0001f52c \u00a0\u2028\ufeff\u0001\U000e0001  x  \n "
)


def tokenizer_file(given: str | Path) -> Path:
    """Return the tokenizer file that is meant: ``given``, or in a folder the first of ``FILES``.

    Raises: DataError: there is none.
    """
    path = Path(given)
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"tokenizer {path} does not exist; name a Hugging Face tokenizer.json, or its folder")
        return path
    for name in FILES:
        if os.path.lexists(path / name):
            try:
                return inside(path, name)
            except ValueError as error:
                raise DataError(f"tokenizer {path}: {error}; name the file itself") from None
    raise DataError(f"tokenizer {path} holds none of {', '.join(FILES)}; name a folder that does")


def has_files_beside(path: Path) -> bool:
    """Return whether the files beside a tokenizer file are its own: it has the name that published ones have.

    A folder may hold many under names of their own, and one tokenizer_config.json says nothing of those.
    """
    return path.name == TOKENIZER or path.suffix == ".model"


def read_engine(path: Path) -> tuple[Engine, tuple[str, ...]]:
    """Return the tokenizer of a file, and a line for each thing stored in it that is switched off.

    Raises: DataError: it cannot be read, or its ids are not those that it says. PackageError: it needs a package to be
    converted.
    """
    if path.suffix == ".model":
        engine = convert(path, PROBE)
        try:
            check_bounds(json.loads(engine.to_str()))
        except ValueError as error:
            raise DataError(f"tokenizer {path} is refused ({error}); name another") from None
        return engine, ()
    try:
        text = read_text(path)
        if text.startswith(_POINTER):
            raise DataError(
                f"tokenizer {path} is a pointer of Git LFS to the file; fetch the file itself: git lfs pull"
            )
        content = parse_json(text)
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            raise ValueError("it holds no tokenizer's model")
        check_bounds(content)
        off = _switch_off(content)
        engine = Engine.from_str(json.dumps(content))  # not the text, of which two readers may see different things
    except (DataError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and where it panics not even that
        raise DataError(f"tokenizer {path} cannot be read ({error}); name a Hugging Face tokenizer.json") from None
    _check_ids(path, engine, content)
    return engine, tuple(f"tokenizer {path}: {line}" for line in off)


def _check_ids(path: Path, engine: Engine, content: dict[str, Any]) -> None:
    """Raise DataError where an id has two tokens, or an added token another id than its file says."""
    tokens = engine.get_vocab()
    names = {number: name for name, number in tokens.items()}
    if len(names) < len(tokens):
        other, number = next((name, number) for name, number in tokens.items() if names[number] != name)
        first, second = sorted((other, names[number]))
        raise DataError(
            f"tokenizer {path}: tokens {first!r} and {second!r} both have the id {number}; give each its own"
        )
    vocabulary = content["model"].get("vocab")
    for token in content.get("added_tokens") or ():
        name, number = token["content"], token["id"]
        if (found := engine.token_to_id(name)) == number:
            continue
        if isinstance(vocabulary, dict) and name in vocabulary:
            why = f"in its vocabulary it is token {vocabulary[name]}; write that"
        elif number in names:
            why = f"that id is {names[number]!r}; give it another"
        else:
            why = "ids before it have no token; give them tokens of their own"
        raise DataError(
            f"tokenizer {path} says that {name} is token {number}, but the tokenizers library reads {found}: {why}"
        )


def _switch_off(content: dict[str, Any]) -> list[str]:
    """Take out of a tokenizer.json what changes the tokens of a text; return a line for each."""
    lines = []
    if truncation := content.get("truncation"):
        content["truncation"] = None
        lines.append(
            f"truncation to {truncation.get('max_length')} tokens is switched off, documents are encoded whole"
        )
    if content.get("padding"):
        content["padding"] = None
        lines.append("padding is switched off, documents are as long as they are")
    if dropout := content["model"].get("dropout"):
        content["model"]["dropout"] = None
        lines.append(f"BPE dropout of {dropout} is switched off, a text has the same tokens every time")
    return lines


def rows_of(engine: Engine) -> int:
    """Return the largest id and one: the rows that a model needs. There may be fewer tokens, for ids may have holes."""
    return 1 + max(engine.get_vocab().values(), default=-1)


def check_size(path: Path, engine: Engine) -> tuple[str, ...]:
    """Return a line where ids have holes.

    Raises: DataError: there are more than a model can have, or than the config.json beside the file says.
    """
    size = rows_of(engine)
    if not size:
        raise DataError(f"tokenizer {path} has no tokens; name another")
    if size > MOST_TOKENS:
        raise DataError(
            f"tokenizer {path} has {engine.get_vocab_size():,} tokens, but ids up to {size - 1:,}: a model has a row "
            f"for every id, {MOST_TOKENS:,} at most; renumber its tokens"
        )
    rows = vocabulary_beside(path) if has_files_beside(path) else None
    if rows is not None and size > rows:
        raise DataError(
            f"{path.with_name('config.json')}: vocab_size = {rows}, but {path.name} has ids up to {size - 1}; "
            "they do not belong together"
        )
    count = engine.get_vocab_size()
    return (f"tokenizer {path}: {count:,} tokens have ids up to {size - 1:,}; that many rows count",) * (count < size)


def mark_special(engine: Engine, names: Iterable[str | None]) -> None:
    """Make tokens special that have a role but are kept as text: a document that spells one must not end there."""
    special = {token.content for token in engine.get_added_tokens_decoder().values() if token.special}
    for name in names:
        if name is not None and name not in special:
            engine.add_special_tokens([AddedToken(name, special=True, normalized=False)])


def check_text(path: Path, engine: Engine, spelling: Spelling, spelled: list[bytes]) -> tuple[str, ...]:
    """Return lines where text comes back changed from a tokenizer.

    ``spelled``: the bytes of every token.
    Raises: DataError: characters are lost, or a text can spell a special token.
    """
    if lacking := [byte for byte in UTF8_BYTES if spelling.token_of_byte(byte) is None]:
        count = "no tokens for bytes"
        if len(lacking) < len(UTF8_BYTES):
            count = f"no token for {len(lacking)} of the {len(UTF8_BYTES)} bytes of text, such as 0x{lacking[0]:02X}"
        unknown = f"becomes {spelling.unknown}" if spelling.unknown else "is lost"
        raise DataError(
            f"tokenizer {path} ({spelling.model}) has {count}: what it does not know {unknown}; use byte-level BPE, or "
            "SentencePiece with byte fallback"
        )
    _check_special_text(path, engine)
    found = b"".join(spelled[number] for number in engine.encode(PROBE, add_special_tokens=False).ids)
    if _same(found, PROBE):
        return _blanks_lost(path, engine, spelled)
    normalised = PROBE
    if engine.normalizer is not None:
        normalised = spelling.text_of_normalised(engine.normalizer.normalize_str(PROBE))
    if not _same(found, normalised):
        raise DataError(
            f"tokenizer {path} ({spelling.model}) loses text: of {len(PROBE.encode())} bytes of a test text come back "
            f"{len(found)}; use byte-level BPE, or SentencePiece with byte fallback"
        )
    kind = ", ".join(_kinds(json.loads(engine.normalizer.__getstate__())))
    return (
        f"tokenizer {path}: its normalizer ({kind}) changes text before it is encoded; what is trained on is the "
        "changed text, and decoding does not give the original back",
    )


def _same(found: bytes, text: str) -> bool:
    """Return whether bytes are a text, or that text after the blank that SentencePiece puts first."""
    return found in (text.encode(), b" " + text.encode())


def _kinds(normalizer: dict[str, Any]) -> list[str]:
    inner = normalizer.get("normalizers")
    return [kind for part in inner for kind in _kinds(part)] if inner else [normalizer["type"]]


def _blanks_lost(path: Path, engine: Engine, spelled: list[bytes]) -> tuple[str, ...]:
    """Return a line where a token that text may spell takes the blanks beside it away."""
    tokens = [t.content for t in engine.get_added_tokens_decoder().values() if not t.special]
    texts = [f"a {token} b" for token in tokens]
    found = engine.encode_batch_fast(texts, add_special_tokens=False)
    lossy = [
        token
        for token, text, encoding in zip(tokens, texts, found)
        if not _same(b"".join(spelled[number] for number in encoding.ids), text)
    ]
    more = f" and {len(lossy) - 1} more" if len(lossy) > 1 else ""
    return (f"tokenizer {path}: blanks beside {lossy[0]}{more} are lost",) if lossy else ()


def _check_special_text(path: Path, engine: Engine) -> None:
    """Refuse a tokenizer to which text is a special token: a document that spells it would end there."""
    special = {number: token for number, token in engine.get_added_tokens_decoder().items() if token.special}
    texts = engine.encode_batch_fast([token.content for token in special.values()], add_special_tokens=False)
    for (number, token), encoding in zip(special.items(), texts):
        if number in encoding.ids:
            raise DataError(
                f"tokenizer {path} encodes the text {token.content} as the special token of that name: what a document "
                "says could end it; use a tokenizer whose special tokens no text can spell"
            )
