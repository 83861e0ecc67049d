"""Multi-token prediction against a slow reference written from the paper (section 2.2, Eq. 21 to 25)."""

import pytest
import torch
import torch.nn.functional as F

from dsv3_megatron.model.backend import TorchBackend
from dsv3_megatron.model.config import transformer_config
from dsv3_megatron.model.depth_masks import DepthMasks, with_depth_masks
from dsv3_megatron.model.stage import build_stage
from parallel.layout import Layout
from parallel.settings import ParallelSettings
from testing.training.tiny import small_recipe

WEIGHT = 0.3


def slow_objective(module, tokens, labels, depths, decay=1.0):
    """Return main loss + weight / D * sum over depths, summed over tokens, built from the model's own blocks."""
    length = tokens.shape[1]
    positions = torch.arange(length).expand_as(tokens)
    embedding, head = module.embedding.word_embeddings.weight, module.output_layer.weight
    hidden = module.decoder(hidden_states=module.embedding(tokens, positions), attention_mask=None)

    def losses(states, targets, valid):
        logits = states.transpose(0, 1) @ head.t()  # [B, S, vocabulary]
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        return each[:, :valid].sum()

    total, state = losses(hidden, labels, length), hidden
    for depth in range(1, depths + 1):
        layer = module.mtp.layers[depth - 1]
        valid = length - depth
        # Position i combines its state with the embedding of token i + depth; what runs past the end is not counted.
        ahead = torch.cat([tokens[:, depth:], torch.zeros_like(tokens[:, :depth])], 1)
        pair = torch.cat([layer.enorm(embedding[ahead].transpose(0, 1)), layer.hnorm(state)], -1)
        state = layer.transformer_layer(hidden_states=layer.eh_proj(pair)[0], attention_mask=None)[0]
        state = layer.final_layernorm(state)
        targets = torch.cat([labels[:, depth:], torch.zeros_like(labels[:, :depth])], 1)
        total = total + WEIGHT / depths * decay ** (depth - 1) * losses(state, targets, valid)
    return total


@pytest.mark.parametrize(("depths", "decay"), [(1, 1.0), (2, 1.0), (3, 1.0), (3, 0.5), (2, 0.0)])
def test_mtp_loss_gradients_equal_a_reference_from_the_paper(depths, decay, one_process):
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

    model = small_recipe(f"model.num_nextn_predict_layers={depths}").model
    config = transformer_config(model, ParallelSettings(), Layout(), mtp_weight=WEIGHT, balance_weight=0.0)
    module = build_stage(
        config, model, TorchBackend(), stage=0, layers_of_stages=(4,), sequence_length=24, groups=one_process
    )
    torch.manual_seed(depths)
    for p in module.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.08)
    ids = torch.randint(0, 256, (2, 25))
    tokens, labels = ids[:, :-1], ids[:, 1:]
    MTPLossAutoScaler.main_loss_backward_scale = torch.ones(1)

    positions = torch.arange(24).expand(2, -1)
    batch = with_depth_masks({"loss_mask": torch.ones(2, 24)}, depths)
    module(tokens, positions, None, labels=labels, loss_mask=DepthMasks.of(batch, decay)).sum().backward()
    got = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    slow_objective(module, tokens, labels, depths, decay).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=2e-4, msg=f"depth {depths}: {name}")
