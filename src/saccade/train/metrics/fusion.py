"""How good an image is that was made of two: the measures of image fusion, each by one definition.

| name | what | of the two inputs | best |
|---|---|---|---|
| `EN` | entropy of the grey levels, bits (Roberts, van Aardt, Ahmed 2008) | none | high |
| `SF` | spatial frequency (Eskicioglu, Fisher 1995) | none | high |
| `AG` | average gradient (Cui, Feng, Xu, Li, Chen 2015) | none | high |
| `SD` | standard deviation (Rao 1997) | none | high |
| `MI` | mutual information, bits (Qu, Zhang, Yan 2002) | sum | high |
| `NMI` | the same over entropies (Hossny, Nahavandi, Creighton 2008) | sum | high, at most 2 |
| `FMI` | mutual information of gradients in windows (Haghighat, Razian 2014) | mean | high, at most 1 |
| `Qabf` | edges that were kept (Xydeas, Petrovic 2000) | weighted by edges | high, below 1 |
| `SCD` | correlations of differences (Aslantas, Bendes 2015) | sum | high, at most 2 |
| `VIF` | visual information fidelity, of pixels (Sheikh, Bovik 2006) | mean | high |
| `SSIM` | structural similarity (Wang and others 2004) | mean | high, at most 1 |
| `PSNR` | of the mean squared error of both, dB (Ma, Ma, Li 2019) | one error | high |

Implementations of these disagree by range, rounding, borders and sums; here the image is grey, its range (`data_range`)
stands for 0 to 255, and only the histograms of `EN`, `MI` and `NMI` round, to 256 levels. So an image in [0, 1] and the
same times 255 give the same figures. VIF, SSIM and PSNR are torchmetrics' (extra `saccade[metrics]`).

Shape letters: H height, W width, L grey levels, N windows, P pixels of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.extras import need
from saccade.models.images import luma, read_image
from saccade.ops.structure import sobel

#: what the range stands for, and the grey levels of histograms
TOP, LEVELS = 255.0, 256
#: side of FMI's windows
WINDOW = 3
#: Xydeas and Petrovic's constants: the two sigmoids Gamma / (1 + exp(kappa (x - sigma))) of strength and orientation
STRENGTH, ORIENTATION = (0.9994, -15.0, 0.5), (0.9879, -22.0, 0.8)
#: sides of the smallest image: VIF's windows at its coarsest scale
LEAST = 41
#: windows whose joint distributions are held at a time
_CHUNK = 16384


def entropy(x_HW: Tensor) -> float:
    """EN = -sum_l p_l log2 p_l over the grey levels of an image in [0, 255]."""
    return _entropy(_levels(x_HW).bincount(minlength=LEVELS))


def spatial_frequency(x_HW: Tensor) -> float:
    """SF = sqrt(RF^2 + CF^2), RF^2 and CF^2 the sums of squared differences along rows and columns over H W."""
    rows, columns = x_HW.diff(dim=1).square().sum(), x_HW.diff(dim=0).square().sum()
    return math.sqrt(float(rows + columns) / x_HW.numel())


def average_gradient(x_HW: Tensor) -> float:
    """AG = the mean of sqrt((d_x^2 + d_y^2) / 2) over (H - 1) (W - 1) pixels, d the differences to the next."""
    right, below = x_HW.diff(dim=1)[:-1], x_HW.diff(dim=0)[:, :-1]
    return float(((right.square() + below.square()) / 2).sqrt().mean())


def standard_deviation(x_HW: Tensor) -> float:
    """SD, divided by H W."""
    return float(x_HW.std(correction=0))


def mutual_information(a_HW: Tensor, b_HW: Tensor) -> float:
    """I(A; B) = H(A) + H(B) - H(A, B) of the grey levels, bits."""
    joint_LL = (_levels(a_HW) * LEVELS + _levels(b_HW)).bincount(minlength=LEVELS**2).view(LEVELS, LEVELS)
    return _entropy(joint_LL.sum(0)) + _entropy(joint_LL.sum(1)) - _entropy(joint_LL.flatten())


def normalised_mutual_information(a_HW: Tensor, b_HW: Tensor) -> float:
    """2 I(A; B) / (H(A) + H(B)); 0 where both images are one level."""
    total = entropy(a_HW) + entropy(b_HW)
    return 2 * mutual_information(a_HW, b_HW) / total if total > 0 else 0.0


def feature_mutual_information(a_HW: Tensor, b_HW: Tensor) -> float:
    """The mean over 3 x 3 windows of 2 I(A; B) / (H(A) + H(B)), A and B distributions over a window's pixels.

    The features are strengths of Sobel's gradient. A window's P values, less the smallest, over their sum, are a
    distribution over pixels 1 .. P, read row by row (equal values: all alike); two equal distributions count 1. The
    joint distribution is a mixture of the independent one and of the one with the most, or where the values correlate
    negatively the least, dependence that these marginals allow (Frechet's bounds), so that its correlation is the
    values': see `joint_distribution`.
    """
    windows_aNP, windows_bNP = (F.unfold(_strength(x)[None, None], WINDOW)[0].T for x in (a_HW, b_HW))
    total = 0.0
    for a_NP, b_NP in zip(windows_aNP.split(_CHUNK), windows_bNP.split(_CHUNK)):
        p_NP, q_NP = _distribution(a_NP), _distribution(b_NP)
        single = _bits(p_NP) + _bits(q_NP)
        shared = single - _bits(joint_distribution(p_NP, q_NP).flatten(1))
        told = 2 * shared / single.clamp(min=1e-9)
        total += float(torch.where((p_NP == q_NP).all(1), 1.0, told).sum())
    return total / len(windows_aNP)


def joint_distribution(p_NP: Tensor, q_NP: Tensor) -> Tensor:
    """(N, P, P): phi M + (1 - phi) p q^T, M the joint distribution of p and q with the extreme correlation.

    With cumulated P and Q the extremes are min(P_i, Q_j), and max(P_i + Q_j - 1, 0) where the correlation of the values
    p and q over the pixels is negative; phi is that correlation over the extreme's (Hoeffding: a covariance is the sum
    of joint less product over all i, j), between 0 and 1.

    Args:
        p_NP, q_NP: rows that sum to 1.
    """
    P_NP, Q_NP = p_NP.cumsum(1)[:, :, None], q_NP.cumsum(1)[:, None]
    about_p, about_q = p_NP - p_NP.mean(1, keepdim=True), q_NP - q_NP.mean(1, keepdim=True)
    norms = (about_p.square().sum(1) * about_q.square().sum(1)).sqrt()
    wanted_N = torch.where(norms > 1e-12, (about_p * about_q).sum(1) / norms.clamp(min=1e-12), 0.0)
    most = torch.minimum(P_NP, Q_NP)
    least = (P_NP + Q_NP - 1).clamp(min=0)
    extreme = torch.where(wanted_N[:, None, None] >= 0, most, least)
    spread_N = (_variance(p_NP) * _variance(q_NP)).sqrt()
    reached_N = (extreme - P_NP * Q_NP).sum((1, 2)) / spread_N.clamp(min=1e-12)
    phi_N = torch.where(reached_N.abs() > 1e-9, wanted_N / reached_N, 0.0).clamp(0, 1)[:, None, None]
    mass = F.pad(extreme, (1, 0, 1, 0)).diff(dim=1).diff(dim=2).clamp(min=0)
    return phi_N * mass + (1 - phi_N) * p_NP[:, :, None] * q_NP[:, None]


def edges_kept(a_HW: Tensor, b_HW: Tensor, fused_HW: Tensor) -> float:
    """Q^{AB/F}: how well strength g and orientation alpha of the edges were kept, weighted by the strength they had.

    With G = the smaller strength over the larger and A = ||alpha_A - alpha_F| - pi/2| / (pi/2), an edge is worth
    Q = s_g(G) s_a(A), s the sigmoids of `STRENGTH` and `ORIENTATION`; Q^{AB/F} = sum (Q_A g_A + Q_B g_B) / sum (g_A +
    g_B). Gradients are Sobel's, the image going on past its border as it ends. 0 where neither input has an edge.
    """
    fused, worth, weight = _edges(fused_HW), 0.0, 0.0
    for strength, angle in (_edges(a_HW), _edges(b_HW)):
        smaller, larger = torch.minimum(strength, fused[0]), torch.maximum(strength, fused[0])
        kept = torch.where(larger > 0, smaller / larger.clamp(min=1e-12), 0.0)
        turned = ((angle - fused[1]).abs() - math.pi / 2).abs() / (math.pi / 2)
        worth += float((_sigmoid(kept, STRENGTH) * _sigmoid(turned, ORIENTATION) * strength).sum())
        weight += float(strength.sum())
    return worth / weight if weight > 0 else 0.0


def correlations_of_differences(a_HW: Tensor, b_HW: Tensor, fused_HW: Tensor) -> float:
    """SCD = r(F - B, A) + r(F - A, B), r Pearson's correlation; 0 for an image of one value."""
    return _correlation(fused_HW - b_HW, a_HW) + _correlation(fused_HW - a_HW, b_HW)


