"""Comateformer: weights in (-1, 1) that add, subtract or leave out tokens, instead of a distribution over them.

Li, Liang, Zhang, "Comateformer: Combined Attention Transformer for Semantic Sentence Matching", arXiv 2412.07220.

Similarity says with which sign and how much a token counts, dissimilarity gates it. In a head of width D, s = D^-1/2,

    M_ij = tanh(alpha s q_i . k_j) 2 sigmoid(-beta s |q_i - k_j|_1),     o_i = sum_j M_ij v_j            (doubled gate)
    M_ij = tanh(alpha s q_i . k_j) sigmoid(N_ij - mean N),     N_ij = -beta s |q_i - k_j|_1             (centred gate)

without softmax or any other sum to one: the host's LayerNorm absorbs the scale. Between two sentences A and B, with one
map F_E and one map F_N for both, M_ij = tanh(alpha F_E a_i . F_E b_j) 2 sigmoid(-beta |F_N a_i - F_N b_j|_1) and
A' = M B, B' = M^T A (`DualAffinity`). Scores go tile by tile, distances by torch's cdist: memory linear in N + M,
nothing of size N M D.

No code of the authors was found; the card's readings are options, its recommendation the default. F_E, F_N: one linear
layer each. Mean of the centred gate: over all pairs that the mask allows, so that padding does not count; it knows the
future, hence is not causal. The share of a layer (`share`; 0.5, 0.4, 0.3 in BERT's layers 1 to 3): `heads` gives the
first round(share H) heads the new weights and the others softmax, `blend` mixes both in each head. Division by sqrt(D)
in both factors as in the layer that the card cites; between sentences there is none. A masked pair has weight 0 after
the nonlinearity: -inf as a score would give tanh = -1. At D = 64 and unit variance the gate starts near 2e-4: this is
the formula, and it is not rescaled here.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, C channels, D head dim, E head dim of values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult, register
from saccade.layers.cache import KVCache
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.autocast import off
from saccade.ops.export import exporting
from saccade.ops.heads import repeat_heads
from saccade.ops.masks import Mask
from saccade.ops.normalizers import Normalizer, State

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

Gate = Literal["doubled", "centred"]
Mode = Literal["heads", "blend"]


class Unnormalised(Normalizer):
    """The scores are the weights."""

    none_is_all = True

    def update(self, scores: Tensor, allowed: Any, state: State) -> tuple[Tensor, State, None]:
        return scores if allowed is None else scores.masked_fill(~allowed, 0.0), state, None

    def weights(self, scores: Tensor, allowed: Any, final: State) -> Tensor:
        return scores if allowed is None else scores.masked_fill(~allowed, 0.0)

    def grad(self, scores: Tensor, weights: Tensor, grad_weights: Tensor, delta: Tensor, final: State) -> Tensor:
        return grad_weights


def comateformer_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    mask: Tensor | Mask | None = None,
    causal: bool = False,
    scale: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    gate: Gate = "doubled",
    similarity_dim: int | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """sum_j M_ij v_j, see the module's docstring.

    Args:
        mask: as `attend`'s; the mean of the centred gate is over the pairs that it allows.
        causal: no query sees a later key (query 0 stands at key 0).
        scale: s, D^-1/2 where None.
        alpha, beta: temperatures of tanh and sigmoid, >= 0.
        gate: "doubled" or "centred".
        similarity_dim: so many channels are for the dot product and the rest for the distance; None: all for both.
        dropout: probability that a weight is dropped.
        backend: as `attend`'s.

    Returns:
        (B, H, N, E).

    Raises:
        ValueError: if options do not fit together, or where `attend` does.
    """
    check(alpha, beta, gate, causal)
    scale = q_BHND.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(mask, Tensor):
        mask = masks.dense(mask)
    if causal:
        mask = masks.causal() if mask is None else mask & masks.causal()
    split = slice(None) if similarity_dim is None else slice(similarity_dim)
    rest = slice(similarity_dim, None)

    def distance(q: Tensor, k: Tensor) -> Tensor:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        q, k = q[..., rest].to(wide), k[..., rest].to(wide)
        if exporting():  # no runtime knows cdist of absolute values
            return (q[..., :, None, :] - k[..., None, :, :]).abs().sum(-1)
        return torch.cdist(q, k, p=1.0)

    mean: Tensor | None = None
    if gate == "centred":
        mean = _mean(distance, q_BHND, k_BKMD, mask, backend)

    def combined(q: Tensor, k: Tensor) -> Tensor:
        # tanh and sigmoid in single precision, also under autocast
        with off(q.device.type):
            far = distance(q, k)
            near = torch.tanh(alpha * scale * (q[..., split].to(far.dtype) @ k[..., split].to(far.dtype).mT))
            if mean is None:
                return near * (2.0 * torch.sigmoid(-beta * scale * far))
            return near * torch.sigmoid(beta * scale * (mean - far))

    return attend(
        q_BHND,
        k_BKMD,
        v_BKME,
        mask=mask,
        score=combined,
        normalize=Unnormalised(),
        dropout=dropout,
        backend=backend,
    )


def _mean(
    distance: Callable[[Tensor, Tensor], Tensor], q: Tensor, k: Tensor, mask: Mask | None, backend: str | None
) -> Tensor:
    """Mean distance (B, H, 1, 1) over the pairs allowed: sums over keys by one more pass, then over queries."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = q.to(wide), k.to(wide)
    ones = k.new_ones(*k.shape[:3], 1)

    def count(q: Tensor, k: Tensor) -> Tensor:
        return q.new_ones(*q.shape[:3], k.shape[2])

    sums, counts = (
        attend(q, k, ones, mask=mask, score=score, normalize=Unnormalised(), backend=backend).sum(2, keepdim=True)
        for score in (distance, count)
    )
    return sums / counts.clamp(min=1.0)


