"""The whole run of the 671B recipe on GPUs of straw: the right device, the right dtypes, and no wait of the host that
is not in the tables below. The GPU of straw refuses what a GPU refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="no C++ compiler here; install with: apt-get install g++",
)
# The recipe as it is but for the depth (a layer a stage) and the widths; 32 microbatches a pipeline.
SMALL = (
    "recipe=dsv3_671b", "data=synthetic", "data.fim_rate=0.0", "data.sequence_length=128", "optim.global_batch=4096",
    "model.num_hidden_layers=16", "model.first_k_dense_replace=1", "model.hidden_size=256",
    "model.intermediate_size=256", "model.moe_intermediate_size=128", "model.num_attention_heads=2",
    "model.q_lora_rank=128", "model.kv_lora_rank=128", "model.vocab_size=512",
    "run.steps=2", "run.tokens=null", "logging.wandb=disabled",
)  # fmt: skip
KINDS = {"first": 0, "middle": 7 * 128 + 3, "last": 15 * 128 + 3}  # of pipeline ranks; the place on the node is 3
MICROBATCHES, LEFT = 32, 4  # a step's, and passes of MoE layers on each of these ranks that the cut leaves

# What a step waits for, or copies, outside of its pipeline: place -> (times, why that is all right).
STEP = {
    "to device, not waited for: parallel/device.py to_device": (
        4 * MICROBATCHES + 1, "tokens, positions, labels and mask of a microbatch; the count of tokens"),
    "item: dsv3_megatron/train/gradients.py finish_gradients": (1, "gradients are divided by the tokens of all ranks"),
    "item: dsv3_megatron/train/step.py mean_loss": (1, "the guard asks for the loss before weights change"),
    "item: megatron/core/optimizer/clip_grads.py get_grad_norm_fp32": (1, "and for the norm"),
    "item: dsv3_megatron/train/step.py _balance_loss": (1, "reported"),
    "tolist: dsv3_megatron/train/step.py _mtp_losses": (1, "reported"),
    "to host: dsv3_megatron/train/expert_load.py gather_loads": (1, "reported"),
    "event.synchronize: dsv3_megatron/train/ema.py Ema._update": (1, "in a thread of its own"),
}  # fmt: skip
MOE = "megatron/core/transformer/moe/"
# In the pipeline, for one MoE layer and microbatch, forward and backward.
LAYER = {
    f"event.synchronize: {MOE}token_dispatcher.py MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize": (
        1, "how many tokens go where: what dropless routing costs without a kernel that reads it on the device"),
    f"to host, not waited for: {MOE}moe_utils.py maybe_move_tensor_to_cpu": (5, "the same numbers on their way"),
    f"masked_select: {MOE}moe_utils.py permute": (2, "megatron-core's permutation; TE's kernel is not asked for"),
}  # fmt: skip
EMULATION = {  # what the torch backend does besides: FP8 of experts is emulated without TE
    "to device, not waited for: parallel/device.py to_device": (1, "where experts' rows end"),
    "item: dsv3_megatron/precision/saved.py columns": (4, "rows are padded to tiles"),
}  # fmt: skip
BACKENDS = {
    # FP8 weights cannot be held there; everything else is the recipe's. Saves beside training, and at the end.
    "torch": (("backend=torch", "precision=fp8", "checkpoint.every_steps=1", "optim.name=muon"), LAYER | EMULATION,
              "Muon and AdamW of this package over torch's"),
    "te": (("backend=te",), LAYER, "Transformer Engine's fused AdamW"),
}  # fmt: skip
IN_FORWARD = {"item: dsv3_megatron/precision/saved.py columns": 2}  # of LAYER's, where it is not all


def run_ranks_of_straw(tmp_path, kinds, *words):
    """Return what was counted of each kind of rank."""
    ranks = [str(KINDS[kind]) for kind in kinds]
    given = (*ranks, "local=3", "of=2048", *SMALL, f"run.directory={tmp_path}/run{{rank}}", *words)
    command = [sys.executable, "-m", "testing.straw", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    return dict(zip(kinds, json.loads(done.stdout.splitlines()[-1])))


RUNS = [
    pytest.param(("te", list(KINDS)), marks=pytest.mark.full),
    pytest.param(("torch", list(KINDS)), marks=pytest.mark.full),
]


@pytest.fixture(scope="module", params=RUNS, ids=["te", "torch"])
def ranks(request, tmp_path_factory):
    """Kinds of rank on a backend: what was counted of each, what may be for a layer, and whose AdamW it is."""
    backend, kinds = request.param
    words, layer, adamw = BACKENDS[backend]
    return run_ranks_of_straw(tmp_path_factory.mktemp("straw"), kinds, *words), layer, adamw


def waits(found, part):
    """Return what was counted in a part, without copies of weights to the average, one a parameter, and without the
    wait of the thread that writes a checkpoint, which comes while training is in any part."""
    elsewhere = ("Ema._copy_to_host", "checkpoint/write.py write_share")
    return {k: v for k, v in found["counts"].get(part, {}).items() if not any(place in k for place in elsewhere)}


def test_a_rank_of_the_671b_recipe_runs_on_the_device_of_its_local_rank(ranks):
    for kind, found in ranks[0].items():
        assert found["steps"] == 2 and {"F", "B", "FB"} <= set(found["actions"]["dualpipe"]), kind
        assert set(found["main_grads"]) == {"torch.float32"}, kind
        # Messages between stages are [S, B, H]; one number opens the connection of a pair.
        messages = {(dtype, *shape) for dtype, shape in found["messages"] if shape != [1]}
        assert messages == {("torch.bfloat16", 128, 1, 256)}, kind
        (averaged,) = (n for place, n in found["counts"]["step 2"].items() if "Ema._copy_to_host" in place)
        assert averaged == sum(found["main_grads"].values()), kind


def test_the_start_says_whose_adamw_it_is(ranks):
    assert ranks[2] in ranks[0]["first"]["facts"]["backend"]


def test_the_host_waits_only_where_it_must(ranks):
    counted, layer, _ = ranks
    for kind, counts in counted.items():
        for step in ("step 1", "step 2"):
            assert waits(counts, step) == {place: times for place, (times, _) in STEP.items()}, kind
            found = waits(counts, f"{step}, pipeline")
            assert found == {place: LEFT * times for place, (times, _) in layer.items()}, kind


def test_an_evaluation_waits_as_forwards_do(ranks):
    counted, layer, _ = ranks
    both = {place: times for place, (times, _) in layer.items()}
    expected = {place: min(times, IN_FORWARD.get(place, times)) for place, times in both.items()}
    for kind in counted.keys() - {"last"}:
        many = waits(counted[kind], "evaluation")["to host: dsv3_megatron/train/evaluation/scoring.py _score_run"]
        found = waits(counted[kind], "evaluation, pipeline")
        found.pop("to device: transformer_engine/pytorch/utils.py _empty_tensor", None)  # made once a process
        assert found == {place: many * times for place, times in expected.items()}


REFUSALS = """
import json, threading
from testing.straw.library import load
library = load()
import torch
from testing.straw.cuda import pretend_cuda
from testing.straw.gpu import Gpu, StrawError
from testing.straw.record import Record
from testing.straw.world import straw_world
import torch.distributed as dist
from parallel.groups import start_processes
from parallel.world import World
record = Record()
pretend_cuda(library, record)
said = {}

