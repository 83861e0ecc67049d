"""What a check finds, and what it is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["PASS", "FAIL", "SKIPPED"]


@dataclass(frozen=True)
class Outcome:
    """What one row of the table says; ``facts`` are the numbers behind it, JSON's types only."""

    status: Status
    said: str
    facts: dict[str, Any] = field(default_factory=dict)


Outcomes = Iterator[Outcome]


def judged(good: bool, said: str, **facts: Any) -> Outcome:
    """Return PASS or FAIL."""
    return Outcome("PASS" if good else "FAIL", said, facts)


def skipped(why: str, **facts: Any) -> Outcome:
    """Return SKIPPED with its reason."""
    return Outcome("SKIPPED", why, facts)


@dataclass(frozen=True)
class Row:
    """A row of the table and of the JSON file."""

    name: str
    status: Status
    said: str
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)
    log: str | None = None  # file with what the process printed, where there was one

    def as_json(self) -> dict[str, Any]:
        """Return the row for the JSON file."""
        return asdict(self)


@dataclass(frozen=True)
class Visit:
    """The machine as the checks are told of it, and what earlier rows found."""

    device: Literal["cuda", "cpu"]
    gpus: int  # on a CPU: processes that stand for them
    logs: Path  # folder of what the processes print, kept
    scratch: Path  # a check's own, empty folder for whatever it writes; not kept
    te: bool = True  # Transformer Engine can be imported (under ``cpu``: its stand-in)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)  # name of a row that passed -> its facts

    @property
    def stands_in(self) -> bool:
        """Whether a CPU plays the GPU: nothing it shows is a measurement of one."""
        return self.device == "cpu"

    @property
    def described(self) -> str:
        """What the JSON file says of the device."""
        return "cpu (stand-in)" if self.stands_in else self.found.get("machine", {}).get("name", "cuda")
