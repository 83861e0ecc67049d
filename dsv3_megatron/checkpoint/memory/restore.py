"""Which states of a run memory still holds, and how every rank gets its share of one.

Rank 0 gathers what each host holds: of every share its rank, step and cut, some two hundred bytes. A state can be taken
if some host has a share of it for every rank, cut as that rank is now. Then every rank compares its own copy with its
checksums; who has none, or a damaged one, is sent the copy of another host, compared at both ends. A state of which a
share is left nowhere is not taken, by no rank, and the next older one is tried.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch.distributed as dist

from dsv3_megatron.checkpoint.find import Found
from dsv3_megatron.checkpoint.manifest import MANIFEST, USE_OLDER, DamageError
from dsv3_megatron.checkpoint.memory import share as shares
from dsv3_megatron.checkpoint.memory.folder import MemoryFolder, State
from dsv3_megatron.checkpoint.memory.lives import Lives
from dsv3_megatron.checkpoint.memory.places import Places
from dsv3_megatron.checkpoint.memory.share import Share
from dsv3_megatron.checkpoint.memory.transfer import exchange
from dsv3_megatron.pipeline.saved import Entry
from parallel.agree import from_first, gathered

_States = dict[str, list[Entry]]


class _Held(NamedTuple):
    """A share that a host holds."""

    state: State
    rank: int
    world: int
    cut: str
    host: str


class Transfer(NamedTuple):
    """A copy of a share that is to travel: from the rank that reads it to the one whose share it is. In a round a rank
    sends one at most, and receives one."""

    rank: int
    sender: int
    round: int


@dataclass
class _Survey:
    """What rank 0 knows: hosts of every state's shares, by rank, and why other states are not taken."""

    holders: dict[State, dict[int, list[str]]]
    notes: list[str]


class InMemory:
    """A state of the run that memory holds. Every method is called by all ranks together.

    Attributes:
        step: after which the state was.
        state: with the life that it is of.
    """

    def __init__(
        self,
        state: State,
        holders: dict[int, list[str]],
        places: Places,
        folder: MemoryFolder,
        states: _States,
        tell: Callable[[str], None],
    ):
        """``holders``: of every rank the hosts that hold its share, its own first; on rank 0.
        ``tell``: gets, on rank 0, what is wrong with a copy in whose place another one is taken."""
        self.state, self.step = state, state.step
        self._holders, self._places, self._folder, self._states, self._tell = holders, places, folder, states, tell

    def fetch(self) -> Found:
        """Return this rank's share, from wherever it lies, compared with its checksums.

        Raises: DamageError: on all ranks; of some share there is no copy that is whole.
        """
        mine, wrong = self._own()
        tried: dict[int, set[str]] = defaultdict(set)  # on rank 0
        while True:
            transfers = self._next_transfers(wrong, tried)
            if transfers is None:
                assert mine is not None
                return mine.found(self._states)
            received, wrong = self._carry_out(transfers)
            mine = received or mine

    def give_up(self, reason: str) -> None:
        """Tell why another state or a checkpoint on disk is taken in place of this one."""
        if dist.get_rank() == 0:
            self._tell(f"step {self.step} in memory: {_why(reason)}")

    def _own(self) -> tuple[Share | None, dict[int, str]]:
        """Return the copy that this host has of the rank's share, and what is wrong with it."""
        rank = dist.get_rank()
        folder = self._folder.share(self.state, rank)
        if not folder.is_dir():
            return None, {rank: ""}  # lost with its host, which is no damage
        try:
            mine = shares.read(folder)
            damage = mine.damage()
        except DamageError as error:
            mine, damage = None, str(error.args[0])
        return (mine, {}) if damage is None else (None, {rank: f"on {self._places.host}, {_why(damage)}"})

    def _next_transfers(self, wrong: dict[int, str], tried: dict[int, set[str]]) -> list[Transfer] | None:
        """Return what is to travel next, on all ranks alike; None where every rank has its share.

        ``wrong``: at this rank, what is wrong by the rank whose share it is.
        """
        said = gathered(wrong)

        def choose() -> list[Transfer] | str | None:
            missing: dict[int, str] = {}
            for each in said:
                for rank, why in each.items():
                    missing[rank] = missing.get(rank) or why
            for why in filter(None, missing.values()):
                self._tell(why)
            holder_of = {}
            for rank in sorted(missing):
                tried[rank].add(self._places.hosts[rank])
                left = [host for host in self._holders[rank] if host not in tried[rank]]
                if not left:
                    return f"rank {rank}'s share of step {self.step} is whole in no memory"
                tried[rank].add(left[0])
                holder_of[rank] = left[0]
            return transfers_of(holder_of, self._places.hosts) or None

        found = from_first(choose)
        if isinstance(found, str):
            raise DamageError(f"{found}; {USE_OLDER}")
        return found

    def _carry_out(self, transfers: Sequence[Transfer]) -> tuple[Share | None, dict[int, str]]:
        """Send and receive what is to travel; return the share that this rank has received, and what has failed here,
        by the rank whose share it is."""
        received: Share | None = None
        failures: dict[int, str] = {}
        me = dist.get_rank()
        for number in range(1 + max(each.round for each in transfers)):
            now = [each for each in transfers if each.round == number]
            to = next((each.rank for each in now if each.sender == me), None)
            source = next((each.sender for each in now if each.rank == me), None)
            if to is None and source is None:
                continue
            copy, failure = (None, None) if to is None else self._copy(to)
            folder = None if source is None else self._folder.share(self.state, me)
            done = exchange(self._places.group, copy, to, folder, source)
            if to is not None and (why := failure or done.not_sent):
                failures[to] = f"on {self._places.host}, {why}"
            if source is not None:
                received = done.received
                if received is None or (received.state, received.rank) != (self.state, me):
                    received = None
                    why = done.not_received  # where the other end has sent nothing it says why
                    failures[me] = f"on {self._places.host}, rank {me}'s share: {why}" if why else ""
        return received, failures

    def _copy(self, rank: int) -> tuple[Share | None, str | None]:
        """Return the share of another rank that this host holds, and what is wrong with it."""
        try:
            return shares.read(self._folder.share(self.state, rank)), None
        except DamageError as error:
            return None, _why(str(error.args[0]))