def visual_information(a_HW: Tensor, b_HW: Tensor, fused_HW: Tensor) -> float:
    """The mean of torchmetrics' VIF of the fused image with each input as reference (noise variance 2 of 255)."""
    fidelity = need("torchmetrics.functional.image", "VIF").visual_information_fidelity
    return sum(float(fidelity(fused_HW[None, None], x[None, None])) for x in (a_HW, b_HW)) / 2


def structural_similarity(a_HW: Tensor, b_HW: Tensor, fused_HW: Tensor) -> float:
    """The mean of torchmetrics' SSIM of the fused image with each input (Gaussian window of 11, deviation 1.5)."""
    similarity = need("torchmetrics.functional.image", "SSIM").structural_similarity_index_measure
    return sum(float(similarity(fused_HW[None, None], x[None, None], data_range=TOP)) for x in (a_HW, b_HW)) / 2


def signal_to_noise(a_HW: Tensor, b_HW: Tensor, fused_HW: Tensor) -> float:
    """torchmetrics' PSNR of the fused image beside both inputs: 10 log10(255^2 / mean of both squared errors), dB."""
    ratio = need("torchmetrics.functional.image", "PSNR").peak_signal_noise_ratio
    return float(ratio(torch.stack([fused_HW, fused_HW]), torch.stack([a_HW, b_HW]), data_range=TOP))


