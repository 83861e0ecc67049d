"""How a model calls the tokens that begin and end a document and fill a sequence up: by its own files, else by name.

A tokenizer.json names no roles. The files beside it do, and the first that says something of a role decides:
``tokenizer_config.json``, ``special_tokens_map.json``, then the ids of ``config.json`` and ``generation_config.json``
(of several end ids the first). Where none does, the names that published tokenizers use are looked for.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer as Engine

from dsv3_megatron.run.handed import inside, read_json_file, read_text
from parallel.errors import DataError

BEGIN, END, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
SPECIAL = (BEGIN, END, PAD, FIM_HOLE, FIM_BEGIN, FIM_END)
# What other published tokenizers call the same: SentencePiece's, Llama 3's, GPT-2's, StarCoder's, Qwen's, Kimi's and
# GLM's names.
ALSO_CALLED = {
    BEGIN: ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "[BOS]", "<sop>"),
    END: ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]", "<eop>"),
    PAD: ("<pad>", "<|pad|>", "[PAD]"),
    FIM_BEGIN: ("<fim_prefix>", "<|fim_prefix|>"),
    FIM_HOLE: ("<fim_suffix>", "<|fim_suffix|>"),
    FIM_END: ("<fim_middle>", "<|fim_middle|>"),
}

CONFIG = "tokenizer_config.json"
_BYTES = 1 << 24  # of a file beside a tokenizer; published ones have a tenth
Role = Literal["begin", "end", "pad"]
ROLES: dict[Role, tuple[str, str]] = {
    "begin": ("bos_token", BEGIN),
    "end": ("eos_token", END),
    "pad": ("pad_token", PAD),
}


@dataclass(frozen=True)
class Names:
    """The tokens of three roles, by name; None where a model has none.

    Attributes:
        origin: role -> the file that says so; absent where the name is one of those known here.
        chat_template: how the model writes conversations, kept for an export; nothing here applies it.
    """

    begin: str | None
    end: str | None
    pad: str | None
    origin: dict[Role, str] = field(default_factory=dict, compare=False)
    chat_template: Any = field(default=None, compare=False)

    def told(self) -> str:
        """Return which tokens begin and end documents, and who says so."""

        def of(role: Role) -> str:
            name = getattr(self, role)
            return "none" if name is None else f"{name} ({self.origin.get(role, 'a known name')})"

        return f"documents begin with {of('begin')}, end with {of('end')}, and are filled up with {of('pad')}"

    def as_config(self) -> dict[str, Any]:
        """Return what ``tokenizer_config.json`` says of them."""
        found: dict[str, Any] = {key: getattr(self, role) for role, (key, _) in ROLES.items()}
        return found if self.chat_template is None else found | {"chat_template": self.chat_template}


def known_token(engine: Engine, name: str) -> str | None:
    """Return the token of a tokenizer that is called ``name`` (one of ``SPECIAL``) or as others call it."""
    return next((n for n in (name, *ALSO_CALLED[name]) if engine.token_to_id(n) is not None), None)


def known_names(engine: Engine) -> Names:
    """Return the names of a tokenizer that has no other files."""
    begin, end, pad = (known_token(engine, name) for _, name in ROLES.values())
    return Names(begin, end, pad)


def names_beside(path: Path, engine: Engine) -> Names:
    """Return the names that the files beside a tokenizer file give.

    Raises: DataError: one of them cannot be read, or is of another tokenizer.
    """
    found: dict[Role, str | None] = {}
    origin: dict[Role, str] = {}
    configuration = _read(path.with_name(CONFIG))
    _check_added_tokens(path, engine, configuration)
    for file, content in (
        (CONFIG, configuration),
        ("special_tokens_map.json", _read(path.with_name("special_tokens_map.json"))),
    ):
        for role, (key, _) in ROLES.items():
            if role in found or key not in content:
                continue
            name = _token_name(content[key], path.with_name(file), key)
            if name is None and role == "end":
                continue  # documents must end: the next file may know how
            if name is not None and engine.token_to_id(name) is None:
                raise DataError(
                    f"{path.with_name(file)}: {key} = {name} is no token of {path.name}; correct one of them"
                )
            found[role], origin[role] = name, file
    for file in ("config.json", "generation_config.json"):
        content = _of_text_model(_read(path.with_name(file)))
        for role, (key, _) in ROLES.items():
            number = content.get(f"{key}_id")
            number = number[0] if isinstance(number, list) and number else number
            if role in found or type(number) is not int or number < 0:  # -1: some write it for none
                continue
            name = engine.id_to_token(number) if number < 1 << 32 else None
            if name is None:
                raise DataError(
                    f"{path.with_name(file)}: {key}_id = {number} is no token of {path.name}; name the token as {key} "
                    f"in {path.with_name(CONFIG)}"
                )
            found[role], origin[role] = name, file
    known = known_names(engine)
    template = configuration.get("chat_template")
    if template is None and os.path.lexists(separate := path.with_name("chat_template.jinja")):
        try:
            template = read_text(inside(separate.parent, separate.name), _BYTES)
        except (OSError, ValueError) as error:
            raise DataError(f"{separate} cannot be read ({error}); fetch it again, or remove it") from None
    begin, end, pad = (found.get(role, getattr(known, role)) for role in ROLES)
    return Names(begin, end, pad, origin, template)


def vocabulary_beside(path: Path) -> int | None:
    """Return the rows of the embedding that a config.json beside a tokenizer file names, None where there is none."""
    rows = _of_text_model(_read(path.with_name("config.json"))).get("vocab_size")
    return rows if type(rows) is int else None


def read_configuration(path: Path) -> dict[str, Any]:
    """Return the tokenizer_config.json beside a tokenizer file, {} where there is none."""
    return _read(path.with_name(CONFIG))


def _read(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        return {}
    try:
        content = read_json_file(inside(path.parent, path.name), _BYTES)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again, or remove it") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no object; fetch it again, or remove it")
    return content


def _of_text_model(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a config.json that describes the text model: models that also see keep it inside."""
    inside = config.get("text_config")
    return {**config, **inside} if isinstance(inside, dict) else config


def _token_name(value: object, path: Path, key: str) -> str | None:
    """Return a token's name as text, or as the object that transformers saves."""
    name = value.get("content") if isinstance(value, dict) else value
    if name is not None and not isinstance(name, str):
        raise DataError(f"{path}: {key} = {value} is no token; write its text")
    return name


def is_id(key: str) -> bool:
    """Return whether a key of an object is a token's id."""
    return re.fullmatch("[0-9]{1,9}", key) is not None


def _check_added_tokens(path: Path, engine: Engine, configuration: dict[str, Any]) -> None:
    """Refuse a tokenizer_config.json of another tokenizer: it lists ids with their tokens."""
    listed = configuration.get("added_tokens_decoder")
    for number, token in (listed if isinstance(listed, dict) else {}).items():
        name = _token_name(token, path.with_name(CONFIG), f"added_tokens_decoder.{number}")
        found = engine.id_to_token(int(number)) if is_id(number) else None
        if found is None or found != name:
            raise DataError(
                f"{path.with_name(CONFIG)} calls token {number} {name}, {path.name} "
                f"{'has none of that id' if found is None else f'calls it {found}'}; they do not belong together"
            )
