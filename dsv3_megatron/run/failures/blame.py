"""Which rank and host of a start failed first; which hosts a run should keep away from.

The first error that anybody reads is seldom the first that happened: when a rank dies, all others lose a connection and
say so, at once and at length. So what a rank met itself counts before what it lost; a rank that is gone without a word
before one that speaks; and a host that says nothing at all, while others do, was lost. Clocks of hosts differ by less
than ranks take to notice a loss, or the check of nodes says so (nodes/judge.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from dsv3_megatron.run.failures.records import FailedStart, failed_starts, forget

EVENT, UNFIT = "failed", "unfit"  # in events.jsonl: the second of a host that a check before a start has found
_REMEMBERED = timedelta(days=7)  # for so long a failure counts against a host: it may have been repaired


@dataclass(frozen=True)
class Blame:
    """Who failed first in a start.

    Attributes:
        rank: None where a whole host was lost, or it is not known.
        host: None where it is not known.
        others: ranks that failed after it, as far as they have said so.
    """

    start: str
    rank: int | None
    host: str | None
    said: str
    of_host: bool
    others: int = 0

    def __str__(self) -> str:
        who = f"rank {self.rank} on {self.host}" if self.rank is not None else self.host
        return f"{who}: {self.said}" if who else self.said


def first_to_fail(start: FailedStart) -> Blame:
    """Return who failed first, as far as the ranks' words tell."""
    causes = [failed for failed in start.ranks if failed.kind != "follows"]
    if causes:
        first = min(causes, key=lambda failed: (failed.kind != "silent", failed.time, failed.rank))
        common = {failed.host for failed in causes if failed.said == first.said} - {first.host}
        of_host = first.of_host and not common  # what several hosts meet alike is no fault of one
        return Blame(start.name, first.rank, first.host, first.said, of_host, len(start.ranks) - 1)
    heard = {failed.host for failed in start.ranks}
    lost = [host for host in start.hosts if host not in heard]
    if heard and len(lost) == 1:
        return Blame(start.name, None, lost[0], "the host was lost with all its ranks", True, len(start.ranks))
    if heard and lost:
        said = f"{len(lost):,} hosts were lost together ({', '.join(sorted(lost)[:4])})"
        return Blame(start.name, None, None, said, False, len(start.ranks))
    said = "every rank lost another one; which failed first is not known" if heard else "it ended without a word"
    return Blame(start.name, None, None, said, False, len(start.ranks))


def take_blames(directory: str | Path, but: Path | None = None) -> Iterator[Blame]:
    """Yield who failed first in each start that has failed, oldest first, and forget it once the caller has gone on.

    ``but``: the folder of a start that is left alone. Nobody else may train in the directory meanwhile.
    """
    for folder, start in failed_starts(directory):
        if folder != but:
            yield first_to_fail(start)
            forget(folder)


def hosts_to_exclude(
    events: Iterable[Mapping[str, Any]], *, failures: int, slow: int = 0, now: datetime | None = None
) -> dict[str, str]:
    """Return the hosts that a run should keep away from, and why, by what its events of the last week say. One that is
    not fit (``UNFIT``) is among them at once.

    Args:
        events: lines of events.jsonl.
        failures: so often a host was the first to fail, for a reason that can be its own; 0 = never mind.
        slow: so often a rank of it was named the slowest (``straggler``), likewise.
    """
    since = (now or datetime.now(UTC)) - _REMEMBERED
    counted: dict[str, Counter[str]] = {UNFIT: Counter(), EVENT: Counter(), "straggler": Counter()}
    for event in events:
        kind, host = event.get("event"), event.get("host")
        if kind in counted and isinstance(host, str) and _is_since(event.get("time"), since):
            counted[kind][host] += int(kind == "straggler" or event.get("of_host") is True)
    found: dict[str, str] = {}
    kinds = (
        ("straggler", slow, "was the slowest"),
        (EVENT, failures, "was the first to fail"),
        (UNFIT, min(failures, 1), "was not fit"),
    )
    for kind, limit, what in kinds:
        found |= {
            host: f"{what} {'once' if times == 1 else f'{times} times'} in the last {_REMEMBERED.days} days"
            for host, times in sorted(counted[kind].items())
            if limit and times >= limit
        }
    return found


def _is_since(time: object, since: datetime) -> bool:
    try:
        return isinstance(time, str) and datetime.fromisoformat(time) >= since
    except (ValueError, TypeError):  # no time, or one without a zone
        return False