#: in the order of the table
METRICS: Mapping[str, Callable[[Tensor, Tensor, Tensor], float]] = {
    "EN": lambda a, b, fused: entropy(fused),
    "SF": lambda a, b, fused: spatial_frequency(fused),
    "AG": lambda a, b, fused: average_gradient(fused),
    "SD": lambda a, b, fused: standard_deviation(fused),
    "MI": lambda a, b, fused: sum(mutual_information(x, fused) for x in (a, b)),
    "NMI": lambda a, b, fused: sum(normalised_mutual_information(x, fused) for x in (a, b)),
    "FMI": lambda a, b, fused: sum(feature_mutual_information(x, fused) for x in (a, b)) / 2,
    "Qabf": edges_kept,
    "SCD": correlations_of_differences,
    "VIF": visual_information,
    "SSIM": structural_similarity,
    "PSNR": signal_to_noise,
}


@torch.no_grad()
def fusion_metrics(
    a: Tensor, b: Tensor, fused: Tensor, *, data_range: float = 1.0, names: tuple[str, ...] = tuple(METRICS)
) -> dict[str, float]:
    """The measures of one fused image.

    Args:
        a, b: the two inputs, (H, W), (1, H, W) or (1, 1, H, W).
        fused: what was made of them, of the same height and width.
        data_range: the value that stands for 255; 0 stands for 0, and values outside count as the nearer of the two in
            histograms.
        names: of `METRICS`.

    Raises:
        ValueError: if the images differ in size, are not grey, smaller than 41 pixels or not finite, the range is not
            positive, or a name is unknown.
        ImportError: if torchmetrics is needed and not installed.
    """
    if not (math.isfinite(data_range) and data_range > 0):
        raise ValueError(f"data_range must be positive, got {data_range}")
    if strange := [name for name in names if name not in METRICS]:
        raise ValueError(f"names must be among {', '.join(METRICS)}, got {strange[0]!r}")
    images = []
    for name, image in (("a", a), ("b", b), ("fused", fused)):
        if image.ndim < 2 or image.shape[:-2].numel() != 1:
            raise ValueError(f"{name} must be one grey image (height, width), got {tuple(image.shape)}")
        if not image.isfinite().all():
            raise ValueError(f"{name} must be finite")
        images.append(image.reshape(image.shape[-2:]).double() * (TOP / data_range))
    if len({image.shape for image in images}) > 1:
        sizes = ", ".join(f"{image.shape[1]} x {image.shape[0]}" for image in images)
        raise ValueError(f"the inputs and the fused image must have one size, got {sizes}")
    if min(images[0].shape) < LEAST:
        raise ValueError(f"height and width must be at least {LEAST}, got {tuple(images[0].shape)}")
    return {name: METRICS[name](*images) for name in names}


