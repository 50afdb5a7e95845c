"""The layer, and the parameter-free router put into a Llama.

Shape letters: B batch, N queries, M keys, C channels, H heads, K key heads, D head dim, E width of values,
R routed heads (h_r).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

from torch import Tensor, nn

from saccade.attention.moh.operator import (
    PRESETS,
    Form,
    KeepsLoss,
    Router,
    Routing,
    gated_attend,
    load_balance_loss,
    query_norm_routing,
    trained_routing,
)
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.pattern import Pattern
from saccade.ops.sharding import refuse_parts


class MoH(KeepsLoss, QKVAttention):
    """Mixture-of-head attention. `routed_heads` may be changed at any time.

    Attributes:
        aux_loss: the load-balance loss of the last call in training mode, None in eval; see `balance_loss`.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: `QKVAttention`'s.
        shared_heads: h_s, the first heads; h // 2 where None.
        routed_heads: K, active heads of the others; max(1, h // 4) where None.
        router: "trained", or "query-norm" without parameters.
        qk_norm: layer norm of each head's queries and keys (DiT's option).
        form: of `gated_attend`.
        balance: the weight of L_b in a training loop that adds it.

    Raises:
        ValueError: if the numbers of heads do not fit, or an option is unknown.
    """

    takes_parts = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        shared_heads: int | None = None,
        routed_heads: int | None = None,
        router: Router = "trained",
        qk_norm: bool = False,
        form: Form = "auto",
        balance: float = 0.01,
        **projections: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **projections)
        self.aux_weight = balance
        shared_heads = num_heads // 2 if shared_heads is None else shared_heads
        routed_heads = min(max(1, num_heads // 4), num_heads - shared_heads) if routed_heads is None else routed_heads
        if not 0 <= shared_heads <= num_heads:
            raise ValueError(f"shared_heads must be between 0 and num_heads ({num_heads}), got {shared_heads}")
        others = num_heads - shared_heads
        # without trained gates the shared heads may be all that is active
        least = 0 if not others or (router == "query-norm" and shared_heads) else 1
        if not least <= routed_heads <= others:
            raise ValueError(f"routed_heads must be between {least} and the other heads ({others}), got {routed_heads}")
        if router not in ("trained", "query-norm"):
            raise ValueError(f"router must be 'trained' or 'query-norm', got {router!r}")
        if form not in ("auto", "masked", "gathered"):
            raise ValueError(f"form must be 'auto', 'masked' or 'gathered', got {form!r}")
        if qk_norm and router == "query-norm":
            raise ValueError("router='query-norm' needs queries whose norms differ, got qk_norm=True")
        self.shared_heads, self.routed_heads, self.router, self.form = shared_heads, routed_heads, router, form
        trained = router == "trained"
        self.routed_gate = nn.Linear(dim, others, bias=False) if trained and others else None
        self.shared_gate = nn.Linear(dim, shared_heads, bias=False) if trained and shared_heads > 1 else None
        self.balance_gate = nn.Linear(dim, 2, bias=False) if trained and shared_heads and others else None
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else None
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else None

    @classmethod
    def from_preset(cls, name: str, layer: int, **arguments: Any) -> Self:
        """Layer `layer` of a published configuration; `arguments` go before what `PRESETS` says.

        Raises:
            ValueError: if there is no such configuration or layer.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        preset = PRESETS[name]
        if not 0 <= layer < len(preset.layers):
            raise ValueError(f"layer must be between 0 and {len(preset.layers) - 1}, got {layer}")
        row = preset.layers[layer]
        heads = {"shared_heads": row.shared, "routed_heads": row.routed, "head_dim": preset.head_dim}
        return cls(**{"dim": row.dim, "num_heads": row.heads, **heads, **preset.options, **arguments})

    def route(self, x_BNC: Tensor, q_BHND: Tensor | None = None) -> Routing:
        """Which heads each token of `x_BNC` uses, and how much; `q_BHND` are its queries without rotary positions."""
        if self.router == "query-norm":
            if q_BHND is None:
                q_BHND = self.split_heads(self.q_proj(x_BNC), self.num_heads)
            return query_norm_routing(
                q_BHND, shared_heads=self.shared_heads, top_k=self.routed_heads, straight_through=self.training
            )
        logits = [None if gate is None else gate(x_BNC) for gate in (self.shared_gate, self.balance_gate)]
        routed_BNR = x_BNC[..., :0] if self.routed_gate is None else self.routed_gate(x_BNC)
        return trained_routing(routed_BNR, *logits, shared_heads=self.shared_heads, top_k=self.routed_heads)

    def project(self, x_BNC: Tensor, context_BMC: Tensor | None, positions: Tensor | None) -> tuple[Any, ...]:
        """Queries, keys, values, and which heads each token of `x_BNC` uses."""
        q_BHND, k_BKMD, v_BKMD = super().project(x_BNC, context_BMC, None)
        routing = self.route(x_BNC, q_BHND)
        if self.q_norm is not None and self.k_norm is not None:
            q_BHND, k_BKMD = self.q_norm(q_BHND), self.k_norm(k_BKMD)
        if positions is not None:
            q_BHND, k_BKMD = self.rotate(q_BHND, positions), self.rotate(k_BKMD, positions)
        return q_BHND, k_BKMD, v_BKMD, routing

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern, routing: Routing) -> Tensor:
        self.aux_loss = None
        if self.training and self.shared_heads < self.num_heads:
            refuse_parts("the balance of heads, which is of all tokens,")
            real_BN = pattern.real_queries(q_BHND.shape[0], q_BHND.shape[2])
            self.aux_loss = load_balance_loss(routing.chances, routing.active, real_BN)
        options: dict[str, Any] = {"shared_heads": self.shared_heads, "form": self.form, "offset": pattern.offset}
        return gated_attend(q_BHND, k_BKMD, v_BKME, routing.gates, mask=pattern, causal=self.causal, **options)

    def start_as_softmax(self) -> None:
        """Gates of 1 where every routed head is active; see the paper's page."""
        for gate in (self.shared_gate, self.balance_gate):
            if gate is not None:
                nn.init.zeros_(gate.weight)
        if self.routed_gate is not None and self.routed_heads == self.num_heads - self.shared_heads:
            nn.init.zeros_(self.routed_gate.weight)

    def extra_repr(self) -> str:
        own = f"shared_heads={self.shared_heads}, routed_heads={self.routed_heads}, router={self.router!r}"
        return f"{super().extra_repr()}, {own}"


