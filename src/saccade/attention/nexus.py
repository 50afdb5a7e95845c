"""Nexus: attention whose queries and keys are themselves outputs of attention, so that a score sees the sequence.

Chen et al., "Nexus: Higher-Order Attention Mechanisms in Transformers", arXiv 2512.03377.

    Q = X W_Q,  K = X W_K,  V = X W_V,      A(q, k, v) = softmax(q k^T / sqrt(D) + M) v
    order 1:  A(Q, K, V)                    order 2:  A(Q2, K2, V)                         (V is not nested)

What Q2 and K2 are is this library's argument `sharing`: the authors published no code, and the sources of the card
give different formulas.

    "S"  Q2 = A(Q, Q, Q),                K2 = A(K, K, K)                 (formulas quoted from the paper; the default)
    "R"  X' = concat_h A(Q, K, V),       Q2 = X' W_Q,  K2 = X' W_K       (a token is refined first; needs H D = C)
    "U"  Q2 = A(X W_1, X W_2, X W_3),    K2 = A(X W_4, X W_5, X W_6)     (not shared; form inferred)

Higher orders reuse the weights: Phi_0 = Z, Phi_r = A(Phi_{r-1}, Phi_{r-1}, Z) with Z = Q or K (S; U from its Phi_1
on, with Z = X W_3 or X W_6); R refines order - 1 times, always with V.

| here              | paper | meaning                                                             | default            |
|-------------------|-------|---------------------------------------------------------------------|--------------------|
| `order`           | m     | depth; 1 is standard attention                                      | 2                  |
| `branches`        |       | which of queries and keys are nested: "both", "query", "key"        | "both" (the paper) |
| `recurse_values`  |       | Phi_{r-1} instead of Z as the value of the inner attention          | False              |
| `inner_positions` |       | rotary positions in the inner attention too                         | True               |

Inferred, as on the card: scale and mask inside as outside (causality needs the mask); rotary positions on the query
and key arguments of every attention, never on a value argument; with grouped heads the key branch stays on the key
heads. `norm_inner` (RMS norm of the nested keys, as public nested-attention layers have it) and `gate`
(Q2 <- Q + g (Q2 - Q), likewise K2, g = 0 at the start) are not in the paper. In U, Q is X W_1 and K is X W_4.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, C channels, D head dim, E width of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult, register
from saccade.layers.cache import NamedCache
from saccade.layers.qkv_attention import QKVAttention, as_mask
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.heads import repeat_heads
from saccade.ops.masks import Mask
from saccade.ops.rope import rotate

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

Branches = Literal["both", "query", "key"]
Inner = Callable[[Tensor, Tensor, Tensor], Tensor]
Keep = Callable[[str, Tensor], Tensor]


def _keep_nothing(name: str, x: Tensor) -> Tensor:
    return x


def nested(
    z_BHND: Tensor,
    depth: int,
    inner: Inner,
    *,
    recurse_values: bool = False,
    keep: Keep = _keep_nothing,
    name: str = "",
) -> Tensor:
    """Phi_depth(Z): Phi_0 = Z, Phi_r = inner(Phi_{r-1}, Phi_{r-1}, Z or, with `recurse_values`, Phi_{r-1}).

    Args:
        inner: A(q, k, v).
        keep: (name, the new tokens of a level) -> all tokens of that level, where a cache holds earlier ones.
    """
    phi = z_BHND
    for level in range(depth):
        keys = keep(f"{name} {level}", phi)
        if level == 0:
            values = keys
        phi = inner(phi, keys, keys if recurse_values else values)
    return phi


def nexus_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    order: int = 2,
    branches: Branches = "both",
    recurse_values: bool = False,
    mask: Tensor | Mask | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Reading S as a function: A(Phi_{m-1}(Q), Phi_{m-1}(K), V). No weights, no positions.

    Args:
        q_BHND, k_BKMD, v_BKME: queries, keys, values; K divides H.
        order: m; time is that of 2 (m - 1) + 1 attentions.
        branches: what is nested.
        mask: over query-key pairs, or (B, M) padding of keys; in self-attention it holds inside too. With another
            number of queries than keys, only padding can be honoured (inside, by the key branch).
        causal: no token attends to a later one, inside and outside.
        scale: of the scores, inside and outside.

    Raises:
        ValueError: if an argument is out of range, or the mask is of pairs and N is not M.
    """
    _check_options(order, branches)
    pairs = as_mask(mask, k_BKMD)
    crossing = q_BHND.shape[2] != k_BKMD.shape[2]
    if crossing and (causal or not (pairs is None or isinstance(pairs, masks.Padding))):
        raise ValueError(f"queries ({q_BHND.shape[2]}) and keys ({k_BKMD.shape[2]}) must be the same tokens here")

    def inner(inside: Mask | None) -> Inner:
        return lambda q, k, v: _attention(q, k, v, inside, causal, 0, scale)

    if branches != "key":
        q_BHND = nested(q_BHND, order - 1, inner(None if crossing else pairs), recurse_values=recurse_values)
    if branches != "query":
        k_BKMD = nested(k_BKMD, order - 1, inner(pairs), recurse_values=recurse_values)
    return _attention(q_BHND, k_BKMD, v_BKME, pairs, causal, 0, scale)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, causal: bool, offset: int, scale: float | None = None
) -> Tensor:
    if causal and not (offset and q.shape[2] == 1):
        mask = masks.and_causal(mask, offset)
    return attend(q, k, v, mask=mask, scale=scale)


