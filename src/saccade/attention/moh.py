"""MoH: attention heads as experts. Each token uses the shared heads and its own few of the others.

Jin, Zhu, Yuan, Yan, "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842.

    MoH(x_t) = sum_i g_i(x_t) H_i Wo_i                          H_i: head i's output for query token t

The first h_s heads are shared, of the other h_r each token takes the K best. Trained router:

    p = softmax(W_r x_t),   m_i = 1 for the K largest p_i
    r_i = K p_i m_i / max(sum_j p_j m_j, eps),   s = h_s softmax(W_s x_t),   [a_1, a_2] = 2 softmax(W_h x_t)
    g = (a_1 s, a_2 r)                                          g = r where h_s = 0,   g = s where h_s = h

Parameter-free router (LLaMA3-8B), from the queries before rotary positions:

    l_i = |q_i|,   p = softmax(l / std(l)),   g_i = 1 for shared heads and the K largest p_i, else 0

Load balance, per layer: L_b = h_r^2 mean_i(P_i f_i), P_i and f_i the means of p_i and m_i over tokens; the total loss
is task + 0.01 * mean over layers of L_b (`balance_loss`).

| here           | paper       | meaning                                     | default               |
|----------------|-------------|---------------------------------------------|-----------------------|
| `shared_heads` | h_s         | heads that every token uses                 | h // 2 (LLaMA3's)     |
| `routed_heads` | K           | heads that a token takes of the h_r others  | max(1, h // 4)        |
| `router`       |             | "trained" or "query-norm"                   | "trained"             |

The factors K, h_s and 2 are the authors' code's (the mean gate is 1); the paper's formula has none. s = 1 where h_s = 1
(their ViT code). Choices left open: in training the query-norm gate passes m_i dp_i straight through; P and f leave
padded tokens out; `from_softmax` sets W_s and W_h to zero, and W_r too where every routed head is active, so that all
gates start at 1 and the layer is the softmax layer (with fewer active heads W_r stays random: equal logits would
send all tokens to the same heads).

Two forms compute the same: "masked" (all heads, then gates) and "gathered" (a routed head gets the queries of the
tokens that chose it, nothing else). Decoding keeps all heads' keys and values: later tokens may choose any head.

Shape letters: B batch, N queries, M keys, C channels, H heads, K key heads, D head dim, E width of values,
R routed heads (h_r), L queries in a list, S tokens of a stretch, T tokens with those that fill up the last one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Claim, ClaimResult, register
from saccade.layers.cache import KVCache
from saccade.layers.qkv_attention import QKVAttention, as_mask
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.heads import repeat_heads
from saccade.ops.masks import Mask
from saccade.ops.merge import merge
from saccade.ops.rope import rotate

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

Router = Literal["trained", "query-norm"]
Form = Literal["auto", "masked", "gathered"]

#: least number of queries that the gathered causal form does without lists
_LEAF = 128
#: fewest queries, and largest share of rows left, at which gathering is faster (measured); causality costs merges
_PAYS = {False: (512, 0.9), True: (2048, 0.65)}


class Routing(NamedTuple):
    """Which heads a token uses: `gates` (B, N, H); `chances` p and `active` m of the routed heads, (B, N, R)."""

    gates: Tensor
    chances: Tensor
    active: Tensor


def trained_routing(
    routed_BNR: Tensor, shared_BNH: Tensor | None, balance_BN2: Tensor | None, *, shared_heads: int, top_k: int
) -> Routing:
    """The gates of the trained router from its logits W_r x, W_s x and W_h x.

    Args:
        routed_BNR: R = 0 where every head is shared.
        shared_BNH: (B, N, shared_heads); None where there are fewer than two shared heads: s = 1.
        balance_BN2: None where there are no shared or no routed heads.
        top_k: K, active routed heads.
    """
    chances, active = _choose(routed_BNR, top_k)
    chosen = chances * active
    routed = top_k * chosen / chosen.sum(-1, keepdim=True).clamp(min=torch.finfo(routed_BNR.dtype).eps)
    if not shared_heads:
        return Routing(routed, chances, active)
    shared = torch.ones_like(chances[..., :1])
    if shared_BNH is not None:
        shared = shared_heads * _softmax(shared_BNH)
    elif not routed_BNR.shape[-1]:
        shared = routed_BNR.new_ones(*routed_BNR.shape[:2], shared_heads)
    if balance_BN2 is not None:
        first, second = (2 * _softmax(balance_BN2)).split(1, -1)
        shared, routed = first * shared, second * routed
    return Routing(torch.cat([shared, routed], -1), chances, active)


def query_norm_routing(q_BHND: Tensor, *, shared_heads: int, top_k: int, straight_through: bool = False) -> Routing:
    """The gates of the parameter-free router: 0 or 1, from the norms of the queries before rotary positions.

    Args:
        straight_through: give the chosen heads' gates the gradient of their p.
    """
    norms_BNR = torch.linalg.vector_norm(_at_least_float(q_BHND[:, shared_heads:]), dim=-1).transpose(1, 2)
    # unbiased; equal norms (and a single routed head) have no spread, and a root has no slope at 0
    R = norms_BNR.shape[-1]
    variance = (norms_BNR - norms_BNR.mean(-1, keepdim=True)).square().sum(-1, keepdim=True) / max(R - 1, 1)
    chances, active = _choose(norms_BNR / variance.clamp(min=1e-20).sqrt(), top_k)
    routed = active.to(chances.dtype)
    if straight_through:
        routed = routed * (chances - chances.detach() + 1)
    shared = routed.new_ones(*routed.shape[:2], shared_heads)
    return Routing(torch.cat([shared, routed], -1), chances, active)


def load_balance_loss(chances_BNR: Tensor, active_BNR: Tensor, real_BN: Tensor | None = None) -> Tensor:
    """L_b = h_r^2 mean_i(P_i f_i), over the tokens that `real_BN` marks: K where p is uniform, more where it is not."""
    active_BNR = active_BNR.to(chances_BNR.dtype)
    if real_BN is None:
        real_BN = torch.ones_like(chances_BNR[..., 0], dtype=torch.bool)
    weight = real_BN[..., None].to(chances_BNR.dtype)
    count = weight.sum().clamp(min=1)
    mean_p, mean_m = ((x * weight).sum((0, 1)) / count for x in (chances_BNR, active_BNR))
    return chances_BNR.shape[-1] * (mean_p * mean_m).sum()


def _choose(logits_BNR: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    best = logits_BNR.detach().topk(top_k, -1).indices
    return _softmax(logits_BNR), torch.zeros_like(logits_BNR, dtype=torch.bool).scatter(-1, best, True)


def _softmax(logits: Tensor) -> Tensor:
    return _at_least_float(logits).softmax(-1)


def _at_least_float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gated_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    gates_BNH: Tensor,
    *,
    shared_heads: int = 0,
    mask: Tensor | Mask | None = None,
    causal: bool = False,
    offset: int = 0,
    scale: float | None = None,
    form: Form = "auto",
) -> Tensor:
    """Attention whose head outputs are multiplied by gates, (B, H, N, E); rows with gate 0 need not be computed.

    Args:
        gates_BNH: of each query token.
        shared_heads: the first heads, whose gates are never 0.
        mask: as `attend` takes it, or bool (B, M), True = real token.
        causal: query i sees the keys up to offset + i.
        form: "masked" computes every head; "gathered" computes a routed head for the queries with a gate other than 0
            alone; "auto" takes the one that was measured to be faster.

    Raises:
        ValueError: if "gathered" is asked for under a mask other than padding, or causal with M other than offset + N.
    """
    mask = as_mask(mask, k_BKMD)
    H, N, M = q_BHND.shape[1], q_BHND.shape[2], k_BKMD.shape[2]
    plain = (mask is None or type(mask) is masks.Padding) and (not causal or offset + N == M)
    if form == "gathered" and not plain:
        raise ValueError(f"the gathered form takes padding alone, over {offset + N} keys where causal, got {mask}")
    if form not in ("auto", "masked", "gathered"):
        raise ValueError(f"form must be 'auto', 'masked' or 'gathered', got {form!r}")
    gates_BHN = gates_BNH.transpose(1, 2).to(q_BHND.dtype)
    active_BRN = gates_BHN[:, shared_heads:] != 0
    if form == "auto" and not (plain and _pays(active_BRN, H, causal)):
        form = "masked"
    if form == "masked" or 0 in (*q_BHND.shape, M) or shared_heads == H:
        out = attend(q_BHND, k_BKMD, v_BKME, mask=masks.causal_where_needed(mask, causal, offset, N), scale=scale)
        return out * gates_BHN[..., None]
    real_BM = mask.valid_BM.expand(q_BHND.shape[0], M) if type(mask) is masks.Padding else None
    parts = []
    if shared_heads:
        k, v = (_key_heads(x, H, 0, shared_heads) for x in (k_BKMD, v_BKME))
        every = masks.causal_where_needed(mask, causal, offset, N)
        parts.append(attend(q_BHND[:, :shared_heads], k, v, mask=every, scale=scale))
    k, v = (_key_heads(x, H, shared_heads, H) for x in (k_BKMD, v_BKME))
    q = q_BHND[:, shared_heads:]
    if causal:
        parts.append(_gathered_causal(q, k, v, active_BRN, real_BM, offset, scale))
    else:
        order_BRL = _listed(active_BRN)
        out = attend(_take(q, order_BRL), k, v, mask=mask, scale=scale)
        parts.append(_put(out, order_BRL, out.new_zeros(*q.shape[:3], out.shape[3])))
    return torch.cat(parts, 1) * gates_BHN[..., None]


def _pays(active_BRN: Tensor, H: int, causal: bool) -> bool:
    """Whether gathering is faster: long inputs with enough rows to leave out, outside torch.compile (the lengths of the
    lists are data), and on CUDA without causality (its fused kernels give no LSE to merge by)."""
    R, N = active_BRN.shape[1:]
    fewest, largest = _PAYS[causal]
    if torch.compiler.is_compiling() or fewest > N or (causal and active_BRN.device.type == "cuda"):
        return False
    longest = int(active_BRN.sum(-1).max()) if active_BRN.numel() else 0
    return (H - R + R * longest / N) / H <= largest


def _gathered_causal(
    q_BRND: Tensor,
    k_BRMD: Tensor,
    v_BRME: Tensor,
    active_BRN: Tensor,
    real_BM: Tensor | None,
    offset: int,
    scale: float | None,
) -> Tensor:
    """Listed queries to the keys before them, by halves: of any stretch, the second half sees all of the first.

    Stretches of one size are one call without a mask; the smallest ones are done for all queries, causally.
    """
    B, R, N = q_BRND.shape[:3]
    k_BRMD, v_BRME = repeat_heads(k_BRMD, R), repeat_heads(v_BRME, R)
    levels = max(0, (N // _LEAF).bit_length() - 1)
    S = -(-N // 2**levels)
    pad = (S << levels) - N
    q, k, v = q_BRND, k_BRMD[:, :, offset:], v_BRME[:, :, offset:]
    active, real = active_BRN, None if real_BM is None else real_BM[:, offset:]
    if pad:
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        active, real = F.pad(active, (0, pad)), None if real is None else F.pad(real, (0, pad))

    def stretches(x_BRT: Tensor, size: int) -> Tensor:  # n stretches become rows of the batch
        return x_BRT.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)

    def together(x_BRS: Tensor) -> Tensor:
        return x_BRS.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)

    within = masks.causal()
    if real is not None:
        within = within & masks.padding(real.reshape(-1, S))
    out, lse = attend(*(stretches(x, S) for x in (q, k, v)), mask=within, scale=scale, return_lse=True)
    out, lse = together(out), together(lse)

    def add(part: Tensor, part_lse: Tensor, order_BRL: Tensor) -> None:
        nonlocal out, lse
        part, part_lse = merge(_take(out, order_BRL), lse.gather(2, order_BRL), part, part_lse)
        out, lse = _put(part, order_BRL, out), lse.scatter(2, order_BRL, part_lse)

    for level in range(levels):
        n, half = 2**level, S << (levels - level - 1)
        order_BRnL = _listed(active.unflatten(2, (n, 2 * half))[..., half:])
        order_BRnL = order_BRnL + torch.arange(half, 2 * half * n, 2 * half, device=q.device)[:, None]
        L = order_BRnL.shape[-1]
        order_BRL = order_BRnL.flatten(2)
        first = (stretches(x, 2 * half)[:, :, :half] for x in (k, v))
        mask = None if real is None else masks.padding(real.unflatten(1, (n, 2, half))[:, :, 0].flatten(0, 1))
        part, part_lse = attend(stretches(_take(q, order_BRL), L), *first, mask=mask, scale=scale, return_lse=True)
        add(together(part), together(part_lse), order_BRL)
    if offset:
        order_BRL, before = _listed(active), (x[:, :, :offset] for x in (k_BRMD, v_BRME))
        mask = None if real_BM is None else masks.padding(real_BM[:, :offset])
        add(*attend(_take(q, order_BRL), *before, mask=mask, scale=scale, return_lse=True), order_BRL)
    return out[:, :, :N]


def _listed(active_BRN: Tensor) -> Tensor:
    """Positions of the active tokens in their order, filled up to one length by others, (B, R, L)."""
    order_BRN = active_BRN.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return order_BRN[..., : int(active_BRN.sum(-1).max())]


def _take(x_BRND: Tensor, order_BRL: Tensor) -> Tensor:
    return x_BRND.gather(2, order_BRL[..., None].expand(*order_BRL.shape, x_BRND.shape[3]))


def _put(x_BRLE: Tensor, order_BRL: Tensor, out_BRNE: Tensor) -> Tensor:
    return out_BRNE.scatter(2, order_BRL[..., None].expand_as(x_BRLE), x_BRLE)


def _key_heads(x_BKMD: Tensor, H: int, first: int, last: int) -> Tensor:
    """The key heads of query heads `first` to `last`; repeated only where a group is cut."""
    group = H // x_BKMD.shape[1]
    if first % group == 0 and last % group == 0:
        return x_BKMD[:, first // group : last // group]
    return x_BKMD[:, torch.arange(first, last, device=x_BKMD.device) // group]


class _KeepsLoss:
    """`aux_loss`: L_b of the last training call, with its graph; None after a call in eval. Copies leave it behind."""

    aux_loss: Tensor | None = None
    aux_weight: float = 0.01

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "aux_loss"}


def balance_loss(model: nn.Module) -> Tensor:
    """The mean of L_b over the MoH layers of a model, of its last training call; add 0.01 of it to the task's loss
    (`saccade.compare` and the lab do, by `aux_loss` and `aux_weight`).

    Raises:
        ValueError: if no layer has one.
    """
    losses = [m.aux_loss for m in model.modules() if isinstance(m, _KeepsLoss) and m.aux_loss is not None]
    if not losses:
        raise ValueError("no MoH layer of this model has made a training call: model.train(), then call it")
    return torch.stack(losses).mean()


class MoH(_KeepsLoss, QKVAttention):
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
        balance: beta, the weight of L_b in training.

    Raises:
        ValueError: if the numbers of heads do not fit, or an option is unknown.
    """

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
                q_BHND = self._heads(self.q_proj(x_BNC), self.num_heads)
            return query_norm_routing(
                q_BHND, shared_heads=self.shared_heads, top_k=self.routed_heads, straight_through=self.training
            )
        logits = [None if gate is None else gate(x_BNC) for gate in (self.shared_gate, self.balance_gate)]
        routed_BNR = x_BNC[..., :0] if self.routed_gate is None else self.routed_gate(x_BNC)
        return trained_routing(routed_BNR, *logits, shared_heads=self.shared_heads, top_k=self.routed_heads)

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: Tensor | Mask | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """`QKVAttention.forward`; the gates are those of the tokens of `x_BNC`."""
        self._check(x_BNC, context_BMC, cache)
        offset = 0 if cache is None else cache.length
        q_BHND, k_BKMD, routing = self._project(x_BNC, context_BMC, offset)
        v_BKMD = self._heads(self.v_proj(x_BNC if context_BMC is None else context_BMC), self.num_kv_heads)
        if cache is not None:
            k_BKMD, v_BKMD = cache.append(k_BKMD, v_BKMD)
        pairs = as_mask(mask, k_BKMD)
        self.aux_loss = None
        if self.training and self.shared_heads < self.num_heads:
            padded = type(pairs) is masks.Padding and context_BMC is None and cache is None
            real_BN = pairs.valid_BM.expand(x_BNC.shape[0], -1) if padded else None  # type: ignore[union-attr]
            self.aux_loss = load_balance_loss(routing.chances, routing.active, real_BN)
        out = self._gated(q_BHND, k_BKMD, v_BKMD, routing, pairs, self.causal and context_BMC is None, offset)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def mix(
        self,
        x_BNC: Tensor,
        values_BHME: Tensor,
        *,
        context: Tensor | None = None,
        mask: Tensor | Mask | None = None,
    ) -> Tensor:
        """The heads' weights, gates included, applied to given values (B, H, M, E)."""
        q_BHND, k_BKMD, routing = self._project(x_BNC, context, 0)
        k_BHMD = repeat_heads(k_BKMD, self.num_heads)
        causal = self.causal and context is None
        return self._gated(q_BHND, k_BHMD, values_BHME, routing, as_mask(mask, k_BHMD), causal, 0)

    def start_as_softmax(self) -> None:
        """Gates of 1 where every routed head is active; see the module's docstring."""
        for gate in (self.shared_gate, self.balance_gate):
            if gate is not None:
                nn.init.zeros_(gate.weight)
        if self.routed_gate is not None and self.routed_heads == self.num_heads - self.shared_heads:
            nn.init.zeros_(self.routed_gate.weight)

    def extra_repr(self) -> str:
        own = f"shared_heads={self.shared_heads}, routed_heads={self.routed_heads}, router={self.router!r}"
        return f"{super().extra_repr()}, {own}"

    def _project(self, x_BNC: Tensor, context_BMC: Tensor | None, start: int) -> tuple[Tensor, Tensor, Routing]:
        q_BHND = self._heads(self.q_proj(x_BNC), self.num_heads)
        k_BKMD = self._heads(self.k_proj(x_BNC if context_BMC is None else context_BMC), self.num_kv_heads)
        routing = self.route(x_BNC, q_BHND)
        if self.q_norm is not None and self.k_norm is not None:
            q_BHND, k_BKMD = self.q_norm(q_BHND), self.k_norm(k_BKMD)
        if self.rope and context_BMC is None:
            position_N = torch.arange(start, start + x_BNC.shape[1], device=x_BNC.device)
            q_BHND, k_BKMD = (rotate(x, position_N, base=self.rope_base) for x in (q_BHND, k_BKMD))
        return q_BHND, k_BKMD, routing

    def _gated(
        self, q: Tensor, k: Tensor, v: Tensor, routing: Routing, mask: Mask | None, causal: bool, offset: int
    ) -> Tensor:
        options: dict[str, Any] = {"shared_heads": self.shared_heads, "form": self.form}
        return gated_attend(q, k, v, routing.gates, mask=mask, causal=causal, offset=offset, **options)


