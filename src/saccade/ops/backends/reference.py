"""The oracle: the definition of `attend`, line by line, on the full N x M scores."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.autocast import working_dtype
from saccade.ops.heads import repeat_heads
from saccade.ops.normalizers import Normalizer
from saccade.ops.pairs import for_pairs, has_to_be_mapped
from saccade.ops.planning import Problem
from saccade.ops.score_mods import Modification, ScoreMod


def refusal(problem: Problem) -> str | None:
    return None


def relative_time(problem: Problem) -> float:
    return 3.0


def extra_bytes(problem: Problem) -> int:
    return 2 * problem.B * problem.H * problem.N * problem.M * max(4, problem.dtype.itemsize)


def run(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    out_dtype = q.dtype
    dtype = working_dtype(q.dtype)
    k, v = (repeat_heads(x, problem.H) for x in (k, v))
    v = v.to(dtype)

    # a score of the user's has parameters in the inputs' dtype
    scores = q.to(dtype) @ k.to(dtype).mT if problem.score is None else problem.score(q, k).to(dtype)
    scores = scores * problem.scale
    if problem.score_mod is not None:
        scores = _modified(problem.score_mod, scores)
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if problem.mask is not None:
        allowed = problem.mask.dense(problem.N, problem.M, q.device).expand_as(scores)

    lse = None
    if isinstance(problem.normalize, Normalizer):
        weights = problem.normalize.dense(scores, allowed)
    elif problem.normalize == "softmax":
        scores = scores.masked_fill(~allowed, float("-inf"))
        empty = (scores == float("-inf")).all(-1, keepdim=True)
        safe = scores.masked_fill(empty, 0.0)
        weights = safe.softmax(-1).masked_fill(empty, 0.0)
        lse = safe.logsumexp(-1).masked_fill(empty[..., 0], float("-inf")) if problem.M else scores.sum(-1) - torch.inf
    elif problem.normalize == "sigmoid":
        weights = scores.sigmoid().masked_fill(~allowed, 0.0)
    elif problem.normalize == "relu":
        weights = scores.relu().masked_fill(~allowed, 0.0)
    else:
        scores = scores.masked_fill(~allowed, 0.0)
        weights = scores / scores.abs().sum(-1, keepdim=True).clamp(min=1.0)
    if problem.dropout:
        weights = torch.nn.functional.dropout(weights, problem.dropout)
    return (weights @ v).to(out_dtype), lse


def _modified(mod: ScoreMod, scores: Tensor) -> Tensor:
    index = _indices(scores)
    # whether a function is for scalars is seen in values, which a graph does not have
    known = isinstance(mod, Modification) or torch.compiler.is_compiling()
    if known or not has_to_be_mapped(mod, scores, *index):
        return mod(scores, *index)
    return for_pairs(mod, scores, *index, scalars=True)


def _indices(scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, N, M = scores.shape
    b, h, q, k = (torch.arange(length, device=scores.device) for length in (B, H, N, M))
    return b[:, None, None, None], h[:, None, None], q[:, None], k