def check(alpha: float, beta: float, gate: str, causal: bool) -> None:
    """Raise ValueError unless the options fit together."""
    if not (0 <= alpha < math.inf and 0 <= beta < math.inf):
        raise ValueError(f"alpha and beta must be at least 0 and finite, got {alpha} and {beta}")
    if gate not in ("doubled", "centred"):
        raise ValueError(f"gate must be 'doubled' or 'centred', got {gate!r}")
    if causal and gate == "centred":
        raise ValueError("the mean of gate='centred' knows the future: a causal layer needs gate='doubled'")


def shared_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    share: float,
    mode: Mode,
    *,
    mask: Mask | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> Tensor:
    """Combined attention in a share of a layer and softmax in the rest, see the module's docstring."""
    H = q_BHND.shape[1]
    if mode == "blend":
        parts = [
            weight * way(q_BHND, k_BKMD, v_BKME, mask=mask, dropout=dropout, **extra)
            for way, weight, extra in ((comateformer_attend, share, options), (attend, 1.0 - share, {}))
            if weight
        ]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]
    first = round(share * H)
    if first in (0, H):
        if first:
            return comateformer_attend(q_BHND, k_BKMD, v_BKME, mask=mask, dropout=dropout, **options)
        return attend(q_BHND, k_BKMD, v_BKME, mask=mask, dropout=dropout)
    k, v = repeat_heads(k_BKMD, H), repeat_heads(v_BKME, H)
    new = comateformer_attend(q_BHND[:, :first], k[:, :first], v[:, :first], mask=mask, dropout=dropout, **options)
    return torch.cat([new, attend(q_BHND[:, first:], k[:, first:], v[:, first:], mask=mask, dropout=dropout)], 1)


def check_share(share: float, mode: str) -> None:
    """Raise ValueError unless share and mode are ones that there are."""
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    if mode not in ("heads", "blend"):
        raise ValueError(f"mode must be 'heads' or 'blend', got {mode!r}")


def _real_pairs(query_BN: Tensor, key_BM: Tensor) -> Mask:
    """Pairs of real tokens: those of padding have ids that are nowhere else."""
    return masks.Documents(query_BN.long() - 1, 2 * (key_BM.long() - 1))