class QueryNormGate(_KeepsLoss, nn.Module):
    """The parameter-free router inside somebody else's attention layer: from q_proj's output to o_proj's input."""

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


@dataclass(frozen=True)
class LayerHeads:
    """Width, heads, shared heads and active routed heads of a layer."""

    dim: int
    heads: int
    shared: int
    routed: int


@dataclass(frozen=True)
class Preset:
    """A published configuration: every layer's heads, and what else its attention has."""

    head_dim: int
    layers: tuple[LayerHeads, ...]
    options: dict[str, Any]

    @property
    def active_share(self) -> float:
        """Active heads over heads, over all layers: the number in the name."""
        return sum(row.shared + row.routed for row in self.layers) / sum(row.heads for row in self.layers)


def _preset(head_dim: int, *runs: tuple[int, int, int, int, int], **options: Any) -> Preset:
    """From runs of equal layers: (how many, dim, heads, shared, routed)."""
    return Preset(head_dim, tuple(LayerHeads(*run[1:]) for run in runs for _ in range(run[0])), options)


_DIT: dict[str, Any] = {"rope": False, "qkv_bias": True, "proj_bias": True}
_LLAMA: dict[str, Any] = {"router": "query-norm", "causal": True, "num_kv_heads": 8, "rope_base": 500000.0}

