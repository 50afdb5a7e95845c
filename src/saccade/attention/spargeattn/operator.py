"""SpargeAttn: the mathematics, as functions of tensors.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim, E width of values; n, m blocks of
queries and keys, q and k tokens per block.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.folder import write_text
from saccade.ops.heads import check_qkv
from saccade.ops.hilbert import hilbert_order as hilbert_order
from saccade.ops.masks import Mask
from saccade.ops.selection import block_causal, block_sparsity, pool_blocks, top_blocks

#: a threshold for all heads, or one per query head
PerHead = float | Tensor | Sequence[float]


_LOG2E = 1 / math.log(2)


def spargeattn_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    causal: bool = False,
    similarity_threshold: PerHead | None = None,
    cdf_threshold: PerHead | None = None,
    top_k: PerHead | None = None,
    pv_threshold: PerHead | None = None,
    attention_sink: bool = False,
    smooth_k: bool = True,
    quantize: bool = False,
    block_q: int = 128,
    block_k: int = 64,
    pv_rows: int | None = None,
    scale: float | None = None,
    short_blocks: Literal["measure", "keep"] = "measure",
    return_map: bool = False,
) -> Any:
    """Attention over the blocks that `sparge_block_map` keeps; `similarity_threshold=1` keeps all.

    Gradients flow through the kept blocks. Memory is linear in N + M; with `pv_threshold` that holds for inference
    only (stage 2 is here for its result: a loop over key blocks that skips no work).

    Args:
        q_BHND, k_BKMD, v_BKME: K divides H; E may differ from D.
        causal: no query sees a later key. With N < M the queries are the last of the tokens, and all is dense.
        similarity_threshold, cdf_threshold, top_k, attention_sink, block_q, block_k, short_blocks: see
            `sparge_block_map`.
        pv_threshold: lambda >= 0 of stage 2, for all or per head; None leaves stage 2 out.
        smooth_k: predict (and quantise) from k less its mean over the sequence.
        quantize: q and smoothed k go through INT8, one scale per block, as in the authors' kernels; inference only.
        pv_rows: rows that stage 2 skips together , a divisor of `block_q`; where None, 32 (a warp of the authors'
            kernels) or what `block_q` has in common with it.
        scale: factor of the dot product, D ** -0.5 where None.
        return_map: also return the blocks that were kept.

    Returns:
        out (B, H, N, E); with `return_map` also the map (B, H, n, m), bool.

    Raises:
        ValueError: if shapes or thresholds do not fit.
    """
    check_qkv(q_BHND, k_BKMD, v_BKME)
    H, N, D = q_BHND.shape[1:]
    M = k_BKMD.shape[2]
    scale = D**-0.5 if scale is None else float(scale)
    if causal and N > M:
        raise ValueError(f"with a causal mask the queries are the last of the tokens: at most {M}, got {N}")
    pv_rows = math.gcd(32, block_q) if pv_rows is None else pv_rows
    if pv_threshold is not None and (pv_rows < 1 or block_q % pv_rows):
        raise ValueError(f"pv_rows must divide block_q ({block_q}), got {pv_rows}")
    if quantize and torch.is_grad_enabled() and (q_BHND.requires_grad or k_BKMD.requires_grad):
        raise ValueError("quantize=True has no gradient: call it under torch.no_grad()")
    smoothed = k_BKMD - k_BKMD.mean(2, keepdim=True) if smooth_k and M else k_BKMD
    keep_BHnm = sparge_block_map(
        q_BHND,
        smoothed,
        causal=causal,
        similarity_threshold=similarity_threshold,
        cdf_threshold=cdf_threshold,
        top_k=top_k,
        attention_sink=attention_sink,
        block_q=block_q,
        block_k=block_k,
        scale=scale,
        short_blocks=short_blocks,
    )
    dense = causal and N < M
    if dense:
        keep_BHnm = torch.ones_like(keep_BHnm)
    elif causal:
        keep_BHnm = _cover(keep_BHnm, block_q, block_k)

    if quantize:
        q_BHND, k_BKMD = _int8(q_BHND.float() * (scale * _LOG2E), block_q), _int8(smoothed.float(), block_k)
        q_BHND, k_BKMD, scale = q_BHND.to(v_BKME.dtype), k_BKMD.to(v_BKME.dtype), math.log(2)
    if pv_threshold is not None and not dense:
        threshold = _per_head(pv_threshold, "pv_threshold", H, q_BHND.device, 0.0)
        out = _two_stages(q_BHND, k_BKMD, v_BKME, keep_BHnm, threshold, block_q, block_k, pv_rows, causal, scale)
    else:
        mask: Mask | None = None if dense else masks.blocks(keep_BHnm, (block_q, block_k))
        if causal:
            mask = masks.causal(M - N) if mask is None else mask & masks.causal()
        out = attend(q_BHND, k_BKMD, v_BKME, mask=mask, scale=scale)
    return (out, keep_BHnm) if return_map else out


@torch.no_grad()
def sparge_block_map(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    *,
    causal: bool = False,
    similarity_threshold: PerHead | None = None,
    cdf_threshold: PerHead | None = None,
    top_k: PerHead | None = None,
    attention_sink: bool = False,
    block_q: int = 128,
    block_k: int = 64,
    scale: float | None = None,
    short_blocks: Literal["measure", "keep"] = "measure",
) -> Tensor:
    """Which blocks matter, from the means of q and of (smoothed) k: bool (B, H, ceil(N / block_q), ceil(M / block_k)).

    Time O(N M D / (block_q block_k) + (N + M) D) per head.

    Args:
        causal: leave out blocks that lie strictly in the future of their query block.
        similarity_threshold: theta; 0.6 where None, or -0.1 (every block counts as similar) with `top_k`. At 1 or more
            all blocks are kept, at -1 or less none by this rule.
        cdf_threshold: tau, 0.98 where None.
        top_k: instead of tau, the share of all key blocks that each row keeps (0 to 1), at least one.
        attention_sink: always keep the first key block.
        short_blocks: "measure" the self-similarity of a short last block on its tokens, or always "keep" it, as the
            authors' code does.

    Raises:
        ValueError: if shapes or thresholds do not fit.
    """
    check_qkv(q_BHND, k_BKMD, k_BKMD)
    B, H, N, D = q_BHND.shape
    K, M = k_BKMD.shape[1:3]
    if block_q < 1 or block_k < 1:
        raise ValueError(f"block_q and block_k must be at least 1, got {block_q} and {block_k}")
    if top_k is not None and cdf_threshold is not None:
        raise ValueError("either cdf_threshold or top_k decides how many blocks are kept, got both")
    if short_blocks not in ("measure", "keep"):
        raise ValueError(f"short_blocks must be 'measure' or 'keep', got {short_blocks!r}")
    device = q_BHND.device
    default = 0.6 if top_k is None else -0.1
    theta = _per_head(
        default if similarity_threshold is None else similarity_threshold, "similarity_threshold", H, device
    )
    n, m = -(-N // block_q), -(-M // block_k)
    if top_k is None:
        tau = _per_head(0.98 if cdf_threshold is None else cdf_threshold, "cdf_threshold", H, device, 0.0)
    else:
        fraction = _per_head(top_k, "top_k", H, device, 0.0, 1.0)
    if 0 in (B, n, m):
        return torch.ones(B, H, n, m, dtype=torch.bool, device=device)

    q_BHnD, similarity_BHn = block_statistics(q_BHND, block_q)
    k_BHmD, similarity_BHm = (x.repeat_interleave(H // K, 1) for x in block_statistics(k_BKMD, block_k))
    similar_BHn, similar_BHm = similarity_BHn > theta[:, None], similarity_BHm > theta[:, None]
    if short_blocks == "keep":
        similar_BHn[..., N // block_q :] = False
        similar_BHm[..., M // block_k :] = False

    scores = q_BHnD @ k_BHmD.mT * (D**-0.5 if scale is None else scale)
    absent = ~similar_BHm[:, :, None]
    past = block_causal(n, m, block_q, block_k, device=device) if causal else None
    if past is not None:
        absent = absent | ~past
    # a row that has no candidate at all is NaN here, as in the authors' code; its blocks are kept by the next rules
    share = scores.masked_fill(absent, float("-inf")).softmax(-1)
    if top_k is None:
        keep = top_blocks(share, p=tau[:, None, None])
    else:
        count = (fraction.double() * m).floor().long().clamp(min=1)
        keep = top_blocks(share, at_least=count[:, None, None])
    keep = keep | ~similar_BHm[:, :, None] | ~similar_BHn[..., None]
    if past is not None:
        keep = keep & past
    if attention_sink:
        keep[..., 0] = True
    return keep


def sparge_sparsity(keep_BHnm: Tensor, *, causal: bool = False, block_q: int = 128, block_k: int = 64) -> Tensor:
    """Share of the blocks left out, (B, H); under a causal mask, of those that are not wholly in the future."""
    n, m = keep_BHnm.shape[2:]
    return block_sparsity(keep_BHnm, block_causal(n, m, block_q, block_k, device=keep_BHnm.device) if causal else None)


def self_similarity(x_BHND: Tensor, block_size: int) -> Tensor:
    """Mean of all entries of X X^T over each block's unit rows, (B, H, blocks), fp32: 1 where all point one way."""
    return block_statistics(x_BHND, block_size)[1]


