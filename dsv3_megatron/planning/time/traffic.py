"""What one GPU sends in a step, by what for and over which class of links."""

from __future__ import annotations

from collections.abc import Sequence

from dsv3_megatron.planning.memory.ranks import Held
from dsv3_megatron.planning.time.expert_exchange import expert_exchange, nodes_reached
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.settings import ClusterSettings
from parallel.errors import RecipeError
from parallel.layout import Layout
from parallel.links import Fabric, Link, Moved
from parallel.pipeline.actions import Placement


def fabric_of(cluster: ClusterSettings) -> Fabric:
    """Return the cluster's links, by the GPUs that the fast ones join, which need not be a node's.

    Raises: RecipeError: it has several nodes or GPUs and no link for them.
    """
    if cluster.fast_domain > 1 and cluster.intra_node is None:
        raise RecipeError(
            f"cluster.intra_node = null, but cluster={cluster.name} has several GPUs a node; give its link"
        )
    if (cluster.nodes or 1) * cluster.gpus_per_node > cluster.fast_domain and cluster.inter_node is None:
        raise RecipeError(f"cluster.inter_node = null, but cluster={cluster.name} has several nodes; give its link")

    def link(name: str) -> Link:
        settings = getattr(cluster, name) or cluster.intra_node
        if settings is None:  # one GPU: nothing is ever sent
            return Link(1e9, 0.0)
        return Link(settings.gigabytes_per_second * 1e9, settings.latency_microseconds * 1e-6)

    between = cluster.inter_node or cluster.intra_node
    own_node = between is not None and between.own_node
    return Fabric(cluster.fast_domain, link("intra_node"), link("inter_node"), own_node)


def widths_over_context(recipe: Recipe) -> tuple[int, int]:
    """Return the numbers a token and head that context parallelism exchanges in a layer's forward and backward.

    Forward: query, key and value one way, the output back. Backward: their gradients, the output once more for
    attention's own backward, and what is recomputed.
    """
    model, recompute = recipe.model, set(recipe.parallel.recompute)
    qk, v = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
    inputs, whole = 2 * qk + v, 2 * (qk + v)
    if recompute & {"attention", "full"}:
        return whole, whole + v + whole
    return whole, whole + v + (inputs if "mla_up" in recompute else 0)


class Traffic:
    """Prices what ranks of a layout send to each other."""

    def __init__(self, recipe: Recipe, layout: Layout):
        self.recipe, self.layout, self.fabric = recipe, layout, fabric_of(recipe.cluster)
        self.size = 2 if recipe.precision.parameters == "bf16" else 4
        self.tokens = recipe.optim.micro_batch * recipe.data.sequence_length / (layout.cp * layout.tp)
        self.message_bytes = round(self.tokens * recipe.model.hidden_size * self.size)
        fp8 = recipe.precision.fp8
        self.fp8_dispatch = fp8 is not None and fp8.dispatch == "e4m3"

    @property
    def slower_beside_kernels(self) -> float:
        """How much longer a dispatch or combine takes on the SMs that kernels leave it than where its bandwidth was
        measured: each SM moves its own share of the tokens."""
        cluster = self.recipe.cluster
        if not cluster.communication_sms or not cluster.exchange_sms:
            return 1.0
        return max(1.0, cluster.exchange_sms / cluster.communication_sms)

    def dispatch(self) -> Moved:
        """Return one dispatch: FP8 with a float32 scale per 128 numbers, or the parameters' format."""
        hidden = self.recipe.model.hidden_size
        return self._exchange(hidden + hidden / 128 * 4 if self.fp8_dispatch else hidden * self.size)

    def combine(self) -> Moved:
        """Return one combine."""
        return self._exchange(self.recipe.model.hidden_size * self.size)

    def _exchange(self, token_bytes: float) -> Moved:
        model, members = self.recipe.model, self.layout.group("ep", 0)
        nodes = nodes_reached(self.fabric.nodes_of(members), model.n_group, model.topk_group, model.num_experts_per_tok)
        return expert_exchange(
            self.fabric,
            members,
            tokens=self.tokens,
            experts_per_token=model.num_experts_per_tok,
            nodes=nodes,
            token_bytes=token_bytes,
        )

    def tensor(self, *, moe: bool) -> Moved:
        """Return the gathers and scatters of sequence parallelism of one layer's forward (its backward has as many)."""
        if self.layout.tp == 1:
            return Moved()
        whole = self.tokens * self.layout.tp * self.recipe.model.hidden_size * self.size
        blocks = 2 if not moe or self.recipe.model.n_shared_experts else 1
        return self.fabric.ring(self.layout.group("tp", 0), whole) * (2 * blocks)

    def context(self, *, backward: bool) -> Moved:
        """Return the all-to-alls over CP of one layer's forward or backward."""
        if self.layout.cp == 1:
            return Moved()
        heads = self.recipe.model.num_attention_heads / self.layout.tp
        numbers = self.tokens * self.layout.tp * heads * widths_over_context(self.recipe)[backward]
        return self.fabric.all_to_all(self.layout.group("cp", 0), numbers * self.size)

    def send(self) -> Moved:
        """Return one message to the neighbouring pipeline rank."""
        if self.layout.pp == 1:
            return Moved()
        return self.fabric.send(0, self.layout.world_size // self.layout.pp, self.message_bytes)

    def gradients(self, held: Held, *, mirrored: bool) -> Moved:
        """Return the reduce-scatter of a step's float32 gradients."""
        return self._over_copies(held, 4, mirrored)

    def weights(self, held: Held, *, mirrored: bool) -> Moved:
        """Return the all-gather of updated weights."""
        return self._over_copies(held, self.size, mirrored)

    def embedding(self, place: Placement) -> Moved:
        """Return the all-reduce of the embedding's float32 gradient, where MTP gives the last stage a copy of it on
        another rank than the first."""
        model, last = self.recipe.model, place.stages - 1
        if "embedding" in model.freeze or not model.num_nextn_predict_layers or last in place.stages_of(0):
            return Moved()
        members = (0, self.layout.world_size - self.layout.world_size // self.layout.pp)
        return self.fabric.ring(members, model.vocab_size * model.hidden_size / self.layout.tp * 4) * 2

    def largest_logits(self) -> Moved:
        """Return the exchange of QK-clip: the largest logit of every head of the model, in float32, over all ranks."""
        model, ranks = self.recipe.model, self.layout.world_size
        if self.recipe.optim.qk_clip is None or ranks == 1:
            return Moved()
        heads = (model.num_hidden_layers + model.num_nextn_predict_layers) * model.num_attention_heads
        return self._ring(range(ranks), heads * 4) * 2

    def _over_copies(self, held: Held, size: int, mirrored: bool) -> Moved:
        dense, experts = self.layout.group("dp_cp", 0), self.layout.group("expert_dp", 0)
        if mirrored:
            dense, experts = self.layout.mirrored(dense), self.layout.mirrored(experts)
        return self._ring(dense, held.trained_dense * size) + self._ring(experts, held.trained_experts * size)

    def _ring(self, members: Sequence[int], nbytes: float) -> Moved:
        return self.fabric.ring(members, nbytes)
