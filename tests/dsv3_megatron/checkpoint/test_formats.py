"""Checkpoints of format 1 load: ``data/format_1.tar.xz``, which that version wrote after two steps.

It was written by 4 ranks under DualPipe with two of them for experts, in BF16, with an average of the weights. What the
next steps were is that version's own word.
"""

import shutil
import tarfile
from pathlib import Path

import pytest

from dsv3_megatron.checkpoint.find import choose_checkpoint
from dsv3_megatron.checkpoint.manifest import OPTIMIZER, WEIGHTS, read_content
from parallel.errors import CheckpointError
from testing.ranks import run_ranks
from testing.training.checkpoints import tensors
from testing.training.lives import Life, live

WORDS = (
    "model.hidden_size=16", "model.intermediate_size=32", "model.moe_intermediate_size=16",
    "model.num_attention_heads=2", "model.q_lora_rank=8", "model.kv_lora_rank=8", "model.qk_nope_head_dim=4",
    "model.qk_rope_head_dim=4", "model.v_head_dim=4", "model.n_routed_experts=4", "model.n_group=2",
    "model.topk_group=1", "model.num_hidden_layers=2", "model.vocab_size=64", "data.sequence_length=16",
    "optim.ema_decay=0.5", "precision=bf16", "optim.micro_batch=1",
)  # fmt: skip
DUAL = ("parallel.pipeline=2", "parallel.schedule=dualpipe", "parallel.expert=2")
LOSSES, NORMS = [4.205695919692516, 4.168419569730759], [0.7160769805176554, 0.7027702920332409]
STEP = "step_00000002"


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """Return a folder with that checkpoint in it."""
    place = tmp_path_factory.mktemp("format_1")
    with tarfile.open(Path(__file__).parent / "data" / "format_1.tar.xz") as archive:
        archive.extractall(place, filter="data")
    return place


def test_a_run_goes_on_from_it_in_any_layout_and_saves_what_it_held(old, tmp_path):
    ((alone,),) = run_ranks(1, live, [Life(WORDS, first=2, load=old / STEP)])
    (others,) = run_ranks(4, live, [Life((*WORDS, *DUAL), first=2, load=old / STEP, save=tmp_path)])
    for rank in (alone, *others):
        assert rank["losses"] == pytest.approx(LOSSES, rel=1e-6) and rank["notes"] == []
        assert rank["norms"] == pytest.approx(NORMS, rel=1e-4)
    assert read_content(tmp_path / STEP)["format"] == 2
    assert read_content(tmp_path / STEP)["updates"] == 2
    before, after = tensors(old / STEP), tensors(tmp_path / STEP)  # as megatron-core reads them
    assert before.keys() == after.keys()
    assert [key for key, value in before.items() if not value.float().equal(after[key].float())] == []


def test_its_weights_alone_can_be_read(old):
    ((alone,),) = run_ranks(1, live, [Life(WORDS, steps=0, load=old / STEP, weights_alone=True)])
    stored = tensors(old / STEP)
    for name in ("embedding.word_embeddings.weight", "decoder.layers.1.mlp.router.weight"):
        assert alone["weights"][name].tolist() == stored[name].float().tolist()


def test_all_its_files_are_read_before_it_is_trusted(old, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    hurt = run / "checkpoints" / STEP
    shutil.copytree(old / STEP, hurt)
    assert choose_checkpoint(run, None, (WEIGHTS,)).path == hurt
    file = max(hurt.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for holding in ((WEIGHTS,), (OPTIMIZER,)):
        with pytest.raises(CheckpointError, match="has xxh3"):
            choose_checkpoint(run, None, holding)


def test_a_format_of_a_later_version_is_refused_by_name(old, tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3_megatron.checkpoint.manifest.FORMAT", 0)
    with pytest.raises(CheckpointError, match="has format 1, this version reads up to 0"):
        read_content(old / STEP)
