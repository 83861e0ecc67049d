"""The end of `make demo`: what a run learned, where it lies, what to try next.

python launcher/demo.py run=RUN_DIRECTORY
"""

from __future__ import annotations

import math
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

from pydantic import Field

from dsv3_megatron.report.sound import is_number, sound_step
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.files import read_json
from dsv3_megatron.run.shell import program
from launcher import generate
from launcher.command_line.arguments import Arguments, takes
from launcher.command_line.console import guarded, text_plot
from launcher.command_line.output import write_output
from launcher.command_line.typed import command
from parallel.errors import DataError
from parallel.units import show_count, show_duration


class DemoArguments(Arguments):
    """The keys of this command."""

    run: str = Field(description="run directory to tell about")
    prompt: str = Field("def read(self, ", description="text for the model to continue")


@takes(DemoArguments, __doc__)
def main(given: DemoArguments) -> int:
    """Print the story of a finished run; return the exit code."""
    directory = RunDirectory(given.run)
    try:
        steps = [step for row in directory.read_metrics() if (step := shown_step(row)) is not None]
    except OSError as error:
        raise DataError(f"{directory.metrics} cannot be read ({error.strerror}); name another run") from None
    summary = read_json(directory.summary)
    checkpoints = sorted(directory.checkpoints.glob("step_*"))
    if not steps or not checkpoints or not is_summary(summary):
        raise DataError(f"run = {given.run} holds no finished run; train one with launcher/pretrain.py")
    plot = save_plot(directory, steps)
    print("\n" + text_plot([s["lm_loss"] for s in steps], title="training loss (nats per token) by step"))
    tell_result(steps, summary)
    tell_sample(given)
    print(f"\nrun directory  {directory.path}\ncheckpoint     {checkpoints[-1]}\nplot           {plot}")
    print(f"report         {directory.report} (open it in a browser)")
    print(f"metrics        {directory.metrics} (and {directory.path}/wandb: `{program('wandb')} sync` uploads it)")
    print("\nTry next\n" + "\n".join(f"  {line}" for line in next_commands(given.run)))
    return 0


def shown_step(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return what is told of a step; None where it has no loss, or is none."""
    step = sound_step(row, ("lm_loss", "mtp_loss", "max_violation", "tokens_per_second"))
    if step is None or not all(is_number(step[key]) for key in ("lm_loss", "tokens_per_second")):
        return None
    return step


def is_summary(content: dict[str, Any]) -> bool:
    """Return whether a run's summary says what is told of it."""
    numbers = [content.get(key) for key in ("step", "tokens", "seconds")]
    held_out = [content.get(key) or {} for key in ("before", "after")]
    return all(is_number(n) for n in numbers) and all(
        isinstance(part, dict) and is_number(part.get("bits_per_byte", 0.0)) for part in held_out
    )


def next_commands(run: str) -> list[str]:
    """Return what to try next, as it is typed in this shell: ``make`` runs in an environment that may not be active."""
    return [
        f"{command('generate')} run={run} prompt='import ' tokens=60 temperature=0.7",
        f"{command('evaluate')} run={run}",
        f"{command('train', ranks=2)} recipe=dsv3_tiny run.name=mine parallel.expert=2",
        f"{command('train')} --help",
    ]


def tell_result(steps: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Print what was learned and how fast."""
    before, after = summary.get("before") or {}, summary.get("after") or {}
    if "bits_per_byte" in before and "bits_per_byte" in after:
        print(f"\nheld-out bits per byte: {before['bits_per_byte']:.3f} before, {after['bits_per_byte']:.3f} after")
    rates = sorted(s["tokens_per_second"] for s in steps)
    print(
        f"{summary['step']} steps, {show_count(summary['tokens'])} tokens in {show_duration(summary['seconds'])}, "
        f"median {show_count(rates[len(rates) // 2])} tokens/s"
    )


def tell_sample(given: DemoArguments) -> None:
    """Print a continuation of the prompt."""
    print("\nThe model continues:\n" + "-" * 72)
    generate.main([f"run={given.run}", f"prompt={given.prompt}", "tokens=80", "temperature=0.6"])
    print("-" * 72)


def save_plot(directory: RunDirectory, steps: list[dict[str, Any]]) -> Path:
    """Write loss.svg into the run directory: main and MTP loss by tokens, and MaxVio below."""
    import matplotlib  # half a second, which a refused run need not wait for

    matplotlib.use("svg")
    import matplotlib.pyplot as plt  # after its backend is chosen

    figure, (losses, balance) = plt.subplots(2, 1, figsize=(8, 6), height_ratios=(3, 1), sharex=True)
    tokens = [s["tokens"] for s in steps]
    losses.plot(tokens, [s["lm_loss"] for s in steps], color="black", label="next token")
    if steps[0]["mtp_loss"] is not None:
        mtp = [math.nan if s["mtp_loss"] is None else s["mtp_loss"] for s in steps]
        losses.plot(tokens, mtp, color="gray", linestyle="--", label="MTP")
    losses.set_ylabel("loss (nats per token)")
    losses.legend(frameon=False)
    balance.plot(tokens, [s["max_violation"] or 0.0 for s in steps], color="black")
    balance.set_ylabel("MaxVio")
    balance.set_xlabel("tokens")
    for axes in (losses, balance):
        axes.grid(alpha=0.3)
    path = directory.path / "loss.svg"
    figure.tight_layout()
    drawn = BytesIO()
    figure.savefig(drawn, format="svg")
    plt.close(figure)
    write_output(path, drawn.getvalue(), "run")
    return path


if __name__ == "__main__":
    sys.exit(guarded(main))