def block_statistics(x_BHND: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean (B, H, n, D) and self-similarity (B, H, n) of each block's tokens."""
    x = x_BHND.float()
    return pool_blocks(x, size), pool_blocks(F.normalize(x, dim=-1), size).square().sum(-1)


def _per_head(
    value: PerHead,
    name: str,
    heads: int,
    device: torch.device,
    low: float = -math.inf,
    high: float = math.inf,
) -> Tensor:
    """One threshold per head; the range is checked for numbers (looking into a tensor would wait for the device)."""
    numbers = [] if isinstance(value, Tensor) else value if isinstance(value, (tuple, list)) else [value]
    if not all(isinstance(number, (int, float)) and low <= number <= high for number in numbers):
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {value}")
    per_head = torch.as_tensor(value, dtype=torch.float32, device=device)
    if per_head.ndim > 1 or (per_head.ndim == 1 and per_head.shape[0] != heads):
        raise ValueError(f"{name} must be one number or one per head ({heads}), got shape {tuple(per_head.shape)}")
    return per_head.expand(heads)


def _cover(keep_BHnm: Tensor, block_q: int, block_k: int) -> Tensor:
    """Keep the first query's own block wherever it sees none of the kept ones."""
    n, m = keep_BHnm.shape[2:]
    own_n = torch.arange(n, device=keep_BHnm.device) * block_q // block_k
    block_m = torch.arange(m, device=keep_BHnm.device)
    blind = ~(keep_BHnm & (block_m <= own_n[:, None])).any(-1, keepdim=True)
    return keep_BHnm | (blind & (block_m == own_n[:, None]))


def _int8(x_BHND: Tensor, block_size: int) -> Tensor:
    """To INT8 and back: scale = max|x| / 127 + 1e-7 per block, half away from zero."""
    N = x_BHND.shape[2]
    blocks = F.pad(x_BHND, (0, 0, 0, -N % block_size)).unflatten(2, (-1, block_size))
    scale = blocks.abs().amax((3, 4), keepdim=True) / 127 + 1e-7
    return ((blocks / scale + 0.5 * blocks.sign()).trunc() * scale).flatten(2, 3)[:, :, :N]


def _two_stages(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    keep_BHnm: Tensor,
    threshold_H: Tensor,
    block_q: int,
    block_k: int,
    rows: int,
    causal: bool,
    scale: float,
) -> Tensor:
    """The online softmax over key blocks with the softmax-aware skip; all query blocks at once."""
    (B, H, N, _), M, E = q_BHND.shape, k_BKMD.shape[2], v_BKME.shape[3]
    wide = torch.float64 if q_BHND.dtype == torch.float64 else torch.float32
    group = H // k_BKMD.shape[1]
    q = F.pad(q_BHND.to(wide) * (scale * _LOG2E), (0, 0, 0, -N % block_q))
    L = q.shape[2]
    position = torch.arange(L, device=q.device)
    top = q.new_full((B, H, L), float("-inf"))
    total, out = q.new_zeros(B, H, L), q.new_zeros(B, H, L, E)
    for j in range(keep_BHnm.shape[3]):
        first, last = j * block_k, min((j + 1) * block_k, M)
        k, v = (x[:, :, first:last].to(wide).repeat_interleave(group, 1) for x in (k_BKMD, v_BKME))
        seen = keep_BHnm[..., j].repeat_interleave(block_q, 2)[..., None] & (position < N)[:, None]
        if causal:
            seen = seen & (position[:, None] >= torch.arange(first, last, device=q.device))
        scores = (q @ k.mT).masked_fill(~seen, float("-inf"))
        here = scores.amax(-1)
        new_top = torch.maximum(top, here)
        gain = torch.where(here == float("-inf"), float("-inf"), here - top)
        worth = gain.unflatten(2, (-1, rows)).amax(-1) + threshold_H[:, None] > 0
        worth = worth.repeat_interleave(rows, 2)
        new_top = torch.where(worth, new_top, top)
        safe = new_top.masked_fill(new_top == float("-inf"), 0.0)
        weights = torch.where(worth[..., None], (scores - safe[..., None]).exp2(), 0.0)
        decay = (top - safe).exp2()
        total = total * decay + weights.sum(-1)
        out = out * decay[..., None] + weights @ v
        top = new_top
    out = out / total.masked_fill(total == 0, 1.0)[..., None]
    return out[:, :, :N].to(q_BHND.dtype)


@dataclass(frozen=True)
class SpargeThresholds:
    """Calibrated thresholds of one layer, one of each per query head.

    Attributes:
        similarity, cdf, pv: theta, tau, lambda; a head with theta = tau = 1 is dense.
        sparsity: mean share of blocks left out on the calibration inputs.
    """

    similarity: tuple[float, ...]
    cdf: tuple[float, ...]
    pv: tuple[float, ...]
    sparsity: tuple[float, ...]

    def options(self, *, stage_2: bool = True) -> dict[str, Any]:
        """Keyword arguments for `spargeattn_attend`, with the sink that the authors add after tuning."""
        options: dict[str, Any] = {
            "similarity_threshold": self.similarity,
            "cdf_threshold": self.cdf,
            "attention_sink": True,
        }
        return options | ({"pv_threshold": self.pv} if stage_2 else {})

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_text(Path(path), json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, path: str | Path) -> SpargeThresholds:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        try:
            found = {name: tuple(map(float, row)) for name, row in json.loads(Path(path).read_text("utf-8")).items()}
            thresholds = cls(**found)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} holds no SpargeAttn thresholds: {error}") from error
        if len({len(row) for row in found.values()}) != 1:
            raise ValueError(f"{path} holds thresholds for different numbers of heads")
        return thresholds


