"""Other structures than one edge a query: paths, an expanding window, a radius.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim, E width of values, W keys within the
largest window, R radii.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.heads import check_qkv, repeat_heads
from saccade.ops.masks import Mask
from saccade.ops.pattern import GivenMask, Pattern

#: w_r of the paths of length 0, 1 and 2
MEAN = (1 / 3, 1 / 3, 1 / 3)
#: ln of the share that a geometric distribution leaves beyond its 95 % quantile
_TAIL = math.log(0.05)


def along_paths(
    step: Callable[[Tensor], Tensor], values: Sequence[Tensor], weights: Sequence[float] | Tensor
) -> Tensor:
    """sum_r w_r A^r V_r, by Horner's rule: as many products with A as the longest path has edges.

    Args:
        step: A applied to values.
        values: V_r of each length.
        weights: w_r of the lengths 0, 1, ...
    """
    total = weights[-1] * values[-1]
    for weight, value in zip(reversed(weights[:-1]), reversed(values[:-1])):
        total = weight * value + step(total)
    return total


def multi_hop_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    weights: Sequence[float] | Tensor = MEAN,
    mask: GivenMask = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """sum_r w_r A^r V: the value of a node is the mean over the paths that begin there. Memory linear in N.

    Args:
        q_BHND, k_BKMD, v_BKME: of the same tokens; K divides H.
        weights: w_r of the lengths 0, 1, ...; (0, 1) is ordinary attention.
        mask: which edges there are; True = may be chosen.
        causal: no edge to a later token, so no path either.
        scale: D ** -0.5 where None.

    Raises:
        ValueError: if queries and keys are not as many, or there is no weight.
    """
    check_qkv(q_BHND, k_BKMD, v_BKME, tokens="same")
    if not len(weights):
        raise ValueError("weights must be one or more, got none")
    B, H, N, _ = q_BHND.shape
    whole = Pattern.of(mask, B, N, N, heads=H, causal=causal).mask
    k, v = repeat_heads(k_BKMD, H), repeat_heads(v_BKME, H)
    return along_paths(lambda x: attend(q_BHND, k, x, mask=whole, scale=scale), [v] * len(weights), weights)


class Windows(NamedTuple):
    """What an expanding attention found, for each query.

    Attributes:
        weights: P, (B, H, N, W), of the last W of the keys.
        reach: k, the real window (B, H, N); `reach.ceil()` positions count, the asking one among them.
        passes: how many it took, integers (B, H, N).
    """

    weights: Tensor
    reach: Tensor
    passes: Tensor


def expanding_windows(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    *,
    alpha: float | Tensor = 0.1,
    beta: float | Tensor = 0.9,
    mask: GivenMask = None,
    scale: float | None = None,
    slope: Literal["code", "exact"] = "code",
    max_passes: int = 100,
) -> Windows:
    """The weights of `expanding_attend` and the windows that they come from.

    Args:
        q_BHND, k_BKMD: queries and keys.
        alpha, beta, mask, scale, slope, max_passes: as there.

    Raises:
        ValueError: as there.
    """
    check_qkv(q_BHND, k_BKMD, k_BKMD, tokens="last")
    if slope not in ("code", "exact"):
        raise ValueError(f"slope must be 'code' or 'exact', got {slope!r}")
    if max_passes < 1:
        raise ValueError(f"max_passes must be at least 1, got {max_passes}")
    (B, H, N, D), M = q_BHND.shape, k_BKMD.shape[2]
    wide = torch.promote_types(q_BHND.dtype, torch.float32)
    fixed: dict[str, Any] = {"dtype": wide, "device": q_BHND.device}
    a, b = (torch.as_tensor(given, **fixed).detach().expand(B, H, N) for given in (alpha, beta))
    if not q_BHND.is_meta and a.numel() and not bool((torch.stack([a, b]) > 0).all()):
        raise ValueError(f"alpha and beta must be positive, got {alpha} and {beta}")
    pattern = Pattern.of(mask, B, N, M, heads=H, causal=True, offset=M - N)
    place_N1 = torch.arange(M - N, M, **fixed)[:, None]
    distance_NM = place_N1 - torch.arange(M, **fixed)
    allowed = distance_NM > 0
    if pattern.mask is not None:
        allowed = allowed & pattern.mask.dense(N, M, q_BHND.device)
    k = repeat_heads(k_BKMD, H)
    factor = D**-0.5 if scale is None else scale
    scores, first = q_BHND.new_zeros(B, H, N, 0, dtype=wide), M
    steep = 1.0 if slope == "code" else -_TAIL
    reach, passes = torch.zeros(B, H, N, **fixed), torch.zeros(B, H, N, dtype=torch.long, device=q_BHND.device)
    active = torch.ones(B, H, N, dtype=torch.bool, device=q_BHND.device)

    def weigh(scores: Tensor, reach: Tensor) -> Tensor:
        """P of the keys from `first` on."""
        k_BHN1, d_NW = reach[..., None], distance_NM[:, first:]
        seen = allowed[..., first:] & (d_NW < k_BHN1.ceil())
        found = (scores - steep * d_NW / k_BHN1).masked_fill(~seen, torch.finfo(wide).min).softmax(-1)
        return found.masked_fill(~seen, 0.0)

    for number in range(max_passes):
        new = _TAIL / (b / (a + b)).log()
        held, reach = reach, torch.where(active, new, reach)
        passes = passes + active
        # scores are computed as far as the farthest window goes, once
        farthest = M - N + 1 - int(reach.amax().ceil()) if reach.numel() else M
        if (nearer := max(0, farthest)) < first:
            scores = torch.cat([(q_BHND @ k[:, :, nearer:first].mT).to(wide) * factor, scores], -1)
            first = nearer
        d = (weigh(scores.detach(), reach) * distance_NM[:, first:]).sum(-1)
        a, b = a + 1, b + d
        ends = (reach > place_N1[:, 0] + 1) | ((number > 0) & (reach - held < 0.01))
        active = active & ~ends
        if not bool(active.any()):
            break
    return Windows(weigh(scores, reach), reach, passes)


def expanding_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    alpha: float | Tensor = 0.1,
    beta: float | Tensor = 0.9,
    mask: GivenMask = None,
    scale: float | None = None,
    slope: Literal["code", "exact"] = "code",
    max_passes: int = 100,
) -> Tensor:
    """Attention that looks back as far as what it finds there suggests, each query by itself.

    A geometric prior over distance has a Beta(alpha, beta) hyper-prior. Until the window stops to grow: the 95 %
    quantile k of the geometric is the window, P the softmax of s_j - slope d_j in it, and the expected distance under P
    updates the hyper-prior. Only scores within the largest window are computed. Window and slope carry no gradient.

    Args:
        q_BHND: of the last N of the M tokens; the asking token itself is never read, and the first has nothing to read.
        k_BKMD, v_BKME: keys and values; K divides H.
        alpha, beta: of the hyper-prior, numbers or tensors that broadcast to (B, H, N).
        mask: what is hidden besides the future.
        scale: D ** -0.5 where None.
        slope: of the distance: "code" 1 / k, "exact" the prior's own -ln(1 - q) = ln 20 / k.
        max_passes: the most updates.

    Raises:
        ValueError: if the shapes do not fit, or an argument is out of range.
    """
    check_qkv(q_BHND, k_BKMD, v_BKME, tokens="last")
    found = expanding_windows(
        q_BHND,
        k_BKMD,
        alpha=alpha,
        beta=beta,
        mask=mask,
        scale=scale,
        slope=slope,
        max_passes=max_passes,
    )
    v = repeat_heads(v_BKME, q_BHND.shape[1])[:, :, v_BKME.shape[2] - found.weights.shape[-1] :]
    return found.weights.to(v.dtype) @ v


def radius_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    radii: Sequence[int],
    *,
    log_prior_R: Tensor | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_R p(R | x_i) of attention to |i - j| <= R, p(R | x_i) proportional to p(R) mean_(|i - j| <= R) psi(x_i, x_j).

    The exact alternative to an expanding window; differentiable in the prior.

    Args:
        q_BHND, k_BKMD, v_BKME: of the same tokens; K divides H.
        radii: R.
        log_prior_R: log p(R), up to a constant; uniform where None.
        mask: which pairs count.
        scale: D ** -0.5 where None.

    Returns:
        out (B, H, N, E), log p(R | x) (B, H, N, R).

    Raises:
        ValueError: if the shapes or the number of radii do not fit.
    """
    check_qkv(q_BHND, k_BKMD, v_BKME, tokens="same")
    if not radii or min(radii) < 0 or (log_prior_R is not None and log_prior_R.shape != (len(radii),)):
        raise ValueError(f"there must be a prior of each radius, at least one of 0 or more, got radii {tuple(radii)}")
    N, outs, evidence = q_BHND.shape[2], [], []
    for number, radius in enumerate(radii):
        near = masks.window(radius, radius) if mask is None else masks.window(radius, radius) & mask
        out, lse = attend(q_BHND, k_BKMD, v_BKME, mask=near, scale=scale, return_lse=True)
        mean = lse - near.keys_seen(N, N, q_BHND.device).clamp(min=1).log()
        outs.append(out)
        evidence.append(mean if log_prior_R is None else mean + log_prior_R[number])
    joint_BHNR = torch.stack(evidence, -1)
    empty = (joint_BHNR == -torch.inf).all(-1, keepdim=True)  # nothing to read at any radius: zeros
    posterior_BHNR = joint_BHNR.masked_fill(empty, 0.0).log_softmax(-1)
    out_BHNE = torch.einsum("bhnr,rbhne->bhne", posterior_BHNR.exp().to(v_BKME.dtype), torch.stack(outs))
    return out_BHNE, posterior_BHNR
