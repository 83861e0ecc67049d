"""Is data ever the bottleneck? prepare_data beside the tokenizer alone, and reading samples beside a training step.

    python -m benchmarks.data_rates [output=FILE.json]

Rows of the Python standard library's source as jsonl.zst. Preparing (reading, unpacking, parsing, encoding, writing,
checksums) and tokenizers' own encode_batch over the same texts in memory take turns in one run; both use all cores.
Reading: packed samples of 4,096 tokens from shards, fill-in-the-middle and isolation on, one process.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import zstandard

from dsv3_megatron.data.prepare.shard import PrepareOptions, prepare
from dsv3_megatron.data.source.stdlib import source_files
from dsv3_megatron.data.tokenizer import Tokenizer

ROUNDS, TARGET_BYTES, SAMPLES = 5, 10_000_000, 300


def corpus(folder: Path) -> tuple[list[str], Path]:
    """Return the texts, some 10 MB of them, and the file that holds them as rows."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in source_files()]
    texts *= max(1, TARGET_BYTES // sum(map(len, texts)))
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path = folder / "rows.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(rows))
    return texts, path


def prepare_seconds(folder: Path, rows: Path) -> tuple[float, float]:
    """Return (wall seconds of preparing, of which until the first block came back: the start of the workers)."""
    output = folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    options = PrepareOptions(
        (str(rows),), None, str(output), str(folder / "tokenizer.json"), held_out=0.02, split_share=0.1
    )
    first: list[float] = []
    start = time.perf_counter()
    prepare(
        options,
        workers=os.cpu_count() or 1,
        progress=lambda *_: first.append(time.perf_counter()) if not first else None,
    )
    return time.perf_counter() - start, first[0] - start  # a block of 1 MB in it


def main() -> None:
    """Print rates and their ratio."""
    folder = Path(tempfile.mkdtemp())
    try:
        texts, rows = corpus(folder)
        size = sum(len(text.encode()) for text in texts)
        trained = Tokenizer.train(texts[:: max(1, len(texts) // 100)], 8_000)
        trained.save(folder / "tokenizer.json")
        ours, theirs, starts = [], [], []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            trained._engine.encode_batch(texts, add_special_tokens=False)
            theirs.append(time.perf_counter() - start)
            seconds, starting = prepare_seconds(folder, rows)
            ours.append(seconds)
            starts.append(starting)
        ratio = statistics.median(t / o for t, o in zip(theirs, ours))
        # Imported late: workers import this file too, and should not wait for torch.
        from dsv3_megatron.data.settings import DataSettings
        from dsv3_megatron.data.source.build import build

        settings = DataSettings(
            source="indexed", path=str(folder / "out"), cache=str(folder / "cache"), sequence_length=4096, fim_rate=0.1,
            isolate_documents=True,
        )  # fmt: skip
        start = time.perf_counter()
        train = build(settings, vocab_size=8_192, seed=1).train
        opening = time.perf_counter() - start
        start = time.perf_counter()
        for number in range(SAMPLES):
            train.sample(number)
        reading = SAMPLES * 4096 / (time.perf_counter() - start)
        found = {
            "cores": os.cpu_count(),
            "load_at_the_end": os.getloadavg()[0],  # a busy machine stretches both sides, and the start of workers most
            "text_bytes": size,
            "prepare_megabytes_per_second": size / statistics.median(ours) / 1e6,
            "encode_batch_megabytes_per_second": size / statistics.median(theirs) / 1e6,
            "prepare_over_encode_batch": ratio,
            "first_block_seconds": statistics.median(starts),
            "seconds": {"prepare": ours, "encode_batch": theirs},
            "open_and_pack_seconds": opening,
            "read_tokens_per_second": reading,
        }
    finally:
        shutil.rmtree(folder)
    for name, value in found.items():
        print(f"{name:<36} {value:.3g}" if isinstance(value, float) else f"{name:<36} {value}")
    output = next((word.split("=", 1)[1] for word in sys.argv[1:] if word.startswith("output=")), None)
    if output:
        Path(output).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
