"""The map of sub-quadratic attention: a tree of classes over the catalogue, and its recurrences as one layer.

Sun et al., "Efficient Attention Mechanisms for Large Language Models: A Survey", arXiv 2507.19595.

Every mechanism has a place in a tree (`CLASSES`): a state equation, costs, what it can recall. `place()` puts the
catalogue's parts into it. The linear branch is one family of recurrences of a state S (D x E), o_t = q_t S_t:

| update | S_t | class path |
|---|---|---|
| kernel | S + phi(k)^T v, o divided by phi(q) z with z_t = z + phi(k) | linear/kernel |
| decay | gamma S + k^T v | linear/decay/data-independent |
| gated | a_t S + k^T v | linear/decay/data-dependent-scalar |
| gated-channel | diag(a_t) S + k^T v | linear/decay/data-dependent-vector |
| delta | (I - beta k^T k) S + beta k^T v | linear/delta |
| gated-delta | a_t (I - beta k^T k) S + beta k^T v | linear/delta |

The delta rule is a step of gradient descent with rate beta on |k S - v|^2 / 2: it replaces what S holds for k.
By chunks of C tokens, with G the running sum of log a in the chunk,

    u_i = beta_i (v_i - exp(G_i) k_i S - sum_{j<i} exp(G_i - G_j) (k_i . k_j) u_j)             a triangular system
    o_i = exp(G_i) q_i S + sum_{j<=i} exp(G_i - G_j) (q_i . k_j) u_j,   S' = exp(G_C) S + sum_j exp(G_C - G_j) k_j^T u_j

Rows and columns as the card fixes them: S is (D, E), o = q S. Gates here: beta = sigmoid(x w), a = sigmoid(x w)^(1/16)
(GLA's exponent), gamma_h = 1 - 2^(-5 - h) (RetNet's); delta's q and k have unit norm, its v is as projected.

Shape letters: B batch, H heads, N tokens, D head dim of q and k, E of v, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import catalogue
from saccade.catalogue import Claim, ClaimResult, Summary, register
from saccade.layers.cache import StateCache
from saccade.layers.constants import Constants
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.export import exporting
from saccade.ops.linear import linear_attend, retention_decay

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

Update = Literal["kernel", "decay", "gated", "gated-channel", "delta", "gated-delta"]


@dataclass(frozen=True)
class AttentionClass:
    """A class of the tree: its equation, costs in tokens L, head dim d, window w, block B and k chosen blocks."""

    path: str
    equation: str
    train_time: str
    step_time: str
    memory: str
    recall: str


_CHOICE = "L k B d + choice"

CLASSES: dict[str, AttentionClass] = {
    entry.path: entry
    for entry in (
        AttentionClass("dense", "o = softmax(q K^T / sqrt d) V", "L^2 d", "L d", "L d", "yes"),
        AttentionClass("linear", "o = phi(q) S", "L d^2", "d^2", "d^2", "limited by d"),
        AttentionClass("linear/kernel", "S + phi(k)^T v;  z + phi(k)", "L d^2", "d^2", "d^2", "limited by d"),
        AttentionClass("linear/decay", "G_t S + k^T v", "L d^2", "d^2", "d^2", "limited by d"),
        AttentionClass("linear/decay/data-independent", "gamma_h S + k^T v", "L d^2", "d^2", "d^2", "limited by d"),
        AttentionClass("linear/decay/data-dependent-scalar", "a_t S + k^T v", "L d^2", "d^2", "d^2", "limited by d"),
        AttentionClass(
            "linear/decay/data-dependent-vector", "diag(a_t) S + k^T v", "L d^2", "d^2", "d^2", "limited by d"
        ),
        AttentionClass("linear/delta", "(I - beta k^T k) S + beta k^T v", "L d^2", "d^2", "d^2", "limited by d"),
        AttentionClass("sparse", "o_t over chosen keys J_t", "", "", "L d", ""),
        AttentionClass("sparse/fixed", "J_t by position", "L w d", "w d", "w d", "inside the pattern"),
        AttentionClass("sparse/fixed/window", "t - w <= j <= t", "L w d", "w d", "w d", "inside the window"),
        AttentionClass("sparse/block", "J_t = k blocks of B keys", _CHOICE, "k B d + L / B", "L d", "if chosen"),
        AttentionClass(
            "sparse/block/data-independent", "blocks by position", "L k B d", "k B d", "L d", "if in the pattern"
        ),
        AttentionClass(
            "sparse/block/training-free", "blocks by pooled scores", _CHOICE, "k B d + L / B", "L d", "if chosen"
        ),
        AttentionClass(
            "sparse/block/trained-routing", "blocks by a trained gate", _CHOICE, "k B d + L / B", "L d", "if chosen"
        ),
        AttentionClass("sparse/token", "J_t = single tokens", "L k d + choice", "k d", "k d to L d", "if chosen"),
        AttentionClass(
            "sparse/token/trained-routing", "tokens by a trained router", "L k d + choice", "k d", "k d", "if chosen"
        ),
        AttentionClass("sparse/token/training-free", "tokens by scores", "L^2 d", "k d", "k d", "if kept"),
        AttentionClass(
            "sparse/cluster", "keys near q by hash or cluster", "L log L d", "sublinear", "L d", "probabilistic"
        ),
        AttentionClass("hybrid", "several of the above side by side", "mix", "mix", "mix", "of its exact part"),
    )
}
"""The survey's tree, by path. A part's `efficiency` is one of these paths."""


def place(parts: list[Summary] | None = None) -> dict[str, list[Summary]]:
    """The catalogue's parts by class path, in the tree's order; those without a class (gates, fusion) are left out.

    Raises:
        ValueError: if a part names a class that the tree does not have.
    """
    placed: dict[str, list[Summary]] = {path: [] for path in CLASSES}
    for part in catalogue.parts() if parts is None else parts:
        if not part.efficiency:
            continue
        if part.efficiency not in CLASSES:
            raise ValueError(f"{part.slug} is of the class {part.efficiency!r}, which the survey's tree does not have")
        placed[part.efficiency].append(part)
    return placed


def tree() -> str:
    """The survey's tree as text: each class with its equation, its costs and the parts that belong to it."""
    lines = []
    placed = place()
    for path, entry in CLASSES.items():
        depth = path.count("/")
        costs = f"  [{entry.train_time}; step {entry.step_time}; memory {entry.memory}]" if entry.train_time else ""
        lines.append(f"{'  ' * depth}{path.rsplit('/', 1)[-1]}: {entry.equation}{costs}")
        lines += [f"{'  ' * depth}  - {part.slug}" for part in placed[path]]
    return "\n".join(lines)


