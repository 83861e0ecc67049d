"""What Transformer Engine holds of weight gradients beside the float32 buffers is in the plan."""

import torch

from dsv3_megatron.planning.memory.te_gradients import placeholder_bytes
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.step import train_step
from launcher.command_line.compose import compose
from parallel.groups import start_processes, stop_processes
from parallel.layout import Layout
from parallel.world import World
from testing.ranks import TE, run_ranks
from testing.training.on_te import FP8, WORDS
from testing.training.tiny import VALUES, small_recipe, step_batches_of

CASES = [
    (*WORDS, "parallel.schedule=1f1b"),
    (*WORDS, "precision=bf16", "parallel.schedule=dualpipev"),
    (*FP8, "parallel.schedule=zb1p"),
    (*FP8, "parallel.schedule=dualpipev"),
    (*FP8, "precision.fp8.hold_weights=true", "parallel.schedule=dualpipev"),
]


def beside_the_buffers(words):
    """Return (most bytes that gradients and queued weight gradients held outside of the buffers, bytes planned)."""
    recipe = small_recipe(*words)
    start_processes(World.from_environment(), torch.device("cpu"))
    try:
        parts = build_parts(recipe, recipe.layout(1), torch.device("cpu"))
        layers = [m for c in parts.chunks.values() for m in c.modules() if getattr(m, "wgrad_store", None)]
        weights = [p for layer in layers for name, p in layer.named_parameters() if name.startswith("weight")]
        most, stages = 0, parts.stages

        def look(run):
            def looked(*arguments):
                nonlocal most
                before = _bytes(layers, weights)
                run(*arguments)
                most = max(most, before, _bytes(layers, weights))

            return looked

        for name in ("forward", "backward", "forward_backward", "weight_gradient"):
            setattr(stages, name, look(getattr(stages, name)))
        for number in range(2):
            train_step(parts, step_batches_of(parts, number), VALUES)
        return most, placeholder_bytes(recipe, parts.layout, parts.chunks)
    finally:
        stop_processes()


def _bytes(layers, weights):
    """Return the bytes of gradients, those that TE made for autograd and those it owes, but for the float32 buffers."""
    from transformer_engine.pytorch.module import base

    held = [*base._dummy_wgrads.values(), *(p.grad for p in weights if p.grad is not None)]
    for layer in layers:
        for (*_, gradients), _ in list(layer.wgrad_store.context.queue) if layer.wgrad_store.context else ():
            held += gradients if isinstance(gradients, list) else []
    buffers = {p.main_grad.untyped_storage().data_ptr() for p in weights}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held if torch.is_tensor(t)}
    return sum(size for place, size in storages.items() if place not in buffers)


def test_te_holds_one_placeholder_for_every_shape_of_weight():
    for words in CASES:  # a process each: placeholders stay as long as it lives
        (((measured, planned),),) = run_ranks(1, beside_the_buffers, [words], preload=TE)
        assert measured == planned > 0, words


def test_placeholders_of_the_published_recipe_by_hand():
    recipe = compose(["recipe=dsv3_671b"])
    layout = Layout(dp=128, pp=16, ep=64, expert_dp=2)
    attention = 1536 * 7168 + 128 * 192 * 1536 + 576 * 7168 + 128 * 256 * 512 + 7168 * 128 * 128
    experts = 2 * 2048 * 7168 + 7168 * 2048  # the shared one has the shapes of the routed ones
    assert placeholder_bytes(recipe, layout, [5]) == 2 * (attention + experts)
    assert placeholder_bytes(recipe, layout, [0, 15]) > placeholder_bytes(recipe, layout, [5, 10])
    assert placeholder_bytes(compose(["recipe=dsv3_671b", "backend=torch"]), layout, [5]) == 0
