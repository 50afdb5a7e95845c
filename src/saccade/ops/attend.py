"""The front door of everything of the form score, mask, normalise, aggregate: `attend`, and `plan`, its forecast.

    s_ij = scale * q_i . k_j            or  score(q, k)_ij
    s_ij = score_mod(s_ij, b, h, i, j)
    w_i  = normalize_j(s_ij, over the j that mask allows)
    out_i = sum_j w_ij v_j              lse_i = log sum_j exp(s_ij)

Shape letters: B batch, H query heads, K key heads (K divides H), N queries, M keys, D head dim of q and k,
E head dim of v.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from saccade.ops import masks
from saccade.ops.autocast import one_type
from saccade.ops.backends import BACKENDS, choose, make_plan
from saccade.ops.backends.sdpa import at_once
from saccade.ops.constants import at_home
from saccade.ops.grad import needs_grad
from saccade.ops.heads import refuse_strangers
from saccade.ops.masks import Mask
from saccade.ops.nan import is_suspect, only_where_attended
from saccade.ops.normalizers import check_normalizer
from saccade.ops.planning import Plan, Problem, ScoreFunction, nothing
from saccade.ops.score_mods import Modification, ScoreMod
from saccade.ops.sharding import dealing, in_parts, parts_of

__all__ = ["attend", "plan"]


@overload
def attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    mask: Tensor | Mask | None = None,
    score: ScoreFunction | None = None,
    score_mod: ScoreMod | None = None,
    normalize: Any = "softmax",
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: Literal[False] = False,
    backend: str | None = None,
    memory_mb: float = 64.0,
) -> Tensor: ...


@overload
def attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    mask: Tensor | Mask | None = None,
    score: ScoreFunction | None = None,
    score_mod: ScoreMod | None = None,
    normalize: Any = "softmax",
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: Literal[True],
    backend: str | None = None,
    memory_mb: float = 64.0,
) -> tuple[Tensor, Tensor]: ...


@in_parts
def attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    mask: Tensor | Mask | None = None,
    score: ScoreFunction | None = None,
    score_mod: ScoreMod | None = None,
    normalize: Any = "softmax",
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
    memory_mb: float = 64.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by the path that `plan` names for the same arguments.

    A query that may attend to nothing gives zeros, and -inf as its LSE. Memory is linear in N + M on every path but
    `reference`. NaN reaches the rows that attend to it, on every path and device, compiled or not; on the CPU (not
    compiled) it reaches no others, so that what lies under padding never matters. Elsewhere a kernel may hand what a
    mask hides to rows that it computes in the same tile. Under `saccade.parallel` tensors are this rank's part of a
    sequence, and the mask is of the whole.

    Args:
        q_BHND: queries.
        k_BKMD: keys; K divides H, query head h reads key head h // (H / K).
        v_BKME: values; E may differ from D.
        mask: bool tensor that broadcasts to (B, H, N, M), True = may attend; a mask of `saccade.masks`; or integers
            (S + 1,), the `cu_seqlens` of packed sequences.
        score: another pairwise score than the dot product, called on a tile of queries (B, H, n, D) and a tile of
            keys (B, H, m, D), returns (B, H, n, m). May own parameters. `scale` multiplies it only where given.
        score_mod: one of `saccade.score_mods`, or any function of FlexAttention's signature
            `(score, b, h, q_idx, kv_idx) -> score`, on broadcastable index tensors.
        normalize: "softmax", "sigmoid", "relu", "abs-sum", or a `saccade.ops.normalizers.Normalizer`.
        scale: factor of the dot product, D ** -0.5 where None.
        dropout: probability that a weight is dropped.
        return_lse: also return the natural log of the sum of the exponentials, (B, H, N), softmax only.
        backend: "reference", "sdpa", "blocksparse", "stream", "flex" or "natten"; None lets the planner choose.
        memory_mb: bound of the extra memory of tiled paths, in MiB.

    Returns:
        out (B, H, N, E), or (out, lse) with `return_lse`.

    Raises:
        ValueError: if shapes, dtypes or options do not fit, or the backend asked for cannot do this.
        TypeError: if an argument is of another type.

    >>> import torch, saccade
    >>> q = k = v = torch.randn(1, 2, 8, 4)
    >>> saccade.attend(q, k, v, mask=saccade.masks.causal()).shape
    torch.Size([1, 2, 8, 4])
    """
    if score is None and score_mod is None and not (dropout or return_lse) and backend is None and memory_mb > 0:
        if normalize == "softmax" and (out := at_once(q_BHND, k_BKMD, v_BKME, mask, scale)) is not None:
            return out
    q_BHND, k_BKMD, v_BKME = one_type(q_BHND, k_BKMD, v_BKME)
    problem = problem_of(
        q_BHND, k_BKMD, v_BKME, mask, score, score_mod, normalize, scale, dropout, return_lse, memory_mb
    )
    with at_home(q_BHND):
        return _run(problem, backend, q_BHND, k_BKMD, v_BKME)


