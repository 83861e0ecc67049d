"""What a visit leaves: a table for a person and a JSON file, written anew with every row."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.outcome import Row, Visit
from dsv3_megatron.run.files import write_atomically

TITLE_OF_STAND_IN = "REHEARSAL ON A CPU: stand-ins play the GPU, and nothing below was measured on one"


@dataclass
class Record:
    """The rows so far."""

    path: Path
    command: Sequence[str]
    seconds: float
    began: float = field(default_factory=time.monotonic)
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row, visit: Visit) -> None:
        """Say that a row is known, and write the file."""
        self.rows.append(row)
        print(f"{row.status:<8}{row.name} ({row.seconds:.0f} s)", file=sys.stderr, flush=True)
        self.write(visit)

    def write(self, visit: Visit) -> None:
        """Write the file, whole."""
        found: dict[str, Any] = {
            "device": visit.described,
            "gpus": visit.gpus,
            "command": list(self.command),
            "seconds_allowed": self.seconds,
            "seconds_taken": round(time.monotonic() - self.began, 1),
            "failed": [row.name for row in self.rows if row.status == "FAIL"],
            "rows": {row.name: row.as_json() for row in self.rows},
        }
        write_atomically(self.path, json.dumps(found, indent=1) + "\n")

    @property
    def exit_code(self) -> int:
        """0 where something passed and nothing failed."""
        statuses = {row.status for row in self.rows}
        return 0 if "PASS" in statuses and "FAIL" not in statuses else 1


def line_of(row: Row) -> str:
    """Return a row as a line."""
    return f"{row.status:<8}{row.name:<24}{row.seconds:>5.0f} s  {row.said}"


def table(rows: Sequence[Row], visit: Visit) -> list[str]:
    """Return the whole table: what failed first, and how many of each there are."""
    order = {"FAIL": 0, "PASS": 1, "SKIPPED": 2}
    counted = ", ".join(f"{sum(r.status == s for r in rows)} {s}" for s in ("PASS", "FAIL", "SKIPPED"))
    title = TITLE_OF_STAND_IN if visit.stands_in else visit.described
    return [title, *(line_of(row) for row in sorted(rows, key=lambda r: order[r.status])), counted]
