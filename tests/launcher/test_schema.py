"""The schema that help, errors, arguments and docs/recipes.md read: every key, as a person reads it."""

from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field, PositiveInt

from dsv3_megatron.recipe import Recipe
from launcher.command_line.recipe_files import GROUPS, RECIPES
from launcher.command_line.schema import dotted, items_of, keys_of, unknown_key
from launcher.views.reference import opening_sentence


class Piece(BaseModel):
    """One of a list. More about it."""

    until: int = Field(description="its end")


class Inner(BaseModel):
    """What lies below."""

    shares: dict[Literal["a", "b"], float] = Field({}, description="by name")
    pieces: float | tuple[Piece, ...] = Field(0.5, description="a number, or pieces")


class Outer(BaseModel):
    """All of it."""

    count: PositiveInt | None = Field(None, description="how many")
    rate: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="how much")
    inner: Inner | None = None
    text: str = Field("", description="words")
    flag: bool = Field(True, description="yes or no")


def test_kinds_limits_and_defaults_are_in_words():
    shown = {key.name: (key.kind, key.default) for key in keys_of(Outer)}
    assert shown == {
        "count": ("integer > 0 or null", "null"),
        "rate": ("number >= 0, < 1", "0.1"),
        "inner": ("", "null"),
        "inner.shares": ("mapping of a, b to number", "{}"),
        "inner.pieces": ("number or list of piece", "0.5"),
        "text": ("text", '""'),
        "flag": ("true, false", "true"),
    }
    assert items_of(Outer) == [Piece]
    assert {key.name: key.description for key in keys_of(Outer)}["inner"] == "What lies below"


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (["count"], None),
        (["inner", "shares", "c"], None),  # a mapping: its own check judges what is in it
        (["inner", "pieces", 0, "until"], None),
        (["inner", "pieces", 0, "untl"], "did you mean inner.pieces[0].until?"),
        (["inner", "share"], "did you mean inner.shares?"),
        (["pieces"], "did you mean inner.pieces?"),
        (["zzz"], "it can be one of: count, rate, inner, text, flag"),
    ],
)
def test_a_key_that_is_none_is_answered_with_the_nearest(parts, says):
    assert unknown_key(Outer, parts) == says


def test_a_key_is_written_with_dots_and_places():
    assert dotted(["optim", "learning_rate", 0, "until"]) == "optim.learning_rate[0].until"


def test_every_key_of_a_recipe_is_known_by_its_name():
    for key in keys_of(Recipe):
        assert unknown_key(Recipe, key.name.split(".")) is None


@pytest.mark.parametrize("group", GROUPS)
def test_every_recipe_file_begins_with_a_sentence_that_is_not_cut_within_brackets(group):
    for path in (RECIPES / group).glob("*.yaml"):
        sentence = opening_sentence(path)
        assert sentence, f"{path} begins with no comment"
        assert sentence.count("(") == sentence.count(")"), sentence
