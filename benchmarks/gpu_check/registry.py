"""The checks, in the order of their worth: should a visit be cut short, what is known by then is worth most."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.gpu_check.outcome import Visit

PRECISIONS = {"torch": ("fp32", "bf16", "fp8"), "te": ("fp32", "bf16", "fp8", "fp8_held")}
MEASURED = (("te", "bf16"), ("te", "fp8"), ("torch", "bf16"))
SCHEDULES = ("1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev")
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
# Kernels that add in one order, where there are such: what is compared bit for bit must not differ by itself.
ORDERED = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


@dataclass(frozen=True)
class Check:
    """One process and the rows it fills."""

    name: str
    function: str  # module:function, called with the visit and ``arguments``; yields an Outcome for each row
    seconds: float  # its time limit
    arguments: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()  # names of its rows; () = one, called as the check
    after: tuple[str, ...] = ()  # rows that must have passed, as it reads their facts
    needs: tuple[str, ...] = ()  # of a machine: gpu, te, kernels, 2 gpus
    alone: bool = False  # nothing else runs meanwhile: it measures, or holds the GPU
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def fills(self) -> tuple[str, ...]:
        """The names of its rows."""
        return self.rows or (self.name,)

    @property
    def stand_ins(self) -> str:
        """The module that imports what plays the GPU in a rehearsal: Transformer Engine's own Python, or nothing."""
        return "testing.te.preload" if "te" in self.needs else "benchmarks.gpu_check.preload"

    def lacks(self, visit: Visit) -> str | None:
        """Return what the machine lacks for it, or None."""
        lacking = {
            "kernels": _no_kernels() if "kernels" in self.needs else None,
            "gpu": "needs a GPU" if visit.stands_in else None,
            "te": None if visit.te else "Transformer Engine is not installed: pip install -e '.[gpu]'",
            "2 gpus": f"needs two GPUs or more, here is {visit.gpus}" if visit.gpus < 2 else None,
        }
        return next((lacking[need] for need in self.needs if lacking[need]), None)


def _no_kernels() -> str | None:
    from dsv3_megatron.precision.kernels.available import why_not  # imports torch, which a list of checks does without

    return (why := why_not()) and f"Triton's kernels are not used here: {why}"


def _needs(backend: str) -> tuple[str, ...]:
    return ("te",) if backend == "te" else ()


def _both() -> list[tuple[str, str]]:
    """Every backend with every precision that it has: te first, as it is what GPUs are for."""
    return [(backend, precision) for backend in ("te", "torch") for precision in PRECISIONS[backend]]


def _per(what: str, function: str, seconds: float, pairs: list[tuple[str, str]], **more: object) -> list[Check]:
    """Return a check for each (backend, precision)."""
    return [
        Check(f"{what} {b} {p}", f"benchmarks.gpu_check.{function}", seconds, (b, p), needs=_needs(b), **more)
        for b, p in pairs
    ]


def _measured() -> list[Check]:
    """True-size layers: memory, speed, kernels; then the same by plain megatron-core."""
    ours = [
        Check(
            f"measure {b} {p}",
            "benchmarks.gpu_check.measured:ours",
            60,
            (b, p),
            rows=tuple(f"{what} {b} {p}" for what in ("memory", "speed", "kernels")),
            after=("machine",),
            needs=("gpu", *_needs(b)),
            alone=True,
        )
        for b, p in MEASURED
    ]
    plain = [
        Check(
            f"speed megatron {p}",
            "benchmarks.gpu_check.measured:plain",
            90,  # torch compiles its fused functions first
            (p,),
            after=("machine",),
            needs=("gpu", "te"),
            alone=True,
        )
        for p in ("bf16", "fp8")
    ]
    return [ours[0], plain[0], ours[1], plain[1], ours[2]]


def _launches() -> list[Check]:
    """What the host takes for each kernel it launches."""
    return [
        Check(
            f"host {backend}",
            "benchmarks.gpu_check.measured:host",
            40,
            (backend,),
            needs=("gpu", *_needs(backend)),
            alone=True,
        )
        for backend in ("te", "torch")
    ]


CHECKS: tuple[Check, ...] = (
    Check("machine", "benchmarks.gpu_check.machine:machine", 40, alone=True),
    Check("cpu losses", "benchmarks.gpu_check.losses:reference", 60, environment=NO_GPU),
    Check("plan", "benchmarks.gpu_check.measured:plan", 120, after=("machine",), needs=("gpu",), environment=NO_GPU),
    *_per("losses", "losses:beside_the_cpu", 60, _both(), after=("cpu losses",)),
    Check("fp8 quantiser te", "benchmarks.gpu_check.products:quantised_as_emulated", 40, needs=("te",)),
    *_per("fp8 products", "products:as_emulated", 40, [("te", "fp8"), ("torch", "fp8")]),
    *(
        Check(f"kernel {name}", f"benchmarks.gpu_check.{function}", 60, after=("machine",), needs=("gpu", "kernels"),
              alone=True)
        for name, function in (
            ("quantise", "kernels:quantised"),
            ("swiglu", "kernels:swiglu"),
            ("weight gradient", "kernels_weight_gradient:weight_gradient"),
        )
    ),
    *_per("muon", "muon:beside_the_cpu", 60, [("te", "bf16"), ("te", "fp8_held"), ("torch", "bf16")],
          after=("cpu losses",)),
    Check("newton-schulz", "benchmarks.gpu_check.muon:orthogonalised", 40, needs=("gpu",), alone=True),
    *_per("requantised", "requantise:weights_follow", 60, [("te", "fp8"), ("torch", "fp8")]),
    *_per("ema", "averages:leaves_training_alone", 60, [("te", "bf16"), ("te", "fp8_held"), ("torch", "bf16")],
          environment=ORDERED),
    *_per("resume", "resume:bit_exact", 60, [*((b, p) for b, p in _both() if p != "fp32")], environment=ORDERED),
    Check("watchdog", "benchmarks.gpu_check.hang:is_named", 40, alone=True),
    *_per("one expert", "layouts:one_expert", 60, [("te", "bf16"), ("torch", "fp32")]),
    *(
        Check(f"schedule {name}", "benchmarks.gpu_check.layouts:schedule", 60, (name,), needs=("2 gpus",), alone=True)
        for name in SCHEDULES
    ),
    Check("one expert of two ranks", "benchmarks.gpu_check.layouts:one_expert_of_two_ranks", 60, needs=("2 gpus",),
          alone=True),
    Check("attention", "benchmarks.gpu_check.attention:backends", 40, needs=("gpu",), alone=True),
    *_measured(),
    *_launches(),
)  # fmt: skip