#: the published models (MoH-ViT's heads do TransNeXt's attention in its stages 1 to 3; here they are softmax heads)
PRESETS: dict[str, Preset] = {
    "vit-b-75": _preset(24, (5, 96, 4, 4, 0), (5, 192, 8, 8, 0), (23, 384, 16, 4, 8), (5, 768, 32, 5, 16), **_DIT),
    "vit-b-50": _preset(24, (5, 96, 4, 2, 2), (5, 192, 8, 2, 4), (23, 384, 16, 2, 6), (5, 768, 32, 4, 8), **_DIT),
    "vit-s-80": _preset(24, (5, 72, 3, 3, 0), (5, 144, 6, 6, 0), (22, 288, 12, 3, 6), (5, 576, 24, 8, 12), **_DIT),
    "vit-s-75": _preset(24, (5, 72, 3, 3, 0), (5, 144, 6, 6, 0), (22, 288, 12, 3, 6), (5, 576, 24, 4, 12), **_DIT),
    "dit-xl/2-90": _preset(72, (9, 1152, 8, 8, 0), (10, 1152, 16, 16, 0), (9, 1152, 24, 16, 3), **_DIT),
    "dit-xl/2-75": _preset(72, (9, 1152, 8, 8, 0), (10, 1152, 16, 10, 2), (9, 1152, 24, 14, 2), **_DIT),
    "dit-l/2-90": _preset(64, (8, 1024, 8, 8, 0), (8, 1024, 16, 16, 0), (8, 1024, 24, 16, 3), **_DIT),
    "dit-l/2-75": _preset(64, (8, 1024, 8, 8, 0), (8, 1024, 16, 8, 4), (8, 1024, 24, 12, 4), **_DIT),
    "dit-b/2-90": _preset(64, (5, 768, 12, 6, 4), (5, 768, 12, 7, 4), (2, 768, 12, 12, 0), **_DIT),
    "dit-b/2-75": _preset(64, (2, 768, 12, 4, 2), (8, 768, 12, 6, 3), (2, 768, 12, 12, 0), **_DIT),
    "dit-s/2-90": _preset(64, (8, 384, 6, 3, 2), (4, 384, 6, 6, 0), **_DIT),
    "dit-s/2-75": _preset(64, (2, 384, 6, 2, 1), (4, 384, 6, 3, 1), (4, 384, 6, 3, 2), (2, 384, 6, 6, 0), **_DIT),
    "llama3-8b": _preset(128, (32, 4096, 32, 16, 8), **_LLAMA),
}


