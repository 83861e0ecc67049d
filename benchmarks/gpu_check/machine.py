"""What the machine is: versions, memory, and how fast its memories and GPUs reach each other."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from typing import Any

from benchmarks.gpu_check.outcome import Outcomes, Visit, judged
from benchmarks.gpu_check.timing import milliseconds

MIB = 1 << 20


def machine(visit: Visit) -> Outcomes:
    """Versions, the GPU and its memory; on a GPU also bandwidths. Fails only where torch cannot use the GPU."""
    from dsv3_megatron.run.directory import environment

    facts: dict[str, Any] = {"environment": environment({"gpus": visit.gpus})}
    if visit.stands_in:
        versions = facts["environment"]["packages"]
        yield judged(True, f"CPU, {platform.machine()}, torch {versions['torch']}", **facts)
        return
    facts |= _gpu(visit)
    moved = facts["gigabytes_per_second"]
    versions = {"driver": facts["driver"], "CUDA": facts["cuda"], "torch": facts["torch"], "NCCL": facts["nccl"]}
    versions |= {"cuDNN": facts["cudnn"], "cuBLAS": facts["cublas"]}
    versions["TE"] = facts["environment"]["packages"]["transformer-engine"]
    said = (
        f"{facts['name']}, {facts['memory_bytes'] / 2**30:.0f} GiB, "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}; "
        f"GB/s: {', '.join(f'{name} {rate:.0f}' for name, rate in moved.items())}"
    )
    yield judged(all(rate > 0 for rate in moved.values()), said, **facts)


def _gpu(visit: Visit) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return {
        "name": properties.name,
        "gpus": visit.gpus,
        "memory_bytes": total,
        "memory_free_bytes": free,
        "context_bytes": total - free,  # this process's and whatever else holds memory; torch has allocated nothing yet
        "multiprocessors": properties.multi_processor_count,
        "capability": list(torch.cuda.get_device_capability(0)),
        "driver": driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "cudnn": torch.backends.cudnn.version(),
        "cublas": _cublas(),
        "gigabytes_per_second": _bandwidths(visit.gpus),
    }


def driver() -> str:
    """Return the driver's version, or why it is not known."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown (nvidia-smi says nothing)"


def _cublas() -> str | None:
    """Return the version of cuBLAS as the package that holds it says; None where CUDA is not from packages."""
    from importlib import metadata

    for package in ("nvidia-cublas", "nvidia-cublas-cu13", "nvidia-cublas-cu12"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def _bandwidths(gpus: int) -> dict[str, float]:
    """Return 10^9 bytes a second between host and device, inside the device, and from GPU 0 to each of the others."""
    import torch

    host = torch.empty(256 * MIB, dtype=torch.uint8, pin_memory=True)
    here, there = (torch.empty(256 * MIB, dtype=torch.uint8, device="cuda:0") for _ in range(2))
    found = {
        "host to device": _rate(lambda: here.copy_(host, non_blocking=True), host.nbytes),
        "device to host": _rate(lambda: host.copy_(here, non_blocking=True), host.nbytes),
        "in the device": _rate(lambda: there.copy_(here), 2 * here.nbytes),  # read and written
    }
    for peer in range(1, gpus):
        far = torch.empty_like(here, device=f"cuda:{peer}")
        found[f"0 to {peer}"] = _rate(lambda far=far: far.copy_(here, non_blocking=True), here.nbytes)
    return found


def _rate(copy: Callable[[], Any], nbytes: int) -> float:
    return nbytes / milliseconds(copy, times=8) / 1e6