class Comateformer(QKVAttention):
    """Multi-head combined attention.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: as `QKVAttention`'s.
        alpha, beta, gate: as `comateformer_attend`'s.
        share, mode: the part of the layer that is not softmax, see the module's docstring.

    Raises:
        ValueError: if arguments do not fit together.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = False,
        rope_base: float = 10000.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        gate: Gate = "doubled",
        share: float = 1.0,
        mode: Mode = "heads",
        qkv_bias: bool = True,
        proj_bias: bool = True,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            causal,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=rope,
            rope_base=rope_base,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
        )
        check(alpha, beta, gate, causal)
        check_share(share, mode)
        self.share, self.mode = share, mode
        self.options: dict[str, Any] = {"alpha": alpha, "beta": beta, "gate": gate}

    def attend(
        self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, *, mask: Mask | None, causal: bool, offset: int
    ) -> Tensor:
        if causal and not (offset and q_BHND.shape[2] == 1):
            mask = masks.causal(offset) if mask is None else mask & masks.causal(offset)
        return shared_attend(q_BHND, k_BKMD, v_BKME, self.share, self.mode, mask=mask, **self.options)

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: Tensor | Mask | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        if self.options["gate"] == "centred" and context_BMC is None and isinstance(mask, Tensor) and mask.ndim == 2:
            mask = _real_pairs(mask, mask)  # padding is no query either: it would count in the mean
        return super().forward(x_BNC, context_BMC, mask=mask, cache=cache)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, share={self.share}, mode={self.mode}, gate={self.options['gate']}"


class DualAffinity(nn.Module):
    """Both sentences through each other: A' = M B and B' = M^T A.

    Args:
        dim: channels C.
        alpha, beta, gate: as `comateformer_attend`'s.
        similarity, dissimilarity: F_E and F_N, any modules C -> channels; a linear layer C -> C where None.

    Raises:
        ValueError: if arguments do not fit together.
    """

    def __init__(
        self,
        dim: int,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        gate: Gate = "doubled",
        similarity: nn.Module | None = None,
        dissimilarity: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check(alpha, beta, gate, causal=False)
        self.dim = dim
        self.options: dict[str, Any] = {"alpha": alpha, "beta": beta, "gate": gate, "scale": 1.0}
        self.similarity = nn.Linear(dim, dim) if similarity is None else similarity
        self.dissimilarity = nn.Linear(dim, dim) if dissimilarity is None else dissimilarity

    def forward(
        self, a_BNC: Tensor, b_BMC: Tensor, *, mask_a: Tensor | None = None, mask_b: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """A' (B, N, C) and B' (B, M, C); masks are bool (B, N) and (B, M), True = real token.

        Raises:
            ValueError: if shapes do not fit.
        """
        for name, x, mask in (("a", a_BNC, mask_a), ("b", b_BMC, mask_b)):
            if x.ndim != 3 or x.shape[-1] != self.dim or x.shape[0] != a_BNC.shape[0]:
                raise ValueError(f"{name} must be ({a_BNC.shape[0]}, tokens, {self.dim}), got {tuple(x.shape)}")
            if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
                raise ValueError(f"mask_{name} must be bool {tuple(x.shape[:2])}, got {mask.dtype} {mask.shape}")
        masked = mask_a is not None or mask_b is not None
        real_a, real_b = (
            x.new_ones(x.shape[:2], dtype=torch.bool) if m is None else m for x, m in ((a_BNC, mask_a), (b_BMC, mask_b))
        )
        a, b = ((self.similarity(x), self.dissimilarity(x)) for x in (a_BNC, b_BMC))
        keys_a, keys_b = (torch.cat(maps, -1)[:, None] for maps in (a, b))
        outs = [
            comateformer_attend(
                query,
                key,
                value[:, None],
                mask=_real_pairs(*real) if masked else None,
                similarity_dim=a[0].shape[-1],
                **self.options,
            )[:, 0]
            for query, key, value, real in (
                (keys_a, keys_b, b_BMC, (real_a, real_b)),
                (keys_b, keys_a, a_BNC, (real_b, real_a)),
            )
        ]
        return outs[0], outs[1]


class CombinedSelfAttention(nn.Module):
    """In the place of transformers' `BertSelfAttention` or `RobertaSelfAttention`, with its projections' names.

    Args:
        host: the attention that it replaces.
        share, mode, alpha, beta, gate: as `Comateformer`'s.

    Raises:
        ValueError: if the host decodes, or has not the names of a `BertSelfAttention`.
    """

    def __init__(self, host: nn.Module, share: float, mode: Mode = "heads", **options: Any) -> None:
        super().__init__()
        names = ("query", "key", "value", "dropout", "num_attention_heads")
        missing = [name for name in names if not hasattr(host, name)]
        if missing or getattr(host, "is_decoder", False):
            what = f"has no {missing[0]}" if missing else "decodes"
            raise ValueError(f"the host must be the self-attention of a BERT-like encoder, but {what}")
        check_share(share, mode)
        check(options.get("alpha", 1.0), options.get("beta", 1.0), options.get("gate", "doubled"), causal=False)
        for name in names[:3]:
            self.add_module(name, host.get_submodule(name))
        self.dropout: float = host.dropout.p  # type: ignore[assignment, union-attr]
        self.num_attention_heads: int = host.num_attention_heads  # type: ignore[assignment]
        self.share, self.mode, self.options = share, mode, options
        self.train(host.training)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        """Context (B, N, C). attention_mask: None, (B, N), or over pairs, bool or added to scores, as transformers
        hands it down."""
        q, k, v = (
            project(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for project in map(self.get_submodule, ("query", "key", "value"))
        )
        mask: Mask | None = None
        if attention_mask is not None:
            allowed = attention_mask
            if allowed.dtype != torch.bool:
                allowed = allowed != 0 if allowed.ndim == 2 else allowed > torch.finfo(allowed.dtype).min / 2
            mask = masks.padding(allowed) if allowed.ndim == 2 else masks.dense(allowed)
        dropout = self.dropout if self.training else 0.0
        out = shared_attend(q, k, v, self.share, self.mode, mask=mask, dropout=dropout, **self.options)
        return out.transpose(1, 2).flatten(2), None


def combine(
    model: nn.Module, shares: Sequence[float] = (0.5, 0.4, 0.3), *, mode: Mode = "heads", **options: Any
) -> nn.Module:
    """Combined attention in the lower layers of a BERT-like encoder of transformers, in place; fine-tune it then.

    Args:
        model: a model with a list of layers that have `attention.self`.
        shares: share of combined attention in layer 1, 2 ...; a layer of share 0 is left as it is.
        options: mode, alpha, beta and gate, as `Comateformer`'s.

    Returns:
        the model.

    Raises:
        ValueError: if the model has no such layers, or fewer than there are shares.
    """
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(hasattr(getattr(layer, "attention", None), "self") for layer in module)
    ]
    if not lists or len(lists[0]) < len(shares):
        found = len(lists[0]) if lists else 0
        raise ValueError(f"the model must have {len(shares)} encoder layers with attention.self, got {found}")
    for layer, share in zip(lists[0], shares):
        if share:
            attention: Any = layer.attention
            attention.self = CombinedSelfAttention(attention.self, share, mode, **options)
    return model


# The claim: pairs of sentences that differ by one token are told apart sooner, and the token moves the output more.


class _Matcher(nn.Module):
    """A one-layer encoder over "Q P" and a classifier on its mean."""

    def __init__(self, attention: nn.Module, vocabulary: int, length: int, dim: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, dim), nn.Embedding(2 * length, dim)
        self.attention, self.norm = attention, nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.last_norm, self.classifier = nn.LayerNorm(dim), nn.Linear(dim, 2)

    def features(self, pair_BN: Tensor) -> Tensor:
        x = self.tokens(pair_BN) + self.positions.weight
        x = self.norm(x + self.attention(x))
        return self.last_norm(x + self.feed_forward(x)).mean(1)

    def forward(self, pair_BN: Tensor) -> Tensor:
        return self.classifier(self.features(pair_BN))


def _pairs(batch: int, length: int, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sentences twice over (label 0), one token of the second copy replaced (label 1)."""
    first = torch.randint(vocabulary, (batch, length), generator=generator)
    label = torch.randint(2, (batch,), generator=generator)
    place = torch.randint(length, (batch,), generator=generator)
    shift = torch.randint(1, vocabulary, (batch,), generator=generator) * label
    second = first.clone()
    rows = torch.arange(batch)
    second[rows, place] = (second[rows, place] + shift) % vocabulary
    return torch.cat([first, second], 1), label


