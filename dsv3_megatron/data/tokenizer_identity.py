"""Which tokenizer a model was trained with: named in the manifest of every checkpoint, kept in the run directory.

The same ids are other text under another tokenizer, and nothing later would show it but a worse loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.data.tokenizer_files.read import TOKENIZER
from parallel.errors import CheckpointError, DataError


def described(tokenizer: Tokenizer | None) -> dict[str, str] | None:
    """Return what a manifest says of a tokenizer: ``sha256``, and ``name`` for messages; None without text."""
    return None if tokenizer is None else {"sha256": tokenizer.sha256, "name": tokenizer.name}


def other_tokenizer(trained_with: dict[str, Any] | None, tokenizer: Tokenizer | None) -> str | None:
    """Return how a tokenizer differs from the one that ``described`` a checkpoint's; None where it is the same one, or
    where one of both is not known."""
    if trained_with is None or tokenizer is None or trained_with["sha256"] == tokenizer.sha256:
        return None
    return f"tokenizer {trained_with['name']}, not {tokenizer.name}"


def check_trained_with(
    place: str | Path, trained_with: dict[str, Any] | None, tokenizer: Tokenizer | None, *, allowed: bool
) -> str | None:
    """Return a line where a model goes on with another tokenizer than it was trained with, and that is ``allowed``.

    Args:
        place: the checkpoint or run, for messages.
        trained_with: what its manifest says; None where it says nothing.
        tokenizer: of the data.
    Raises: CheckpointError: it is another one, and not allowed.
    """
    difference = other_tokenizer(trained_with, tokenizer)
    if difference and not allowed:
        raise CheckpointError(
            f"{place} was trained with {difference}; prepare the data with its tokenizer, or set data.allow_other=true"
        )
    return f"{place} was trained with {difference}: data.allow_other = true" if difference else None


def check_rows(tokenizer: Tokenizer, rows: int, place: str | Path) -> None:
    """Raise DataError where a tokenizer has ids that a model of ``rows`` rows does not have."""
    if tokenizer.vocab_size > rows:
        raise DataError(
            f"model.vocab_size = {rows}, but the tokenizer of {place} has ids up to {tokenizer.vocab_size - 1}; "
            f"set model.vocab_size={-(-tokenizer.vocab_size // 64) * 64}"
        )


def tokenizer_of_run(directory: str | Path, rows: int) -> Tokenizer | None:
    """Return the tokenizer that a run directory keeps, None where it keeps none.

    ``rows``: of the model's embedding. Raises: DataError: it cannot be read, or does not fit the model.
    """
    path = Path(directory) / TOKENIZER
    if not path.is_file():
        return None
    tokenizer = Tokenizer.load(path)
    check_rows(tokenizer, rows, directory)
    return tokenizer
