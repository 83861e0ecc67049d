"""Is data ever the bottleneck? prepare_data beside the tokenizer alone, and reading samples beside a training step.

    python -m benchmarks.data_rates [output=FILE.json]

Rows of the Python standard library's source as jsonl.zst. Preparing (reading, unpacking, parsing, encoding, writing,
checksums) and tokenizers' own encode_batch over the same texts in memory take turns in one run, once with one process
and one thread, and once with all cores on each side.
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
from dsv3_megatron.data.source.samples import SampleSource
from dsv3_megatron.data.source.stdlib import source_files
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.run.files import read_json, write_json

ROUNDS, TARGET_BYTES, SAMPLES = 3, 60_000_000, 300


def corpus(folder: Path) -> tuple[list[str], Path]:
    """Return the texts, some 60 MB of them, and the file that holds them as rows."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in source_files()]
    texts *= max(1, TARGET_BYTES // sum(map(len, texts)))
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path = folder / "rows.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(rows))
    return texts, path


def prepare_seconds(folder: Path, rows: Path, workers: int) -> float:
    """Return the wall seconds of preparing, the start of the workers included."""
    output = folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    options = PrepareOptions(
        (str(rows),), None, str(output), str(folder / "tokenizer.json"), held_out=0.02, split_share=0.1
    )
    start = time.perf_counter()
    prepare(options, workers=workers)
    return time.perf_counter() - start


def encode_seconds(tokenizer: Tokenizer, texts: list[str], workers: int) -> float:
    """Return the wall seconds of tokenizers' own encode_batch."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if workers > 1 else "false"  # read at every call
    start = time.perf_counter()
    for first in range(0, len(texts), 1000):  # all at once, it would hold gigabytes of encodings
        tokenizer._engine.encode_batch(texts[first : first + 1000], add_special_tokens=False)
    return time.perf_counter() - start


def tokens_per_second(train: SampleSource) -> float:
    """Return how many tokens of samples one process reads."""
    start = time.perf_counter()
    for number in range(SAMPLES):
        train.sample(number)
    return SAMPLES * 4096 / (time.perf_counter() - start)


def main() -> None:
    """Print rates and their ratio."""
    folder = Path(tempfile.mkdtemp())
    try:
        texts, rows = corpus(folder)
        size = sum(len(text.encode()) for text in texts)
        trained = Tokenizer.train(texts[:: max(1, len(texts) // 100)], 8_000)
        trained.save(folder / "tokenizer.json")
        cores = os.cpu_count() or 1
        seconds: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for workers in sorted({1, cores}):
                theirs = encode_seconds(trained, texts, workers)
                seconds.setdefault(f"encode_batch, {workers}", []).append(theirs)
                seconds.setdefault(f"prepare, {workers}", []).append(prepare_seconds(folder, rows, workers))

        def faster(one: str, other: str) -> float:
            """Return how many times faster one is than the other: the median of the pairs."""
            return statistics.median(o / s for s, o in zip(seconds[one], seconds[other]))

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
        reading = tokens_per_second(train)
        manifest = folder / "out/manifest.json"
        write_json(manifest, {**read_json(manifest), "has_sums": False})
        unchecked = tokens_per_second(build(settings, vocab_size=8_192, seed=1).train)
        found = {
            "cores": cores,
            "load_at_the_end": os.getloadavg()[0],  # a busy machine stretches both sides
            "text_bytes": size,
            "prepare_megabytes_per_second": size / statistics.median(seconds[f"prepare, {cores}"]) / 1e6,
            "prepare_over_encode_batch, one process": faster("prepare, 1", "encode_batch, 1"),
            "prepare_over_encode_batch, all cores": faster(f"prepare, {cores}", f"encode_batch, {cores}"),
            "prepare, all cores over one": faster(f"prepare, {cores}", "prepare, 1"),
            "encode_batch, all cores over one": faster(f"encode_batch, {cores}", "encode_batch, 1"),
            "seconds": seconds,
            "open_and_pack_seconds": opening,
            "read_tokens_per_second": reading,
            "read_tokens_per_second, without checksums": unchecked,
        }
    finally:
        shutil.rmtree(folder)
    for name, value in found.items():
        print(f"{name:<40} {value:.3g}" if isinstance(value, float) else f"{name:<40} {value}")
    output = next((word.split("=", 1)[1] for word in sys.argv[1:] if word.startswith("output=")), None)
    if output:
        Path(output).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
