"""A small model as others publish one: made, trained and saved by transformers, with a tokenizer of its own.

Moonlight-16B-A3B's shape cut down (full-rank queries, one group, two shared experts, a dense layer first) and its names
of tokens; trained for a minute on prose, so that there is something to lose.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SHAPE = {
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
BEGIN, END, PAD = "[BOS]", "[EOS]", "[PAD]"


def publish(folder: Path, texts: list[str], *, steps: int, length: int = 128, seed: int = 5) -> None:
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
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "e_score" in name:
                buffer.uniform_(-0.01, 0.01)
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
