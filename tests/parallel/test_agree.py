"""An error of one rank ends all: a mistake of everybody's as itself, any other by rank and host."""

import pickle
import socket

import pytest
import torch
import torch.distributed as dist

from parallel.agree import _others, agree, agreed
from parallel.errors import CheckpointError, DataError, RankFault, RecipeError, UserError
from parallel.groups import start_processes
from parallel.world import World
from testing.ranks import run_ranks

HOST = socket.gethostname()
MISTAKE, OTHER_MISTAKE = RecipeError("steps = 0"), DataError("shard_7 is missing")
MISFIT = CheckpointError("step_1 holds no tensor a")
BROKEN = OSError(5, "Input/output error")


class NoException(BaseException):
    """As torch's CheckpointException, which is none either."""


# what ranks 0, 1, 2 have met; options of each; what each raises: its kind and words
CASES = {
    "nobody": ([None] * 3, [{}] * 3, [None] * 3),
    "all, by their own words": (
        [MISTAKE, OTHER_MISTAKE, MISTAKE], [{}] * 3, [("RecipeError", "recipe: steps = 0")] * 3,
    ),
    "one": (
        [None, MISTAKE, None], [{}] * 3,
        [("RankFault", f"fault: rank 1 on {HOST}: recipe: steps = 0 (1 of 3 ranks: no fault of the recipe)")] * 3,
    ),
    "two": (
        [None, MISTAKE, OTHER_MISTAKE], [{}] * 3,
        [("RankFault", f"fault: rank 1 on {HOST} (and 1 more there): recipe: steps = 0 (2 of 3 ranks: no fault of the "
                       "recipe)")] * 3,
    ),
    "all that looked": (
        [MISTAKE, None, None], [{}, {"looked": False}, {"looked": False}], [("RecipeError", "recipe: steps = 0")] * 3,
    ),
    "one of those that looked": (
        [MISTAKE, None, None], [{}, {}, {"looked": False}],
        [("RankFault", f"fault: rank 0 on {HOST}: recipe: steps = 0 (1 of 2 ranks: no fault of the recipe)")] * 3,
    ),
    "one, and any counts": (
        [None, BROKEN, MISFIT], [{"any_counts": True}] * 3,
        [("CheckpointError", "checkpoint: step_1 holds no tensor a")] * 3,
    ),
    "a disk": (
        [None, None, BROKEN], [{"any_counts": True}] * 3,
        [("RankFault", f"fault: rank 2 on {HOST}: OSError: [Errno 5] Input/output error (1 of 3 ranks: no fault of "
                       "the recipe)")] * 2 + [("OSError", "[Errno 5] Input/output error")],
    ),
    "a disk of all": ([BROKEN] * 3, [{}] * 3, [("OSError", "[Errno 5] Input/output error")] * 3),
    "what is no Exception": (
        [NoException("a\n b")] * 3, [{}] * 3,
        [("RankFault", f"fault: rank 0 on {HOST} (and 2 more there): tests.parallel.test_agree.NoException: a b "
         "(3 of 3 ranks)")] * 3,
    ),
}  # fmt: skip


def met(case):
    """Return kind and words of what this rank raises."""
    errors, options, _ = CASES[case]
    start_processes(World.from_environment(), torch.device("cpu"), timeout_seconds=60)
    rank = dist.get_rank()
    try:
        agree(errors[rank], **options[rank])
    except (Exception, NoException) as error:
        return type(error).__name__, str(error)


def test_every_rank_ends_with_what_any_has_met():
    found = dict(zip(CASES, run_ranks(3, met, list(CASES), timeout_seconds=120)))
    for case, (_, _, wanted) in CASES.items():
        assert found[case] == wanted, case


def test_one_process_raises_its_own():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        agree(None)
        with pytest.raises(RecipeError, match="steps = 0"):
            agree(MISTAKE)
        with pytest.raises(OSError, match="Input/output"), agreed():
            raise BROKEN
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("hosts", "text"),
    [
        (["a"], ""),
        (["a", "", "a", "a"], " (and 2 more there)"),
        (["", "a", "b", "b"], " (and 2 on b)"),
        (["a"] * 8 + [f"node-{n // 8}" for n in range(2040)], " (and 7 more there, 8 on node-0, 8 on node-1, "
                                                              "8 on node-2, 2,016 on 252 more hosts)"),
    ],
)  # fmt: skip
def test_hosts_are_named_up_to_a_few(hosts, text):
    assert _others(hosts, "a") == text


def test_every_mistake_travels_between_ranks():
    """What a rank raises is sent to all others."""
    kinds = [UserError, *UserError.__subclasses__()]
    for kind in kinds:
        again = pickle.loads(pickle.dumps(kind("a = 1; b")))
        assert type(again) is kind and str(again) == str(kind("a = 1; b"))
    assert str(pickle.loads(pickle.dumps(RankFault("rank 1:\n  x")))) == "fault: rank 1: x"