@torch.no_grad()
def calibrate_spargeattn(
    inputs: Sequence[tuple[Tensor, Tensor, Tensor]],
    *,
    causal: bool = False,
    l1: float = 0.07,
    pv_l1: float = 0.08,
    block_q: int = 128,
    block_k: int = 64,
    scale: float | None = None,
    smooth_k: bool = True,
) -> SpargeThresholds:
    """Thresholds per head that keep the relative L1 error, sum |sparse - dense| / sum |dense|, below a budget.

    On each input, theta rises from -1 in steps of 1/16 for as long as the sparsity is at least 0.1; for each, the
    smallest tau with an error below `l1` is found by bisection (to 1e-3). For the theta of greatest sparsity, so is
    the smallest lambda with an error below `pv_l1` (from 20, to 0.1). The inputs' results are grouped by theta in
    cells of 2/16; the cell of greatest summed sparsity gives the maxima of its thetas, taus and lambdas. Heads with a
    mean sparsity of at most 0.1 become dense.

    Args:
        inputs: (q, k, v) of the same layer on different data; the paper takes five.
        l1, pv_l1: the budgets of stage 1 and of both stages, pv_l1 > l1.

    Raises:
        ValueError: if there are no inputs or the budgets do not rise.
    """
    if not inputs:
        raise ValueError("there must be at least one input to calibrate on, got none")
    if not 0 < l1 < pv_l1:
        raise ValueError(f"the budgets must be 0 < l1 < pv_l1, got {l1} and {pv_l1}")
    heads = inputs[0][0].shape[1]
    fixed: dict[str, Any] = {"causal": causal, "block_q": block_q, "block_k": block_k, "scale": scale}
    fixed["smooth_k"] = smooth_k
    found = torch.stack([_calibrate_one(q, k, v, fixed, l1, pv_l1) for q, k, v in inputs])  # inputs, heads, 4

    theta, sparsity = found[..., 0], found[..., 3]
    cell = ((theta + 1) * 8).floor().long()
    summed = torch.zeros(heads, 17).scatter_add_(1, cell.T, sparsity.T)
    inside = cell == summed.argmax(1)
    best = found[..., :3].masked_fill(~inside[..., None], float("-inf")).amax(0)
    mean = sparsity.mean(0)
    best[mean <= 0.1, :2] = 1.0
    rows = [tuple(row) for row in best.T.tolist()]
    return SpargeThresholds(rows[0], rows[1], rows[2], tuple(mean.tolist()))