class QueryNormGate(KeepsLoss, nn.Module):
    """The parameter-free router inside somebody else's attention layer: from q_proj's output to o_proj's input.

    Args:
        num_heads: of the layer.
        shared_heads, routed_heads: h_s and K.
    """

    def __init__(self, num_heads: int, shared_heads: int, routed_heads: int) -> None:
        super().__init__()
        self.num_heads, self.shared_heads, self.routed_heads = num_heads, shared_heads, routed_heads
        self._gates: Tensor | None = None

    def route(self, module: nn.Module, inputs: Any, queries: Tensor) -> None:
        """Hook after q_proj: the gates of the tokens that go by."""
        q_BHND = queries.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        routing = query_norm_routing(
            q_BHND, shared_heads=self.shared_heads, top_k=self.routed_heads, straight_through=self.training
        )
        self._gates = routing.gates.to(queries.dtype)
        self.aux_loss = load_balance_loss(routing.chances, routing.active) if self.training else None

    def gate(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Hook before o_proj: the heads' outputs times their gates."""
        assert self._gates is not None
        gates_BNH, self._gates = self._gates, None
        return ((inputs[0].unflatten(-1, (self.num_heads, -1)) * gates_BNH[..., None]).flatten(-2), *inputs[1:])


def convert_llama(model: nn.Module, *, shared: float = 0.5, routed: float = 0.25) -> nn.Module:
    """Turn a transformers model of Llama's kind (Llama, Mistral, Qwen2 ...) into MoH, in place, without new weights.

    Gates go on the heads' outputs before `o_proj`, by hooks on `q_proj` and `o_proj`: whatever attention the model
    uses, caches included, stays (all heads are computed; `MoH.from_softmax` gathers). Train on, with
    `balance_loss(model)`, to adapt the model to its fewer heads.

    Args:
        model: changed in place.
        shared, routed: shares of the heads that are shared, and routed and active.

    Returns:
        the model.

    Raises:
        ValueError: if it has no such layers, they normalise their queries, or it was converted before.
    """
    if min(shared, routed) < 0 or not 0 < shared + routed <= 1:
        raise ValueError(f"shared and routed must be shares of the heads, together at most 1, got {shared}, {routed}")
    layers = list(_llama_layers(model))
    for layer in layers:
        num_heads = layer.q_proj.out_features // layer.head_dim
        gate = QueryNormGate(num_heads, int(shared * num_heads), int(routed * num_heads)).train(layer.training)
        layer.moh_gate = gate
        layer.q_proj.register_forward_hook(gate.route)
        layer.o_proj.register_forward_pre_hook(gate.gate)
    return model


def _llama_layers(model: nn.Module) -> Iterator[Any]:
    found = False
    for name, module in model.named_modules():
        if all(isinstance(getattr(module, p, None), nn.Linear) for p in ("q_proj", "k_proj", "v_proj", "o_proj")):
            if hasattr(module, "q_norm") or not isinstance(getattr(module, "head_dim", None), int):
                raise ValueError(f"{name} ({type(module).__name__}) normalises its queries or tells no head_dim")
            if hasattr(module, "moh_gate"):
                raise ValueError(f"{name} is MoH already")
            found = True
            yield module
    if not found:
        raise ValueError(f"{type(model).__name__} has no layers with q_proj, k_proj, v_proj and o_proj")
