"""What one matrix is: as published for every model of the family, and the variants by head against plain slices."""

import dataclasses

import numpy as np
import pytest

from dsv3_megatron.checkpoint.hugging_face.names import our_shapes, published_tensors
from dsv3_megatron.optim.matrices import matrices_in, rule_of, rules
from dsv3_megatron.optim.settings import MuonSettings, OptimSettings
from dsv3_megatron.train.muon import heads_of
from launcher.command_line.compose import compose
from parallel.errors import RecipeError

MODELS = ("dsv3_671b", "dsv3_tiny", "kimi_k2", "moonlight_16b", "glm_4_7_flash", "dsv3_150m", "dsv3_article_tiny")
NOT_MUON = ("model.embed_tokens.weight", "lm_head.weight")


def table_of(model, **muon):
    return rules(OptimSettings(name="muon", muon=MuonSettings(**muon)), heads_of(model))


@pytest.mark.parametrize("name", MODELS)
def test_as_published_every_matrix_of_the_published_files_is_one(name):
    """The list of published tensors was written for import and export, from the files and not from papers on Muon."""
    model = compose([f"recipe={name}"]).model
    table = table_of(model)
    expected = {}
    for tensor in published_tensors(model):
        if len(tensor.shape) == 2 and tensor.copy_of is None and tensor.name not in NOT_MUON:
            *stack, row, column = tensor.start
            box = (*(stack or [None]), row, row + tensor.extent[-2], column, column + tensor.extent[-1])
            expected[tensor.key, *box] = tensor.shape
    found = {}
    for key, shape in our_shapes(model).items():
        for matrix in matrices_in(key, shape, table) if not key.endswith("expert_bias") else ():
            ((top, bottom),), ((left, right),) = matrix.rows, matrix.columns
            found[key, matrix.expert, top, bottom, left, right] = matrix.shape
    assert found == expected


def plain(model):
    """Return the tensors of attention as named heads' parts, the way transformers' module slices them."""
    heads, nope, rope, value = dataclasses.astuple(heads_of(model))
    width, rank, latent = 24, 10, 12
    q = np.arange(heads * (nope + rope) * rank).reshape(heads, nope + rope, rank)
    kv = np.arange(heads * (nope + value) * latent).reshape(heads, nope + value, latent)
    o = np.arange(width * heads * value).reshape(width, heads, value)
    key, values = kv[:, :nope], kv[:, nope:]
    return {
        ("linear_q_up_proj", "query", "head"): [q[h] for h in range(heads)],
        ("linear_kv_up_proj", "key_value", "parts"): [key.reshape(-1, latent), values.reshape(-1, latent)],
        ("linear_kv_up_proj", "key_value", "head"): [*key, *values],
        ("linear_proj", "output", "head"): [o[:, h] for h in range(heads)],
    }, {
        "linear_q_up_proj": q.reshape(-1, rank),
        "linear_kv_up_proj": kv.reshape(-1, latent),
        "linear_proj": o.reshape(width, -1),
    }


def test_variants_are_the_slices_that_attention_computes_with():
    model = compose(["recipe=dsv3_tiny"]).model
    expected, wholes = plain(model)
    for (name, field, variant), parts in expected.items():
        key, whole = f"decoder.layers.2.self_attention.{name}.weight", wholes[name]
        found = list(matrices_in(key, whole.shape, table_of(model, **{field: variant})))
        assert len({matrix.name for matrix in found}) == len(found) == len(parts)
        for matrix, part in zip(found, parts):
            rows = np.concatenate([np.arange(*run) for run in matrix.rows])
            columns = np.concatenate([np.arange(*run) for run in matrix.columns])
            assert (whole[np.ix_(rows, columns)] == part).all() and matrix.shape == part.shape


def test_the_router_may_be_adamws_and_a_name_that_nobody_knows_is_refused():
    model = compose(["recipe=dsv3_tiny"]).model
    key = "decoder.layers.2.mlp.router.weight"
    assert list(matrices_in(key, (16, 128), table_of(model)))
    assert not list(matrices_in(key, (16, 128), table_of(model, router="adamw")))
    with pytest.raises(RecipeError, match=r"no rule says what a matrix is in decoder\.layers\.2\.new\.weight \[3, 4\]"):
        rule_of("decoder.layers.2.new.weight", (3, 4), table_of(model))
    assert rule_of("decoder.layers.2.new.weight", (3, 4), rules(OptimSettings(), heads_of(model))).split is None
