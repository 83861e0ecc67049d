"""How fast is a training step on a CPU, beside transformers' model of the same shape with torch's AdamW?

Fair because: same shape (dsv3_tiny without MTP, which transformers does not have, and once with it), same batch, same
number of threads, forward + backward + optimizer on both sides, in one run, sides alternated, warm-up thrown away,
median of several. transformers runs its grouped experts, the fastest of its ways. Ours trains through the whole
trainer step (pipeline schedule, ZeRO-1, clipping, bias update, metrics), theirs through the plainest loop.

python benchmarks/cpu_step.py [repeats=5] [steps=3] [threads=2]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NO_MTP = "model.num_nextn_predict_layers=0"
SHAPE = ["data=synthetic", "logging.wandb=disabled", "optim.learning_rate=0.001", "optim.micro_batch=4"]


def ours(world: int, repeats: int, steps: int, threads: int, overrides: list[str]) -> list[float]:
    """Return tokens per second of each repeat of ``steps`` steps, from a torchrun of ``world`` ranks."""
    with tempfile.TemporaryDirectory() as folder:
        total = 2 + repeats * steps  # two steps of warm-up
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--standalone"]
        words = [*SHAPE, *overrides, f"run.steps={total}", f"run.directory={folder}/run", "run.name=bench"]
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, threads // world))}
        command = [*torchrun, "launcher/pretrain.py", "recipe=dsv3_tiny", *words]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()][2:]
    return [
        sum(s["global_batch"] for s in lines[i : i + steps])
        * 256
        / sum(s["step_seconds"] for s in lines[i : i + steps])
        for i in range(0, len(lines), steps)
    ]


def transformers(repeats: int, steps: int, threads: int) -> list[float]:
    """Return tokens per second of transformers' DeepseekV3ForCausalLM + AdamW(fused)."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from launcher.compose import compose

    torch.set_num_threads(threads)
    model = compose([*SHAPE, NO_MTP]).model
    shape = model.model_dump(exclude={"rope_scaling", "rope_theta", "topk_method", "scoring_func"})
    config = DeepseekV3Config(**shape, num_key_value_heads=model.num_attention_heads)
    config._experts_implementation = "grouped_mm"
    network = DeepseekV3ForCausalLM(config).float().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, model.vocab_size, (4, 4, 256))  # 16 sequences in microbatches of 4

    def step() -> None:
        for batch in tokens:
            (network(batch, labels=batch).loss / len(tokens)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(steps):
            step()
        rates.append(steps * tokens.numel() / (time.perf_counter() - start))
    return rates


def main() -> None:
    """Print a table of tokens per second and the ratio to transformers; write it beside."""
    options = {"repeats": 5, "steps": 3, "threads": 2}
    options |= {key: int(value) for key, _, value in (word.partition("=") for word in sys.argv[1:])}
    repeats, steps, threads = (options[k] for k in ("repeats", "steps", "threads"))
    parallel = ["parallel.pipeline=2", "parallel.expert=2"]
    sides = {
        "transformers, 1 process": lambda n: transformers(n, steps, threads),
        "ours, 1 process": lambda n: ours(1, n, steps, threads, [NO_MTP]),
        "ours, PP2 x EP2": lambda n: ours(4, n, steps, threads, [NO_MTP, "optim.micro_batch=2", *parallel]),
        "ours with MTP, 1 process": lambda n: ours(1, n, steps, threads, []),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):  # alternated: a machine that changes speed changes it for all
        order = list(sides.items())
        for name, measure in order if turn % 2 == 0 else reversed(order):
            rates[name] += measure(1)
    base = statistics.median(rates["transformers, 1 process"])
    print(f"{'':28}{'tokens/s':>10}{'spread':>18}{'ratio':>8}")
    for name, found in rates.items():
        middle = statistics.median(found)
        print(f"{name:28}{middle:10.0f}{min(found):9.0f} -{max(found):7.0f}{middle / base:8.2f}")


if __name__ == "__main__":
    main()
