"""Damage that files meet, and what somebody would write into them on purpose."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

Mutation = Callable[[bytes, Sequence[bytes], random.Random], bytes]

# Where sizes, counts and offsets break: each as two, four and eight bytes.
INTEGERS = (0, 1, -1, 255, 2**15, 2**16 - 1, 2**31 - 1, -(2**31), 2**32 - 1, 2**40, 2**63 - 1, -(2**63))
NAMES = (
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "/dev/zero",
    "a/../../b",
    "nul\0",
    "\x1b[2J\x1b]0;x\x07",
    "x" * 5000,
    "\ud7ff",
)
NUMBERS = ("null", "true", "false", "0", "-1", "1", "0.5", "1e400", "-1e400", "NaN", "Infinity", "1" + "0" * 400, '"7"',
           str(2**31), str(2**63), str(2**64), str(10**9))  # fmt: skip
SHAPES = (
    "[]",
    "{}",
    "[[]]",
    '{"": 0}',
    "[" * 50_000 + "]" * 50_000,
    "[" * 50_000,
    '{"a":' * 20_000 + "0" + "}" * 20_000,
)
_LAUGHS = "b: &b [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "\n".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in pairwise("bcdefghijk")
)
YAML_LINES = ("---", "a: &a [*a]", "<<: *x", "!!python/object/apply:os.system [true]", "? [1]", "\t- x", "%YAML 9.9",
              "x: !!binary ====", "k: {k: {k: [", "'", "a: 1\na: 2", "${oc.env:HOME}", "#", "\0", "... \n--- 2", ": ",
              _LAUGHS)  # fmt: skip


def binary(data: bytes, seeds: Sequence[bytes], dice: random.Random) -> bytes:
    """Damage bytes: cut, lengthen, flip, overwrite with numbers at which sizes break, copy, remove, join two files."""
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        data = dice.choice(_BINARY)(data, seeds, dice)
    return data


def json_text(data: bytes, seeds: Sequence[bytes], dice: random.Random) -> bytes:
    """Change a JSON text: a value for another of any type or size, a key removed, doubled or renamed; or its bytes."""
    if dice.random() < 0.2:
        return binary(data, seeds, dice)
    try:
        tree = json.loads(data)
    except ValueError:
        return binary(data, seeds, dice)
    replaced: dict[str, str] = {}
    for _ in range(dice.choice((1, 1, 2))):
        tree = _changed(tree, dice, replaced)
    text = json.dumps(tree, indent=dice.choice((None, 1)))
    for mark, raw in replaced.items():
        text = text.replace(json.dumps(mark), raw)
    return text.encode("utf-8", "surrogatepass")


def json_lines(data: bytes, seeds: Sequence[bytes], dice: random.Random) -> bytes:
    """Change one line of a file with a JSON value a line, or the order, ends and bytes of its lines."""
    lines = data.splitlines(keepends=True) or [b""]
    place = dice.randrange(len(lines))
    kind = dice.randrange(5)
    if kind < 3:
        lines[place] = json_text(lines[place].rstrip(b"\n"), seeds, dice) + b"\n"
    elif kind == 3:
        lines.insert(
            place, dice.choice((b"\n", b"null\n", b"\0\n", b"[]\n", b"{\n", b"{}", b"\xff\xfe\n", lines[place]))
        )
    else:
        return binary(data, seeds, dice)
    return b"".join(lines)


def yaml_text(data: bytes, seeds: Sequence[bytes], dice: random.Random) -> bytes:
    """Change a YAML text: a value, an indent, a line that YAML reads in a way of its own; or its bytes."""
    lines = data.decode("utf-8", "replace").splitlines() or [""]
    for _ in range(dice.choice((1, 1, 2, 3))):
        place = dice.randrange(len(lines))
        line, kind = lines[place], dice.randrange(7)
        if kind == 0:
            lines.insert(place, dice.choice(YAML_LINES))
        elif kind == 1:
            lines.insert(place, line)
        elif kind == 2 and len(lines) > 1:
            del lines[place]
        elif kind == 3:
            lines[place] = " " * dice.randrange(5) + line.lstrip()
        elif kind == 4:
            return binary("\n".join(lines).encode(), seeds, dice)
        else:
            value = dice.choice(NUMBERS + SHAPES + tuple(json.dumps(name) for name in NAMES) + YAML_LINES)
            lines[place] = line.partition(":")[0] + ": " + value
    return "\n".join(lines).encode()


def _changed(tree: Any, dice: random.Random, replaced: dict[str, str]) -> Any:
    """Return the tree with one place changed; raw text that JSON's writer would not write stands behind a mark."""
    parents = list(_parents(tree))
    if not parents or dice.random() < 0.05:
        return _mark(dice, replaced)
    parent = dice.choice(parents)
    keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
    key = dice.choice(keys)
    kind = dice.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[dice.choice((*NAMES, *map(str, keys)))] = parent.pop(key)
    elif kind == 2 and isinstance(parent, list):
        parent.extend([parent[key]] * dice.choice((1, 3, 2000)))
    elif kind == 3:
        other = dice.choice(parents)
        parent[key] = json.loads(json.dumps(other)) if not replaced else None
    else:
        parent[key] = _mark(dice, replaced)
    return tree