def elu_features(x: Tensor) -> Tensor:
    """elu(x) + 1, the Linear Transformer's."""
    return F.elu(x) + 1


def random_features(width: int, count: int, *, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """exp(w . x - |x|^2 / 2) / sqrt m, w ~ N(0, I): the Performer's; E[phi(q) . phi(k)] = exp(q . k)."""
    w = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))

    def features(x: Tensor) -> Tensor:
        return (x @ w.to(x).mT - x.square().sum(-1, keepdim=True) / 2).exp() * count**-0.5

    return features


def _solve(below: Tensor, right: Tensor) -> Tensor:
    """(I + below)^-1 right for matrices that are 0 on the diagonal and above it."""
    if not exporting():
        return torch.linalg.solve_triangular(below, right, upper=False, unitriangular=True)
    # no runtime has it; (I + A)^-1 = (I - A) (I + A^2) (I + A^4) ..., as A^c = 0
    power, size = -below, 1
    while size < below.shape[-1]:
        right, power, size = right + power @ right, power @ power, 2 * size
    return right


def delta_attend(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    beta_BHN: Tensor,
    log_decay_BHN: Tensor | None = None,
    *,
    state: Tensor | None = None,
    return_state: bool = False,
    chunk_size: int = 64,
) -> Any:
    """The (gated) delta rule, chunk by chunk; equations at the top of this file.

    Args:
        q_BHND, k_BHND: a step is stable where beta |k|^2 <= 2; unit keys are usual.
        beta_BHN: rates.
        log_decay_BHN: log a_t <= 0; none where None.
        state: S before the first token, (B, H, D, E).
        return_state: also return S after the last.
        chunk_size: C; the result does not depend on it.

    Returns:
        out (B, H, N, E), or (out, state).

    Raises:
        ValueError: if shapes do not fit.
    """
    B, H, N, D = q_BHND.shape
    E = v_BHNE.shape[-1]
    if k_BHND.shape != q_BHND.shape or v_BHNE.shape[:3] != (B, H, N) or beta_BHN.shape != (B, H, N):
        raise ValueError(
            f"q, k, v and beta must be (B, H, N, D), (B, H, N, D), (B, H, N, E) and (B, H, N), got "
            f"{tuple(q_BHND.shape)}, {tuple(k_BHND.shape)}, {tuple(v_BHNE.shape)} and {tuple(beta_BHN.shape)}"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    kind = torch.float64 if q_BHND.dtype == torch.float64 else torch.float32
    chunk = max(1, min(chunk_size, N))
    log_decay = torch.zeros_like(beta_BHN) if log_decay_BHN is None else log_decay_BHN
    short = -N % chunk
    q, k, v = (F.pad(x.to(kind), (0, 0, 0, short)).unflatten(2, (-1, chunk)) for x in (q_BHND, k_BHND, v_BHNE))
    # padding writes nothing (beta 0) and forgets nothing (log decay 0)
    beta, gate = (F.pad(x.to(kind), (0, short)).unflatten(2, (-1, chunk)) for x in (beta_BHN, log_decay))
    total = gate.cumsum(-1)
    below = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    decay = (total[..., None] - total[..., None, :]).masked_fill(~below, -torch.inf).exp()
    system = (beta[..., None] * (k @ k.mT) * decay).tril(-1)
    # one triangular solve for all chunks: u = new - old S
    right = beta[..., None] * torch.cat([v, total.exp()[..., None] * k], -1)
    new, old = _solve(system, right).split((E, D), -1)
    inside = (q @ k.mT) * decay
    reach = total.exp()[..., None] * q
    keep = (total[..., -1:] - total).exp()[..., None] * k
    S = q.new_zeros(B, H, D, E) if state is None else state.to(kind)
    outs = []
    for c in range(q.shape[2]):
        u = new[:, :, c] - old[:, :, c] @ S
        outs.append(reach[:, :, c] @ S + inside[:, :, c] @ u)
        S = total[:, :, c, -1:, None].exp() * S + keep[:, :, c].mT @ u
    out = torch.stack(outs, 2).flatten(2, 3)[:, :, :N] if outs else v.new_zeros(B, H, 0, E)
    out = out.to(v_BHNE.dtype)
    return (out, S) if return_state else out


class RecurrentAttention(Constants):
    """The survey's linear recurrences as one causal layer with a state of constant size.

    Args:
        dim: channels.
        num_heads: H, a divisor of `dim`.
        causal: must be True.
        update: which recurrence, see the table at the top of this file.
        chunk_size: tokens of a chunk in the parallel form.

    Raises:
        ValueError: if `causal` is False, heads do not divide, or the update is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = True,
        *,
        update: Update = "gated-delta",
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        if not causal:
            raise ValueError("a recurrence is causal; got causal=False")
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim ({dim}), got {num_heads}")
        names = ("kernel", "decay", "gated", "gated-channel", "delta", "gated-delta")
        if update not in names:
            raise ValueError(f"update must be one of {', '.join(names)}, got {update!r}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.dim, self.num_heads, self.causal, self.update, self.chunk_size = dim, num_heads, causal, update, chunk_size
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        width = dim if update == "gated-channel" else num_heads
        self.gate = nn.Linear(dim, width) if update in ("gated", "gated-channel", "gated-delta") else None
        self.rate = nn.Linear(dim, num_heads) if update in ("delta", "gated-delta") else None
        self.constant("decay", partial(retention_decay, num_heads) if update == "decay" else None)

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        cache: StateCache | None = None,
    ) -> Tensor:
        """`x_BNC` after what `cache` has seen; `mask` (B, N), True = real token: padding is not written.

        Raises:
            ValueError: if shapes do not fit, or there is a context.
        """
        if x_BNC.ndim != 3 or x_BNC.shape[-1] != self.dim:
            raise ValueError(f"x must be (batch, tokens, {self.dim}), got {tuple(x_BNC.shape)}")
        if context_BMC is not None:
            raise ValueError("a recurrence takes no context")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x_BNC.shape[:2]):
            raise ValueError(f"mask must be bool {tuple(x_BNC.shape[:2])}, got {mask.dtype} of {tuple(mask.shape)}")
        q, k, v = (self._heads(p(x_BNC)) for p in (self.q_proj, self.k_proj, self.v_proj))
        state = None if cache is None else cache.state
        out, state = self._run(x_BNC, q, k, v, mask, state)
        if cache is not None:
            cache.state, cache.length = _detached(state), cache.length + x_BNC.shape[1]
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> StateCache:
        """An empty state."""
        return StateCache()

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, update={self.update!r}"

    def _run(
        self, x_BNC: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Any
    ) -> tuple[Tensor, Any]:
        real = None if mask is None else mask[:, None]
        plain: dict[str, Any] = {"state": state, "return_state": True}
        gate = None if self.gate is None else F.logsigmoid(self.gate(x_BNC)) / 16
        if real is not None:
            v = v * real[..., None]
        if self.update == "kernel":
            # written after the feature map, which gives padding weight too
            q, k = elu_features(q), elu_features(k)
            k = k if real is None else k * real[..., None]
            return linear_attend(q, k, v, normalize=True, chunk_size=self.chunk_size, **plain)
        if self.update in ("delta", "gated-delta"):
            assert self.rate is not None
            rate = self.rate(x_BNC).sigmoid().transpose(1, 2)
            log_decay = None if gate is None else gate.transpose(1, 2)
            if real is not None:
                rate, log_decay = rate * real, None if log_decay is None else log_decay * real
            q, k = (F.normalize(x, dim=-1) for x in (q, k))
            return delta_attend(q, k, v, rate, log_decay, chunk_size=self.chunk_size, **plain)
        decay: Tensor | None = self.decay if isinstance(self.decay, Tensor) else None
        if real is not None and decay is not None:
            decay = torch.where(real, decay[:, None], 1.0)
        if gate is not None:
            gate = self._heads(gate) if self.update == "gated-channel" else gate.transpose(1, 2)
            if real is not None:
                gate = gate * (real[..., None] if gate.ndim == 4 else real)
            decay = gate.exp().to(q.dtype)
        return linear_attend(q * q.shape[-1] ** -0.5, k, v, decay=decay, chunk_size=self.chunk_size, **plain)

    def _heads(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _detached(state: Any) -> Any:
    return state.detach() if isinstance(state, Tensor) else type(state)(*(part.detach() for part in state))


class _Window(nn.Module):
    """Softmax attention over the last `keys` keys: the fixed sparse class of the same memory as a state."""

    def __init__(self, dim: int, num_heads: int, keys: int) -> None:
        super().__init__()
        self.qkv, self.out, self.heads, self.keys = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), num_heads, keys

    def forward(self, x_BNC: Tensor, **_: Any) -> Tensor:
        q, k, v = self.qkv(x_BNC).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(attend(q, k, v, mask=masks.window(self.keys - 1)).transpose(1, 2).flatten(2))


def _claim(lab: Lab) -> ClaimResult:
    """Associative recall at equal bytes of state: dense, then the delta rule, then decay, then a window."""
    from saccade.layers.softmax_attention import SoftmaxAttention

    measured: dict[str, float] = {}
    rows: dict[str, Callable[[int], nn.Module]] = {
        "dense": lambda dim: SoftmaxAttention(dim, 4, causal=True, rope=False),
        "delta": lambda dim: RecurrentAttention(dim, 4, update="delta", chunk_size=32),
        "kernel": lambda dim: RecurrentAttention(dim, 4, update="kernel"),
        "decay": lambda dim: RecurrentAttention(dim, 4, update="decay"),
        # a state of 16 x 16 a head holds as many numbers as keys and values of 8 tokens
        "window": lambda dim: _Window(dim, 4, 8),
    }
    for name, mixer in rows.items():
        _, _, measured[f"{name}_recall_accuracy"] = lab.recall(
            mixer, length=128, pairs=16, power=1.0, layers=1, steps=300, lr=5e-3, description=name
        )
    best = measured["dense_recall_accuracy"]
    order = [measured[f"{name}_recall_accuracy"] for name in ("delta", "decay", "window")]
    return ClaimResult(
        measured,
        holds=best >= order[0] - 0.01 and order[0] > order[1] > order[2],
        note="one learning rate for all; with two layers at 2e-3 nothing but dense had learned it after 300 steps",
    )


register(
    "efficient-attention-survey",
    kind="sequence",
    summary="The survey's tree over the catalogue, and its linear recurrences (decay, gates, delta rule) as a layer.",
    supports=("causal", "padding", "decoding"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="linear/delta",
    complexity="time O(N D (E + C)), state O(H D E) whatever the length",
    invariants=(
        "parallel, recurrent and chunked forms agree, with and without a state, for any chunk",
        "beta = 0 leaves the state, beta = 1 with a unit key stores v exactly; orthonormal keys: delta is plain linear",
        "a = 1 turns the gated delta rule into the delta rule; a constant gate is RetNet",
        "a delta step is a gradient step on |k S - v|^2 / 2",
        "every part of the catalogue has its place in the tree",
    ),
    build=RecurrentAttention,
    example={"dim": 16, "num_heads": 4, "chunk_size": 4},
    claim=Claim(
        paper="linear models lag on recall, bounded by their state: dense >= delta > decay > window at equal bytes",
        expected="the same order on recall of 16 pairs anywhere in 128 tokens, with one layer",
        run=_claim,
    ),
)