def tried(name, function):
    try:
        said[name] = repr(function())
    except (StrawError, RuntimeError, TypeError) as error:
        said[name] = "refused: " + str(error)

device, world = torch.device("cuda", 3), World(11, 16, 3)
with Gpu(device, record, 8):
    tried("unset current device", lambda: torch.ones(2, device="cuda"))
    with straw_world(world, device):
        torch.cuda.set_device(1)
        tried("another current device", lambda: dist.init_process_group(
            "cpu:gloo,cuda:nccl", store=None, rank=11, world_size=16, timeout=None))
        start_processes(world, device)
    tried("current device", torch.cuda.current_device)
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.cuda.current_device()))
    thread.start(); thread.join()
    said["a thread's device"] = found[0]
    here = torch.ones(4, device="cuda", requires_grad=True)
    tried("another device", lambda: torch.ones(2, device="cuda:2"))
    tried("mixed", lambda: here + torch.ones(4))
    tried("numpy", lambda: here.detach().numpy())
    tried("pin", lambda: here.pin_memory())
    tried("no such device", lambda: torch.cuda.set_device(8))
    tried("not contiguous", lambda: dist.all_reduce(torch.ones(2, 3, device="cuda").t()))
    tried("a size only the device knows", lambda: here.detach()[here > 0])
    tried("splits", lambda: dist.all_to_all_single(here.detach(), here.detach(), [1, 2], [4, 0]))
    (here * 2).sum().backward()
    said["gradient"] = [str(here.grad.device), here.grad.type()]
    with record.during("counted"):
        here.sum().item(); bool(here.isnan().any()); here.tolist(); here.cpu(); torch.tensor([1.0, 2.0], device="cuda")
        dist.all_reduce(torch.ones(2)); dist.all_reduce(here.detach())
        torch.cuda.synchronize(); here.detach().masked_select(here > 0)
        here.detach()[here > 0] = torch.ones(4, device="cuda"); here.detach()[here > 0] = 1.0
        torch.ones(2).pin_memory().to("cuda", non_blocking=True); torch.ones(2).to("cuda", non_blocking=True)
        row = torch.zeros(2, device="cuda"); row[1] = 1.0; row[1:] = 1.0
    tried("known", lambda: torch.tensor([0, 7], device="cuda").tolist())
    dist.destroy_process_group()
said["counts"] = {kind: count for (part, kind, _), count in record.counts.items() if part == "counted"}
print(json.dumps(said))
"""


def test_it_refuses_what_a_gpu_refuses_and_counts_what_the_host_waits_for():
    done = subprocess.run([sys.executable, "-c", REFUSALS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    for name in ("unset current device", "another current device", "another device", "mixed", "numpy", "pin",
                 "no such device", "not contiguous", "splits",
                 "a size only the device knows"):  # fmt: skip
        assert str(said[name]).startswith("refused: "), (name, said[name])
    assert said["current device"] == "3" and said["a thread's device"] == 0
    assert said["gradient"] == ["cuda:3", "torch.cuda.FloatTensor"]
    assert said["known"] == "[0, 7]"
    assert said["counts"] == {
        "gloo": 1, "item": 2, "tolist": 1, "to host": 1, "synchronize": 1, "masked_select": 1, "index by a mask": 1,
        "to device": 3,  # from a list; from memory that is not pinned; one number of a tensor set
        "to device, not waited for": 1,
    }  # fmt: skip