def _mark(dice: random.Random, replaced: dict[str, str]) -> str:
    mark = f"mark {len(replaced)}"
    replaced[mark] = dice.choice((dice.choice(NUMBERS), dice.choice(SHAPES), json.dumps(dice.choice(NAMES))))
    return mark


def _parents(tree: Any) -> list[Any]:
    """Return every list and mapping of the tree that is not empty."""
    found, left = [], [tree]
    while left:
        node = left.pop()
        if isinstance(node, (dict, list)) and node:
            found.append(node)
            left += node.values() if isinstance(node, dict) else node
    return found


def _cut(data: bytes, seeds: Sequence[bytes], dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data) + 1)]


def _longer(data: bytes, seeds: Sequence[bytes], dice: random.Random) -> bytes:
    more = dice.choice((1, 3, 8, 4096))
    return data + dice.choice((b"\0" * more, dice.randbytes(more), data))


def _flip(data: bytes, seeds: Sequence[bytes], dice: random.Random) -> bytes:
    changed = bytearray(data or b"\0")
    changed[_place(changed, dice)] ^= 1 << dice.randrange(8)
    return bytes(changed)


def _run(data: bytes, seeds: Sequence[bytes], dice: random.Random) -> bytes:
    start, length = dice.randrange(len(data) + 1), dice.choice((1, 2, 8, 64))
    return data[:start] + dice.choice((b"\0", b"\xff", b"\x7f"))[:1] * length + data[start + length :]


def _integer(data: bytes, seeds: Sequence[bytes], dice: random.Random) -> bytes:
    size = dice.choice((2, 4, 8))
    value = (dice.choice(INTEGERS) % (1 << 8 * size)).to_bytes(size, dice.choice(("little", "little", "big")))
    start = _place(data or b"\0", dice)
    start -= start % size if dice.random() < 0.5 else 0
    return data[:start] + value + data[start + size :]


def _remove(data: bytes, seeds: Sequence[bytes], dice: random.Random) -> bytes:
    start, length = dice.randrange(len(data) + 1), dice.choice((1, 4, 8, 100))
    return data[:start] + data[start + length :]


def _copy(data: bytes, seeds: Sequence[bytes], dice: random.Random) -> bytes:
    start, to, length = dice.randrange(len(data) + 1), dice.randrange(len(data) + 1), dice.choice((1, 8, 64, 1000))
    return data[:to] + data[start : start + length] + data[to:]


def _join(data: bytes, seeds: Sequence[bytes], dice: random.Random) -> bytes:
    other = dice.choice(seeds)
    return data[: dice.randrange(len(data) + 1)] + other[dice.randrange(len(other) + 1) :]


def _nothing(data: bytes, seeds: Sequence[bytes], dice: random.Random) -> bytes:
    return b""


def _place(data: bytes | bytearray, dice: random.Random) -> int:
    """Return a place, as often in the first hundred bytes, where headers are, as anywhere."""
    return dice.randrange(min(len(data), 100) if dice.random() < 0.5 else len(data))


_BINARY: tuple[Mutation, ...] = (
    _cut, _cut, _longer, _flip, _flip, _flip, _run, _integer, _integer, _integer, _remove, _copy, _join, _nothing,
)  # fmt: skip
