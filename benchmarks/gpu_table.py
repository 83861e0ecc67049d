"""The GPU benchmark's quantities, the paper's for every side, its goals, and its table."""

from __future__ import annotations

from collections.abc import Sequence

GOALS = (  # row, against which other (None: MFU), at least
    ("te bf16", "megatron bf16", 1.0),
    ("te bf16 dense", None, 0.45),
    ("te fp8", "te bf16", 1.3),
    ("torch bf16", "te bf16", 0.9),
    ("torch fp8", "te fp8", 0.9),
)


def in_paper_terms(words: Sequence[str], step_seconds: float, memory: float) -> dict[str, float | None]:
    """Return the same quantities for a side that knows only how long its step took.

    ``words`` make the recipe; ``mfu`` is None where its cluster has no BF16 peak.
    """
    from dsv3_megatron.model.costs import training_flops_per_token
    from launcher.command_line.compose import compose

    recipe = compose(list(words))
    rate = recipe.optim.global_batch * recipe.data.sequence_length / step_seconds
    tflops = rate * training_flops_per_token(recipe.model, recipe.data.sequence_length) / 1e12
    peak = recipe.cluster.peak_tflops.get("bf16")
    mfu = tflops / peak if peak else None
    return {"tokens_per_second": rate, "tflops_per_device": tflops, "mfu": mfu, "memory_peak_bytes": memory}


def table(rows: dict[str, dict[str, float]], failures: dict[str, str]) -> list[str]:
    """Return the lines of the comparison, then the goals reached and missed."""
    plain = rows.get("megatron bf16", {}).get("tokens_per_second")
    lines = []
    for name, row in rows.items():
        ratio = f"{row['tokens_per_second'] / plain:.2f} x plain megatron-core bf16" if plain else ""
        mfu = f"{100 * row['mfu']:>6.1f}% MFU" if row["mfu"] is not None else ""
        lines.append(
            f"{name:<18}{row['tokens_per_second']:>9.0f} tokens/s{row['tflops_per_device']:>7.0f} TFLOP/s{mfu}"
            f"{row['memory_peak_bytes'] / 2**30:>7.1f} GiB  {ratio}".rstrip()
        )
    for name, against, wanted in GOALS:
        if name in rows and (rows[name]["mfu"] is not None if against is None else against in rows):
            here = rows[name]
            found = here["tokens_per_second"] / rows[against]["tokens_per_second"] if against else here["mfu"]
            what = f"{name} at least {wanted} x {against}" if against else f"{name} at least {wanted} MFU"
            lines.append(f"goal: {what}: {found:.2f}, {'reached' if found >= wanted else 'missed'}")
    return [*lines, *(f"failed: {name}: {why}" for name, why in failures.items())]


def reason(stderr: str) -> str | None:
    """Return the line of a process's last words that says why: warnings at the end come after it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error: " in line), lines[-1] if lines else None)
