"""YAML that somebody else may have written: one small document of plain values, where a number is what it looks like.

Refused, with its line: tags that are no plain value, several documents, a key given twice, aliases that unfold to more
than a recipe can hold, deep nesting, and numbers that YAML 1.1 reads otherwise than people.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dsv3_megatron.run.handed import read_text

YAML_BYTES = 1 << 18  # of a file; a resolved recipe has some 8 thousand, and Python's reader takes a second for these
_DEPTH = 32  # of lists and mappings in each other
_VALUES = 50_000  # of a document, with what its aliases stand for
_DIGITS = 300  # of a number: Python itself refuses thousands, which take long to read
_TAG = "tag:yaml.org,2002:"
_PLAIN = {_TAG + name for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


class _Loader(yaml.SafeLoader):
    """Reads what OmegaConf reads: 1e-4 is a number, and a date is the text that it is."""


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] not in ("timestamp", "float", "value")]
    for letter, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_TAG + "float", re.compile(rf"^(?:{_FLOAT.pattern})$"), list("-+0123456789."))


class _Wrong(ValueError):
    def __init__(self, place: Any, reason: str):
        super().__init__(reason)
        self.line = None if place is None else place.line + 1


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds, as plain values.

    Raises: OSError: it cannot be read, or is no regular file. ValueError: as :func:`parse_yaml`, or it is too large.
    """
    try:
        text = read_text(path, YAML_BYTES)
    except ValueError as error:
        raise ValueError(f"{path} {_unreadable(error)}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Any:
    """Return what a YAML text holds, as plain values.

    Raises: ValueError: one line that begins with ``name``, and the number of the line where there is one.
    """
    try:
        return _parse(text)
    except _Wrong as error:
        raise ValueError(f"{name}{'' if error.line is None else f':{error.line}'}: {error}") from None
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        said = " ".join((error.problem or error.context or "cannot be read").split())
        raise ValueError(f"{name}{'' if place is None else f':{place.line + 1}'}: is not YAML ({said})") from None
    except (yaml.YAMLError, ValueError) as error:  # a character that YAML forbids; what Python's own types refuse
        raise ValueError(f"{name}: is not YAML ({' '.join(str(error).split())[:200]})") from None


def _unreadable(error: ValueError) -> str:
    return "is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def _parse(text: str) -> Any:
    if len(text) > YAML_BYTES:
        raise _Wrong(None, f"has more than {YAML_BYTES:,} characters")
    _check_events(text)
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _count(root, {})
        for key, node in _scalars(root, "", set()):
            _check_number(key, node)
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _check_events(text: str) -> None:
    """Refuse, before anything calls itself, what is too deep, and what is no plain value."""
    depth = documents = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _Wrong(event.start_mark, "a second document begins here; a file holds one")
        elif isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _DEPTH:
                raise _Wrong(event.start_mark, f"lists and mappings lie more than {_DEPTH} deep in each other")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in ("!", *_PLAIN):
            raise _Wrong(
                event.start_mark,
                f"the tag {tag.replace(_TAG, '!!')[:80]} is not read; write a plain value, list or mapping",
            )


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many values a node stands for, those of its aliases each time; refuse a key that stands twice."""
    if (count := known.get(id(node))) is not None:
        if count == 0:
            raise _Wrong(node.start_mark, "it holds itself")
        return count
    known[id(node)] = 0
    total = 1
    if isinstance(node, yaml.SequenceNode):
        total += sum(_count(item, known) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Wrong(key.start_mark, "a key is a list or a mapping; write a name")
            if key.value in keys and key.tag != _TAG + "merge":
                raise _Wrong(key.start_mark, f"{key.value[:80]} is given twice; leave one of the two out")
            keys.add(key.value)
            total += 1 + _count(value, known)
    if total > _VALUES:
        raise _Wrong(node.start_mark, f"it stands for more than {_VALUES:,} values")
    known[id(node)] = total
    return total


def _scalars(node: yaml.Node, key: str, seen: set[int]) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """Yield the values without quotes that YAML takes for numbers, with their dotted keys, each once."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _scalars(value, f"{key}.{name.value}".lstrip("."), seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _scalars(value, f"{key}.{index}".lstrip("."), seen)
    elif isinstance(node, yaml.ScalarNode) and node.style is None and node.tag in (_TAG + "int", _TAG + "float"):
        yield key, node


def _check_number(key: str, node: yaml.ScalarNode) -> None:
    """Refuse a number that YAML 1.1 reads otherwise than people, by sixties, by eights and without an end, and one with
    letters (0x6a), which as a text is another."""
    text = node.value
    if len(text) > _DIGITS:
        raise _Wrong(node.start_mark, f"{key} is a number of {len(text):,} characters; write a shorter one")
    by_eights = re.fullmatch(r"[-+]?0[0-7_]+", text) is not None
    in_letters = re.fullmatch(r"[-+]?0[xb][0-9a-fA-F_]+", text) is not None  # a key of text would get other digits
    if ":" not in text and not by_eights and not in_letters:
        if "n" not in text.lower() and node.tag == _TAG + "float" and math.isinf(float(text.replace("_", ""))):
            raise _Wrong(node.start_mark, f"{key} = {text} is more than a number can be; write a smaller one")
        return
    read = yaml.load(text, Loader=_Loader)
    if by_eights and read == int(text):
        return
    name = key.rpartition(".")[2]
    fix = f"write {'' if name.isdecimal() else f'{name}: '}'{text}'"
    fix += (
        f", or {int(text)} without the zero in front" if by_eights else f", or {read}" if in_letters else " in quotes"
    )
    raise _Wrong(node.start_mark, f"{key} = {text} is the number {read} to YAML; {fix}")
