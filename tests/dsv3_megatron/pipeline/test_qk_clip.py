"""QK-clip: what it does to the masters of a step, in every kind of layout, and that training stays that of one process.

Oracles: S x S scores of what attention was given, one head after the other; the same step without QK-clip; one process.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from dsv3_megatron.checkpoint.manifest import read_manifest
from dsv3_megatron.checkpoint.optimizer_states import states_of
from dsv3_megatron.data.source.samples import Synthetic
from dsv3_megatron.megatron.replaced import replaced
from dsv3_megatron.model import te_attention
from dsv3_megatron.model.layers.attention import CoreAttention
from dsv3_megatron.model.layers.max_logits import MaxLogits
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.evaluation.scoring import evaluate_batches
from dsv3_megatron.train.step import train_step
from parallel.errors import RecipeError
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.lanes import in_lanes
from testing.ranks import TE, run_ranks
from testing.training.on_te import FP8, forget_fp8_state
from testing.training.on_te import WORDS as ON_TE
from testing.training.one_process import check
from testing.training.tiny import VALUES, Case, named_parameters, small_recipe, step_batches_of, train_rank
from testing.training.whole_runs import FOUR_STEPS, copy_of, steps, train

SHARP = ("model.initializer_range=0.2", "optim.global_batch=4", "optim.micro_batch=1")  # logits that differ by head
NOPE, VALUE, HEADS = 16, 16, 4
TAU = 5.5  # between the heads
AT_TAU, NEVER = f"optim.qk_clip={TAU}", "optim.qk_clip=1e9"


@dataclass
class Masters:
    """A step: the largest logits [L, H], how many heads were clipped, and the masters by name with their runs."""

    largest: np.ndarray
    clipped: int
    masters: dict[str, tuple[int, np.ndarray]]
    weights: dict[str, np.ndarray]
    scores: dict[int, np.ndarray]  # on one process, by layer: the largest of all S x S scores of each head


class InDocuments(Synthetic):
    """Samples of three documents each, cut in another place each."""

    def sample(self, number):
        """Return sequence ``number``."""
        sample, places = super().sample(number), np.arange(self.sequence_length)
        return replace(sample, documents=((places > number % 29).astype(np.int32) + (places > 25)).astype(np.int32))


def one_step(overrides):
    """Train this rank one step and return what it came to."""
    recipe, world = small_recipe(*SHARP, *overrides), World.from_environment()
    start_processes(world, torch.device("cpu"), timeout_seconds=120)
    try:
        with replaced(te_attention, "why_unfused", lambda *of_what: None):
            parts = build_parts(recipe, recipe.layout(world.size), torch.device("cpu"))
        make = InDocuments if recipe.data.isolate_documents else Synthetic
        source = make(recipe.model.vocab_size, recipe.data.sequence_length, seed=5)
        batches = step_batches_of(parts, 0, source)
        evaluate_batches(parts, step_batches_of(parts, 3, source))  # other text: its logits do not count
        scores = {}
        with scores_watched(parts, scores) if world.size == 1 else nullcontext():
            result = train_step(parts, batches, VALUES)
        parameters = named_parameters(parts)
        names = {id(parameter): name for name, parameter in parameters.items()}
        masters = {}
        for part in parts.optimizer.chained_optimizers:
            for parameter in part.model_param_group_index_map:
                start = part._get_model_param_range_map(parameter)["param"].start
                masters[names[id(parameter)]] = start, states_of(parts.optimizer)[parameter]["param"].numpy().copy()
        logits = result.logits
        weights = {name: p.detach().float().numpy().copy() for name, p in parameters.items()}
        return Masters(logits.largest, result.clipped_heads, masters, weights, scores)
    finally:
        stop_processes()
        if recipe.backend == "te":
            forget_fp8_state()


def plain_factors(name, largest, rope):
    """Return what each row of a whole weight of the model is multiplied with; None: it is none that is clipped."""
    parts = {"linear_q": ((NOPE, 0.5), (rope, 1.0)), "linear_kv_up": ((NOPE, 0.5), (VALUE, 0.0))}
    kind = next((kind for kind in parts if kind in name and "down" not in name), None)
    if kind is None or not name.endswith("proj.weight"):
        return None
    layer = int(name.split("layers.")[1].split(".")[0]) + (4 if name.startswith("mtp") else 0)
    rows = []
    for head in range(HEADS):
        gamma = min(1.0, TAU / largest[layer, head])
        rows += [gamma**power for width, power in parts[kind] for _ in range(width)]
    return np.array(rows, dtype=np.float32)


def check_masters(clipped, free, tp=(0, 1), rope=8, in_fp8=False):
    """Every master is that of the free step, of clipped heads scaled, all others bit for bit; weights follow them."""
    changed = 0
    for name, (start, master) in clipped.masters.items():
        begun, expected = free.masters[name]
        assert begun == start
        factors = plain_factors(name, free.largest, rope)
        if factors is not None:
            width = clipped.weights[name].shape[1]
            mine = np.split(factors, tp[1])[tp[0]].repeat(width)[start : start + len(expected)]
            assert np.array_equal(master[mine == 1], expected[mine == 1]), name
            expected = expected * mine
            changed += int((mine != 1).sum())
            np.testing.assert_allclose(master, expected, rtol=1e-6, err_msg=name)
        else:
            assert np.array_equal(master, expected), name
        weight = clipped.weights[name].flatten()[start : start + len(master)]
        if in_fp8 and np.abs(weight - master).max() <= 2**-4 * np.abs(master).max():
            continue
        assert np.array_equal(weight, master) or np.array_equal(weight, bf16(master)), name
    return changed


def bf16(numbers):
    return torch.from_numpy(numbers).bfloat16().float().numpy()


@contextmanager
def scores_watched(parts, found):
    """Add to ``found``, by layer, the largest of all S x S scores of each head that attention is given in training."""
    forward = CoreAttention.forward
    cores = [
        m.core_attention for chunk in parts.chunks.values() for m in chunk.modules() if hasattr(m, "core_attention")
    ]

    def watched(core, query, key, value, documents=None, **more):
        if core.training:
            scores = core.softmax_scale * torch.einsum("qbhd,kbhd->bhqk", query.double(), key.double()).detach()
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1).expand(len(scores), -1, -1)
            if documents is not None:
                hidden = hidden | (documents[:, :, None] != documents[:, None, :])
            largest = scores.masked_fill(hidden[:, None], -torch.inf).amax((0, 2, 3)).numpy()
            layer = cores.index(core)
            found[layer] = np.maximum(found.get(layer, -np.inf), largest)
        return forward(core, query, key, value, documents, **more)

    with replaced(CoreAttention, "forward", watched):
        yield


PLAIN = {
    "float32": (),
    "bf16": ("precision=bf16",),
    "bf16, float32 moments": ("precision=bf16", "precision.moments=fp32"),
    "full-rank queries": ("model.q_lora_rank=null",),
    "isolated documents": ("data.isolate_documents=true",),
    "recompute": ("parallel.recompute=[mla_up,attention]",),
    "full recompute": ("parallel.recompute=[full]",),
}


@pytest.mark.parametrize(
    "cases", in_lanes(PLAIN, "float32", "bf16", "full-rank queries", "isolated documents", "recompute")
)
def test_a_step_scales_the_masters_of_the_heads_above_the_threshold(cases):
    found = run_ranks(1, one_step, [(*words, more) for words in cases.values() for more in (AT_TAU, NEVER)])
    for name, ((clipped,), (free,)) in zip(cases, zip(found[::2], found[1::2])):
        for layer, largest in free.scores.items():
            np.testing.assert_allclose(free.largest[layer], largest, rtol=1e-5, err_msg=name)
        assert 0 < clipped.clipped < clipped.largest.size and free.clipped == 0, name
        assert np.array_equal(clipped.largest, free.largest), name  # taken before the update
        assert check_masters(clipped, free) > 0, name


TWO = {
    "DP2": (),
    "EP2": ("parallel.expert=2",),
    "TP2": ("parallel.tensor=2",),
    "CP2": ("parallel.context=2",),
    "CP2 recompute": ("parallel.context=2", "parallel.recompute=[mla_up,attention]"),
    "1f1b": ("parallel.pipeline=2",),
    "zb1p": ("parallel.pipeline=2", "parallel.schedule=zb1p"),
    "dualpipe": ("parallel.pipeline=2", "parallel.schedule=dualpipe"),
    "dualpipev": ("parallel.pipeline=2", "parallel.schedule=dualpipev"),
}
FOUR = {
    "TP2 x CP2": ("parallel.tensor=2", "parallel.context=2"),
    "dualpipe x TP2": ("parallel.pipeline=2", "parallel.schedule=dualpipe", "parallel.tensor=2"),
    "dualpipe x DP2": ("parallel.pipeline=2", "parallel.schedule=dualpipe"),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("reference") / "reference.pt")
    ((found,),) = run_ranks(1, train_rank, [Case((*SHARP, AT_TAU), save_to=path)])
    return found, path


def trained(case):
    """Return three steps of a Case, or one of a recipe's words."""
    return train_rank(case) if isinstance(case, Case) else one_step(case)


