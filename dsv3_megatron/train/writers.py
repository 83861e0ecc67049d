"""Which writers a recipe asks for, beside metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable

from dsv3_megatron.metrics.guarded import Guarded
from dsv3_megatron.metrics.step_metrics import MetricsWriter
from dsv3_megatron.optim.regime import Regime
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.report.writer import ReportWriter, schedule_drawing
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.reasons import reason_of
from dsv3_megatron.run.resilient import ResilientFiles
from parallel.layout import Layout


def open_writers(
    recipe: Recipe, layout: Layout, first_step: int, tokens: int, files: ResilientFiles, tell: Callable[[str], None]
) -> list[MetricsWriter]:
    """Return the writers of a run that begins after ``first_step`` steps and ``tokens`` tokens; on rank 0.

    The report comes first: when W&B closes, it takes the finished report along.
    Raises: PackageError: one of them needs a package that is not installed.
    """
    logging, run = recipe.logging, RunDirectory(recipe.run.directory)
    batch = Regime(recipe.optim, recipe.data.sequence_length).global_batch(tokens)
    if drawing := schedule_drawing(recipe, batch // (recipe.optim.micro_batch * layout.dp)):
        files.replace(run.schedule, drawing)
    writers: list[MetricsWriter] = []
    if logging.report_every_seconds:
        writers.append(ReportWriter(run.path, logging.report_every_seconds, files.outages))
    if logging.wandb != "disabled":
        from dsv3_megatron.metrics.wandb_writer import WandbRun  # a second to import

        try:
            wandb = WandbRun(recipe, first_step, tokens, files, tell)
        except OSError as error:
            tell(f"warning: W&B cannot be started ({reason_of(error)}); this start goes on without it")
        else:
            writers.append(Guarded("W&B", wandb, files.outages))
    if logging.tensorboard:
        from dsv3_megatron.metrics.tensorboard_writer import TensorBoardRun  # an optional package

        writers.append(TensorBoardRun(run.path, first_step, files))
    return writers
