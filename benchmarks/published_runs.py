"""Training runs of DeepSeek-V3 that others have published, as overrides of our recipe: what planner_truth.py plans.

Each is written down from the source's own configuration files, so that like is compared with like; what we cannot
express stands in ``differs``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedRun:
    """A published throughput and its configuration.

    Attributes:
        tokens: a second and GPU, as published.
        overrides: of recipe=dsv3_671b.
        overlapped: the run hides exchanges inside interleaved 1F1B (megatron-core's combined 1F1B).
        fp8: False for a BF16 run.
        held_out: no constant of the model was settled by it.
        differs: what the source runs and we do not plan.
    """

    name: str
    tokens: float
    source: str
    overrides: tuple[str, ...]
    overlapped: bool = False
    fp8: bool = True
    held_out: bool = False
    differs: str = ""


# Dispatch in BF16, no FP8 cache of SwiGLU, the input of the linear after attention kept once.
ON_TE = (
    "precision.fp8.dispatch=high",
    "precision.fp8.swiglu_cache=high",
    "precision.fp8.attention_output_cache=once",
)
INTERLEAVED = ("parallel.schedule=interleaved", "optim.global_batch=4096")
# "Et*4|(t*4|)*14tmL": four layers a stage, one with MTP and loss in the last.
FOURS = f"parallel.stages=[{'4,' * 15}1]"
GB200 = (
    "cluster=gb200_256",
    "parallel.pipeline=4",
    "parallel.expert=64",
    "parallel.chunks=4",
    FOURS,
    *INTERLEAVED,
    *ON_TE,
)


def _runs() -> tuple[PublishedRun, ...]:
    bridge = "NVIDIA-NeMo/Megatron-Bridge, docs/performance-summary.md; scripts/performance/configs/deepseek"
    report = "arXiv 2603.07685, table of results and case study"
    # "Et|(tt|)*30mL"; our last stage has a layer of its own, theirs MTP and loss alone.
    h100 = (
        "cluster=h100_1024",
        "parallel.tensor=2",
        "parallel.pipeline=8",
        "parallel.schedule=interleaved",
        "parallel.chunks=4",
        "optim.global_batch=8192",
        f"parallel.stages=[{'2,' * 29}1,1,1]",
        *ON_TE,
    )
    b200 = ("cluster=b200_256", FOURS, *ON_TE)
    without_mtp = "model.num_nextn_predict_layers=0"
    return (
        PublishedRun(
            "PaddleFleet, 256 H800, FP8",
            1400,
            "PaddlePaddle/PaddleFormers, examples/best_practices/DeepSeek-V3 (README, pretrain/config)",
            (
                "cluster=h800_256",
                "parallel.pipeline=8",
                "parallel.expert=32",
                "parallel.schedule=dualpipev",
                "optim.global_batch=768",  # gradient_accumulation_steps 24 in the shipped configuration
                "parallel.recompute=[norm,mla_up,attention,moe_act,shared_experts]",
            ),
            differs="real routing, optimizer states on the host, the experts' first product recomputed; the batch is "
            "that of the shipped configuration, not stated for this run",
        ),
        PublishedRun(
            "Megatron-Bridge 25.09, 1,024 H100, FP8",
            1297,
            bridge,
            (*h100, "parallel.recompute=[mla_up,mlp]"),
            overlapped=True,
            differs="gradients reduced in BF16 and not beside the backward",
        ),
        PublishedRun(
            "Megatron-Bridge 26.04.01, 256 B200, MXFP8",
            3328,
            bridge,
            (
                *b200,
                *INTERLEAVED,
                "parallel.pipeline=8",
                "parallel.expert=32",
                "parallel.chunks=2",
                "parallel.recompute=[mla_up,mlp]",
            ),
            overlapped=True,
            differs="gradients in BF16; routed experts launched by the host, the rest as CUDA graphs",
        ),
        PublishedRun(
            "Megatron-Bridge 26.08, 256 GB200, MXFP8",
            4912,
            bridge,
            (*GB200, "parallel.recompute=[mla_up]"),
            overlapped=True,
            differs="SwiGLU and casts fused into the experts' products",
        ),
        PublishedRun(
            "torchtitan and Nebius, 256 B200, BF16, DeepEP, 8,192 tokens",
            859,
            "nebius/ml-cookbook, pytorch-dsv3-mxfp8/train_671b.sh",
            (
                "cluster=b200_256",
                "parallel.tensor=2",
                "parallel.pipeline=2",
                "parallel.expert=32",
                "parallel.chunks=2",
                *INTERLEAVED,
                "data.sequence_length=8192",
                "parallel.recompute=[full]",
                without_mtp,
            ),
            fp8=False,
            differs="FSDP; attention by a compiler (FlexAttention); host not hidden by graphs",
        ),
        PublishedRun(
            "megatron-core's report, 1,024 H100, FP8",
            1412,
            report,
            (*h100, "parallel.recompute=[mla_up,mlp,moe_act,norm]"),
            overlapped=True,
            held_out=True,
        ),
        PublishedRun(
            "Megatron-Bridge 26.02.01, 256 GB200, MXFP8",
            4021,
            bridge,
            (*GB200, "parallel.recompute=[mlp]"),
            held_out=True,
            differs="routed experts launched by the host, the rest as CUDA graphs",
        ),
        PublishedRun(
            "Megatron-Bridge 25.11, 256 GB200, MXFP8, without MTP",
            4018,
            bridge,
            (
                "cluster=gb200_256",
                "parallel.pipeline=8",
                "parallel.expert=32",
                "parallel.chunks=4",
                *INTERLEAVED,
                *ON_TE,
                "parallel.recompute=[moe_act,mlp]",
                without_mtp,
            ),
            held_out=True,
            differs="routed experts launched by the host, the rest as CUDA graphs",
        ),
        PublishedRun(
            "Megatron-Bridge 25.11, 256 GB200, BF16, without MTP",
            3139,
            bridge,
            (*GB200, "parallel.recompute=[mla_up]", without_mtp),
            fp8=False,
            held_out=True,
            differs="routed experts launched by the host, the rest as CUDA graphs",
        ),
        PublishedRun(
            "Megatron-Bridge 26.02.01, 256 B200, MXFP8, EP 8 in a node",
            2790,
            bridge,
            (
                *b200,
                "parallel.pipeline=16",
                "parallel.expert=8",
                "parallel.schedule=1f1b",
                "optim.global_batch=4096",
                "parallel.recompute=[mla_up]",
            ),
            held_out=True,
            differs="no CUDA graphs: 32 experts a GPU, each a launch of its own",
        ),
    )


RUNS = _runs()
