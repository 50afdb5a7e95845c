"""The two routers, attention whose heads are gated in two forms, the balance loss, and the published configurations.

Shape letters: B batch, N queries, M keys, H heads, K key heads, D head dim, E width of values, R routed heads (h_r),
L queries in a list, n stretches of S tokens, T tokens with those that fill up the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.heads import repeat_heads
from saccade.ops.merge import merge
from saccade.ops.pattern import GivenMask, Pattern
from saccade.ops.sharding import in_force

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
        shared_heads: h_s.
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
        q_BHND: queries of all heads, the shared ones first.
        shared_heads: h_s.
        top_k: K, active routed heads.
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
    """L_b = h_r^2 mean_i(P_i f_i): K where p is uniform, more where it is not.

    Args:
        chances_BNR, active_BNR: p and m of a `Routing`.
        real_BN: bool, True = counts; all tokens where None.
    """
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
    mask: GivenMask = None,
    causal: bool = False,
    offset: int = 0,
    scale: float | None = None,
    form: Form = "auto",
) -> Tensor:
    """Attention whose head outputs are multiplied by gates, (B, H, N, E); rows with gate 0 need not be computed.

    Args:
        q_BHND, k_BKMD, v_BKME: K divides H.
        gates_BNH: of each query token.
        shared_heads: the first heads, whose gates are never 0.
        mask: as `attend` takes it, or bool (B, M), True = real token.
        causal: query i sees the keys up to offset + i.
        offset: the key at which query 0 stands.
        scale: D ** -0.5 where None.
        form: "masked" computes every head; "gathered" computes a routed head for the queries with a gate other than 0
            alone; "auto" takes the one that was measured to be faster.

    Raises:
        ValueError: if the form is unknown, or "gathered" is asked for under a mask other than padding, or causal with M
            other than offset + N.
    """
    (B, H, N, _), M = q_BHND.shape, k_BKMD.shape[2]
    pattern = Pattern.of(mask, B, N, M, heads=H, causal=causal, offset=offset)
    plain = not {*pattern.says} - ({"causal", "padding"} if causal else {"padding"})
    plain = plain and (not causal or offset + N == M)
    if form == "gathered" and not plain:
        raise ValueError(
            f"the gathered form takes padding alone, over {offset + N} keys where causal, got {pattern.mask}"
        )
    if form not in ("auto", "masked", "gathered"):
        raise ValueError(f"form must be 'auto', 'masked' or 'gathered', got {form!r}")
    gates_BHN = gates_BNH.transpose(1, 2).to(q_BHND.dtype)
    active_BRN = gates_BHN[:, shared_heads:] != 0
    if in_force() is not None or (form == "auto" and not (plain and _pays(active_BRN, H, causal))):
        form = "masked"
    if form == "masked" or 0 in (*q_BHND.shape, M) or shared_heads == H:
        out = attend(q_BHND, k_BKMD, v_BKME, mask=pattern.mask, scale=scale)
        return out * gates_BHN[..., None]
    real_BM = pattern.real_keys(B)
    parts = []
    if shared_heads:
        k, v = (_key_heads(x, H, 0, shared_heads) for x in (k_BKMD, v_BKME))
        parts.append(attend(q_BHND[:, :shared_heads], k, v, mask=pattern.mask, scale=scale))
    k, v = (_key_heads(x, H, shared_heads, H) for x in (k_BKMD, v_BKME))
    q = q_BHND[:, shared_heads:]
    if causal:
        parts.append(_gathered_causal(q, k, v, active_BRN, real_BM, offset, scale))
    else:
        order_BRL = _listed(active_BRN)
        out = attend(_take(q, order_BRL), k, v, mask=pattern.mask, scale=scale)
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


class KeepsLoss:
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
    losses = [m.aux_loss for m in model.modules() if isinstance(m, KeepsLoss) and m.aux_loss is not None]
    if not losses:
        raise ValueError("no MoH layer of this model has made a training call: model.train(), then call it")
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class LayerHeads:
    """A layer of a published model.

    Attributes:
        dim, heads: C and h.
        shared: h_s.
        routed: K, how many of the others are active.
    """

    dim: int
    heads: int
    shared: int
    routed: int


@dataclass(frozen=True)
class Preset:
    """A published configuration.

    Attributes:
        head_dim: D, of all layers.
        layers: every layer's heads, from the first on.
        options: what else `MoH` is given.
    """

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