def of_files(a: str | Path, b: str | Path, fused: str | Path) -> dict[str, float]:
    """`fusion_metrics` of three image files, of colours their luma.

    Raises:
        OSError, ValueError: if one cannot be read, or they differ in size or are too small.
    """
    return fusion_metrics(*(luma(read_image(path)) for path in (a, b, fused)))


def _levels(x_HW: Tensor) -> Tensor:
    return x_HW.round().clamp(0, TOP).long().flatten()


def _entropy(counts_L: Tensor) -> float:
    return float(_bits(counts_L[None].double() / counts_L.sum()))


def _bits(p_NL: Tensor) -> Tensor:
    """Entropies of distributions, (N,)."""
    return -torch.special.xlogy(p_NL, p_NL).sum(1) / math.log(2)


def _strength(x_HW: Tensor) -> Tensor:
    return torch.linalg.vector_norm(sobel(x_HW[None, None])[0, 0], dim=0)


def _edges(x_HW: Tensor) -> tuple[Tensor, Tensor]:
    """Strength, and orientation between -pi/2 and pi/2."""
    along, across = sobel(x_HW[None, None])[0, 0]
    angle = torch.where(along != 0, (across / torch.where(along != 0, along, 1.0)).atan(), math.pi / 2)
    return torch.hypot(along, across), angle


def _sigmoid(x: Tensor, constants: tuple[float, float, float]) -> Tensor:
    most, slope, middle = constants
    return most / (1 + (slope * (x - middle)).exp())


def _distribution(x_NP: Tensor) -> Tensor:
    above = x_NP - x_NP.amin(1, keepdim=True)
    total = above.sum(1, keepdim=True)
    return torch.where(total > 1e-9, above / total.clamp(min=1e-9), 1 / x_NP.shape[1])


def _variance(p_NP: Tensor) -> Tensor:
    """Of the number of the pixel."""
    number = torch.arange(p_NP.shape[1], dtype=p_NP.dtype, device=p_NP.device)
    mean = (p_NP * number).sum(1, keepdim=True)
    return (p_NP * (number - mean).square()).sum(1)


def _correlation(x_HW: Tensor, y_HW: Tensor) -> float:
    x, y = x_HW - x_HW.mean(), y_HW - y_HW.mean()
    norms = float(x.norm() * y.norm())
    return float((x * y).sum()) / norms if norms > 1e-9 else 0.0
