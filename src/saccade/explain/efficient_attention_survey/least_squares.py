"""The Mesa layer: what is read is the exact answer of regularised least squares over all keys and values so far.

    S_t = a_t S_{t-1} + beta_t k_t^T v_t,   H_t = a_t H_{t-1} + beta_t k_t^T k_t
    o_t = q_t (H_t + diag(lambda))^-1 S_t

With the solutions x_t of (H_t + diag(lambda)) x_t = q_t it is linear attention, o_t = x_t S_t. They come of Cholesky's
factors, chunk by chunk, or of steps of conjugate gradients, whose products x_t H_t are linear attention too.

Shape letters: B batch, H heads, N tokens, D head dim of q and k, E of v, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.ops.autocast import working_dtype
from saccade.ops.linear import linear_attend
from saccade.ops.sharding import in_parts


class MesaState(NamedTuple):
    """What is kept of the tokens so far.

    Attributes:
        values: S, (B, H, D, E).
        keys: H, (B, H, D, D).
    """

    values: Tensor
    keys: Tensor


@in_parts
def mesa_attend(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    beta_BHN: Tensor,
    ridge_HD: Tensor,
    log_decay_BHN: Tensor | None = None,
    *,
    state: MesaState | None = None,
    return_state: bool = False,
    chunk_size: int = 16,
    steps: int | None = None,
) -> Any:
    """Regularised least squares, answered at each token; equations at the top of this file.

    Args:
        q_BHND, k_BHND, v_BHNE: queries, keys and values.
        beta_BHN: weights of the tokens, not negative; one of weight 0 is not there.
        ridge_HD: lambda, positive; of one number (H, 1).
        log_decay_BHN: log a_t <= 0; none where None.
        state: what came before.
        return_state: also return the state after the last token.
        chunk_size: C; the result does not depend on it.
        steps: of conjugate gradients; exact, at O(D^3) a token, where None.

    Returns:
        out (B, H, N, E), or (out, state).

    Raises:
        ValueError: if shapes do not fit.
    """
    B, H, N, D = q_BHND.shape
    if k_BHND.shape != q_BHND.shape or v_BHNE.shape[:3] != (B, H, N) or beta_BHN.shape != (B, H, N):
        raise ValueError(
            f"q, k, v and beta must be (B, H, N, D), (B, H, N, D), (B, H, N, E) and (B, H, N), got "
            f"{tuple(q_BHND.shape)}, {tuple(k_BHND.shape)}, {tuple(v_BHNE.shape)} and {tuple(beta_BHN.shape)}"
        )
    if ridge_HD.shape not in ((H, D), (H, 1)):
        raise ValueError(f"ridge must be ({H}, {D}) or ({H}, 1), got {tuple(ridge_HD.shape)}")
    if chunk_size < 1 or (steps is not None and steps < 1):
        raise ValueError(f"chunk_size and steps must be at least 1, got {chunk_size} and {steps}")
    kind = working_dtype(q_BHND.dtype)
    q, k, v, beta = (x.to(kind) for x in (q_BHND, k_BHND, v_BHNE, beta_BHN))
    gate = torch.zeros_like(beta) if log_decay_BHN is None else log_decay_BHN.to(kind)
    ridge = ridge_HD.to(kind)[:, None].expand(H, 1, D)
    if state is None:
        state = MesaState(q.new_zeros(B, H, D, v.shape[-1]), q.new_zeros(B, H, D, D))
    weighted: dict[str, Any] = {"decay": gate.exp(), "return_state": True}
    k_beta = k * beta[..., None]

    def by_keys(x: Tensor) -> tuple[Tensor, Tensor]:
        """x_t H_t, and H after the last token."""
        return linear_attend(x, k_beta, k, state=state.keys, **weighted)

    if steps is None:
        x, keys = _exact(q, k, k_beta, gate, ridge, state.keys, min(chunk_size, max(N, 1)))
    else:
        x = _conjugate_gradients(lambda p: by_keys(p)[0] + p * ridge, q, steps)
        keys = by_keys(q)[1]
    out, values = linear_attend(x, k_beta, v, state=state.values, **weighted)
    out = out.to(v_BHNE.dtype)
    return (out, MesaState(values, keys)) if return_state else out


def _exact(
    q: Tensor, k: Tensor, k_beta: Tensor, gate: Tensor, ridge: Tensor, keys: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """x of each token by Cholesky's factors, and H after the last one."""
    found = []
    for q_C, k_C, weighted_C, gate_C in zip(*(x.split(chunk, 2) for x in (q, k, k_beta, gate)), strict=True):
        total = gate_C.cumsum(-1)
        below = torch.ones(2 * total.shape[-1:], dtype=torch.bool, device=q.device).tril()
        decay = (total[..., None] - total[..., None, :]).masked_fill(~below, -torch.inf).exp()
        products = (k_C[..., None] * weighted_C[..., None, :]).flatten(3)
        every = (decay @ products).unflatten(3, (k.shape[-1], -1)) + total.exp()[..., None, None] * keys[:, :, None]
        factor = torch.linalg.cholesky(every + torch.diag_embed(ridge))
        found.append(torch.cholesky_solve(q_C[..., None], factor)[..., 0])
        keys = every[:, :, -1]
    return (torch.cat(found, 2) if found else q), keys


def _conjugate_gradients(product: Callable[[Tensor], Tensor], q: Tensor, steps: int) -> Tensor:
    """Towards x with product(x) = q, for all tokens at once."""
    x, rest, way = torch.zeros_like(q), q, q
    size = rest.square().sum(-1, keepdim=True)
    tiny = torch.finfo(q.dtype).tiny
    for _ in range(steps):
        pushed = product(way)
        length = size / (way * pushed).sum(-1, keepdim=True).clamp(min=tiny)
        x, rest = x + length * way, rest - length * pushed
        new = rest.square().sum(-1, keepdim=True)
        way, size = rest + new / size.clamp(min=tiny) * way, new
    return x
