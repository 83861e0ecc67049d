"""Which text a run reads, named in the manifest of every checkpoint: other shards at the same path are another run.

A sample number means a sequence only together with the shards it is counted in. Where those were exchanged, a resumed
run would read some documents again and others never, and nothing would show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from parallel.errors import CheckpointError


@dataclass(frozen=True)
class DataIdentity:
    """What a run's samples are counted in.

    Attributes:
        sha256: a digest of the text as tokens, and of nothing that says where it lies.
        name: what a message calls it.
        order: version of the rule by which sample numbers become sequences.
    """

    sha256: str
    name: str
    order: int

    def described(self) -> dict[str, Any]:
        """Return what a manifest says of it."""
        return asdict(self)


def other_text(stored: Mapping[str, Any] | None, now: DataIdentity | None) -> str | None:
    """Return how a text differs from the one that a manifest names; None where it is the same one, or where one of both
    is not known."""
    if stored is None or now is None or stored["sha256"] == now.sha256:
        return None
    return f"{stored['name']}, not {now.name}"


def check_counted_in(
    place: str, stored: Mapping[str, Any] | None, now: DataIdentity | None, *, samples: int, allowed: bool
) -> list[str]:
    """Return what a person should know of a run that goes on counting samples in this text, in a line each.

    Args:
        place: the checkpoint, for messages.
        stored: what its manifest says; None where an earlier version wrote it.
        now: of the data; None where it is made from a seed.
        samples: that were consumed.
        allowed: whether the text may be another one.
    Raises: CheckpointError: it is another one, and not allowed.
    """
    if now is None or not samples:
        return []
    if stored is None:
        return [
            f"warning: {place} was saved by an earlier version, which ordered samples otherwise: from sample "
            f"{samples:,} on, some sequences are read again and others not at all"
        ]
    if difference := other_text(stored, now):
        if not allowed:
            raise CheckpointError(
                f"{place} was trained on {difference}; restore those, or set data.allow_other=true to continue at "
                f"sample {samples:,} of others"
            )
        return [f"{place} was trained on {difference}: data.allow_other = true, continuing at sample {samples:,}"]
    if stored["order"] != now.order:
        return [
            f"warning: {place} counted samples by order {stored['order']}, this version by order {now.order}: from "
            f"sample {samples:,} on, some sequences are read again and others not at all"
        ]
    return []
