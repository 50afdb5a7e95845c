"""LKCA: the mixing by a static kernel in its three equal forms, and the choice among them.

Shape letters: B batch, C channels, h heads of d = C / h channels, H, W height and width, N = H W tokens, k kernel rows,
l kernel columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.autocast import working_dtype

IMPLEMENTATIONS = ("conv", "attention", "fft")


def fit(kernel_hkl: Tensor, H: int, W: int) -> Tensor:
    """The kernel as (h, 2H - 1, 2W - 1): cut to its centre where it is larger, zeros around it where smaller.

    Args:
        kernel_hkl: K, of odd sizes.
        H, W: the grid.
    """
    margins = [full - size for full, size in zip((2 * W - 1, 2 * H - 1), reversed(kernel_hkl.shape[1:]), strict=True)]
    return F.pad(kernel_hkl, [margin // 2 for margin in margins for _ in range(2)])


def attention_matrix(kernel_hkl: Tensor, H: int, W: int) -> Tensor:
    """A, (h, N, N): the windows of K, the lower right one first, each a row.

    Args:
        kernel_hkl: K, of odd sizes.
        H, W: the grid.
    """
    windows_hHWHW = fit(kernel_hkl, H, W).unfold(1, H, 1).unfold(2, W, 1)
    return windows_hHWHW.flip(1, 2).reshape(-1, H * W, H * W)


def mix(v_BNC: Tensor, kernel_hkl: Tensor, H: int, W: int, implementation: str | None = None) -> Tensor:
    """O, (B, N, C), of values in raster order: channels in h equal runs, each mixed by its kernel (odd sizes).

    Args:
        v_BNC: V.
        kernel_hkl: K; h divides C.
        H, W: the grid, of N tokens.
        implementation: of `IMPLEMENTATIONS`; the one that `cheapest` names where None.

    Raises:
        ValueError: if `implementation` is unknown.
    """
    C = v_BNC.shape[2]
    h = kernel_hkl.shape[0]
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation must be None or one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    if implementation is None:
        implementation = cheapest(v_BNC, kernel_hkl, H, W)
    if implementation == "attention":
        v_BhNd = v_BNC.unflatten(2, (h, -1)).transpose(1, 2)
        return (attention_matrix(kernel_hkl, H, W) @ v_BhNd).transpose(1, 2).flatten(2)
    if implementation == "fft":
        return _fourier(v_BNC, kernel_hkl, H, W)
    # a kernel per channel, equal ones in a head: depthwise convolutions are fast, those of one channel are not
    over = [min(0, full - size) // 2 for full, size in zip((2 * W - 1, 2 * H - 1), reversed(kernel_hkl.shape[1:]))]
    kernel_C1kl = F.pad(kernel_hkl, [over[0]] * 2 + [over[1]] * 2).repeat_interleave(C // h, 0)[:, None]
    padding = (kernel_C1kl.shape[2] // 2, kernel_C1kl.shape[3] // 2)
    v_BCHW = v_BNC.unflatten(1, (H, W)).permute(0, 3, 1, 2)
    return F.conv2d(v_BCHW, kernel_C1kl, padding=padding, groups=C).flatten(2).transpose(1, 2)


def cheapest(v_BNC: Tensor, kernel_hkl: Tensor, H: int, W: int) -> str:
    """The implementation of `mix` with the least expected time, by multiply-adds with weights measured on a CPU.

    A large depthwise convolution is fast forwards and a dozen times slower with its gradients; entries of A cost as
    much to lay out as some hundreds of multiply-adds in a matrix product; so do transformed pixels.

    Args:
        v_BNC, kernel_hkl, H, W: as in `mix`.
    """
    B, N, C = v_BNC.shape
    h, k, l = kernel_hkl.shape
    learns = torch.is_grad_enabled() and (v_BNC.requires_grad or kernel_hkl.requires_grad)
    taps = min(k, 2 * H - 1) * min(l, 2 * W - 1)
    costs = {
        "conv": (12 if learns else 0.75) * taps * N * B * C,
        "attention": N * N * (B * C + 350 * h),
        "fft": 1100 * 9 * N * B * C,
    }
    return min(costs, key=lambda name: costs[name])


def _fourier(v_BNC: Tensor, kernel_hkl: Tensor, H: int, W: int) -> Tensor:
    """Cross-correlation as a product of spectra, in single precision at least; padded so that nothing wraps around."""
    dtype = working_dtype(v_BNC.dtype)
    full_hkl = fit(kernel_hkl, H, W).to(dtype)
    size = (3 * H - 2, 3 * W - 2)
    v_BhdHW = v_BNC.to(dtype).unflatten(1, (H, W)).unflatten(3, (kernel_hkl.shape[0], -1)).permute(0, 3, 4, 1, 2)
    spectrum = torch.fft.rfft2(v_BhdHW, size) * torch.fft.rfft2(full_hkl, size).conj()[:, None]
    # position 0 of the product has the kernel's corner on the map's, its centre is H - 1, W - 1 further on
    o_BhdHW = torch.fft.irfft2(spectrum, size).roll((H - 1, W - 1), (3, 4))[..., :H, :W]
    return o_BhdHW.permute(0, 3, 4, 1, 2).reshape(v_BNC.shape).to(v_BNC.dtype)
