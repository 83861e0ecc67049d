"""What a person sees: progress, tables, one-line errors, exit codes. Nobody else prints."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING

from dsv3_megatron.run.made import for_owner
from dsv3_megatron.run.terminal import printing_safely, rewrite
from launcher.command_line.typed import as_typed
from parallel.errors import UserError
from parallel.units import show_bytes, show_count, show_duration

if TYPE_CHECKING:
    from dsv3_megatron.metrics.step_metrics import StepMetrics


def guarded(command: Callable[[Sequence[str]], int], *, speaks: bool = True) -> int:
    """Run a command on the arguments given; return its exit code. What a user can fix becomes one line on stderr.

    Files are made for their owner from here on, nothing that is printed drives the terminal, and processes that are
    started import nothing from the current directory, which may hold what somebody else has made.
    ``speaks``: False on all ranks but the first, for what ends them all, such as Ctrl-C.
    """
    for_owner()
    os.environ["PYTHONSAFEPATH"] = "1"  # `python -m` and `python -c`, as of torchrun and multiprocessing, would
    with printing_safely():
        return _answered(command, speaks)


def _answered(command: Callable[[Sequence[str]], int], speaks: bool) -> int:
    try:
        return command(sys.argv[1:])
    except UserError as error:
        if speaks:
            print(as_typed(str(error).replace("\n", " ")), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if speaks:
            print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _reader_left():
            raise
        sys.stderr.close()
        return 0


def _reader_left() -> bool:
    """Return whether the reader of what is printed, such as head, has enough: other pipes may break too."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or no file
            poll.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


class SilentReporter:
    """The reporter of every rank but the first."""

    def start(self, facts: dict[str, str]) -> None:
        """Say nothing."""

    def step(self, metrics: StepMetrics, last_step: int | None) -> None:
        """Say nothing."""

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""


class ConsoleReporter:
    """A line per step; on a terminal one line that is rewritten, and a kept one every so often."""

    def __init__(self, every_steps: int = 1, remarks: Sequence[str] = ()):
        """``remarks``: printed below what the run is made of, once all ranks are here: what one is refused for comes
        first."""
        self._every, self._remarks = every_steps, remarks
        self._live = sys.stdout.isatty()
        self._recent: list[float] = []
        self._kept_at = 0.0

    def start(self, facts: dict[str, str]) -> None:
        """Print what the run is made of."""
        for name, text in facts.items():
            print(f"{name:>8}  {text}", flush=True)
        for text in self._remarks:
            self.note(text)

    def step(self, metrics: StepMetrics, last_step: int | None) -> None:
        """Print one step."""
        self._recent = [*self._recent[-19:], metrics.step_seconds]
        line = step_line(metrics, last_step, sum(self._recent) / len(self._recent))
        is_last = metrics.step == last_step
        if not self._live:
            if metrics.step % self._every == 0 or is_last:
                print(line, flush=True)
            return
        keep = is_last or time.monotonic() - self._kept_at > 15
        self._kept_at = time.monotonic() if keep else self._kept_at
        rewrite(sys.stdout, line, end="\n" if keep else "")

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Print a held-out loss."""
        text = f"held-out loss {values['held_out_loss']:.4f}"
        if "bits_per_byte" in values:
            text += f" = {values['bits_per_byte']:.4f} bits per byte"
        sources = {key.removeprefix("held_out/"): value for key, value in values.items() if key.startswith("held_out/")}
        if len(sources) > 1:
            text += f" ({', '.join(f'{name} {value:.4f}' for name, value in sources.items())})"
        self._line(f"step {step}: {text}")

    def note(self, text: str) -> None:
        """Print a remark."""
        self._line(text)

    def _line(self, text: str) -> None:
        if self._live:
            rewrite(sys.stdout, text, end="\n")
        else:
            print(text, flush=True)


def step_line(metrics: StepMetrics, last_step: int | None, recent_seconds: float) -> str:
    """Return everything one watches, in one line."""
    of = f"/{last_step}" if last_step else ""
    parts = [
        f"step {metrics.step}{of}",
        f"loss {metrics.lm_loss:.4f}",
    ]
    if metrics.mtp_loss is not None:
        parts.append(f"mtp {metrics.mtp_loss:.3f}")
    parts += [f"lr {metrics.learning_rate:.2e}", f"norm {metrics.grad_norm:.2f}"]
    if metrics.clipped_heads:
        parts.append(f"clipped {metrics.clipped_heads} head{'s' * (metrics.clipped_heads > 1)}")
    if metrics.max_violation is not None:
        parts.append(f"maxvio {metrics.max_violation:.2f}")
    where = "" if metrics.memory_peak_rank is None else f" on rank {metrics.memory_peak_rank}"
    parts += [f"{show_count(metrics.tokens_per_second)} tok/s", show_bytes(metrics.memory_peak_bytes) + where]
    if metrics.bubble_fraction is not None:
        parts.append(f"bubble {metrics.bubble_fraction:.0%}")
    if metrics.skipped:
        parts.append(f"skipped {metrics.skipped}")
    if last_step:
        parts.append(f"left {show_duration((last_step - metrics.step) * recent_seconds)}")
    return "  ".join(parts)


class ProgressLine:
    """How far a long work is: rewritten in place on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, what: str):
        self._what, self._live = what, sys.stderr.isatty()
        self._start = self._shown_at = time.monotonic()
        self._start_bytes: int | None = None
        self._open = False

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` bytes are done: share, rate, time left."""
        rate = self._rate(done)
        left = f", left {show_duration((total - done) / rate)}" if rate else ""
        self._show(f"{done / max(total, 1):.0%} of {show_bytes(total)}, {show_bytes(rate)}/s{left}  {note}")

    def files(self, done: int, count: int, size_bytes: int) -> None:
        """Show that ``done`` of ``count`` files, ``size_bytes`` in all, are finished."""
        rate = self._rate(size_bytes)
        self._show(f"{done}/{count} files, {show_bytes(size_bytes)}, {show_bytes(rate)}/s", last=done == count)

    def close(self) -> None:
        """Leave the line as it is; what is shown after it gets a line of its own."""
        if self._open:
            print(file=sys.stderr)
            self._open = False

    def _rate(self, done: int) -> float:
        if self._start_bytes is None:
            self._start, self._start_bytes = time.monotonic(), done  # a continued work begins somewhere
        return (done - self._start_bytes) / max(time.monotonic() - self._start, 1e-9)

    def _show(self, text: str, *, last: bool = False) -> None:
        now = time.monotonic()
        if now - self._shown_at < (0.2 if self._live else 10.0) and not last:
            return
        self._shown_at, self._open = now, self._live
        line = f"{self._what}: {text}"
        if self._live:
            rewrite(sys.stderr, line)
        else:
            print(line, file=sys.stderr, flush=True)


def text_plot(values: Sequence[float], *, title: str, width: int = 72, height: int = 12) -> str:
    """Return a curve for a terminal: one column per run of points (their mean), half-block resolution."""
    columns = min(width, len(values))
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (2 * height - 1) / ((high - low) or 1.0)
    levels = [round((mean - low) * scale) for mean in means]
    lines = [title]
    for row in range(height - 1, -1, -1):
        marks = "".join({2 * row: "▄", 2 * row + 1: "▀"}.get(level, " ") for level in levels)
        label = f"{low + (2 * row + 0.5) / scale:8.3f}" if row % 3 == 2 or row == 0 else " " * 8
        lines.append(f"{label} │{marks}".rstrip())
    lines.append(" " * 9 + "└" + "─" * columns)
    lines.append(f"{'':10}1{len(values):>{columns - 1}}")
    return "\n".join(lines)
