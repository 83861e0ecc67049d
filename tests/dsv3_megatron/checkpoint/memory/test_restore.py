"""A state that was kept in memory comes back to the last bit from wherever it is whole, and from nowhere else.

Real ranks, each on a node of its own (SLURMD_NODENAME), real files. One launch trains once and then loses, damages and
restores one thing after the other.
"""

import os
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import dsv3_megatron.checkpoint.memory.places as places_module
import dsv3_megatron.checkpoint.memory.saver as saver_module
from dsv3_megatron.checkpoint.find import load_newest
from dsv3_megatron.checkpoint.load import load_checkpoint
from dsv3_megatron.checkpoint.memory.open import open_memory
from dsv3_megatron.checkpoint.memory.restore import transfers_of
from dsv3_megatron.checkpoint.memory.transfer import exchange
from dsv3_megatron.checkpoint.save import Saver
from dsv3_megatron.checkpoint.state import optimizer_entries
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.step import train_step
from launcher.command_line.compose import resolved_yaml
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.ranks import run_ranks
from testing.training.tiny import VALUES, named_weights, small_recipe, step_batches_of

PROGRESS = {"tokens": 7, "samples": 3, "skipped": 0}
TEXT = {"tokenizer": None, "data": None}


class Run:
    """One rank of a run that trains, keeps states, forgets, and restores."""

    def __init__(self, place, overrides):
        self.told, self.notes = [], []
        self.place, self.rank = Path(place), dist.get_rank()
        self.recipe = small_recipe("checkpoint.memory_every_steps=1", f"checkpoint.memory_path={place}", *overrides)
        layout = self.recipe.layout(dist.get_world_size())
        self.parts = build_parts(self.recipe, layout, torch.device("cpu"))
        self.directory = RunDirectory(self.place / "run")
        if self.rank == 0:
            self.directory.checkpoints.mkdir(parents=True, exist_ok=True)
        self.memory = self.open()
        self.memory.begin(None)
        self.disk = Saver(self.directory.checkpoints, self.recipe.checkpoint, self.parts, self.text, self.tell)
        self.steps = 0

    @property
    def text(self):
        return resolved_yaml(self.recipe)

    def tell(self, name, values):
        self.told.append((name, values))

    def open(self):
        return open_memory(self.parts, self.directory, self.text, self.tell, self.notes.append, TEXT)

    def train(self):
        train_step(self.parts, step_batches_of(self.parts, self.steps), VALUES)
        self.steps += 1

    def keep(self):
        self.memory.save({**PROGRESS, "step": self.steps})
        self.memory.finish()
        self.memory._wait_for_removal()  # of the state before
        dist.barrier()

    def numbers(self):
        states = [entry.tensor for entry in optimizer_entries(self.parts, self.memory._shares)]
        return [tensor.clone() for tensor in (*named_weights(self.parts).values(), *states)]

    def spoil(self):
        with torch.no_grad():
            for tensor in named_weights(self.parts).values():
                tensor.fill_(7.0)
            for entry in optimizer_entries(self.parts, self.memory._shares):
                entry.tensor.fill_(7.0)

    def restore(self, begin=True):
        """Start anew: return the step loaded, whether from memory, and what was said of copies and states."""
        dist.barrier()
        self.spoil()
        self.memory, said = self.open(), []
        states, remarks = self.memory.states(said.append)
        found, _, wrong = load_newest(
            lambda: sorted(self.directory.checkpoints.glob("step_*"), reverse=True),
            lambda found: load_checkpoint(found, self.parts, training=True),
            states,
        )
        state = found and next((s.state for s in states if s.state.name == found.path.parent.name), None)
        if begin:
            self.memory.begin(state)
        return found and found.progress["step"], state is not None, [*said, *remarks, *wrong]

    def share(self, node, of):
        (found,) = self.place.glob(f"dsv3-*/*/node{node}/step_*/rank_{of:05d}")
        return found

    def at_rank_0(self, action):
        dist.barrier()
        if self.rank == 0:
            action()
        dist.barrier()


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_off(*given):
    raise RuntimeError("Connection closed by peer")


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def scenarios(case):
    """Return what every scenario came to on this rank."""
    name, place, overrides = case
    world = World.from_environment()
    places_module.LONGEST_WAIT = timedelta(seconds=5)
    os.environ["SLURMD_NODENAME"] = f"node{world.rank // (2 if world.size == 4 else 1)}"
    start_processes(world, torch.device("cpu"), timeout_seconds=120)
    try:
        return globals()[f"scenarios_of_{name}"](Run(place, overrides))
    finally:
        stop_processes()
        del os.environ["SLURMD_NODENAME"]


