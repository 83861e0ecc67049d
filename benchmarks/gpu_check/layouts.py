"""Schedules and layouts: each step's losses beside those of the plain schedule on one device."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from typing import Any

from benchmarks.gpu_check.losses import STEPS, compared, tolerance_of
from benchmarks.gpu_check.outcome import Outcome, Outcomes, Visit, judged
from benchmarks.gpu_check.tiny import stepper, words
from testing.ports import free_port

ONE_EXPERT = ("model.n_routed_experts=1", "model.num_experts_per_tok=1", "model.n_group=1", "model.topk_group=1")
TWO_EXPERTS = ("model.n_routed_experts=2", *ONE_EXPERT[1:])
RANKS = 2


def one_expert(visit: Visit, backend: str, precision: str) -> Outcomes:
    """One routed expert under the plain schedule and under the overlapped plan, which resizes its storage."""
    wanted = _steps(visit, words(backend, precision, *ONE_EXPERT))
    found = _steps(visit, words(backend, precision, *ONE_EXPERT, "parallel.schedule=dualpipev"))
    yield compared(found, wanted, tolerance_of(backend, precision), beside="1f1b")


def schedule(visit: Visit, name: str) -> Outcomes:
    """Three steps over two pipeline ranks, messages between them by NCCL; beside one device."""
    more = ("parallel.chunks=2",) if name == "interleaved" else ()
    layout = ("parallel.pipeline=2", f"parallel.schedule={name}", *more)
    yield _beside_one(visit, (), layout)


def one_expert_of_two_ranks(visit: Visit) -> Outcomes:
    """Two experts over two ranks under the overlapped plan: each holds one and exchanges tokens."""
    yield _beside_one(visit, TWO_EXPERTS, ("parallel.expert=2", "parallel.schedule=dualpipev"))


def _beside_one(visit: Visit, model: tuple[str, ...], layout: tuple[str, ...]) -> Outcome:
    # Layers for four stages; float32, so that nothing but the order of sums may differ.
    recipe = words("torch", "fp32", *model, "model.num_hidden_layers=4", "optim.micro_batch=1", "optim.global_batch=8")
    ranks = on_ranks(visit, (*recipe, *layout))  # first: on a CPU they are forked from here, where nothing has run yet
    wanted = _steps(visit, recipe)
    if any(rank != ranks[0] for rank in ranks):
        return judged(False, f"ranks report different losses: {ranks}", ranks=ranks)
    return compared(ranks[0], wanted, tolerance_of("torch", "fp32"), beside="one device")


def _steps(visit: Visit, recipe: tuple[str, ...]) -> dict[str, list[float]]:
    with stepper(visit, recipe) as step:
        results = [step() for _ in range(STEPS)]
    return {"losses": [r.lm_loss for r in results], "norms": [r.grad_norm for r in results]}


# -- several ranks -----------------------------------------------------------------------------------------------------


def on_ranks(visit: Visit, recipe: tuple[str, ...]) -> list[dict[str, list[float]]]:
    """Return losses and norms of every rank. Raises RuntimeError with the traceback of the first that fails."""
    context = multiprocessing.get_context("fork" if visit.stands_in else "spawn")
    results, port = context.SimpleQueue(), free_port()
    ranks = [context.Process(target=_rank, args=(r, port, visit, recipe, results)) for r in range(RANKS)]
    for rank in ranks:
        rank.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < RANKS:  # the check's own time limit ends what waits for ever
            number, losses, failure = results.get()
            if failure:
                raise RuntimeError(f"rank {number}: {failure.strip().splitlines()[-1]}\n{failure}")
            found[number] = losses
        for rank in ranks:
            rank.join()
    finally:
        for rank in ranks:  # what still runs waits for the one that failed
            rank.kill()
    return [found[number] for number in range(RANKS)]


def _rank(number: int, port: int, visit: Visit, recipe: tuple[str, ...], results: Any) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        import torch

        if not visit.stands_in:
            torch.cuda.set_device(number)
        results.put((number, _steps(visit, recipe), None))
    except BaseException:
        results.put((number, None, traceback.format_exc()))
        raise
