"""Facts of all ranks -> what is wrong with which host. Nothing here asks a machine.

A device or a link is slow beside the others of the job: nodes of one job are alike, and what a data sheet promises
depends on the library, the clock and the size of the message. What is slow is reported; what is wrong ends the start.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Literal

from dsv3_megatron.nodes.facts import Finding, RankFacts

# Below this share of the median of all ranks. GPUs of one kind differ by a few percent in clock and temperature; a
# message is timed together with what else the fabric carries.
SLOW_PRODUCT, SLOW_LINK = 0.85, 0.7
FEWEST = 4  # ranks of which one can be slow beside the others
CLOCK_SECONDS = 1.0  # by which clocks may differ: times in events and logs of two nodes are compared by people
_NAMES: dict[Literal["within", "between"], str] = {"within": "within the node", "between": "to the next node"}


def judge(facts: Sequence[RankFacts]) -> list[Finding]:
    """Return what is wrong, the unfit hosts first; nothing where all is well. ``facts``: of all ranks, in any order."""
    facts = sorted(facts, key=lambda each: each.rank)
    found = [*_problems(facts), *_different(facts), *_slow_devices(facts), *_slow_links(facts), *_clocks(facts)]
    return sorted(found, key=lambda finding: not finding.unfit)  # stable: by node within each


def _problems(facts: Iterable[RankFacts]) -> Iterable[Finding]:
    for each in facts:
        for problem in each.problems:
            yield Finding(each.host, problem, unfit=True)


def _different(facts: Sequence[RankFacts]) -> Iterable[Finding]:
    """Name the hosts that have something else than most have; of two halves, the one without rank 0."""
    names = sorted({name for each in facts for name in each.digests})
    for name in names:
        who = [each for each in facts if name in each.digests]
        count = Counter(each.digests[name] for each in who)
        right, most = max(count.items(), key=lambda item: (item[1], item[0] == who[0].digests[name]))
        for each in who:
            if each.digests[name] != right:
                yield Finding(each.host, f"has another {name} than {most:,} of {len(who):,} nodes have", unfit=True)


def _slow_devices(facts: Sequence[RankFacts]) -> Iterable[Finding]:
    usual = median(each.tflops for each in facts)
    for each in facts if len(facts) >= FEWEST else ():
        if each.tflops < SLOW_PRODUCT * usual:
            share = each.tflops / usual
            text = f"{_device(each)} multiplies matrices at {each.tflops:.3g} TFLOP/s, {share:.0%} of the median"
            yield Finding(each.host, text, unfit=False)


def _slow_links(facts: Sequence[RankFacts]) -> Iterable[Finding]:
    """Name the host that has sent slow messages, once for each kind, with the slowest. Its receiver may be at fault."""
    for kind, name in _NAMES.items():
        speeds = {each.rank: speed for each in facts if (speed := getattr(each, kind)) is not None}
        if len(speeds) < FEWEST:
            continue
        usual = median(speeds.values())
        slow = {rank for rank, speed in speeds.items() if speed < SLOW_LINK * usual}
        for host, ranks in _by_host(facts, slow).items():
            worst = min(ranks, key=lambda each: speeds[each.rank])
            speed = speeds[worst.rank]
            more = f", and of {len(ranks) - 1} more of its ranks" if len(ranks) > 1 else ""
            text = f"messages of {_device(worst)} {name} pass at {speed:.3g} GB/s, {speed / usual:.0%} of the median"
            yield Finding(host, text + more, unfit=False)


def _by_host(facts: Iterable[RankFacts], ranks: set[int]) -> dict[str, list[RankFacts]]:
    found: dict[str, list[RankFacts]] = defaultdict(list)
    for each in facts:
        if each.rank in ranks:
            found[each.host].append(each)
    return found


def _clocks(facts: Sequence[RankFacts]) -> Iterable[Finding]:
    firsts = [each for each in facts if each.local_rank == 0]
    usual = median(each.clock_seconds for each in firsts)
    for each in firsts:
        if abs(ahead := each.clock_seconds - usual) > CLOCK_SECONDS:
            way = "ahead of" if ahead > 0 else "behind"
            yield Finding(each.host, f"its clock is {abs(ahead):.1f} s {way} the others", unfit=False)


def _device(each: RankFacts) -> str:
    return f"GPU {each.local_rank}" if each.device != "cpu" else f"rank {each.rank}"