def _claim(lab: Lab) -> ClaimResult:
    from saccade.layers.softmax_attention import SoftmaxAttention

    length, vocabulary, dim, batch = lab.size((4, 16, 32, 128), (4, 8, 16, 2))
    ways: dict[str, Callable[[], nn.Module]] = {
        "combined": lambda: Comateformer(dim, 4),
        "softmax": lambda: SoftmaxAttention(dim, 4, rope=False, qkv_bias=True, proj_bias=True),
    }
    held_out = _pairs(lab.size(1024, 4), length, vocabulary, torch.Generator().manual_seed(10**6 + lab.seed))
    measured: dict[str, float] = {}
    for name, attention in ways.items():
        with lab.seeded():
            model = _Matcher(attention(), vocabulary, length, dim)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            generator = lab.generator()
            while True:
                yield _pairs(batch, length, vocabulary, generator)

        def loss(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(model(pair[0]), pair[1])

        losses = lab.train(model, batches(), loss, 700, lr=4e-3, description=name)
        with torch.no_grad():
            model.eval()
            accuracy = (model(held_out[0]).argmax(-1) == held_out[1]).float().mean().item()
            same = held_out[0][:, :length].repeat(1, 2)
            other = held_out[0][held_out[1] == 1]
            moved = model.features(same[held_out[1] == 1]) - model.features(other)
            features = model.features(same)
            sensitivity = moved.norm(dim=-1).mean() / (features - features.mean(0)).norm(dim=-1).mean()
        below = [i for i in range(len(losses)) if sum(losses[max(0, i - 19) : i + 1]) / min(i + 1, 20) < 0.35]
        measured[f"{name}_accuracy"] = accuracy
        measured[f"{name}_steps_to_loss_0.35"] = float(below[0] if below else math.inf)
        measured[f"{name}_sensitivity_to_one_token"] = float(sensitivity)
    sooner = measured["combined_steps_to_loss_0.35"] < measured["softmax_steps_to_loss_0.35"]
    keener = measured["combined_sensitivity_to_one_token"] > measured["softmax_sensitivity_to_one_token"]
    return ClaimResult(
        measured,
        holds=sooner and keener,
        note="sensitivity: movement of the features by a replaced token over their spread between sentences",
    )


register(
    "comateformer",
    kind="sequence",
    summary="Weights in (-1, 1): the tanh of a dot product, gated by an L1 distance; tokens add, subtract or drop out.",
    supports=("causal", "bidirectional", "cross", "padding", "decoding", "grouped-heads", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="dense",
    complexity="time O(N M D), twice softmax's products in another operation; memory O((N + M) D) by tiles",
    note="no code of the authors is known: the card's readings are options",
    invariants=(
        "|M| <= 1, with the sign of the dot product; q = k opens the doubled gate to exactly 1",
        "beta = 0 is pure tanh attention, alpha = 0 gives 0, far keys have no weight",
        "alpha, beta -> infinity give weights of -1, 0 and 1",
        "M(A, B)^T = M(B, A) where the maps are shared",
        "share 0 is softmax attention and an unmodified BERT",
        "masked keys have no influence; permuting keys with their values changes nothing",
    ),
    build=Comateformer,
    example={"dim": 16, "num_heads": 4},
    claim=Claim(
        paper="tokens that differ are noticed: about +5 points under TextFlint's small changes",
        expected="sentence pairs that differ by one token are told apart in fewer steps than with softmax attention "
        "in the same one-layer encoder, and the token moves the features more",
        run=_claim,
    ),
)