def scenarios_of_losses(run):
    found = {}
    run.train()
    run.keep()
    first = run.numbers()
    found["own"] = *run.restore(), same(run.numbers(), first)

    run.at_rank_0(lambda: shutil.rmtree(run.share(0, 0).parent))  # node 0 with all that it held
    found["node lost"] = *run.restore(), same(run.numbers(), first)

    run.train()
    run.keep()
    second = run.numbers()
    run.at_rank_0(lambda: flip(run.share(0, 0) / "__0_1.distcp"))
    found["own damaged"] = *run.restore(), same(run.numbers(), second)

    run.train()
    run.keep()
    third = run.numbers()
    run.disk.save_finally({**PROGRESS, "step": 2})  # older than memory, and of other numbers: which one is loaded shows
    run.at_rank_0(lambda: shutil.rmtree(run.share(1, 1)))
    run.at_rank_0(lambda: flip(next(run.place.glob("dsv3-*/*/node*/step_*/rank_00001")) / "__1_0.distcp"))
    found["both lost"] = *run.restore(), same(run.numbers(), third)

    run.train()
    run.keep()
    run.disk.save_finally({**PROGRESS, "step": run.steps})
    found["disk as new"] = run.restore()[:2]
    return found | {"told": run.told, "bytes": run.told and sum(t[1].get("bytes", 0) for t in run.told)}


def scenarios_of_lives(run):
    found = {}
    run.train()
    run.keep()
    kept = run.place / f"kept{run.rank}"
    mine = next(run.place.glob(f"dsv3-*/*/node{run.rank}"))
    shutil.copytree(mine, kept)

    # The run goes on from something older, and a node that was away comes back with what it held.
    run.memory.forget()
    dist.barrier()
    found["forgotten"] = not list(mine.glob("step_*"))
    shutil.copytree(kept, mine, dirs_exist_ok=True)
    found["a life left behind"] = run.restore(begin=False)
    run.memory.begin(None)
    dist.barrier()

    # One rank's save fails: nothing of it stays, and what was whole before is what comes back.
    run.train()
    run.keep()
    first = run.numbers()
    free, saver_module.free_bytes = saver_module.free_bytes, lambda folder: 0 if run.rank == 1 else 1 << 40
    run.train()
    run.keep()
    run.train()
    run.keep()
    saver_module.free_bytes = free
    found["memory full"] = *run.restore(), same(run.numbers(), first)
    run.train()
    run.keep()
    found["told"] = [(name, values["step"], values.get("reason")) for name, values in run.told]

    # A connection is lost before anything was sent: the other end waits in vain, and the save after that goes well.
    run.told.clear()
    if run.rank == 1:
        saver_module.exchange = cut_off
    run.train()
    run.keep()
    saver_module.exchange = exchange
    run.keep()
    found["cut off"] = [(name, values["step"]) for name, values in run.told]

    # A manifest of another run in this run's folder, and one that is not what was written.
    run.at_rank_0(lambda: flip(run.share(0, 0) / "manifest.json"))
    found["manifest damaged"] = run.restore(begin=False)[:2]

    run.memory.free()
    dist.barrier()
    found["freed"] = not list(run.place.glob("dsv3-*"))
    return found


def scenarios_of_four(run):
    """Two nodes of two ranks under DualPipe, whose mirrored ranks hold the same stages."""
    run.train()
    run.keep()
    kept = run.numbers()
    run.at_rank_0(lambda: shutil.rmtree(run.share(0, 0).parent))
    found = *run.restore(), same(run.numbers(), kept), run.memory.places.keeper

    # The same on four nodes; then every rank comes to the node after the next, where neither copy of its share is.
    os.environ["SLURMD_NODENAME"] = f"n{run.rank}"
    run.restore()
    run.train()
    run.keep()
    kept = run.numbers()
    os.environ["SLURMD_NODENAME"] = f"n{(run.rank + 2) % 4}"
    moved = *run.restore(), same(run.numbers(), kept)
    return found, moved, len(list(run.place.glob(f"dsv3-*/*/n{(run.rank + 2) % 4}/step_*/rank_*")))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    cases = [(name, str(tmp_path_factory.mktemp(name)), ("parallel.expert=2",)) for name in ("losses", "lives")]
    return dict(zip(("losses", "lives"), run_ranks(2, scenarios, cases)))


