"""The tree of classes and the catalogue's parts in it; the (gated) delta rule, and its generalisation, by chunks.

Shape letters: B batch, H heads, N tokens, D head dim of q and k, E of v, C tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade import catalogue
from saccade.catalogue import Summary
from saccade.ops.autocast import working_dtype
from saccade.ops.export import exporting
from saccade.ops.sharding import in_parts

Update = Literal[
    "kernel", "decay", "gated", "gated-channel", "delta", "gated-delta", "longhorn", "rwkv7",
    "ttt", "ttt-mlp", "titans", "mesa",
]  # fmt: skip


@dataclass(frozen=True)
class AttentionClass:
    """A class of the tree. Costs are in L tokens, head dim d, window w, and k chosen tokens, or blocks of B.

    Attributes:
        path: from the root, "linear/decay/data-independent".
        equation: of the state, or which keys are read.
        train_time: of a whole sequence; empty where the class is too wide to say.
        step_time: of one more token.
        memory: of what a step reads.
        recall: whether a token far back can be had again.
    """

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
        AttentionClass("linear/gradient", "M - rate grad |f(k; M) - v|^2 / 2", "L d^2", "d^2", "d^2", "limited by d"),
        AttentionClass("linear/least-squares", "q (k^T k + lambda)^-1 k^T v", "L d^3", "d^3", "d^2", "limited by d"),
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


def place(parts: list[Summary] | None = None) -> dict[str, list[Summary]]:
    """The catalogue's parts by class path, in the tree's order; those without a class (gates, fusion) are left out.

    Args:
        parts: summaries to be placed; all of the catalogue where None.

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


def _solve(below: Tensor, right: Tensor) -> Tensor:
    """(I + below)^-1 right for matrices that are 0 on the diagonal and above it."""
    if not exporting():
        return torch.linalg.solve_triangular(below, right, upper=False, unitriangular=True)
    # no runtime has it; (I + A)^-1 = (I - A) (I + A^2) (I + A^4) ..., as A^c = 0
    power, size = -below, 1
    while size < below.shape[-1]:
        right, power, size = right + power @ right, power @ power, 2 * size
    return right


def implicit_rate(rate_BHN: Tensor, k_BHND: Tensor) -> Tensor:
    """beta = r / (1 + r |k|^2): the delta rule with it is argmin_S |S - S'|^2 + r |k S - v|^2, stable for any key.

    Args:
        rate_BHN: r, Longhorn's rate (arXiv 2407.14207).
        k_BHND: keys.
    """
    return rate_BHN / (1 + rate_BHN * k_BHND.square().sum(-1))


def state_size(update: Update, key_dim: int, value_dim: int, hidden: int = 0) -> int:
    """How many numbers the state of a head is, whatever the length.

    D E; D more of a normalised kernel, D D more of mesa. Of memories that learn, their matrices twice, now and at the
    beginning of the mini-batch, and a third time where they have momentum (and for each row, not each head, a count).

    Args:
        update: of the recurrence.
        key_dim, value_dim: D and E.
        hidden: width of a memory of two matrices.
    """
    once = key_dim * value_dim
    if update in ("ttt-mlp", "titans"):
        once = (key_dim + value_dim) * hidden
    more = {"kernel": key_dim, "mesa": key_dim**2, "ttt": once, "ttt-mlp": once, "titans": 2 * once}
    return once + more.get(update, 0)


@in_parts
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
    """The (gated) delta rule, chunk by chunk; equations on the paper's page.

    Args:
        q_BHND, k_BHND: a step is stable where beta |k|^2 <= 2; unit keys are usual.
        v_BHNE: values.
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
    kind = working_dtype(q_BHND.dtype)
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


@in_parts
def generalised_delta_attend(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    read_BHND: Tensor,
    write_BHND: Tensor,
    log_decay_BHND: Tensor,
    *,
    state: Tensor | None = None,
    return_state: bool = False,
    chunk_size: int = 16,
) -> Any:
    """A decay for each channel, and any row that is read and written back, as RWKV-7's.

        S_t = diag(w_t) S_{t-1} + write_t^T (read_t S_{t-1}) + k_t^T v_t,     o_t = q_t S_t

    With w = 1, read = k, write = -beta k and beta k in place of k it is the delta rule. Within a chunk, with G the
    running sum of log w and z_i = read_i S_{i-1},

        z_i = (read_i exp(G_{i-1})) S + sum_{j<i} (read_i exp(G_{i-1} - G_j)) . (write_j z_j + k_j v_j)

    Args:
        q_BHND, k_BHND: queries and keys.
        v_BHNE: values.
        read_BHND, write_BHND: of RWKV-7 kappa and -a kappa, kappa of length 1 and a between 0 and 1.
        log_decay_BHND: log w_t <= 0.
        state: S before the first token, (B, H, D, E).
        return_state: also return S after the last.
        chunk_size: C; the result does not depend on it. Memory is O(N C D), as every pair has a decay by channel.

    Returns:
        out (B, H, N, E), or (out, state).

    Raises:
        ValueError: if shapes do not fit.
    """
    B, H, N, D = q_BHND.shape
    E = v_BHNE.shape[-1]
    alike = (k_BHND, read_BHND, write_BHND, log_decay_BHND)
    if any(x.shape != q_BHND.shape for x in alike) or v_BHNE.shape[:3] != (B, H, N):
        shapes = [tuple(x.shape) for x in (q_BHND, *alike, v_BHNE)]
        raise ValueError(f"q, k, read, write and log_decay must be alike, and (B, H, N) as of v, got {shapes}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    kind = working_dtype(q_BHND.dtype)
    chunk = max(1, min(chunk_size, N))
    short = -N % chunk
    q, v, k, read, write, gate = (
        F.pad(x.to(kind), (0, 0, 0, short)).unflatten(2, (-1, chunk)) for x in (q_BHND, v_BHNE, *alike)
    )
    total = gate.cumsum(-2)
    # at the token before, which a token reads
    before = total - gate
    upto = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()

    def reaching(row: Tensor, at: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """row_i exp(G_i - G_j) . write_j, and . k_j, (.., C, C)."""
        decay = (at[..., :, None, :] - total[..., None, :, :]).masked_fill(~seen[..., None], -torch.inf).exp()
        weighted = row[..., :, None, :] * decay
        return (weighted * write[..., None, :, :]).sum(-1), (weighted * k[..., None, :, :]).sum(-1)

    from_written, from_keys = reaching(read, before, upto.tril(-1))
    out_written, out_keys = reaching(q, total, upto)
    right = torch.cat([from_keys @ v, before.exp() * read], -1)
    new, old = _solve(-from_written, right).split((E, D), -1)
    reach = total.exp() * q
    kept_write, kept_k = ((total[..., -1:, :] - total).exp() * x for x in (write, k))
    S = q.new_zeros(B, H, D, E) if state is None else state.to(kind)
    outs = []
    for c in range(q.shape[2]):
        z = new[:, :, c] + old[:, :, c] @ S
        outs.append(reach[:, :, c] @ S + out_written[:, :, c] @ z + out_keys[:, :, c] @ v[:, :, c])
        S = total[:, :, c, -1, :, None].exp() * S + kept_write[:, :, c].mT @ z + kept_k[:, :, c].mT @ v[:, :, c]
    out = torch.stack(outs, 2).flatten(2, 3)[:, :, :N] if outs else v.new_zeros(B, H, 0, E)
    out = out.to(v_BHNE.dtype)
    return (out, S) if return_state else out