def _check_options(order: int, branches: str) -> None:
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"order must be an integer of at least 1, got {order}")
    if branches not in ("both", "query", "key"):
        raise ValueError(f"branches must be 'both', 'query' or 'key', got {branches!r}")


class Nexus(QKVAttention):
    """Higher-order attention as a layer; S and R have the parameters of `SoftmaxAttention` and take its weights.

    Decoding keeps V, the nested keys, and what the inner attentions read: raw Q and K in S (twice a KV cache at order
    2), the inner keys in R (1.5 times). One step is as many attention rows as the parallel form has attentions.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: `QKVAttention`'s.
        order: m.
        branches: "both", "query" or "key".
        sharing: "S", "R" or "U", see the module's docstring.
        recurse_values: Phi_{r-1} instead of Z as the inner values (S and U, order 3 and up).
        inner_positions: rotary positions inside as well.
        rope_channels: rotate these first channels of a head only (Pythia: a quarter); all where None.
        norm_inner: RMS norm, without weight, of the nested keys.
        gate: learned g between the plain (g = 0, the start) and the nested queries and keys, one each.

    Raises:
        ValueError: if an argument is out of range, or in R if num_heads * head_dim is not dim.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        order: int = 2,
        branches: Branches = "both",
        sharing: Literal["S", "R", "U"] = "S",
        recurse_values: bool = False,
        inner_positions: bool = True,
        rope_channels: int | None = None,
        norm_inner: bool = False,
        gate: bool = False,
        **projections: Any,
    ) -> None:
        _check_options(order, branches)
        if sharing not in ("S", "R", "U"):
            raise ValueError(f"sharing must be 'S', 'R' or 'U', got {sharing!r}")
        if recurse_values and sharing == "R":
            raise ValueError("recurse_values is for sharing 'S' and 'U', got 'R'")
        super().__init__(dim, num_heads, causal, **projections)
        if sharing == "R" and num_heads * self.head_dim != dim:
            raise ValueError(f"sharing 'R' needs num_heads * head_dim = dim ({dim}), got {num_heads * self.head_dim}")
        if rope_channels is not None and (rope_channels % 2 or not 0 <= rope_channels <= self.head_dim):
            raise ValueError(f"rope_channels must be even and at most head_dim ({self.head_dim}), got {rope_channels}")
        self.order, self.branches, self.sharing, self.recurse_values = order, branches, sharing, recurse_values
        self.inner_positions, self.rope_channels, self.norm_inner = inner_positions, rope_channels, norm_inner
        self.nests_queries = order > 1 and branches != "key"
        self.nests_keys = order > 1 and branches != "query"
        bias = self.q_proj.bias is not None
        if sharing == "U" and self.nests_queries:
            width = num_heads * self.head_dim
            self.q_inner = nn.ModuleDict({part: nn.Linear(dim, width, bias=bias) for part in ("key", "value")})
        if sharing == "U" and self.nests_keys:
            width = self.num_kv_heads * self.head_dim
            self.k_inner = nn.ModuleDict({part: nn.Linear(dim, width, bias=bias) for part in ("key", "value")})
        self.q_gate = nn.Parameter(torch.zeros(())) if gate and self.nests_queries else None
        self.k_gate = nn.Parameter(torch.zeros(())) if gate and self.nests_keys else None

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: Tensor | Mask | None = None,
        cache: Any = None,
    ) -> Tensor:
        """`QKVAttention.forward` with a cache of `new_cache`; with a context, `mask` is its padding.

        Raises:
            ValueError: if the arguments do not fit together, or a context is given in reading R.
        """
        self._check(x_BNC, context_BMC, cache)
        if context_BMC is not None and self.sharing == "R":
            raise ValueError("sharing 'R' refines one sequence and takes no context")
        start = 0 if cache is None else cache.length
        keep = _keep_nothing if cache is None else cache.append
        tokens = x_BNC if context_BMC is None else context_BMC
        v_BKMD = keep("value", self._heads(self.v_proj(tokens), self.num_kv_heads))
        pairs = as_mask(mask, v_BKMD)
        if context_BMC is not None and not (pairs is None or isinstance(pairs, masks.Padding)):
            raise ValueError(f"with a context the mask must be its padding (batch, keys), got {pairs!r}")
        q_BHND, k_BKMD = self._nested_queries_and_keys(x_BNC, context_BMC, v_BKMD, pairs, start, keep)
        causal = self.causal and context_BMC is None
        out_BHND = self.attend(q_BHND, k_BKMD, v_BKMD, mask=pairs, causal=causal, offset=start)
        return self.out_proj(out_BHND.transpose(1, 2).flatten(2))

    def attend(
        self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, *, mask: Mask | None, causal: bool, offset: int
    ) -> Tensor:
        return _attention(q_BHND, k_BKMD, v_BKME, mask, causal, offset)

    def mix(self, x_BNC: Tensor, values_BHME: Tensor, *, mask: Tensor | Mask | None = None) -> Tensor:
        """The outer weights on given values."""
        v_BKMD = self._heads(self.v_proj(x_BNC), self.num_kv_heads)
        pairs = as_mask(mask, v_BKMD)
        q_BHND, k_BKMD = self._nested_queries_and_keys(x_BNC, None, v_BKMD, pairs, 0, _keep_nothing)
        k_BHMD = repeat_heads(k_BKMD, self.num_heads)
        return self.attend(q_BHND, k_BHMD, values_BHME, mask=pairs, causal=self.causal, offset=0)

    def new_cache(  # type: ignore[override]
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> NamedCache:
        return NamedCache()

    def start_as_softmax(self) -> None:
        """U starts as S; with `gate` every reading starts equal to the softmax layer."""
        if self.sharing == "U":
            for nests, plain, inner in (
                (self.nests_queries, self.q_proj, "q_inner"),
                (self.nests_keys, self.k_proj, "k_inner"),
            ):
                for projection in getattr(self, inner).values() if nests else ():
                    projection.load_state_dict(plain.state_dict())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, order={self.order}, branches={self.branches}, sharing={self.sharing}"

    def _nested_queries_and_keys(
        self, x_BNC: Tensor, context_BMC: Tensor | None, v_BKMD: Tensor, pairs: Mask | None, start: int, keep: Keep
    ) -> tuple[Tensor, Tensor]:
        """Q_m of the new tokens and K_m of all, rotated for the outer attention."""
        tokens = x_BNC if context_BMC is None else context_BMC
        positioned, causal = self.rope and context_BMC is None, self.causal and context_BMC is None
        q, k = self._heads(self.q_proj(x_BNC), self.num_heads), self._heads(self.k_proj(tokens), self.num_kv_heads)

        def place(x: Tensor, first: int, really: bool = positioned) -> Tensor:
            if not really:
                return x
            positions = torch.arange(first, first + x.shape[2], device=x.device)
            return rotate(x, positions, base=self.rope_base, channels=self.rope_channels)

        inside = positioned and self.inner_positions

        def inner(mask: Mask | None) -> Inner:
            return lambda q, k, v: _attention(place(q, start, inside), place(k, 0, inside), v, mask, causal, start)

        q2, k2 = q, k
        if self.sharing == "R":
            for level in range(self.order - 1):
                keys = keep(f"key {level}", place(k2, start, inside))
                out = _attention(place(q2, start, inside), keys, v_BKMD, pairs, causal, start)
                refined_BNC = out.transpose(1, 2).flatten(2)
                q2 = self._heads(self.q_proj(refined_BNC), self.num_heads)
                k2 = self._heads(self.k_proj(refined_BNC), self.num_kv_heads)
        else:
            # padding of a context says nothing of the queries' own tokens
            if self.nests_queries:
                q2 = self._nest(q, x_BNC, "q", inner(pairs if context_BMC is None else None), keep)
            if self.nests_keys:
                k2 = self._nest(k, tokens, "k", inner(pairs), keep)
        q2, k2 = q2 if self.nests_queries else q, k2 if self.nests_keys else k
        if self.norm_inner and self.nests_keys:
            k2 = F.rms_norm(k2, k2.shape[-1:])
        q2 = q2 if self.q_gate is None else torch.lerp(q, q2, self.q_gate)
        k2 = k2 if self.k_gate is None else torch.lerp(k, k2, self.k_gate)
        return place(q2, start), keep("nested key", place(k2, start))

    def _nest(self, z: Tensor, tokens_BNC: Tensor, name: str, inner: Inner, keep: Keep) -> Tensor:
        if self.sharing == "S":
            return nested(z, self.order - 1, inner, recurse_values=self.recurse_values, keep=keep, name=name)
        maps = self.q_inner if name == "q" else self.k_inner
        keys, values = (keep(f"{name} {part}", self._heads(maps[part](tokens_BNC), z.shape[1])) for part in maps)
        phi = inner(z, keys, values)
        for level in range(1, self.order - 1):
            keys = keep(f"{name} {level}", phi)
            phi = inner(phi, keys, keys if self.recurse_values else values)
        return phi


def two_hops(batch: int, chains: int, entities: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Facts `a b` and `b c` of P chains a -> b -> c in any order, then every a and b alone, in any order.

    Returns tokens (B, 6 P), labels c (-100 where nothing is asked), and whether an a is asked: two hops.
    """
    order = torch.rand(batch, entities, generator=generator).argsort(-1)[:, : 3 * chains].view(batch, 3, chains)
    a, b, c = order.unbind(1)
    facts = torch.stack([torch.cat([a, b], 1), torch.cat([b, c], 1)], -1)
    shuffle = torch.rand(batch, 2 * chains, generator=generator).argsort(-1)
    facts = facts.gather(1, shuffle[..., None].expand(-1, -1, 2)).flatten(1)
    shuffle = torch.rand(batch, 2 * chains, generator=generator).argsort(-1)
    asked, answers = torch.cat([a, b], 1).gather(1, shuffle), torch.cat([c, c], 1).gather(1, shuffle)
    silent = (4 * chains, 0)
    return torch.cat([facts, asked], 1), F.pad(answers, silent, value=-100), F.pad(shuffle < chains, silent)