def check_layouts(ranks, layouts, reference):
    expected, path = reference
    assert all(result.clipped_heads for result in expected["results"])
    cases = [
        case
        for words in layouts.values()
        for case in ((*words, AT_TAU), (*words, NEVER), Case((*SHARP, AT_TAU, *words), reference=path))
    ]
    found = iter(run_ranks(ranks, trained, cases))
    for name in layouts:
        changed = 0
        for rank, (clipped, free) in enumerate(zip(next(found), next(found))):
            tp = int("parallel.tensor=2" in layouts[name]) + 1
            changed += check_masters(clipped, free, (rank % tp, tp))
        assert changed > 0, name
        three_steps = next(found)
        check(name, three_steps, expected)
        for rank in three_steps:
            for mine, one in zip(rank["results"], expected["results"]):
                np.testing.assert_allclose(mine.logits.largest, one.logits.largest, rtol=1e-5, err_msg=name)
                assert mine.clipped_heads == one.clipped_heads, name


@pytest.mark.parametrize("layouts", in_lanes(TWO, "EP2", "TP2", "CP2", "dualpipe", "dualpipev"))
def test_two_ranks_clip_as_one_process(reference, layouts):
    check_layouts(2, layouts, reference)


@pytest.mark.parametrize("layouts", in_lanes(FOUR, "TP2 x CP2"))
def test_four_ranks_clip_as_one_process(reference, layouts):
    check_layouts(4, layouts, reference)


