"""Pickles that somebody else may have made, read as plain data: no class is looked up, and nothing is called.

Python's own unpickler calls what a file names, and reserves memory for what it announces. This one knows the
instructions that plain values, containers and objects are made of, and builds of an object a :class:`Record`: its
class by name, its arguments, its state. Whoever reads makes of it what it stands for, and checks the types.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

_BYTES_OF_A_CONTAINER = 8  # of a pickle, at least: what it describes must not be much larger than itself
PERSISTENT = "persistent"  # the name of a Record for what a pickle has elsewhere; its state says where
_FEW = 1 << 12  # containers of a pickle that is too small for such a rule


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names, as ``module.name``."""

    name: str


class Record:
    """An object of a pickle: ``name`` of its class or function, what that is given, and the state of the object."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...]):
        self.name, self.arguments = name, arguments
        self.state: Any = None


def read_pickle(data: bytes, allowed: Collection[str]) -> Any:
    """Return what a pickle holds: None, bool, int, float, str, tuple, list and dict (keys: str, int and
    Record), Record, Global.

    Args:
        allowed: the classes and functions that it may name, as ``module.name``.
    Raises: ValueError: it names another one, is torn, or holds instructions that such data does not need.
    """
    try:
        return _run(data, allowed)
    except (IndexError, TypeError, AttributeError):
        raise ValueError("it is no pickle of such data, or torn") from None


def _run(data: bytes, allowed: Collection[str]) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: list[Any] = []
    at, made, most = 0, 0, len(data) // _BYTES_OF_A_CONTAINER + _FEW
    while True:
        code = data[at]
        at += 1
        if code == 0x94:  # MEMOIZE
            memo.append(stack[-1])
        elif code == 0x68:  # BINGET
            stack.append(memo[data[at]])
            at += 1
        elif code == 0x6A:  # LONG_BINGET
            stack.append(memo[int.from_bytes(data[at : at + 4], "little")])
            at += 4
        elif code == 0x4B:  # BININT1
            stack.append(data[at])
            at += 1
        elif code == 0x4D:  # BININT2
            stack.append(data[at] | data[at + 1] << 8)
            at += 2
        elif code == 0x4A:  # BININT
            stack.append(int.from_bytes(_bytes(data, at, 4), "little", signed=True))
            at += 4
        elif code == 0x8A:  # LONG1
            size = data[at]
            stack.append(int.from_bytes(_bytes(data, at + 1, size), "little", signed=True))
            at += 1 + size
        elif code in (0x85, 0x86, 0x87):  # TUPLE1, TUPLE2, TUPLE3
            made += 1
            count = code - 0x84
            stack[-count:] = [tuple(stack[-count:])]
        elif code in (0x52, 0x81):  # REDUCE, NEWOBJ
            made += 1
            arguments = stack.pop()
            stack[-1] = Record(_named(stack[-1]), _typed(arguments, tuple))
        elif code == 0x62:  # BUILD
            state = stack.pop()
            if type(stack[-1]) is not Record or stack[-1].state is not None:
                raise ValueError("it gives a state to what has one, or can have none")
            stack[-1].state = state
        elif code == 0x7D:  # EMPTY_DICT
            made += 1
            stack.append({})
        elif code == 0x29:  # EMPTY_TUPLE
            stack.append(())
        elif code == 0x5D:  # EMPTY_LIST
            made += 1
            stack.append([])
        elif code == 0x28:  # MARK
            marks.append(len(stack))
        elif code in (0x75, 0x73):  # SETITEMS, SETITEM
            first = marks.pop() if code == 0x75 else len(stack) - 2
            keys, values = stack[first::2], stack[first + 1 :: 2]
            del stack[first:]
            if len(keys) != len(values) or not {type(key) for key in keys} <= {str, int, Record}:
                raise ValueError("it holds keys that such data does not have")
            _typed(stack[-1], dict).update(zip(keys, values))
        elif code == 0x65:  # APPENDS
            first = marks.pop()
            _typed(stack[first - 1], list).extend(stack[first:])
            del stack[first:]
        elif code == 0x61:  # APPEND
            value = stack.pop()
            _typed(stack[-1], list).append(value)
        elif code == 0x74:  # TUPLE
            made += 1
            first = marks.pop()
            stack[first:] = [tuple(stack[first:])]
        elif code in (0x8C, 0x58):  # SHORT_BINUNICODE, BINUNICODE
            width = 1 if code == 0x8C else 4
            size = int.from_bytes(_bytes(data, at, width), "little")
            stack.append(_bytes(data, at + width, size).decode("utf-8"))
            at += width + size
        elif code == 0x93:  # STACK_GLOBAL
            name = stack.pop()
            stack[-1] = _allowed(_typed(stack[-1], str), _typed(name, str), allowed)
        elif code == 0x63:  # GLOBAL
            middle = data.index(b"\n", at)
            end = data.index(b"\n", middle + 1)
            stack.append(_allowed(data[at:middle].decode("utf-8"), data[middle + 1 : end].decode("utf-8"), allowed))
            at = end + 1
        elif code in (0x88, 0x89):  # NEWTRUE, NEWFALSE
            stack.append(code == 0x88)
        elif code == 0x4E:  # NONE
            stack.append(None)
        elif code in (0x71, 0x72):  # BINPUT, LONG_BINPUT
            width = 1 if code == 0x71 else 4
            if int.from_bytes(_bytes(data, at, width), "little") != len(memo):
                raise ValueError("it numbers its objects otherwise than Python does")
            memo.append(stack[-1])
            at += width
        elif code == 0x51:  # BINPERSID
            made += 1
            given = Record(PERSISTENT, ())
            given.state = stack[-1]
            stack[-1] = given
        elif code == 0x47:  # BINFLOAT
            stack.append(struct.unpack(">d", _bytes(data, at, 8))[0])
            at += 8
        elif code == 0x80:  # PROTO
            at += 1
        elif code == 0x95:  # FRAME
            at += 8
        elif code == 0x2E:  # STOP
            if len(stack) != 1 or at != len(data):
                raise ValueError("it does not end with one object")
            return stack[0]
        else:
            raise ValueError(f"it holds an instruction that such data does not need (0x{code:02x})")
        if made > most:
            raise ValueError("it describes much more than it is long")


def _bytes(data: bytes, start: int, count: int) -> bytes:
    found = data[start : start + count]
    if len(found) < count:
        raise ValueError("it is torn")
    return found


def _typed(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise ValueError(f"it has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _named(value: Any) -> str:
    return str(_typed(value, Global).name)


def _allowed(module: str, name: str, allowed: Collection[str]) -> Global:
    if f"{module}.{name}" not in allowed:
        raise ValueError(f"it names {module}.{name}, and nothing but data belongs there")
    return Global(f"{module}.{name}")