class _OneLayer(nn.Module):
    """Embedding of each token and of the one before it, one attention layer, one MLP, logits."""

    def __init__(self, mixer: nn.Module, dim: int, vocab: int) -> None:
        super().__init__()
        self.token, self.before = nn.Embedding(vocab, dim), nn.Embedding(vocab, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.mixer = mixer
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.head = nn.Linear(dim, vocab)

    def forward(self, tokens_BN: Tensor) -> Tensor:
        x = self.token(tokens_BN) + F.pad(self.before(tokens_BN[:, :-1]), (0, 0, 1, 0))
        x = x + self.mixer(self.norms[0](x))
        return self.head(self.norms[2](x + self.mlp(self.norms[1](x))))


def _claim(lab: Lab) -> ClaimResult:
    """One- and two-hop lookup in one layer: order 2 in two readings against order 1, all with the same parameters."""
    chains, entities, dim, batch = 3, 16, 64, lab.size(64, 2)
    rows: dict[str, dict[str, Any]] = {
        "order_1": {"order": 1},
        "order_2_S": {"sharing": "S"},
        "order_2_R": {"sharing": "R"},
    }
    measured: dict[str, float] = {}

    def batches(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield two_hops(batch, chains, entities, generator)[:2]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=-100)

    for name, options in rows.items():
        with lab.seeded():
            model = _OneLayer(Nexus(dim, 4, True, rope=False, **options), dim, entities)
        lab.train(model, batches(lab.generator()), loss, 1300, lr=1e-2, description=name)
        held_out = torch.Generator().manual_seed(10**6 + lab.seed)
        tokens, labels, twice = two_hops(lab.size(512, 2), chains, entities, held_out)
        with torch.no_grad():
            right = model.eval()(tokens).argmax(-1) == labels
        measured[f"{name}_two_hop_accuracy"] = right[twice].float().mean().item()
        measured[f"{name}_one_hop_accuracy"] = right[(labels >= 0) & ~twice].float().mean().item()
        measured[f"{name}_parameters"] = float(sum(p.numel() for p in model.parameters()))
    standard = measured["order_1_two_hop_accuracy"]
    return ClaimResult(
        measured,
        holds=measured["order_2_R_two_hop_accuracy"] > standard + 0.3,
        note="guessing among the three chains' ends is right in 0.33 of the two-hop questions",
    )


register(
    "nexus",
    kind="sequence",
    summary="Queries and keys that are outputs of inner self-attention: multi-hop relations in one layer.",
    supports=("causal", "bidirectional", "cross", "padding", "decoding", "grouped-heads", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "single"},
    efficiency="dense",
    complexity="time (2 (m - 1) + 1) O(N M D) in S and U, m O(N M D) in R; order 2 caches 2 x (S), 1.5 x (R) K and V",
    note="built from the card: the authors published no code; `sharing` chooses between the readings of the paper",
    invariants=(
        "order 1 is standard attention, exactly",
        "the first token of a causal sequence gets what standard attention gives (S)",
        "equal tokens: nested queries and keys are the plain ones (S)",
        "nested queries are convex combinations of the visible queries (S)",
        "strongly self-similar queries and keys: standard attention (S)",
        "S and R have the parameters of standard attention, U 4 C H D more",
        "a linear map of the tokens does not give the nested queries",
        "decoding equals the parallel form, in every order and reading",
    ),
    build=Nexus,
    example={"dim": 16, "num_heads": 4, "num_kv_heads": 2, "causal": True},
    claim=Claim(
        paper="nested attention captures multi-hop relations within one layer; better zero-shot averages than the "
        "standard layer at every Pythia size, also with shared weights",
        expected="one layer of order 2 in reading R learns to look up A -> B -> C, one of order 1 does not, with equal "
        "parameters; reading S, measured beside them, comes no farther than guessing an end of a chain in this time",
        run=_claim,
    ),
)
