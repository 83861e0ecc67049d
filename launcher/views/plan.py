"""The plan as a table in the terminal."""

from __future__ import annotations

from dsv3_megatron.planning.advice import advice
from dsv3_megatron.planning.plan import Plan, missing_facts
from parallel.units import GIB, show_bytes, show_count, show_duration


def text_of(plan: Plan, *, advise: bool = True) -> list[str]:
    """Return the plan as lines of text."""
    return [*_head(plan), "", *_memory(plan, advise=advise), *_time(plan), *_failures(plan)]


def _head(plan: Plan) -> list[str]:
    recipe, counts = plan.recipe, plan.parameters
    cluster = recipe.cluster
    return [
        f"recipe={recipe.recipe} cluster={cluster.name}: {plan.layout.world_size:,} ranks, {plan.layout.describe()}, "
        f"{recipe.parallel.schedule}, {plan.schedule.microbatches} microbatches of {recipe.optim.micro_batch} x "
        f"{recipe.data.sequence_length:,} tokens",
        f"stages          {' '.join(map(str, plan.layers))} layers; recompute [{', '.join(recipe.parallel.recompute)}]",
        "",
        f"parameters      {counts.main:>19,}  main",
        f"                {counts.mtp:>19,}  MTP",
        f"                {counts.activated_per_token:>19,}  activated per token",
        *([f"                {counts.trained:>19,}  trained"] if recipe.model.freeze else []),
        *([f"                {counts.frozen:>19,}  frozen: {', '.join(recipe.model.freeze)}"] if counts.frozen else []),
        f"                {counts.attention:>19,}  attention, a layer",
        f"                {counts.dense_layer:>19,}  dense layer",
        f"                {counts.moe_layer:>19,}  MoE layer, {recipe.model.n_routed_experts} experts of "
        f"{counts.routed_expert:,}",
        f"                {counts.embedding:>19,}  embedding, and as many in the head",
    ]


def _memory(plan: Plan, *, advise: bool) -> list[str]:
    lines = [
        "memory of a GPU by pipeline rank, GiB",
        "  rank  params  weights  in FP8  gradients  optimizer  activations  live  messages  reserve    total   limit",
    ]
    for rank, held in zip(plan.ranks, plan.held):
        limit = f"{rank.limit_bytes / GIB:7.1f}" if rank.limit_bytes else "      -"
        reserve = rank.reserved_bytes + rank.fragmentation_bytes
        lines.append(
            f"  {rank.pipeline_rank:4}  {show_count(held.all):>6}  {rank.weights_bytes / GIB:7.1f}  "
            f"{rank.fp8_weights_bytes / GIB:6.1f}  {rank.gradients_bytes / GIB:9.1f}  "
            f"{rank.optimizer_bytes / GIB:9.1f}  {rank.activations_bytes / GIB:11.1f}  {rank.live_microbatches:4}  "
            f"{rank.messages_bytes / GIB:8.2f}  {reserve / GIB:7.1f}  {rank.total_bytes / GIB:7.1f}  {limit}"
            f"{'' if rank.fits else '  does not fit'}"
        )
    tightest = plan.tightest
    where = f"tightest is rank {tightest.pipeline_rank}: {show_bytes(tightest.total_bytes)}"
    if tightest.limit_bytes:
        spare = tightest.limit_bytes - tightest.total_bytes
        where += (
            f" of {show_bytes(tightest.limit_bytes)}, {show_bytes(abs(spare))} {'spare' if spare >= 0 else 'too much'}"
        )
    lines.append(f"  {where}; fullest at {tightest.fullest_action}")
    if update := max(rank.update_bytes for rank in plan.ranks):
        lines.append(f"  while Muon updates, activations are gone; its matrices take {show_bytes(update)} at most")
    if advise:
        lines += [f"  {line}" for line in advice(plan)]
    return [*lines, ""]


def _muon(plan: Plan) -> list[str]:
    """Return what Muon's part of the step's end consists of."""
    muon = plan.priced_step.muon
    if muon is None:
        return []
    return [
        f"                Muon {muon.seconds:.3f} of that: Newton-Schulz {muon.work_seconds:.3f} on the slowest rank, "
        f"momentum, weights and AdamW {muon.memory_seconds:.3f},",
        f"                waiting for the exchange {muon.waiting_seconds:.3f}; the exchange alone takes "
        f"{muon.exchange_seconds:.3f}",
        *_unpriced(plan),
    ]


