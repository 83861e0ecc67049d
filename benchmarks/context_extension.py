"""Is the long context used after the extension, and not before? Held-out loss by position and by context.

    python -m benchmarks.context_extension before=RUN_DIRECTORY after=RUN_DIRECTORY [sequences=8] [output=FILE.json]

``before`` is a finished run of recipe=dsv3_tiny (256 tokens), ``after`` one of dsv3_tiny_2k started from it. Both
predict the same held-out sequences of 2,048 tokens: with all tokens before each as context, and with the last 128 to
256 only (windows of 256, of which the second half counts). The gain from the long context is what the first beats the
second by, on the same targets.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, PositiveInt

from launcher.command_line.arguments import parse_arguments
from launcher.command_line.compose import load_resolved
from launcher.command_line.console import guarded

LENGTH, WINDOW = 2048, 256
EDGES = (0, 256, 512, 1024, 2048)


class Arguments(BaseModel):
    """What the benchmark takes."""

    before: str = Field(description="finished run of recipe=dsv3_tiny")
    after: str = Field(description="finished run of recipe=dsv3_tiny_2k")
    sequences: PositiveInt = 8
    output: str = "benchmarks/results/context_extension.json"


def measure(directory: str, sequences: int) -> dict[str, Any]:
    """Return mean losses, nats a token, of one model: by position with whole and with short context."""
    import torch
    import torch.nn.functional as F

    from dsv3_megatron.data.source import stdlib
    from dsv3_megatron.inference.trained_model import trained_model
    from dsv3_megatron.model.stage import forward_logits

    recipe = load_resolved(Path(directory) / "recipe.yaml")
    _, _, held_out = stdlib.load(recipe.data.cache, recipe.model.vocab_size, recipe.data.held_out)
    ids = torch.from_numpy(held_out[: sequences * LENGTH + 1].astype("int64"))
    tokens, labels = ids[:-1].view(sequences, LENGTH), ids[1:].view(sequences, LENGTH)

    def losses(model: Any, tokens: Any, labels: Any) -> Any:
        return F.cross_entropy(forward_logits(model, tokens).flatten(0, 1), labels.flatten(), reduction="none")

    # The model is built for the sequence length of its recipe; RoPE goes on as far as it is asked to.
    longer = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sequence_length": LENGTH})})
    with trained_model(longer, directory) as trained, torch.no_grad():
        model = trained.parts.whole_model
        whole = torch.cat([losses(model, t[None], y[None]) for t, y in zip(tokens, labels)]).view_as(labels)
        half = WINDOW // 2
        short = torch.full_like(whole, float("nan"))
        for row in range(sequences):
            windows = tokens[row].unfold(0, WINDOW, half), labels[row].unfold(0, WINDOW, half)
            found = losses(model, windows[0].contiguous(), windows[1]).view(-1, WINDOW)
            short[row, half:] = found[:, half:].flatten()
    spans = {f"{a}-{b}": slice(a, b) for a, b in pairwise(EDGES)}
    deep = slice(1024, LENGTH)
    return {
        "checkpoint": trained.checkpoint.name,
        "whole_context": {name: whole[:, span].mean().item() for name, span in spans.items()},
        "short_context_deep": short[:, deep].mean().item(),
        "whole_context_deep": whole[:, deep].mean().item(),
        "gain_deep": (short[:, deep] - whole[:, deep]).mean().item(),
        "gain_standard_error": ((short[:, deep] - whole[:, deep]).mean(1).std() / sequences**0.5).item(),
    }


def main(arguments: list[str]) -> int:
    """Measure both and print a table."""
    given = parse_arguments(Arguments, arguments)
    found = {name: measure(getattr(given, name), given.sequences) for name in ("before", "after")}
    Path(given.output).write_text(json.dumps(found, indent=1))
    print("| loss, nats a token | before | after |\n|---|---|---|")
    for span in found["before"]["whole_context"]:
        print(f"| positions {span} | " + " | ".join(f"{v['whole_context'][span]:.3f}" for v in found.values()) + " |")
    print("| 1024-2048, short context | " + " | ".join(f"{v['short_context_deep']:.3f}" for v in found.values()) + " |")
    gains = [f"{v['gain_deep']:+.3f} ± {v['gain_standard_error']:.3f}" for v in found.values()]
    print("| gain from the long context | " + " | ".join(gains) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
