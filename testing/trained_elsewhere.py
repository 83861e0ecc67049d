"""A small model as others publish one: made, trained and saved by transformers, with a tokenizer of its own.

Moonlight-16B-A3B's shape cut down (full-rank queries, one group, two shared experts, a dense layer first) and its names
of tokens; trained for a minute on prose, so that there is something to lose.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SHAPE: dict[str, Any] = {
    "vocab_size": 520,  # eight rows that no token uses, as published models have
    "hidden_size": 64,
    "intermediate_size": 176,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.446,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "num_nextn_predict_layers": 0,
}
TOKENS = 512
BIAS_SPEED = 0.01
BEGIN, END, PAD = "[BOS]", "[EOS]", "[PAD]"
LENGTH = SHAPE["max_position_embeddings"]


def as_recipe(steps: int) -> list[str]:
    """Return the words that make recipe=moonlight_16b as small as this model, for so many steps on a CPU."""
    shape = [
        f"model.{key}={value}" for key, value in SHAPE.items() if key not in ("num_key_value_heads", "q_lora_rank")
    ]
    rate = f"{{until: 10 steps, shape: linear, to: 1.5e-3}},{{until: {steps} steps, shape: cosine, to: 1.5e-4}}"
    return [
        *shape,
        "precision=fp32",
        "backend=torch",
        f"data.sequence_length={LENGTH}",
        f"optim.learning_rate=[{rate}]",
        "optim.global_batch=16",
        "run.tokens=null",
        f"run.steps={steps}",
        "run.evaluate_every_steps=0",
        "logging.wandb=disabled",
        "logging.report_every_seconds=0",
    ]


def publish(folder: Path, texts: list[str], *, steps: int, length: int = LENGTH, seed: int = 5) -> None:
    """Train a model and a tokenizer on texts and save both, with what tells their begin and end."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM  # seconds, which collecting tests need not take

    folder.mkdir(parents=True)
    tokenizer = _tokenizer(texts)
    begin, end, pad = (tokenizer.token_to_id(name) for name in (BEGIN, END, PAD))
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": 50000.0}
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(**SHAPE, rope_parameters=rope, bos_token_id=begin, eos_token_id=end, pad_token_id=pad)
    )
    model.train()
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    for gate in gates:
        gate.register_forward_hook(_balance)
    ids = torch.tensor([i for text in texts for i in (*tokenizer.encode(text).ids, end)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    for _ in range(steps):
        rows = torch.stack([ids[at : at + length] for at in torch.randint(0, len(ids) - length, (16,)).tolist()])
        model(rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))


@torch.no_grad()
def _balance(gate: torch.nn.Module, inputs: object, outputs: tuple[torch.Tensor, ...]) -> None:
    """Move the router's bias against the load of its experts, as DeepSeek-V3 was trained: arXiv 2412.19437, 2.1.2."""
    if gate.training:
        load = torch.bincount(outputs[2].flatten(), minlength=SHAPE["n_routed_experts"]).float()
        gate.e_score_correction_bias += BIAS_SPEED * (load.mean() - load).sign()


def old_text(folder: Path) -> list[str]:
    """Write prose, the topics of Python's own help, as files; return it."""
    from pydoc_data.topics import topics  # half a megabyte

    folder.mkdir()
    for name, text in topics.items():
        (folder / f"{name.replace('/', '_')}.txt").write_text(text)
    return list(topics.values())


def own_text(folder: Path) -> None:
    """Write source code, of four packages of Python's library, as files."""
    folder.mkdir()
    library = Path(sysconfig.get_path("stdlib"))
    for package in ("asyncio", "email", "http", "json"):
        for file in sorted((library / package).glob("*.py")):
            shutil.copy(file, folder / f"{package}_{file.name}")


def _tokenizer(texts: list[str]) -> Tokenizer:
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [BEGIN, END, PAD]
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    engine.train_from_iterator(texts, trainer)
    return engine