def _unpriced(plan: Plan) -> list[str]:
    """Return what of Muon's time is no price: where the peak of its arithmetic is not known, BF16's is taken."""
    cluster = plan.recipe.cluster
    if plan.recipe.optim.muon.arithmetic != "fp32" or "fp32" in cluster.peak_tflops:
        return []
    return [
        f"                too short: cluster={cluster.name} gives no peak_tflops.fp32 for optim.muon.arithmetic = "
        "fp32, and BF16's is taken"
    ]


def _time(plan: Plan) -> list[str]:
    if plan.step is None:
        name = plan.recipe.cluster.name
        return [f"time            not priced: cluster={name} gives no {missing_facts(plan.recipe)}"]
    lines = ["sent by one GPU in a step               inside the node   between nodes   seconds if alone"]
    for name, moved in plan.traffic().items():
        if moved.intra_bytes or moved.inter_bytes:
            lines.append(
                f"  {name:<36} {show_bytes(moved.intra_bytes):>17} {show_bytes(moved.inter_bytes):>15} "
                f"{moved.seconds:18.2f}"
            )
    step = plan.step
    mfu, open_mfu = plan.mfu(), plan.mfu(causal=False)
    hours = plan.gpu_hours_per_trillion_tokens
    run_hours = hours * plan.budget_tokens / 1e12
    cost = run_hours * plan.recipe.cluster.dollars_per_gpu_hour
    lines += [
        "",
        f"step            {step.seconds:.2f} s: pipeline {step.pipeline_seconds:.2f} (mean bubble "
        f"{step.bubble_seconds:.2f}), gradients after it {step.tail_seconds:.2f}, optimizer and weights "
        f"{step.optimizer_seconds:.2f}",
        *_muon(plan),
        f"                {show_count(plan.tokens)} tokens, {show_count(plan.tokens_per_second)} tokens/s, "
        f"{plan.tokens_per_second / plan.layout.world_size:,.0f} a GPU",
        f"                {plan.tflops_per_device(causal=True):.0f} TFLOP/s a GPU causal, "
        f"{plan.tflops_per_device(causal=False):.0f} not" + (f"; MFU {mfu:.1%} and {open_mfu:.1%}" if mfu else ""),
        f"run             {hours / 1e3:.1f}K GPU-hours per trillion tokens; {show_count(plan.budget_tokens)} tokens: "
        f"{show_duration(run_hours / plan.layout.world_size * 3600)}, {show_count(run_hours)} GPU-hours, "
        f"{show_count(cost)} dollars",
        "                priced from published kernels and links, not measured (docs/planning.md)",
    ]
    return lines


def _failures(plan: Plan) -> list[str]:
    """Return what failures and saves leave of the time."""
    if lacks := plan.goodput_lacks:
        return [f"failures        not planned: {lacks}"]
    found, cluster = plan.goodput, plan.recipe.cluster
    lines = [
        f"failures        {found.failures_per_day:.2f} a day on {plan.layout.world_size:,} GPUs "
        f"(cluster.failures_per_gpu_day = {cluster.failures_per_gpu_day:g})",
        f"                a checkpoint has {show_bytes(found.checkpoint_bytes)}, {show_bytes(found.rank_bytes)} on the "
        f"fullest rank; the file system takes {cluster.storage_gigabytes_per_second:g} GB/s",
    ]
    if "memory_survives" in found.assumptions:
        served = found.assumptions["memory_survives"]
        lines.append(
            f"                memory serves {served:.0%} of the failures, by assumption, and the disk the others"
        )
    for kind in found.saves:
        load = kind.costs.recovery_seconds - found.assumptions["run.abort_seconds"] - cluster.start_seconds
        lines += [
            f"                a save to {kind.name} stops training for {_time_of(kind.costs.stall_seconds)} and is "
            f"complete after {_time_of(kind.costs.seconds)};",
            f"                the recipe has one {_interval(plan, kind.planned_seconds)}; best is "
            f"{_interval(plan, kind.best_seconds)}",
            f"                from a failure to the next step: {show_duration(kind.costs.recovery_seconds)} "
            f"({found.assumptions['run.abort_seconds']:g} s until it is noticed at the latest, "
            f"{cluster.start_seconds:g} to start, {load:.3g} to load)",
        ]
    return [
        *lines,
        f"                useful {found.share:.1%} of the time; {found.best_share:.1%} with the best interval",
    ]


def _time_of(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else show_duration(seconds)


def _interval(plan: Plan, seconds: float) -> str:
    steps = plan.goodput.steps(seconds)
    return "never" if steps is None else f"every {steps:,} steps, which take {show_duration(seconds)}"
