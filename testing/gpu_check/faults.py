"""Checks that go wrong, each in a way of its own, for the tests of benchmarks/gpu_check."""

import ctypes
import os
import signal
import subprocess
import time
from dataclasses import replace

from benchmarks.gpu_check.outcome import judged
from benchmarks.gpu_check.registry import Check
from parallel.errors import PackageError


def passes(visit):
    yield judged(True, "well", number=7)


def reads(visit):
    yield judged(visit.found["good"]["number"] == 7, "what it reads is there")


def raises(visit):
    yield judged(True, "the first row is known")
    raise ValueError("a value that cannot be\nand more about it")


def refuses(visit):
    raise PackageError("the package is too old; install a newer one")
    yield


def crashes(visit):
    ctypes.string_at(0)
    yield


def is_killed(visit):
    yield judged(True, "before the kill")
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(visit):
    started = subprocess.Popen(["sleep", "100"])
    (visit.scratch / "started").write_text(str(started.pid))
    wait_for_ever()
    yield


def wait_for_ever():
    time.sleep(100)


def says_nothing(visit):
    return iter(())


class Bare(Check):
    """A check that needs nothing of what takes seconds to import."""

    stand_ins = "json"


def faulty(name, function, seconds=60.0, **more):
    """Return a check of this page."""
    return Bare(name, f"testing.gpu_check.faults:{function}", seconds, **more)


# -- faults of what is checked: the product is broken in one place, and the check is the real one ----------------------


def loss_is_off(visit):
    """The second step's loss is wrong by a hundredth."""
    import dsv3_megatron.train.step as steps
    from benchmarks.gpu_check import losses

    train, calls = steps.train_step, []

    def wrong(*given):
        calls.append(0)
        found = train(*given)
        return replace(found, lm_loss=found.lm_loss + 0.01) if len(calls) == 2 else found

    steps.train_step = wrong
    yield from losses.beside_the_cpu(visit, "torch", "bf16")


def weights_stay(visit):
    """FP8 goes on with the weights of the first step."""
    from benchmarks.gpu_check import requantise
    from dsv3_megatron.precision.products import Fp8Products

    quantised = Fp8Products.quantised_weight

    def first(self, weight):
        if self._weight is None:
            quantised(self, weight)
        return self._weight[2]

    Fp8Products.quantised_weight = first
    yield from requantise.weights_follow(visit, "torch", "fp8")


def load_is_not_exact(visit):
    """One weight in a million comes back changed."""
    import torch

    import dsv3_megatron.train.start as start
    from benchmarks.gpu_check import resume

    load = start.load_checkpoint

    def changed(found, parts, **how):
        notes = load(found, parts, **how)
        with torch.no_grad():
            next(parts.whole_model.parameters()).view(-1)[0] += 0.125
        return notes

    start.load_checkpoint = changed
    yield from resume.bit_exact(visit, "torch", "fp32")


def other_data_after_a_resume(visit):
    """State comes back, and the place in the data does not."""
    from benchmarks.gpu_check import resume
    from dsv3_megatron.train.progress import Progress

    stored = Progress.of
    Progress.of = classmethod(lambda cls, values: replace(stored(values), samples=0))
    yield from resume.bit_exact(visit, "torch", "fp32")


def average_stands_still(visit):
    """The average never takes a new weight in, and a save scales the gradients down."""
    import dsv3_megatron.train.trainer as trainer
    from benchmarks.gpu_check import averages
    from dsv3_megatron.train.ema import Ema

    Ema._update = lambda self: None
    train = trainer.train_step

    def lost(parts, *given):
        found = train(parts, *given)
        saved = parts.ema is not None and (visit.scratch / "with" / "checkpoints").glob("step_*")
        return replace(found, grad_norm=found.grad_norm / 5) if saved and any(saved) else found

    trainer.train_step = lost
    yield from averages.leaves_training_alone(visit, "torch", "fp32")


def products_are_off(visit):
    """A scale is wrong by a thirtieth."""
    from benchmarks.gpu_check import products

    emulated = products._emulated
    products._emulated = lambda *given: tuple(1.03 * value for value in emulated(*given))
    yield from products.as_emulated(visit, "te", "fp8")


def watchdog_is_silent(visit):
    """Actions are not told to the watchdog."""
    from benchmarks.gpu_check import hang
    from parallel.pipeline.watchdog import Watchdog

    Watchdog.begin = Watchdog.enter = lambda self, *given, **more: None
    yield from hang.is_named(visit)


def a_rank_fails(visit):
    """One of two ranks raises."""
    from benchmarks.gpu_check import layouts

    steps = layouts._steps

    def broken(visit, recipe):
        if os.environ.get("RANK") == "1":
            raise RuntimeError("no such kernel")
        return steps(visit, recipe)

    layouts._steps = broken
    yield from layouts.schedule(visit, "zb1p")


def of_product(function, needs=(), after=()):
    """Return a check whose product is broken by a function above."""
    return Check(function, f"testing.gpu_check.faults:{function}", 120.0, needs=needs, after=after)
