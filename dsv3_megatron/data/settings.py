"""The ``data`` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from parallel.errors import DataError, RecipeError
from parallel.units import parse_count

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class MixturePhase(BaseModel):
    """One piece of a mixture over tokens consumed.

    A phase starts where the one before it ended, in tokens and in its table, unless ``at`` names its own. Tables give
    weights, whose sum does not matter; a source that a table does not name has none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    until: str | int | float = Field(description="end of the phase in tokens ('10T'); after the last its table stays")
    shape: Literal["constant", "linear"] = Field("constant", description="how the shares of the sources move")
    at: dict[str, Weight] | None = Field(None, description="weights at the start, where not the last phase's end")
    to: dict[str, Weight] | None = Field(None, description="weights at the end of a linear phase")

    @field_validator("until", mode="before")  # before true becomes 1
    @classmethod
    def _in_tokens(cls, until: object) -> object:
        if isinstance(until, str) and until.rstrip().endswith("steps"):
            raise ValueError(
                f"{until!r} counts steps, but the source of a sample must not depend on the batch; "
                "write tokens, such as 469B"
            )
        if isinstance(until, str | int | float):
            parse_count(until)
        return until

    @property
    def end(self) -> int:
        """``until`` in tokens."""
        return parse_count(self.until)


class DataSettings(BaseModel):
    """Where tokens come from and how they become sequences."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Literal["stdlib", "indexed", "synthetic", "recall"] = Field(
        "stdlib", description="stdlib: Python's own source text; indexed: token shards; the others are made from a seed"
    )
    sequence_length: PositiveInt = Field(4096, description="tokens of one sequence")
    path: str | None = Field(None, description="folder of token shards, for data=indexed (launcher/prepare_data.py)")
    cache: str = Field(".cache/dsv3", description="where prepared token arrays, tokenizers and packings are kept")
    held_out: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.02, description="share of documents never trained on (shards: decided by prepare_data's held_out)"
    )
    held_out_sequences: PositiveInt = Field(
        64, description="held-out sequences evaluated in all, of each source by its share, but one at least"
    )
    tokenizer: str | None = Field(None, description="a tokenizer.json, or its folder; null = the source's own")
    allow_other: bool = Field(
        False, description="continue with other text or another tokenizer than were trained on, refused otherwise"
    )
    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(
        None, description="share of samples of each source of the shards by name; null = as the manifest says"
    )
    mixture: tuple[MixturePhase, ...] | None = Field(
        None, description="weights that change over the run, as a list of phases in tokens; null = they do not"
    )
    at_source_end: Literal["repeat", "stop"] = Field(
        "repeat", description="where all of a source has been read: repeat reads it again, stop ends the run"
    )
    exclude: str | None = Field(
        None,
        description="file of JSON lines that name documents, as dsv3 data trace prints them, or samples to leave out",
    )
    start_token: Literal["begin", "end"] = Field(
        "begin", description="what a packed document's first token is predicted from (not published)"
    )
    isolate_documents: bool = Field(
        False, description="attention and MTP do not cross documents; the paper's pretraining lets them (4.1)"
    )
    read_ahead: NonNegativeInt = Field(
        2, description="steps whose samples are made while earlier ones compute; 0 = each when it is needed"
    )
    fim_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of documents in fill-in-the-middle order, cut between tokens (indexed data)"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_recipes(cls, given: Any) -> Any:
        """Take allow_other by the name it had in recipes that runs have stored."""
        if isinstance(given, dict) and "allow_other_tokenizer" in given:
            old = given["allow_other_tokenizer"]
            return {"allow_other": old} | {k: v for k, v in given.items() if k != "allow_other_tokenizer"}
        return given

    def check_source(self) -> None:
        """Refuse, before anything is imported or submitted, a source without what it needs, or with what it ignores.

        Raises: DataError, RecipeError.
        """
        if self.weights is not None and self.mixture is not None:
            raise RecipeError("data.weights and data.mixture both say how sources are mixed; set one of them to null")
        if self.source == "indexed":
            if not self.path:
                raise DataError(
                    "data.path = null, but data.source = indexed reads token shards; set data.path to a folder that "
                    "launcher/prepare_data.py wrote"
                )
            return
        if self.mixture is not None or self.at_source_end != "repeat":
            key = "at_source_end = stop" if self.mixture is None else "mixture"
            raise DataError(f"data.{key} is for token shards, not {self.source}; use data=indexed")
        for key in ("fim_rate", "weights", "tokenizer", "path"):
            if value := getattr(self, key):
                raise DataError(f"data.{key} = {value} is for token shards, not {self.source}; use data=indexed")
