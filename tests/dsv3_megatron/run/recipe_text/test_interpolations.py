"""What a value may refer to, and that it cannot unfold to what fills the memory."""

import time

import pytest
from omegaconf import OmegaConf

from dsv3_megatron.run.recipe_text.interpolations import check_interpolations, escaped

HARMLESS = [
    "${run.name}", "a ${oc.env:HOME} ${run.name}", "${ oc.env : SCRATCH , /tmp }", r"\${oc.env:SECRET}", "${.b}",
    "${list[0]}", "$", "$(cat x)", "{}",
]  # fmt: skip
REFUSED = [
    "${oc.env:SECRET}", "${oc.env:HO${run.name}ME}", "${oc.env:HOME,${oc.env:SECRET}}", "${oc.env:'SECRET'}",
    "${oc.decode:x}", "${oc.create:x}", "${hydra:runtime.cwd}", "${now:%Y}", "${${run.name}:x}", r"\\${oc.env:SECRET}",
    "${oc.env:HOME2}", "${oc.env:SLURM_JOB_ID_}", "${oc.env:${run.name}}", "${oc.select:run.name}", "${", "${a\n:b}",
]  # fmt: skip


@pytest.mark.parametrize("text", HARMLESS)
def test_keys_known_variables_and_the_shells_own_are_taken(text, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch")
    tree = {"run": {"name": "x"}, "list": [1], "a": {"b": "y", "c": text}}
    check_interpolations(tree)
    OmegaConf.to_container(OmegaConf.create(tree), resolve=True)  # and OmegaConf knows them all


@pytest.mark.parametrize("text", REFUSED)
def test_everything_else_is_refused_by_its_key(text):
    with pytest.raises(ValueError, match=r"^a\.b\[1\] = .* would be written to recipe.yaml") as caught:
        check_interpolations({"a": {"b": ["x", text]}})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["${B}", r"\${B}", r"\\${B:-c}", "$ {", "a${oc.env:HOME}b", "\\\\", "\\${\\${"])
def test_an_escaped_text_is_itself_however_it_looks(text):
    tree = {"a": [text], "b": {"c": text}, "d": 1}
    check_interpolations(escaped(tree))
    assert OmegaConf.to_container(OmegaConf.create(escaped(tree)), resolve=True) == tree


def laughs(value, levels=40):
    return {f"k{n}": value(n) for n in range(levels)} | {f"k{levels}": "ha"}


@pytest.mark.parametrize(
    "tree",
    [
        laughs(lambda n: f"${{k{n + 1}}}${{k{n + 1}}}"),
        laughs(lambda n: [f"${{k{n + 1}}}", f"${{k{n + 1}}}"]),
        laughs(lambda n: {"a": f"${{..k{n + 1}}}", "b": f"${{k{n + 1}}}"}),
        {"a": {"b": ["${a}"]}},
        {"a": "${b}", "b": "${a}"},
        {"a": "${.a}"},
        {"a": "${b.c}", "b": "${a}"},
        {"a": {"b": "${..a}"}},
    ],
    ids=range(8),
)
def test_references_that_unfold_without_end_are_refused_at_once(tree):
    start = time.monotonic()
    with pytest.raises(ValueError, match="refers to") as caught:
        check_interpolations(tree)
    assert time.monotonic() - start < 1 and "\n" not in str(caught.value)