def _build_attention(args: dict[str, Any]) -> MoH:
    """MoHAttention(dim, num_heads, qkv_bias, qk_norm, shared_head, routed_head, head_dim) of the DiT code."""
    return MoH(
        int(args["dim"]),
        int(args.get("num_heads", 8)),
        shared_heads=int(args["shared_head"]),
        routed_heads=int(args["routed_head"]),
        head_dim=args.get("head_dim"),
        qkv_bias=bool(args.get("qkv_bias", False)),
        qk_norm=bool(args.get("qk_norm", False)),
        proj_bias=True,
        rope=False,
    )


def _convert_attention(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"wg": "routed_gate", "wg_1": "shared_gate", "wg_0": "balance_gate", "proj": "out_proj"}
    ours = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module == "qkv":
            for part, rows in zip("qkv", tensor.chunk(3)):
                ours[f"{part}_proj.{kind}"] = rows
        else:
            ours[f"{names.get(module, module)}.{kind}"] = tensor
    return ours


def _run_attention(module: MoH, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    outputs = {"y": module(inputs["x"])}
    if module.routed_heads:
        routing = module.route(inputs["x"])
        outputs["aux_loss"] = load_balance_loss(routing.chances, routing.active).view(1)
    return outputs


def _build_llama(args: dict[str, Any]) -> MoH:
    heads = int(args["num_attention_heads"])
    return MoH(
        int(args["hidden_size"]),
        heads,
        True,
        shared_heads=int(0.5 * heads),
        routed_heads=int(0.25 * heads),
        router="query-norm",
        num_kv_heads=int(args.get("num_key_value_heads") or heads),
        head_dim=args.get("head_dim"),
        rope_base=float(args.get("rope_theta", 10000.0)),
        qkv_bias=bool(args.get("attention_bias", False)),
        proj_bias=bool(args.get("attention_bias", False)),
    )


class _Digits(nn.Module):
    """A small vision transformer: 16 patches of 2 x 2 pixels, two layers."""

    def __init__(self, dim: int, mixers: list[nn.Module]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, 2, 2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, dim))
        self.mixers = nn.ModuleList(mixers)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * len(mixers) + 1))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in mixers
        )
        self.head = nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        x_BNC = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps)):
            x_BNC = x_BNC + mixer(self.norms[2 * i](x_BNC))
            x_BNC = x_BNC + mlp(self.norms[2 * i + 1](x_BNC))
        return self.head(self.norms[-1](x_BNC).mean(1))