HELD = (*FP8, "precision.fp8.hold_weights=true")
DELAYED = (*(f"precision.fp8.{role}_tile=tensor" for role in ("activation", "weight", "gradient")),
           "precision.fp8.scaling=delayed", "precision.fp8.swiglu_cache=high")  # fmt: skip
TE_ONE = {
    "float32": ON_TE,
    "bf16": (*ON_TE, "precision=bf16"),
    "fp8": FP8,
    "held": HELD,
    "held, float32 moments": (*HELD, "precision.moments=fp32"),
    "delayed": (*FP8, *DELAYED),
}
TE_TWO = {
    "TP2": (*ON_TE, "parallel.tensor=2"),
    "held": HELD,
    "held, dualpipe": (*HELD, "parallel.pipeline=2", "parallel.schedule=dualpipe"),
}


@pytest.mark.parametrize("cases", in_lanes(TE_ONE, "float32", "held"))
def test_transformer_engine_clips_as_torch_does(cases):
    torch_words = (*ON_TE[1:], "backend=torch", NEVER)
    ((torch_backend,),) = run_ranks(1, one_step, [torch_words])
    words = [(*words, more) for words in cases.values() for more in (AT_TAU, NEVER)]
    found = run_ranks(1, one_step, words, preload=TE)
    for name, ((clipped,), (free,)) in zip(cases, zip(found[::2], found[1::2])):
        # What rounding does to later layers of this sharp model is no small change.
        layers, tolerance = (5, 1e-5) if name == "float32" else (1, 0.1)
        largest, expected = free.largest[:layers], torch_backend.largest[:layers]
        np.testing.assert_allclose(largest, expected, rtol=tolerance, err_msg=name)
        assert 0 < clipped.clipped < clipped.largest.size and free.clipped == 0, name
        assert check_masters(clipped, free, rope=16, in_fp8="held" in name) > 0, name


