"""The rendezvous store: how many messages a rank sends to it, those that torch sends from C++ among them.

Names in the tally: ``store/set``, ``store/get``, ``store/wait``, ``store/add``, ... A call that names several keys is
one message. What a TCPStore exchanges when it connects is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from testing.counting.tally import Tally

MESSAGES = (
    *("set", "get", "add", "wait", "check", "compare_set", "append", "delete_key", "num_keys"),
    *("multi_get", "multi_set", "queue_push", "queue_pop", "queue_len"),
)

_alive: list[dist.Store] = []  # C++ keeps its half of a store alive, but not the Python half that it calls


class CountedStore(dist.Store):
    """Hands every message on to another store and counts it."""

    def __init__(self, store: dist.Store, tally: Tally):
        super().__init__()
        self.store, self.tally = store, tally
        _alive.append(self)

    def has_extended_api(self) -> bool:
        """Return whether the store behind takes messages that name several keys."""
        return self.store.has_extended_api()

    def clone(self) -> CountedStore:
        """Return another connection to the store, counted too."""
        return CountedStore(self.store.clone(), self.tally)


def _counted(name: str) -> Callable[..., Any]:
    def send(self: CountedStore, *arguments: Any, **others: Any) -> Any:
        self.tally.add(f"store/{name}")
        return getattr(self.store, name)(*arguments, **others)

    return send


for _name in MESSAGES:
    setattr(CountedStore, _name, _counted(_name))
