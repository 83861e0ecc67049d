"""The two lanes of the test suite, how its tests are shared among workers, and what is said of them at the end.

``make test`` runs the fast lane, all that is not marked ``full``: every promise in a small form. ``make test-all`` runs
that and then the rest: what is marked ``full``, and the property tests once more with all their examples. The hooks are
imported by tests/conftest.py.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest
from hypothesis import settings

from testing.cpu_seconds import cpu_seconds

# Without a deadline: on a busy machine an example that takes a millisecond takes a fifth of a second now and then.
settings.register_profile("fast", max_examples=20, deadline=None)
settings.register_profile("default", deadline=None)
settings.load_profile("default")

# What takes long, the longest first, so that no worker is left with one of them at the end. SLURM's tests wait for
# other processes most of the time: they begin, beside workers that compute.
LONG = ("tests/slurm/", "tests/benchmarks/test_gpu_check.py", "tests/end_to_end/test_watching",
        "tests/end_to_end/test_chaos", "tests/end_to_end/test_schedules", "tests/end_to_end/", "tests/benchmarks/",
        "tests/docs/test_commands")  # fmt: skip
# Files whose tests share nothing that costs: each may go to another worker. All others stay together.
APART = ("tests/end_to_end/test_watching", "tests/end_to_end/test_chaos", "tests/end_to_end/test_schedules",
         "tests/end_to_end/test_nccl_manners", "tests/end_to_end/test_data_and_regime", "tests/fuzz/")  # fmt: skip
LEFT, SPENT = "left", "spent"  # what workers report
FAST_LANE = pytest.StashKey[tuple[set[str], set[str]]]()  # files that were collected, and tests of the fast lane
_found = pytest.StashKey[dict[str, Any]]()


def examples(count: int) -> int:
    """Return how many examples a property test takes: ``count``; in the fast lane a fifth of it, yet at least ten."""
    return min(count, max(10, count * settings().max_examples // 100))


def in_lanes(cases: Mapping[str, Any], *fast: str) -> list[Any]:
    """Return two parameters: the cases of the fast lane together, as a dictionary like ``cases``, and all others."""
    rest = {name: case for name, case in cases.items() if name not in fast}
    return [
        pytest.param({name: cases[name] for name in fast}, id="few"),
        pytest.param(rest, id="rest", marks=pytest.mark.full),
    ]


def names_in_lanes(names: Iterable[str], *fast: str) -> list[Any]:
    """Return the names as parameters, all but those of the fast lane marked ``full``."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.full) for name in names]


class InLanes(Mapping[str, Any]):
    """What cases have come to, by name; run in two batches, each when the first of its names is asked for.

    ``run`` takes a dictionary of cases and returns their results in the same order. Cases of one batch share its start;
    a run of the fast lane never starts the other.
    """

    def __init__(self, cases: Mapping[str, Any], run: Callable[[dict[str, Any]], Iterable[Any]], *fast: str) -> None:
        assert cases.keys() >= set(fast), fast
        self._cases, self._run, self._fast = cases, run, fast
        self._found: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._found:
            batch = {n: case for n, case in self._cases.items() if (n in self._fast) == (name in self._fast)}
            self._found |= dict(zip(batch, self._run(batch), strict=True))
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._cases)

    def __len__(self) -> int:
        return len(self._cases)


def scope_of(nodeid: str) -> str:
    """Return the name of the tests that go to one worker together."""
    return nodeid if nodeid.startswith(APART) else nodeid.partition("::")[0]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take the number of tests to name."""
    parser.addoption("--cpu-seconds", type=int, default=0, metavar="N", help="name the N tests that compute longest")


def pytest_configure(config: pytest.Config) -> None:
    """Begin with nothing counted."""
    config.stash[_found] = {LEFT: 0, SPENT: Counter()}


@pytest.hookimpl(tryfirst=True)  # before any is left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with what takes longest; note which tests the fast lane has, by file and name."""
    fast = {item.nodeid.partition("[")[0] for item in items if item.get_closest_marker("full") is None}
    config.stash[FAST_LANE] = {item.nodeid.partition("::")[0] for item in items}, fast
    items.sort(key=lambda item: next((n for n, start in enumerate(LONG) if item.nodeid.startswith(start)), len(LONG)))


def pytest_collection_finish() -> None:
    """Leave what importing and collecting have made out of every collection of garbage; runs in this process ask for
    many."""
    gc.collect()
    gc.freeze()


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count what this lane leaves out."""
    for item in items[:1]:
        item.config.stash[_found][LEFT] += len(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Count the processor time of each test, with what it sets up."""
    if not gc.get_freeze_count():  # a run in this process has thawed it
        gc.collect()  # else what it has left behind would stay for good
        gc.freeze()
    before = cpu_seconds()
    try:
        return (yield)
    finally:
        item.config.stash[_found][SPENT][item.nodeid] += cpu_seconds() - before


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Report to the process that has started the workers."""
    if hasattr(session.config, "workeroutput"):
        found = session.config.stash[_found]
        session.config.workeroutput |= {LEFT: found[LEFT], SPENT: dict(found[SPENT])}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take a worker's report; one that was killed has none."""
    found, told = node.config.stash[_found], getattr(node, "workeroutput", {})
    found[LEFT] = max(found[LEFT], told.get(LEFT, 0))
    found[SPENT].update(told.get(SPENT, {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say what was left out, and what the tests have cost."""
    found = config.stash[_found]
    total = sum(found[SPENT].values())
    terminalreporter.write_line(f"the tests computed for {total:.0f} CPU-seconds")
    for nodeid, seconds in found[SPENT].most_common(config.getoption("--cpu-seconds")):
        terminalreporter.write_line(f"{seconds:7.1f} CPU-s  {nodeid}")
    if config.getoption("markexpr") == "not full":
        terminalreporter.write_line(f"{found[LEFT]} tests are left to make test-all")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share the tests by scope_of."""
    from xdist.scheduler import LoadScopeScheduling  # only where there are workers

    class ByScope(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    return ByScope(config, log)
