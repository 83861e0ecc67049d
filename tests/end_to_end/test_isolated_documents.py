"""Packed documents that are isolated train and predict as each document alone does, under every schedule."""

import dataclasses

import numpy as np
import pytest
import torch

from dsv3_megatron.data.source.samples import Sample, make_batch
from dsv3_megatron.model.backend import TorchBackend
from dsv3_megatron.model.config import transformer_config
from dsv3_megatron.model.stage import build_stage
from parallel.layout import Layout
from parallel.settings import ParallelSettings
from testing.lanes import in_lanes
from testing.ranks import TE, run_ranks
from testing.training.tiny import VALUES, Case, small_recipe, train_rank

LENGTH = 32
SIZES = [(32,), (20, 12), (1, 30, 1), (9, 9, 8), (3, 2, 27), (16, 15), (31,), (5, 5, 5, 5, 5, 5)]  # of packed rows
# No balance loss and no bias: both look at all tokens of a row, and padding is tokens too.
VALUES_ALONE = dataclasses.replace(VALUES, balance_weight=0.0, bias_speed=0.0)


def pieces():
    """Return the documents' ids, [length + 1] each, row by row."""
    random = np.random.default_rng(1)
    return [[random.integers(0, 256, size + 1) for size in sizes] for sizes in SIZES]


def row(documents):
    """Return documents packed into one sequence; what is left over counts for nothing."""
    parts = [Sample.of_ids(ids) for ids in documents]
    fill = LENGTH - sum(len(p.tokens) for p in parts)
    tokens = np.concatenate([*(p.tokens for p in parts), np.full(fill, 2)])
    labels = np.concatenate([*(p.labels for p in parts), np.full(fill, 2)])
    weights = np.concatenate([*(p.weights for p in parts), np.zeros(fill, np.float32)])
    lengths = [*(len(p.tokens) for p in parts), fill]
    return Sample(tokens, labels, weights, np.repeat(np.arange(len(lengths)), lengths).astype(np.int32))


def case(rows, *overrides, **more):
    batch = f"optim.global_batch={len(rows)}"
    return Case((batch, *overrides), steps=1, values=VALUES_ALONE, samples=rows, **more)


PIPELINE = "parallel.pipeline=2"
LAYOUTS = {
    "one rank": (1, ("parallel.schedule=1f1b", "parallel.recompute=[attention]")),
    "1f1b": (2, (PIPELINE, "parallel.schedule=1f1b")),
    "dualpipe": (2, (PIPELINE, "parallel.schedule=dualpipe")),
    "dualpipe, recompute": (2, (PIPELINE, "parallel.schedule=dualpipe", "parallel.recompute=[norm,mla_up,attention]")),
    "dualpipev": (2, (PIPELINE, "parallel.schedule=dualpipev")),
    "zb1p": (2, (PIPELINE, "parallel.schedule=zb1p")),
    "interleaved": (2, (PIPELINE, "parallel.schedule=interleaved", "parallel.chunks=2")),
    "CP2": (2, ("parallel.context=2",)),
    "CP2, recompute": (2, ("parallel.context=2", "parallel.recompute=[norm,mla_up]")),
    "TP2, recompute": (2, ("parallel.tensor=2", "parallel.recompute=[full]")),
    "dualpipe, EP2": (4, (PIPELINE, "parallel.schedule=dualpipe", "parallel.expert=2")),
}
FAST = ("1f1b", "dualpipe, recompute", "dualpipev", "zb1p", "interleaved", "CP2, recompute")
DEEPER = {name: LAYOUTS[name] for name in ("1f1b", "dualpipe, recompute")}  # the plain and the planned path
few, rest = in_lanes(LAYOUTS, *FAST)


