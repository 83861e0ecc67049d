"""Recipes against each other: what is told, what is refused, whatever is changed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.checkpoint.changes import NOT_TOLD, changes, read_recipe, refusal
from parallel.errors import CheckpointError
from testing.training.tiny import small_recipe

RECIPE = small_recipe().model_dump(mode="json")


def keys_of(values, prefix=""):
    for name, value in values.items():
        yield from keys_of(value, f"{prefix}{name}.") if isinstance(value, dict) and value else (prefix + name,)


KEYS = sorted(keys_of(RECIPE))


def changed(key):
    """Return the recipe with one key changed to a value it does not have."""
    found = small_recipe().model_dump(mode="json")
    section, name = found, key.split(".")
    for part in name[:-1]:
        section = section[part]
    section[name[-1]] = "something else"
    return found


@given(st.sets(st.sampled_from(KEYS), max_size=4))
@settings(deadline=None)
def test_every_change_is_told_unless_no_number_depends_on_it_and_shapes_are_refused(keys):
    now = RECIPE
    for key in keys:
        section, name = (now := _deep(now)), key.split(".")
        for part in name[:-1]:
            section = section[part]
        section[name[-1]] = "something else"
    silent = {k for k in keys if any(k == p or k.startswith(p + ".") for p in NOT_TOLD)}
    found = changes(RECIPE, now)
    assert set(found) == keys - silent
    assert (refusal(found) is not None) == any(key.startswith("model.") for key in keys - {"model.freeze"})


def test_the_refusal_names_key_and_values():
    assert refusal(changes(RECIPE, changed("model.v_head_dim"))) == "model.v_head_dim = 16, not something else"


def test_a_section_switched_on_or_off_is_a_change():
    off, on = _deep(RECIPE), _deep(RECIPE)
    on["model"]["rope_scaling"] = {"factor": 8.0}
    assert off["model"]["rope_scaling"] is None
    assert changes(off, on) == {"model.rope_scaling": (None, {"factor": 8.0})}
    assert changes(on, off) == {"model.rope_scaling": ({"factor": 8.0}, None)}
    assert refusal(changes(off, on)) == "model.rope_scaling = null, not {'factor': 8.0}"


def _deep(values):
    return {k: _deep(v) if isinstance(v, dict) else v for k, v in values.items()}


@pytest.mark.parametrize(
    "text", ["", "[]", "model: {}", "model: 3\noptim: {}\ndata: {}", "a: [", "\0", "optim: &a [*a]"]
)
def test_a_stored_recipe_that_says_nothing_of_the_model_is_refused(tmp_path, text):
    """Else whatever the recipe of now says would go with it."""
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"recipe.yaml.*; restore it") as error:
        read_recipe(tmp_path / "recipe.yaml")
    assert "\n" not in str(error.value)