@pytest.mark.full
def test_transformer_engine_clips_on_two_ranks():
    words = [(*words, more) for words in TE_TWO.values() for more in (AT_TAU, NEVER)]
    found = run_ranks(2, one_step, words, preload=TE)
    for name, ranks, free_ranks in zip(TE_TWO, found[::2], found[1::2]):
        tp = 2 if name == "TP2" else 1
        for rank, (clipped, free) in enumerate(zip(ranks, free_ranks)):
            check_masters(clipped, free, (rank % tp, tp), rope=16, in_fp8="held" in name)
        assert 0 < ranks[0].clipped < ranks[0].largest.size, name


def test_a_run_reports_what_it_clips_and_resumes_bit_for_bit(tmp_path):
    words = (*SHARP, *FOUR_STEPS, AT_TAU)
    train(1, *words, f"run.directory={tmp_path}/whole")
    lines = steps(tmp_path / "whole")
    assert all(len(line["max_attention_logit"]) == 5 for line in lines)
    assert all(0 < line["clipped_heads"] < 20 for line in lines)
    train(1, *words, f"run.directory={copy_of(tmp_path / 'whole', tmp_path / 'resumed', keep_steps=2)}")
    fields = ("lm_loss", "grad_norm", "max_attention_logit", "clipped_heads")
    for mine, theirs in zip(steps(tmp_path / "resumed"), lines, strict=True):
        assert [mine[field] for field in fields] == [theirs[field] for field in fields]
    final = "checkpoints/step_00000004"
    assert read_manifest(tmp_path / "resumed" / final) == read_manifest(tmp_path / "whole" / final)


@pytest.mark.parametrize("freeze", ["attention", "layers.1-2", "mtp"])
def test_frozen_attention_cannot_be_clipped(freeze):
    said = rf"optim.qk_clip = 100 scales .*, which model.freeze = \['{freeze}'\] freezes in some layers; set"
    with pytest.raises(RecipeError, match=said) as refused:
        small_recipe("optim.qk_clip=100", f"model.freeze=[{freeze}]")
    assert "\n" not in str(refused.value)
    small_recipe("optim.qk_clip=100", "model.freeze=[experts,norms]")


def skipped_and_broken(case):
    """Return what changes in a step that is skipped, and in one with a logit that is no number."""
    world = World.from_environment()
    recipe = small_recipe(*SHARP, AT_TAU)
    start_processes(world, torch.device("cpu"), timeout_seconds=120)
    try:
        parts = build_parts(recipe, recipe.layout(world.size), torch.device("cpu"))
        before = {name: p.detach().clone() for name, p in named_parameters(parts).items()}
        skipped = train_step(parts, step_batches_of(parts), VALUES, lambda loss, norm: False)
        moved = [name for name, p in named_parameters(parts).items() if not p.equal(before[name])]
        take = MaxLogits.take
        with replaced(MaxLogits, "take", lambda largest: take(largest).fill_(float(case))):
            broken = train_step(parts, step_batches_of(parts), VALUES)
        finite = all(p.isfinite().all() for p in named_parameters(parts).values())
        return skipped.clipped_heads, skipped.logits.clipped, moved, broken.clipped_heads, finite, broken.logits.largest
    finally:
        stop_processes()


def test_a_skipped_step_clips_nothing_and_no_number_that_is_none_gets_into_weights():
    for ((clipped, above, moved, broken, finite, largest),) in run_ranks(1, skipped_and_broken, ["nan", "inf"]):
        assert clipped == 0 < above and not moved
        assert broken == 0 and finite and np.isinf(largest).all()