#: every gate is 1: plain multi-head attention
_PLAIN: dict[str, Any] = {"shared_heads": 8, "routed_heads": 0, "router": "query-norm"}


def _digits(lab: Lab, heads: dict[str, Any], balance: float, name: str) -> tuple[float, Tensor]:
    """Test accuracy, and how often each routed head of each layer is active (layers, R) per class (10 first)."""
    data = lab.data.digits()
    dim = 64
    with lab.seeded():
        model = _Digits(dim, [MoH(dim, 8, rope=False, balance=balance, **heads) for _ in range(2)])
    generator = lab.generator()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            chosen = torch.randint(len(data.train_labels), (lab.size(64, 4),), generator=generator)
            yield data.train_images[chosen], data.train_labels[chosen]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    lab.train(model, batches(), loss, 800, lr=2e-3, description=name)
    model.eval()
    seen: list[Tensor] = []

    def look(mixer: Any, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        seen.append(mixer.route(inputs[0]).active.float().mean(1))

    hooks = [mixer.register_forward_hook(look) for mixer in model.mixers]
    with torch.no_grad():
        right = model(data.test_images).argmax(-1) == data.test_labels
    for hook in hooks:
        hook.remove()
    used_BLR = torch.stack(seen, 1)
    by_class = torch.stack([used_BLR[data.test_labels == c].mean(0) for c in range(10)])
    return right.float().mean().item(), by_class


def _claim(lab: Lab) -> ClaimResult:
    """Digits with three quarters of the heads; how even the routing is with and without L_b; time at 4k tokens."""
    every, _ = _digits(lab, _PLAIN, 0.0, "all heads")
    moh, used = _digits(lab, {"shared_heads": 4, "routed_heads": 2}, 0.01, "MoH")
    free, used_free = _digits(lab, {"shared_heads": 4, "routed_heads": 2}, 0.0, "MoH without L_b")
    with lab.seeded(), torch.no_grad():
        length = lab.size(4096, 64)
        x = torch.randn(1, length, 512)
        plain, half = MoH(512, 8, **_PLAIN).eval(), MoH(512, 8, shared_heads=2, routed_heads=2).eval()
        plain_seconds, half_seconds = (lab.seconds(partial(layer, x), repeats=3) for layer in (plain, half))
    measured = {
        "all_heads_accuracy": every,
        "moh_6_of_8_heads_accuracy": moh,
        "moh_without_balance_accuracy": free,
        "least_used_head_share": used.mean(0).min().item(),
        "least_used_head_share_without_balance": used_free.mean(0).min().item(),
        "largest_difference_between_classes": (used.amax(0) - used.amin(0)).max().item(),
        "half_of_heads_speedup_ratio_4k": plain_seconds / half_seconds,
    }
    return ClaimResult(measured, holds=moh > every - 0.02 and measured["least_used_head_share"] > 0.1)


register(
    "moh",
    kind="sequence",
    summary="Attention heads as experts: every token uses the shared heads and its own top-k of the others.",
    supports=("causal", "bidirectional", "cross", "padding", "decoding", "grouped-heads", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="dense",
    complexity="time O(a N M D + N C h) with a active heads of h, cache O(M D)",
    invariants=(
        "zero routers with every routed head active: every gate is 1, plain multi-head attention exactly",
        "the gates of a token sum to a_1 h_s + a_2 K with a_1 + a_2 = 2; exactly h - h_s - K are zero",
        "only the chosen heads receive gradient from a token",
        "the load-balance loss is K for a uniform router, larger for a collapsed one",
        "query-norm router: a factor on all queries of a token leaves its heads",
        "computing the active heads alone equals computing all and multiplying, forward and backward",
    ),
    build=MoH,
    example={"dim": 16, "num_heads": 4, "num_kv_heads": 2, "shared_heads": 1, "routed_heads": 2},
    ports=(
        *(
            AuthorsPort(f"moh_attention{i}", build=_build_attention, convert=_convert_attention, run=_run_attention)
            for i in range(3)
        ),
        AuthorsPort(
            "moh_llama_attention",
            build=_build_llama,
            convert=lambda state: {name.replace("o_proj", "out_proj"): tensor for name, tensor in state.items()},
            run=lambda module, inputs, args: {"y": module(inputs["x"])},
        ),
    ),
    claim=Claim(
        paper="MoH equals or beats multi-head attention in ViT, DiT and LLMs with 50 to 90 % of the heads",
        expected="a tiny vision transformer on 8 x 8 digits with 6 of 8 heads per token: accuracy at most 2 points "
        "under all 8 heads; with L_b no head is left unused (share of tokens above 0.1, where 0.5 is even)",
        run=_claim,
    ),
)
