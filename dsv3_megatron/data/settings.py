"""The ``data`` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt


class DataSettings(BaseModel):
    """Where tokens come from and how they become sequences."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Literal["stdlib", "indexed", "synthetic"] = "stdlib"
    sequence_length: PositiveInt = Field(4096, description="tokens of one sequence")
    path: str | None = Field(None, description="folder of token shards, for data=indexed")
    cache: str = Field(".cache/dsv3", description="where prepared token arrays and trained tokenizers are kept")
    held_out: Annotated[float, Field(ge=0, lt=1)] = Field(0.02, description="share of documents never trained on")
    tokenizer: str | None = Field(None, description="a tokenizer.json; null = the source's own")
    isolate_documents: bool = Field(False, description="attention and MTP do not cross document boundaries")
    fim_rate: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="share of documents in fill-in-middle order")
