"""The ``data`` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from parallel.errors import DataError


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
    weights: dict[str, PositiveFloat] | None = Field(
        None, description="share of samples of each source of the shards by name; null = as the manifest says"
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

        Raises: DataError.
        """
        if self.source == "indexed":
            if not self.path:
                raise DataError(
                    "data.path = null, but data.source = indexed reads token shards; set data.path to a folder that "
                    "launcher/prepare_data.py wrote"
                )
            return
        for key in ("fim_rate", "weights", "tokenizer", "path"):
            if value := getattr(self, key):
                raise DataError(f"data.{key} = {value} is for token shards, not {self.source}; use data=indexed")
