"""How fast an export is: the second part of benchmarks/checkpoints.py.

Beside it safetensors' own save_file of the same tensors to the same disk, in turns: what writing alone would take. The
export also reads, converts, reads back, compares and takes checksums.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.checkpoint_saves import BASE


def exports(place: Path, repeats: int) -> dict[str, float]:
    """Return MB/s of the export and of a plain save_file of the same tensors, from a checkpoint of ``saves``."""
    from safetensors.torch import load_file, save_file

    from dsv3_megatron.checkpoint.hugging_face.export import export, shards_of
    from dsv3_megatron.checkpoint.hugging_face.regions import Regions
    from dsv3_megatron.checkpoint.manifest import newest_valid
    from launcher.command_line.compose import compose

    checkpoint = newest_valid(place / "synchronous")[0]
    vocabulary, hidden = Regions(checkpoint).shapes["embedding.word_embeddings.weight"]
    widths = [f"model.hidden_size={hidden}", f"model.moe_intermediate_size={hidden}"]
    model = compose([*BASE, *widths, f"model.vocab_size={vocabulary}"]).model
    folder = place / "export"
    folder.mkdir()

    def ours() -> int:
        for old in folder.iterdir():
            old.unlink()
        shards = shards_of(model, checkpoint, folder, dtype="bf16", shard_bytes=5 * 2**30)
        return export(shards, folder, processes=1)

    size = ours()
    tensors = load_file(next(folder.glob("*.safetensors")))

    def plain() -> None:
        target = place / "plain.safetensors"
        save_file(tensors, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())

    rates = interleaved({"export": ours, "plain": plain}, repeats)
    return {
        "bytes": size,
        "export_mb_per_second": size / rates["export"] / 1e6,
        "plain_copy_mb_per_second": size / rates["plain"] / 1e6,
        "ratio": rates["plain"] / rates["export"],
    }


def interleaved(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each work, run in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats):
        for name in works if repeat % 2 else reversed(works):
            begin = time.perf_counter()
            works[name]()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found) for name, found in seconds.items()}