def _run(problem: Problem, backend: str | None, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor) -> Any:
    name = choose(problem, backend)
    if 0 in (problem.B, problem.H, problem.N, problem.M):
        mod = problem.score_mod
        found = nothing(q_BHND, k_BKMD, v_BKME, *(mod.tensors() if isinstance(mod, Modification) else ()))
        return found if problem.return_lse else found[0]
    if problem.unseen_keys:
        seen = slice(problem.first_key, problem.first_key + problem.M)
        k_BKMD, v_BKME = k_BKMD[:, :, seen], v_BKME[:, :, seen]
    no_width = problem.E == 0
    if no_width:  # values of no width still have an LSE
        v_BKME, problem.E = v_BKME.new_zeros(*v_BKME.shape[:3], 1), 1
    out, lse = BACKENDS[name].run(problem, q_BHND, k_BKMD, v_BKME)
    if is_suspect(problem, name, q_BHND, k_BKMD, out):
        out, lse = only_where_attended(problem, name, q_BHND, k_BKMD, v_BKME, out, lse)
    out = out[..., :0] if no_width else out
    return (out, lse) if problem.return_lse else out


def plan(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    mask: Tensor | Mask | None = None,
    score: ScoreFunction | None = None,
    score_mod: ScoreMod | None = None,
    normalize: Any = "softmax",
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
    memory_mb: float = 64.0,
    mesh: Any = None,
    balance: str = "contiguous",
    unit: int = 1,
) -> Plan:
    """What `attend` would do with the same arguments: path, reason, FLOPs, bytes, density. Computes nothing.

    The tensors may lie on the "meta" device. With `mesh` they are the whole of a sequence that is shared as under
    `saccade.parallel`, and `Plan.parts` says what each rank computes, sends and receives.

    Args:
        q_BHND, k_BKMD, v_BKME, mask, score, score_mod, normalize, scale, dropout: as in `attend`.
        return_lse, backend, memory_mb: as in `attend`.
        mesh: ranks that share the sequence: how many, one dimension of a `DeviceMesh`, or what `saccade.parallel`
            yields, which knows its own balance and unit.
        balance, unit: how it is dealt to them, as in `saccade.parallel`.

    Raises:
        ValueError: where `attend` would, or if there is no rank.
    """
    problem = problem_of(
        q_BHND, k_BKMD, v_BKME, mask, score, score_mod, normalize, scale, dropout, return_lse, memory_mb
    )
    made = make_plan(problem, backend)
    if mesh is None:
        return made
    ranks, (B, H, N, _), M = dealing(mesh, balance, unit), q_BHND.shape, k_BKMD.shape[2]
    whole = None if mask is None else as_mask(mask, B, H, N, M, q_BHND.device).simplified(N, M)
    parts = parts_of(problem, whole, ranks.layout(N), ranks.layout(M), needs_grad(k_BKMD, v_BKME))
    return replace(made, parts=parts)