def test_a_state_comes_back_from_where_it_is_whole(two):
    for rank, found in enumerate(two["losses"]):
        assert found["own"] == (1, True, [], True)
        assert found["node lost"] == (1, True, [], True)
        step, from_memory, said, is_same = found["own damaged"]
        assert (step, from_memory, is_same) == (2, True, True)
        assert len(said) == (rank == 0) and all("node0" in line and "__0_1.distcp" in line for line in said)


def test_a_share_that_is_whole_nowhere_leaves_the_state_to_the_disk(two):
    for rank, found in enumerate(two["losses"]):
        step, from_memory, said, _ = found["both lost"]
        assert (step, from_memory) == (2, False)
        assert (rank > 0) or any("rank 1's share of step 3 is whole in no memory" in line for line in said)
        assert found["disk as new"] == (4, False)


def test_the_bytes_that_travel_are_those_that_are_kept(two):
    saved = [values for name, values in two["losses"][0]["told"] if name == "saved_in_memory"]
    assert len(saved) == 4 and all(values["bytes"] == values["bytes_sent"] > 1e5 for values in saved)


def test_what_a_life_has_left_behind_is_not_taken(two):
    for found in two["lives"]:
        assert found["forgotten"] and found["a life left behind"][:2] == (None, False)


def test_a_save_that_one_rank_cannot_make_counts_on_none(two):
    for rank, found in enumerate(two["lives"]):
        assert found["memory full"] == (2, True, [], True)
        names = [name for name, *_ in found["told"]]
        kept = "saved_in_memory"  # the second failure is not said again, and the save after it goes well
        assert names == ([kept, kept, "memory_save_failed", kept] if rank == 0 else [])
    (failed,) = (each for each in two["lives"][0]["told"] if each[0] == "memory_save_failed")
    assert failed[1] == 3 and "rank 1 on node1" in failed[2] and "0 B are free" in failed[2]


def test_a_lost_connection_fails_a_save_and_not_those_after_it(two):
    assert two["lives"][0]["cut off"] == [("memory_save_failed", 6), ("saved_in_memory", 6)]


def test_a_damaged_manifest_is_no_share_and_a_run_that_is_over_frees_all(two):
    for found in two["lives"]:
        assert found["manifest damaged"] == (6, True) and found["freed"]


def test_under_dualpipe_a_lost_node_costs_nothing(tmp_path):
    words = ("parallel.pipeline=2", "parallel.schedule=dualpipe", "optim.micro_batch=1", "optim.ema_decay=0.9")
    (found,) = run_ranks(4, scenarios, [("four", str(tmp_path), words)])
    for rank, (lost, moved, shares) in enumerate(found):
        assert lost == (1, True, [], True, (rank + 2) % 4)
        assert moved == (2, True, [], True)
        assert shares == 2, "no more than there is room for beside the next state"


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_shares_travel_in_rounds_in_which_a_rank_sends_and_receives_one(nodes, random):
    hosts = [f"n{node}" for node, ranks in enumerate(nodes) for _ in range(ranks)]
    needing = random.sample(range(len(hosts)), random.randint(1, len(hosts)))
    holder_of = {rank: random.choice(hosts) for rank in needing}
    found = transfers_of(holder_of, hosts)
    assert {each.rank for each in found} == set(holder_of) and len(found) == len(holder_of)
    assert all(hosts[each.sender] == holder_of[each.rank] for each in found)
    assert len({(each.sender, each.round) for each in found}) == len(found)
    for host in set(hosts):
        rounds = [each.round for each in found if holder_of[each.rank] == host]
        assert not rounds or max(rounds) == (len(rounds) - 1) // hosts.count(host)
