"""Does training in FP8 lose anything? The same model, text, seed and steps in fp32, bf16 and several kinds of FP8.

    python -m benchmarks.fp8_vs_bf16 [steps=400] [jobs=2] [variants=bf16,fp8_paper,...]

Fair because everything but the format is the same: weights of step 0, order of samples, learning rates. Compared is the
relative difference of the language-model loss from BF16's, each curve smoothed by an exponential moving average of 0.9,
as in DeepSeek-V3's report (arXiv 2412.19437 appendix B.1; below 0.25% over 1.33T tokens of a 16B model). FP8 is the
torch backend's emulation, which rounds as the GPU does and adds up in float32. Runs resume where they were cut.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from pydantic import BaseModel, Field

from benchmarks.fp8_variants import MEANING, ROOT, VARIANTS, directory, train
from launcher.command_line.arguments import parse_arguments

RESULTS = ROOT / "benchmarks" / "results" / "fp8_vs_bf16.json"
FIGURE = ROOT / "docs" / "img" / "fp8_vs_bf16.svg"


class Arguments(BaseModel):
    """What can be said on the command line."""

    steps: int = Field(400, ge=60, description="steps of 4,096 tokens each")
    jobs: int = Field(2, description="trainings side by side, one thread each")
    variants: str = Field(
        ",".join(VARIANTS), description="which to train; all that were, at least half, are reported; none = report only"
    )


def losses(name: str, steps: int) -> list[float] | None:
    """Return a variant's loss curve as far as it was trained, smoothed, or None where that is not worth a figure."""
    path = directory(name, steps) / "metrics.jsonl"
    raw = [json.loads(line)["lm_loss"] for line in path.read_text().splitlines()] if path.exists() else []
    if len(raw) < steps // 2:
        return None
    smooth = [raw[0]]
    for value in raw[1:]:
        smooth.append(0.9 * smooth[-1] + 0.1 * value)
    return smooth


def held_out(name: str, steps: int) -> float:
    """Return the held-out loss after the last step."""
    summary = json.loads((directory(name, steps) / "summary.json").read_text())
    return round(summary["after"]["held_out_loss"], 5)


def trained_at(steps: int) -> str:
    """Return the commit that trained the reference."""
    return json.loads((directory("bf16", steps) / "environment.json").read_text())["git_commit"]


def report(steps: int) -> dict:
    """Return the figures of every trained variant, and draw the differences."""
    curves = {name: curve for name in VARIANTS if (curve := losses(name, steps))}
    reference = curves["bf16"]
    rows = {}
    for name, curve in curves.items():
        relative = [100 * (mine - theirs) / theirs for mine, theirs in zip(curve, reference)]
        late, finished = relative[steps // 4 :], len(curve) >= steps
        rows[name] = {
            "meaning": MEANING[name],
            "steps": len(curve),
            "final_smoothed_loss": round(curve[-1], 5),
            "held_out_loss": held_out(name, steps) if finished else None,
            "difference_percent_at_the_end": round(relative[-1], 4),
            "mean_difference_percent_after_a_quarter": round(sum(late) / len(late), 4),
            "largest_difference_percent_after_a_quarter": round(max(late, key=abs), 4),
            "difference_percent": [round(value, 4) for value in relative[:: max(1, steps // 100)]],
        }
    draw({name: row["difference_percent"] for name, row in rows.items() if name != "bf16"}, steps)
    return rows


def draw(differences: dict[str, list[float]], steps: int) -> None:
    """Draw the relative differences over tokens as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    axes.axhspan(-0.25, 0.25, color="0.92", label="the paper's 0.25%")
    for name, values in differences.items():
        tokens = [i * max(1, steps // 100) * 4096 / 1e6 for i in range(len(values))]
        axes.plot(tokens, values, label=f"{name}: {MEANING[name]}", linewidth=1.4)
    axes.set_xlabel("tokens, million")
    axes.set_ylabel("loss against BF16, % (EMA 0.9)")
    axes.legend(fontsize=7, frameon=False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(FIGURE)


def main() -> None:
    """Train what is missing, then print and write the table."""
    arguments = parse_arguments(Arguments, sys.argv[1:])
    with ThreadPoolExecutor(arguments.jobs) as pool:
        wanted = [name for name in arguments.variants.split(",") if name in VARIANTS]
        list(pool.map(lambda name: train(name, arguments.steps), wanted))
    rows = report(arguments.steps)
    import torch

    made = {
        "command": f"python -m benchmarks.fp8_vs_bf16 steps={arguments.steps} jobs={arguments.jobs}",
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "tokens_a_step": 4096,
        "variants": rows,
    }
    RESULTS.write_text(json.dumps(made, indent=1) + "\n")
    print(f"{'variant':<24}{'steps':>6}{'final loss':>11}{'held-out':>10}{'end, %':>9}{'mean, %':>9}{'largest, %':>12}")
    for name, row in rows.items():
        print(
            f"{name:<24}{row['steps']:>6}{row['final_smoothed_loss']:>11}{row['held_out_loss'] or '-':>10}"
            f"{row['difference_percent_at_the_end']:>9}{row['mean_difference_percent_after_a_quarter']:>9}"
            f"{row['largest_difference_percent_after_a_quarter']:>12}"
        )


if __name__ == "__main__":
    main()