def problem_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | Mask | None = None,
    score: ScoreFunction | None = None,
    score_mod: ScoreMod | None = None,
    normalize: Any = "softmax",
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    memory_mb: float = 64.0,
) -> Problem:
    """A call of `attend`, checked, without the tensors' contents.

    Args:
        q, k, v, mask, score, score_mod, normalize, scale, dropout, return_lse, memory_mb: as in `attend`.

    Raises:
        ValueError: if they do not fit together.
    """
    # this stands before every call, however small: names and shapes are read once, and complaints are made elsewhere
    refuse_strangers(q, k, v)
    B, H, N, D = q.shape
    k_B, K, M, k_D = k.shape
    v_B, v_K, v_M, E = v.shape
    if not (k_B == B == v_B):
        raise ValueError(f"query, key and value must have one batch size, got {B}, {k_B} and {v_B}")
    if v_K != K or v_M != M:
        raise ValueError(f"key and value must agree in heads and tokens, got {tuple(k.shape)} and {tuple(v.shape)}")
    if H != K and (H % K if K else H):
        raise ValueError(f"the key heads must divide the query heads ({H}), got {K}")
    if k_D != D and score is None:
        raise ValueError(f"query and key must have one head_dim, got {D} and {k_D}")
    if D == 0:
        raise ValueError("head_dim must be at least 1, got 0")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if memory_mb <= 0:
        raise ValueError(f"memory_mb must be positive, got {memory_mb}")
    if normalize != "softmax":
        check_normalizer(normalize)
    if return_lse and normalize != "softmax":
        raise ValueError(f"return_lse needs normalize='softmax', got {normalize!r}")
    first, end = 0, M
    if mask is not None:
        mask = as_mask(mask, B, H, N, M, q.device).simplified(N, M)
        if mask is not None and score_mod is None:  # which counts keys from the first
            first, end = mask.seen_keys(N, M)
            if 0 < end - first < M:
                mask = mask.from_key(first).simplified(N, end - first)
            else:
                first, end = 0, M
    return Problem(
        B=B,
        H=H,
        K=K,
        N=N,
        M=end - first,
        D=D,
        E=E,
        dtype=q.dtype,
        device=q.device,
        needs_grad=needs_grad(q, k, v, *_checked(score_mod, B, H, N, M, q.device)),
        mask=mask,
        score=score,
        score_mod=score_mod,
        normalize=normalize,
        scale=(D**-0.5 if score is None else 1.0) if scale is None else float(scale),
        dropout=float(dropout),
        return_lse=return_lse,
        memory_mb=float(memory_mb),
        first_key=first,
        unseen_keys=M - (end - first),
    )


def _checked(score_mod: ScoreMod | None, B: int, H: int, N: int, M: int, device: torch.device) -> list[Tensor]:
    """The tensors of a modification that has a name, once it is known to fit."""
    if not isinstance(score_mod, Modification):
        if score_mod is not None and not callable(score_mod):
            raise TypeError(f"score_mod must be one of saccade.score_mods, or a function, got {score_mod!r}")
        return []
    why_not = score_mod.refusal(B, H, N, M)
    if why_not:
        raise ValueError(why_not)
    tensors = score_mod.tensors()
    if device.type != "meta" and any(x.device != device for x in tensors):
        raise ValueError(f"{score_mod!r} is on {tensors[0].device}, but query is on {device}")
    return tensors


def as_mask(mask: Tensor | Mask, B: int, H: int, N: int, M: int, device: torch.device) -> Mask:
    """What `attend` was given as its mask, as an object that is known to fit.

    Args:
        mask: as in `attend`.
        B, H, N, M: what it has to fit.
        device: on which it has to be; any, where that is "meta".

    Raises:
        ValueError: if it does not fit.
    """
    if isinstance(mask, Tensor):
        mask = masks.packed(mask) if mask.ndim == 1 else masks.dense(mask)
    if not isinstance(mask, Mask):
        raise ValueError(f"mask must be a bool tensor or a mask of saccade.masks, got {type(mask).__name__}")
    if mask.batch not in (1, B) or mask.heads not in (1, H):
        raise ValueError(f"mask is for {mask.batch} batch rows and {mask.heads} heads, got {B} and {H}")
    mask.check(N, M)
    for tensor in mask.tensors():
        if tensor.device != device and device.type != "meta":
            raise ValueError(f"mask is on {tensor.device}, but query is on {device}: use mask.to({str(device)!r})")
    return mask