def transfers_of(holder_of: dict[int, str], hosts: Sequence[str]) -> list[Transfer]:
    """Return how shares travel from the hosts that hold them to the ranks whose they are, evenly over each host's ranks
    and in as few rounds.

    Args:
        holder_of: of every rank that needs its share the host that sends it.
        hosts: of every rank.
    """
    ranks_of: dict[str, list[int]] = defaultdict(list)
    for rank, host in enumerate(hosts):
        ranks_of[host].append(rank)
    sent: Counter[str] = Counter()
    found = []
    for rank, host in sorted(holder_of.items()):
        number, place = divmod(sent[host], len(ranks_of[host]))
        found.append(Transfer(rank, ranks_of[host][place], number))
        sent[host] += 1
    return found


def _why(damage: str) -> str:
    """Return what is wrong, without the advice for a checkpoint that a person has chosen."""
    return damage.removeprefix("checkpoint: ").removesuffix(f"; {USE_OLDER}")


def states_in_memory(
    folder: MemoryFolder, places: Places, lives: Lives, states: _States, tell: Callable[[str], None]
) -> tuple[list[InMemory], list[str]]:
    """Return the states that memory holds whole for the layout of this run, newest first, and why others are not taken.
    All ranks together.

    Args:
        lives: of the run, on rank 0.
        states: what this rank reads when it resumes (:func:`share.read_here`).
        tell: gets, on rank 0, what is wrong with copies.
    """
    held: list[_Held] = []
    damaged: list[str] = []
    if places.is_leader:
        for state, rank, where in folder.shares():
            if not (where / MANIFEST).exists():
                continue  # it was being written when its rank was killed
            try:
                found = shares.read(where)
                held.append(_Held(found.state, found.rank, found.world, found.cut, places.host))
                if (found.state, found.rank, found.run) != (state, rank, folder.run):
                    held.pop()
                    damaged.append(f"on {places.host}, {where} holds another share")
            except DamageError as error:
                damaged.append(f"on {places.host}, {_why(str(error.args[0]))}")
    said = gathered((shares.cut_of(states), held, damaged))
    survey = _Survey({}, [])

    def choose() -> list[State]:
        cuts = [cut for cut, _, _ in said]
        all_held = [each for _, held, _ in said for each in held if lives.may_load(each.state)]
        for _, _, damaged in said:
            for why in damaged:
                tell(why)
        survey.notes += _arrange(survey, all_held, cuts, places.hosts)
        return sorted(survey.holders, reverse=True)

    chosen = from_first(choose)
    in_memory = [
        InMemory(state, survey.holders.get(state, {}), places, folder, states, tell)
        for state in map(State._make, chosen)
    ]
    return in_memory, survey.notes


def _arrange(survey: _Survey, held: list[_Held], cuts: list[str], hosts: tuple[str, ...]) -> list[str]:
    """Put into the survey the states that are there for every rank; return why others are not taken, in a line each."""
    by_state: dict[State, list[_Held]] = defaultdict(list)
    for each in held:
        by_state[each.state].append(each)
    notes = []
    for state, copies in sorted(by_state.items(), reverse=True):
        fitting = [each for each in copies if each.world == len(cuts) and each.cut == cuts[each.rank]]
        holders: dict[int, list[str]] = defaultdict(list)
        for each in fitting:
            own = each.host == hosts[each.rank]
            holders[each.rank].insert(0 if own else len(holders[each.rank]), each.host)
        lost = [rank for rank in range(len(cuts)) if rank not in holders]
        if not lost:
            survey.holders[state] = dict(holders)
        elif not fitting:
            notes.append(f"memory holds step {state.step} in another layout or of another model: a checkpoint is used")
        else:
            more = f" and of {len(lost) - 1:,} more" if len(lost) > 1 else ""
            notes.append(f"memory does not hold step {state.step} whole: it lacks the share of rank {lost[0]}{more}")
    return notes
