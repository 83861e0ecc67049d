"""What a user can cause. The lowest package holds these so that every other can raise them."""

from __future__ import annotations

import re

_FIRST, _LAST = 4000, 1000  # characters of a message: what it quotes may have no end
_BREAKS_LINES = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")


def one_line(text: str) -> str:
    """Return a text that is quoted as given, such as the name of a file, so that it can't break a line in two."""
    return spelled_out(_BREAKS_LINES, text)


def spelled_out(characters: re.Pattern[str], text: str) -> str:
    """Return a text in which some characters are spelled as Python spells them: ``\\x1b``."""
    return characters.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class UserError(Exception):
    """A mistake a user can fix. The message is one line: field and value, why it cannot be, what to do."""

    kind = "error"
    exit_code = 2

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > _FIRST + _LAST:
            text = f"{text[:_FIRST]} ... {text[-_LAST:]}"
        return f"{self.kind}: {one_line(text)}"


class RankFault(Exception):
    """What failed on some ranks and not on all: their host's fault, not the recipe's, and a new start may go well.

    The message is one line that names rank and host. No UserError: it leaves with 1, and a batch job starts again.
    """

    kind = "fault"
    exit_code = 1

    def __str__(self) -> str:
        return f"{self.kind}: {' '.join(super().__str__().split())}"


class RecipeError(UserError):
    """A recipe holds an unknown key, a value out of range, or values that contradict each other."""

    kind = "recipe"


class LayoutError(UserError):
    """The degrees of parallelism do not fit the world or the model."""

    kind = "layout"


class PackageError(UserError):
    """A package that the recipe needs is missing or too old."""

    kind = "package"


class DataError(UserError):
    """Input data is missing or damaged."""

    kind = "data"


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or of another model."""

    kind = "checkpoint"


class ScheduleError(UserError):
    """A pipeline schedule cannot be made or breaks a rule."""

    kind = "schedule"


class HealthError(UserError):
    """A run goes wrong in a way that more steps will not fix."""

    kind = "health"


class ClusterError(UserError):
    """SLURM is missing, refuses, or is asked for something it cannot know."""

    kind = "cluster"


class RunInUseError(UserError):
    """Another job trains in this run directory."""

    kind = "run"


class DoesNotFitError(UserError):
    """The job cannot run on the hardware named (exit code 3)."""

    kind = "plan"
    exit_code = 3