def _calibrate_one(q: Tensor, k: Tensor, v: Tensor, fixed: dict[str, Any], l1: float, pv_l1: float) -> Tensor:
    """theta, tau, lambda and sparsity of each head on one input, (H, 4)."""
    heads = q.shape[1]
    mask = masks.causal() if fixed["causal"] else None
    dense = attend(q, k, v, mask=mask, scale=fixed["scale"]).double()
    size = dense.abs().sum((0, 2, 3))

    def run(theta: Tensor, tau: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        out, keep = spargeattn_attend(
            q, k, v, similarity_threshold=theta, cdf_threshold=tau, return_map=True, **fixed, **more
        )
        sparsity = sparge_sparsity(keep, causal=fixed["causal"], block_q=fixed["block_q"], block_k=fixed["block_k"])
        return ((out.double() - dense).abs().sum((0, 2, 3)) / size).cpu(), sparsity.mean(0).cpu()

    best = torch.tensor([1.0, 1.0, 50.0, 0.0]).repeat(heads, 1)
    rising = torch.ones(heads, dtype=torch.bool)
    for step in range(32):
        theta = torch.full((heads,), -1 + step / 16)
        tau = _bisect(lambda t, theta=theta: run(theta, t)[0] < l1, heads, 1.0, 0.1, 1e-3)
        _, sparsity = run(theta, tau)
        better = rising & (sparsity > best[:, 3])
        row = torch.stack([theta, tau, torch.full_like(tau, 50.0), sparsity], 1)
        best = torch.where(better[:, None], row, best)
        rising &= sparsity >= 0.1
        if not rising.any():
            break
    theta, tau = best[:, 0], best[:, 1]
    best[:, 2] = _bisect(lambda t: run(theta, tau, pv_threshold=t)[0] < pv_l1, heads, 50.0, 20.0, 0.1)
    return best


def _bisect(good: Any, heads: int, high: float, start: float, resolution: float) -> Tensor:
    """The smallest value per head, between 0 and `high`, that is good; `high` where none below it is."""
    low_H, high_H, value_H = torch.zeros(heads), torch.full((heads,), high), torch.full((heads,), start)
    while (high_H - low_H).max() > resolution:
        fine = good(value_H)
        high_H, low_H = torch.where(fine, value_H, high_H), torch.where(fine, low_H, value_H)
        value_H = (low_H + high_H) / 2
    return high_H
