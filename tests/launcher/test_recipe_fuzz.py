"""Whatever is typed: a recipe, or one clean line."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_megatron.recipe import Recipe
from launcher.command_line.compose import compose
from launcher.command_line.recipe_files import GROUPS
from launcher.command_line.schema import keys_of
from parallel.errors import UserError
from testing.lanes import examples

KEYS = [*(key.name for key in keys_of(Recipe)), *GROUPS]
mutated = st.tuples(st.sampled_from(KEYS), st.integers(0, 30), st.characters(codec="ascii")).map(
    lambda t: t[0][: t[1]] + t[2] + t[0][t[1] + 1 :]
)
keys = st.sampled_from(KEYS) | mutated | st.text(max_size=8)
numbers = st.integers(-(10**6), 10**18).map(str) | st.floats().map(str)
words = st.sampled_from(
    ["null", "", "true", "[]", "{}", "[1,2]", "{a: 1}", "[{until: 1T, at: 1}]", "[{until: 2 steps, shape: cosine}]",
     "10T", "-1", "0", "fp8", "${x}", "${run.name}", "1e400", "'", '"', "a b", "[[", "\\", "../..", "%"]
)  # fmt: skip
values = numbers | words | st.text(max_size=12)
prefixes = st.sampled_from(["", "", "", "+", "++", "~"])
overrides = st.builds(lambda p, k, v: f"{p}{k}={v}", prefixes, keys, values) | st.text(max_size=20)


@settings(max_examples=examples(150), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(overrides, min_size=1, max_size=3))
def test_any_overrides_give_a_recipe_or_one_line(words):
    try:
        recipe = compose(words)
    except UserError as error:
        assert "\n" not in str(error), (words, str(error))
        assert len(str(error)) < 2000
        return
    assert isinstance(recipe, Recipe)


@settings(max_examples=examples(150), deadline=None)
@given(st.integers(1, 5000), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_any_world_gives_a_layout_or_one_line(world, tensor, context, expert, pipeline):
    try:
        recipe = compose([f"parallel.tensor={tensor}", f"parallel.context={context}", f"parallel.expert={expert}",
                          f"parallel.pipeline={pipeline}"])  # fmt: skip
        layout = recipe.layout(world)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert layout.world_size == world
