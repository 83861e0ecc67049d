"""Every key of a recipe is read by some code outside the file that declares it: none is without effect."""

import ast
from pathlib import Path

from pydantic import BaseModel

from dsv3_megatron.recipe import Recipe

ROOT = Path(__file__).parents[2]
PACKAGES = ("parallel", "dsv3_megatron", "launcher")
# Read by another way than as an attribute of its name, and how.
READ_OTHERWISE = {
    "ModelSettings.tie_word_embeddings": "false is its only value; config.json repeats it",
}


def sections(model: type[BaseModel]) -> set[type[BaseModel]]:
    """Return a model and every model among its fields, at any depth."""
    found = {model}
    for field in model.model_fields.values():
        for part in parts_of(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= sections(part)
    return found


def parts_of(annotation: object) -> list[object]:
    """Return the types inside an annotation."""
    inside = getattr(annotation, "__args__", ())
    return [annotation, *(part for each in inside for part in parts_of(each))]


def attributes_read() -> set[str]:
    """Return every name that is read as an attribute outside of the settings' own files."""
    names = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "settings.py":
                for node in ast.walk(ast.parse(path.read_text())):
                    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                        names.add(node.attr)
    return names


def test_every_key_of_a_recipe_is_read():
    read = attributes_read()
    unread = {
        f"{section.__name__}.{field}"
        for section in sections(Recipe)
        for field in section.model_fields
        if field not in read
    }
    assert unread == set(READ_OTHERWISE), "keys that no code reads, or that are read again"


def test_a_key_that_nobody_reads_would_be_found():
    class Section(BaseModel):
        read_by_nobody_at_all: int = 0

    class Whole(BaseModel):
        one: list[Section | None]

    assert sections(Whole) == {Whole, Section} and "read_by_nobody_at_all" not in attributes_read()