@pytest.mark.parametrize(
    ("depth", "layouts"),
    [
        pytest.param(1, *few.values, id="few"),
        pytest.param(1, *rest.values, id="rest", marks=pytest.mark.full),
        pytest.param(2, DEEPER, id="MTP of depth 2", marks=pytest.mark.full),
    ],
)
def test_packed_documents_have_the_gradients_of_documents_alone(tmp_path, depth, layouts):
    common = (
        "data.isolate_documents=true", "optim.micro_batch=1", f"model.num_nextn_predict_layers={depth}",
        "model.num_hidden_layers=8",
    )  # fmt: skip
    alone = [row([ids]) for documents in pieces() for ids in documents]
    path = str(tmp_path / "alone.pt")
    ((expected,),) = run_ranks(1, train_rank, [case(alone, *common, save_to=path)])
    expected = expected["results"][0]
    packed = [row(documents) for documents in pieces()]
    for ranks in (1, 2, 4):
        asked = {
            name: case(packed, *common, *more, reference=path)
            for name, (many, more) in layouts.items()
            if many == ranks
        }
        for name, found in zip(asked, run_ranks(ranks, train_rank, list(asked.values())) if asked else ()):
            for rank in found:
                result = rank["results"][0]
                assert result.lm_loss == pytest.approx(expected.lm_loss, rel=1e-5), name
                assert result.mtp_loss == pytest.approx(expected.mtp_loss, rel=1e-5), name
                assert result.objective == pytest.approx(expected.objective, rel=1e-5), name
                worst = max(rank["gradient_errors"][0].items(), key=lambda kv: kv[1])
                assert worst[1] < 1e-4, (name, worst)


ON_TE = ("backend=te", "model.qk_rope_head_dim=16", "data.isolate_documents=true", "optim.micro_batch=1")


def test_documents_are_isolated_among_transformer_engines_layers():
    alone = [row([ids]) for documents in pieces() for ids in documents]
    packed = [row(documents) for documents in pieces()]
    (wanted,) = run_ranks(1, train_rank, [case(alone, *ON_TE)], preload=TE)[0]
    for ranks, names in ((1, ("one rank",)), (2, ("dualpipe, recompute", "CP2"))):
        asked = [case(packed, *ON_TE, *LAYOUTS[name][1]) for name in names]
        for found in run_ranks(ranks, train_rank, asked, preload=TE):
            for rank in found:
                for what in ("lm_loss", "mtp_loss", "grad_norm"):
                    values = (getattr(one["results"][0], what) for one in (rank, wanted))
                    assert next(values) == pytest.approx(next(values), rel=1e-5), what


def test_without_isolation_documents_do_reach_each_other(tmp_path):
    """The test above can fail: the same rows as one document each give another loss."""
    path = str(tmp_path / "alone.pt")
    packed = [row(documents) for documents in pieces()]
    joined = [dataclasses.replace(r, documents=None) for r in packed]
    first, second = run_ranks(1, train_rank, [case(packed, save_to=path), case(joined, reference=path)])
    assert abs(first[0]["results"][0].lm_loss - second[0]["results"][0].lm_loss) > 1e-4
    assert max(second[0]["gradient_errors"][0].values()) > 1e-2


def test_logits_of_packed_documents_equal_those_of_documents_alone(one_process):
    model = small_recipe().model
    config = transformer_config(model, ParallelSettings(), Layout())
    module = build_stage(
        config, model, TorchBackend(), stage=0, layers_of_stages=(4,), sequence_length=LENGTH, groups=one_process
    )
    torch.manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.08)
    module.eval()
    module.mtp_process, module.config.mtp_num_layers = False, None
    batch = make_batch([row(documents) for documents in pieces()])
    with torch.no_grad():
        packed = module(batch["tokens"], batch["position_ids"], batch["documents"])
        for number, documents in enumerate(pieces()):
            at = 0
            for ids in documents:
                tokens = torch.from_numpy(ids[:-1]).unsqueeze(0)
                alone = module(tokens, torch.arange(tokens.shape[1]).unsqueeze(0), None)
                here = packed[number, at : at + tokens.shape[1]]
                assert (here - alone[0]).abs().max() < 1e-5, (number, at)
                at += tokens.shape[1]
