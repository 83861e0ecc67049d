"""Two lives of a small run on 2 to 32 real ranks, counted: the first part of benchmarks/at_scale.py.

The first life starts, trains and saves; the second resumes from that and goes on. A larger world has as much on every
rank: its pipeline, its experts and its data parallelism grow, and layers, experts and batch with them, about in the
proportion of recipe=dsv3_671b.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
# World -> pipeline ranks, expert-parallel ranks; the rest is expert-data-parallel.
LAYOUTS = {2: (2, 1), 4: (2, 2), 8: (2, 2), 16: (4, 2), 32: (4, 4)}
LAYERS_OF_A_RANK, EXPERTS_OF_A_RANK = 2, 8  # a rank holds two stages of the pipeline, shared with its mirror
DESCRIPTION = ("", ".json", ".yaml", ".pt")  # names of files that do not grow with the model
STEP = re.compile(r"\.?step_\d+")  # a checkpoint's folder
STEPS = 4  # of the first life; what is saved after half of them warms up, the save at the end is counted
MODEL = (
    "recipe=dsv3_tiny", "data=synthetic", "data.sequence_length=32", "model.vocab_size=256", "model.hidden_size=128",
    "model.intermediate_size=256", "model.moe_intermediate_size=256", "optim.micro_batch=1", "optim.ema_decay=0.999",
    "precision=bf16", "parallel.schedule=dualpipe", "logging.wandb=disabled", "logging.report_every_seconds=0",
)  # fmt: skip


@dataclass(frozen=True)
class Life:
    """A part of a run: its words, and its directory."""

    words: tuple[str, ...]
    directory: str


def words_of(world: int) -> tuple[str, ...]:
    """Return the recipe of a world as a command takes it."""
    pipeline, expert = LAYOUTS[world]
    # As many experts on every rank with its mirror, the MTP module's too: of recipe=dsv3_671b the fullest ranks have 8%
    # more than the mean, where a split by the cost of so few layers would give 23%.
    return (
        *MODEL,
        f"parallel.pipeline={pipeline}",
        f"parallel.stages={[LAYERS_OF_A_RANK] * pipeline}".replace(" ", ""),
        f"parallel.expert={expert}",
        f"model.num_hidden_layers={LAYERS_OF_A_RANK * pipeline}",
        f"model.n_routed_experts={EXPERTS_OF_A_RANK * expert}",
        f"optim.global_batch={world // pipeline * 2 * pipeline}",
    )


def lives(world: int, place: Path, *, asynchronous: bool = False) -> list[list[dict[str, Any]]]:
    """Run both lives on so many ranks; return what each life counted on each rank.

    Args:
        asynchronous: the counted save is one beside training, as in dsv3_671b; else one that training waits for.
    """
    from testing.ranks import run_ranks

    words = (*words_of(world), f"run.directory={place / 'run'}", f"checkpoint.asynchronous={asynchronous}".lower())
    # Beside training every step saves, so that the last one before the end has nothing left to do for the first time.
    words += ("checkpoint.keep=1", f"checkpoint.every_steps={1 if asynchronous else STEPS // 2}")
    cases = [Life((*words, f"run.steps={steps}"), str(place / "run")) for steps in (STEPS, STEPS + 1)]
    return run_ranks(world, live, cases, timeout_seconds=1800)


def live(life: Life) -> dict[str, Any]:
    """Be a rank of one life; return what it counted, its layout, and the bytes of its state."""
    import torch

    import dsv3_megatron.train.run as run
    from launcher.command_line.compose import compose, resolved_yaml
    from launcher.command_line.console import SilentReporter
    from parallel.world import World
    from testing.counting.phases import counted

    torch.set_num_threads(1)
    recipe, world = compose(list(life.words)), World.from_environment()
    found: dict[str, Any] = {}
    with counted("start", lambda path: place_of(path, life.directory)) as phases, marked(phases, found):
        run.run(recipe, world, SilentReporter(), resolved_yaml(recipe))
    return found | phases.found()


def place_of(path: str, directory: str) -> str | None:
    """Return what a path of a run is: its checkpoints' tensors, what describes them, or the rest of the directory."""
    if path.startswith(f"{directory}/checkpoints"):
        return "description" if Path(path).suffix in DESCRIPTION and not STEP.match(Path(path).name) else "checkpoint"
    return "run" if path.startswith(directory) else None


@contextmanager
def marked(phases: Any, found: dict[str, Any]) -> Iterator[None]:
    """Let a run enter its phases: start, build, load, step, beside, save, end; and note what the rank holds.

    ``step`` is a step from its batch to its update, ``evaluation`` the held-out loss, ``beside`` what else happens
    between steps. The save at the end is ``save``, those before are ``save beside``.
    """
    # torch and megatron-core, which a process that only starts ranks has no need of
    import dsv3_megatron.train.build as build
    import dsv3_megatron.train.run as run
    import dsv3_megatron.train.trainer as trainer
    from dsv3_megatron.model.costs import count_parameters
    from dsv3_megatron.train.callbacks.evaluation import Evaluation
    from dsv3_megatron.train.callbacks.saving import Saving

    def then(real: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*arguments: Any, **others: Any) -> Any:
            result = real(*arguments, **others)
            phases.enter(phase)
            return result

        return call

    def within(real: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*arguments: Any, **others: Any) -> Any:
            with phases.within(phase):
                return real(*arguments, **others)

        return call

    def load(parts: Any, *arguments: Any) -> Any:
        counted_parameters = count_parameters(parts.recipe.model)
        found.update(
            layout=vars(parts.layout),
            state_bytes=state_bytes(parts),
            parameters=counted_parameters.main + counted_parameters.mtp,
        )
        phases.enter("load")
        result = load_start(parts, *arguments)
        phases.enter("beside")
        return result

    load_start = run.load_start
    with ExitStack() as stack:
        for owner, name, replaced in (
            (build, "build_groups", then(build.build_groups, "build")),
            (run, "load_start", load),
            (trainer, "train_step", within(trainer.train_step, "step")),
            (Saving, "after_step", within(Saving.after_step, "save beside")),
            (Saving, "end", within(Saving.end, "save")),
            (Evaluation, "begin", within(Evaluation.begin, "evaluation")),
            (Evaluation, "after_step", within(Evaluation.after_step, "evaluation")),
            (Evaluation, "end", within(Evaluation.end, "evaluation")),
            (run, "stop_processes", within(run.stop_processes, "end")),
        ):
            stack.enter_context(patch.object(owner, name, replaced))
        yield


def state_bytes(parts: Any) -> int:
    """Return the bytes of what a rank has to get back when it resumes.

    Its weights, its shard of the optimizer (float32 masters, two moments each), and its average of the weights.
    """
    from dsv3_megatron.optim.optimizer import parts_of  # megatron-core: as in marked

    weights = [p for chunk in parts.chunks.values() for p in chunk.parameters()]
    masters = [
        p for part in parts_of(parts.optimizer) for group in part.optimizer.param_groups for p in group["params"]
    ]
    each = 4 + 2 * (2 if parts.recipe.precision.moments == "bf16" else 4)
    average = parts.ema.average.values() if parts.ema is not None else ()
    return sum(t.numel() * t.element_size() for t in (*weights, *average)) + each * sum(m.numel() for m in masters)


def imports() -> dict[str, int]:
    """Return what a fresh process asks of the file system until everything is imported that a run needs."""
    code = (
        "import json, testing.counting.files as files; from testing.counting.tally import Tally\n"
        "tally = Tally('imports')\n"
        "with files.counted_files(tally):\n"
        "    import launcher.pretrain, dsv3_megatron.train.run\n"
        "print(json.dumps(tally.of('imports')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def lives_of(world: int, *, asynchronous: bool = False) -> list[list[dict[str, Any]]]:
    """Return :func:`lives` in a folder that is there for them alone."""
    with tempfile.TemporaryDirectory() as folder:
        return lives(world, Path(folder), asynchronous=asynchronous)


def layers_of_a_rank(world: int) -> float:
    """Return how many layers a rank holds, one MTP module counted as one: two stages of the pipeline."""
    pipeline, _ = LAYOUTS[world]
    return 2 * (LAYERS_OF_A_RANK * pipeline + 1) / pipeline
