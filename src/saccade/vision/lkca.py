"""LKCA: self-attention whose matrix is one static large kernel over the token grid.

Li, Zhang, Zeng, Lu, Shi, Chen, Liu, Zhu, Yang, Shen, "LKCA: Large Kernel Convolutional Attention", 2024, arXiv
2401.05738 (v3: "Interpreting and Improving Attention From the Perspective of Large Kernel Convolution").

    V = X W_V,   O = mix(V, K),   Y = O W_O

with K of (2H - 1) x (2W - 1) for a grid of H x W tokens, and two equal views of mix. As attention: a window of H x W
slides over K from its lower right to its upper left corner, a step a token, and each window is a row of

    A[(y, x), (y', x')] = K[H-1 - y + y', W-1 - x + x'],    O = A V.

As convolution: O is the cross-correlation of the map V with K, padded by zeros. A is doubly block Toeplitz, the same
for all inputs; its entries may be negative and its rows do not sum to one (`normalize` is not in the sources). The
mixing is linear, every token sees every token, and no position embedding is needed.

Symbols: K `kernel`, one matrix for all channels (`num_heads` = 1, the paper's text), for each of h heads, or for each
channel (h = C: a depthwise convolution). A smaller `kernel_size` is K's centre, and zero elsewhere.

No authors' code could be had. Inferred, and switchable: W_V and W_O (the attention view multiplies values); the
initialisation (truncated normal, 0.02); mean pooling instead of a class token (`class_token`: it bypasses the grid,
and is mixed by the mean of V). Extensions: padding masks zero V; `causal` zeroes the taps ahead in raster order.

Other maps than the grid that K was made for: a larger one sees K as a band, a smaller one uses its centre.

`implementation`: "conv", "attention" (N x N by its definition), "fft", equal up to rounding; None takes the one that
`cheapest` expects to be fastest.

Shape letters: B batch, C channels, h heads of d = C / h channels, H, W height and width, N = H W tokens, k kernel rows,
l kernel columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult, register

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

IMPLEMENTATIONS = ("conv", "attention", "fft")


def fit(kernel_hkl: Tensor, H: int, W: int) -> Tensor:
    """The kernel as (h, 2H - 1, 2W - 1): cut to its centre where it is larger, zeros around it where smaller."""
    margins = [full - size for full, size in zip((2 * W - 1, 2 * H - 1), reversed(kernel_hkl.shape[1:]), strict=True)]
    return F.pad(kernel_hkl, [margin // 2 for margin in margins for _ in range(2)])


def attention_matrix(kernel_hkl: Tensor, H: int, W: int) -> Tensor:
    """A, (h, N, N): the windows of K, the lower right one first, each a row."""
    windows_hHWHW = fit(kernel_hkl, H, W).unfold(1, H, 1).unfold(2, W, 1)
    return windows_hHWHW.flip(1, 2).reshape(-1, H * W, H * W)


def mix(v_BNC: Tensor, kernel_hkl: Tensor, H: int, W: int, implementation: str | None = None) -> Tensor:
    """O, (B, N, C), of values in raster order: channels in h equal runs, each mixed by its kernel (odd sizes).

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
    dtype = v_BNC.dtype if v_BNC.dtype == torch.float64 else torch.float32
    full_hkl = fit(kernel_hkl, H, W).to(dtype)
    size = (3 * H - 2, 3 * W - 2)
    v_BhdHW = v_BNC.to(dtype).unflatten(1, (H, W)).unflatten(3, (kernel_hkl.shape[0], -1)).permute(0, 3, 4, 1, 2)
    spectrum = torch.fft.rfft2(v_BhdHW, size) * torch.fft.rfft2(full_hkl, size).conj()[:, None]
    # position 0 of the product has the kernel's corner on the map's, its centre is H - 1, W - 1 further on
    o_BhdHW = torch.fft.irfft2(spectrum, size).roll((H - 1, W - 1), (3, 4))[..., :H, :W]
    return o_BhdHW.permute(0, 3, 4, 1, 2).reshape(v_BNC.shape).to(v_BNC.dtype)


class LKCA(nn.Module):
    """Large kernel convolutional attention; x (B, C, H, W) -> y of the same shape and memory format, any H and W.

    `tokens` is the same on a sequence, for a transformer's block.

    Args:
        channels: C.
        size: the token grid, H or (H, W), for which K is made; 8 in the setting of the paper's data sets.
        kernel_size: k or (k, l), odd; 2 size - 1 where None: every token sees every other.
        num_heads: h, kernels; divides C.
        v_proj, out_proj: linear layers around the mixing.
        bias: one number per channel after the mixing.
        normalize: softmax over each row of A (not in the sources).
        causal: no token sees a later one in raster order (an extension).
        implementation: see above.
        identity_init: start at y = x exactly: K one at its centre and zero elsewhere, the layers the identity.

    Raises:
        ValueError: if an argument is out of range, or the input is not (B, C, H, W).
    """

    def __init__(
        self,
        channels: int,
        size: int | tuple[int, int] = 8,
        kernel_size: int | tuple[int, int] | None = None,
        num_heads: int = 1,
        v_proj: bool = True,
        out_proj: bool = True,
        bias: bool = False,
        normalize: bool = False,
        causal: bool = False,
        implementation: str | None = None,
        identity_init: bool = False,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be positive, got {channels}")
        if num_heads < 1 or channels % num_heads:
            raise ValueError(f"num_heads must divide the channels ({channels}), got {num_heads}")
        grid = (size, size) if isinstance(size, int) else tuple(size)
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"size must be the height and width of a grid, got {size}")
        full = (2 * grid[0] - 1, 2 * grid[1] - 1)
        given = full if kernel_size is None else kernel_size
        kernel = (given, given) if isinstance(given, int) else tuple(given)
        largest = full if kernel_size is None else (max(full), max(full))
        if len(kernel) != 2 or any(k % 2 == 0 or not 1 <= k <= most for k, most in zip(kernel, largest, strict=True)):
            raise ValueError(f"kernel_size must be odd and between 1 and {largest[0]}, got {kernel_size}")
        if implementation not in (None, *IMPLEMENTATIONS):
            raise ValueError(
                f"implementation must be None or one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}"
            )
        if identity_init and normalize:
            raise ValueError("identity_init needs normalize=False: a softmax is positive everywhere")
        self.channels, self.num_heads, self.implementation = channels, num_heads, implementation
        self.normalize, self.causal = normalize, causal
        self.kernel = nn.Parameter(torch.empty(num_heads, *kernel))
        self.v_proj = nn.Linear(channels, channels) if v_proj else None
        self.out_proj = nn.Linear(channels, channels) if out_proj else None
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        nn.init.trunc_normal_(self.kernel, std=0.02)
        for layer in (self.v_proj, self.out_proj):
            if layer is not None:
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
                if identity_init:
                    nn.init.eye_(layer.weight)
        if identity_init:
            with torch.no_grad():
                self.kernel.zero_()[:, kernel[0] // 2, kernel[1] // 2] = 1

    def taps(self) -> Tensor:
        """The kernel that is applied, (h, k, l): K, exp(K) for rows of a softmax; zero on taps ahead if causal."""
        taps_hkl: Tensor = self.kernel
        if self.normalize:
            taps_hkl = (taps_hkl - taps_hkl.amax((1, 2), keepdim=True)).exp()
        if self.causal:
            k, l = taps_hkl.shape[1:]
            behind = torch.arange(k * l, device=taps_hkl.device).view(k, l) <= k * l // 2
            taps_hkl = taps_hkl * behind
        return taps_hkl

    def matrix(self, H: int, W: int) -> Tensor:
        """A for a grid of H x W, (h, N, N)."""
        matrix_hNN = attention_matrix(self.taps(), H, W)
        return matrix_hNN / matrix_hNN.sum(2, keepdim=True) if self.normalize else matrix_hNN

    def mix(self, x_BCHW: Tensor, values_BhNE: Tensor) -> Tensor:
        """A of the map's grid, applied to given values (B, h, N, E); what `attention_map` shows."""
        return self.matrix(x_BCHW.shape[2], x_BCHW.shape[3]) @ values_BhNE

    def tokens(
        self, x_BNC: Tensor, size: tuple[int, int], *, mask: Tensor | None = None, class_token: bool = False
    ) -> Tensor:
        """The same on tokens in raster order, (B, N, C), of a grid `size`.

        Args:
            mask: (B, N), True = a real token; the others are seen by none.
            class_token: x has one token more, at its front: it takes the mean of V over the real tokens of the grid,
                and the grid does not see it.

        Raises:
            ValueError: if shapes do not fit.
        """
        H, W = size
        N = H * W
        if x_BNC.ndim != 3 or x_BNC.shape[1:] != (N + class_token, self.channels) or N < 1:
            raise ValueError(f"x must be (batch, {N + class_token}, {self.channels}), got {tuple(x_BNC.shape)}")
        if mask is not None and (mask.shape != (x_BNC.shape[0], N) or mask.dtype != torch.bool):
            raise ValueError(f"mask must be bool ({x_BNC.shape[0]}, {N}), got {mask.dtype} {tuple(mask.shape)}")
        v_BNC = x_BNC if self.v_proj is None else self.v_proj(x_BNC)
        v_BNC = v_BNC[:, int(class_token) :]
        if mask is not None:
            v_BNC = v_BNC * mask[..., None]
        taps_hkl = self.taps().to(v_BNC.dtype)
        o_BNC = mix(v_BNC, taps_hkl, H, W, self.implementation)
        if self.normalize:
            # the sums of the rows: the same mixing of ones, a channel a head
            real_BNh = v_BNC.new_ones(1, N, self.num_heads) if mask is None else mask[..., None].to(v_BNC.dtype)
            real_BNh = real_BNh.expand(-1, -1, self.num_heads)
            sums_BNh = mix(real_BNh, taps_hkl, H, W, self.implementation).clamp(min=torch.finfo(v_BNC.dtype).tiny)
            o_BNC = (o_BNC.unflatten(2, (self.num_heads, -1)) / sums_BNh[..., None]).flatten(2)
        if class_token:
            count = N if mask is None else mask.sum(1).clamp(min=1)[:, None, None]
            o_BNC = torch.cat([v_BNC.sum(1, keepdim=True) / count, o_BNC], 1)
        if self.bias is not None:
            o_BNC = o_BNC + self.bias
        return o_BNC if self.out_proj is None else self.out_proj(o_BNC)

    def forward(self, x_BCHW: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask`: (B, H, W), True = a real position."""
        if x_BCHW.ndim != 4 or x_BCHW.shape[1] != self.channels or 0 in x_BCHW.shape[2:]:
            raise ValueError(f"x must be (batch, {self.channels}, height, width), got {tuple(x_BCHW.shape)}")
        H, W = x_BCHW.shape[2:]
        flat = None if mask is None else mask.flatten(1)
        y_BNC = self.tokens(x_BCHW.flatten(2).transpose(1, 2), (H, W), mask=flat)
        y_BCHW = y_BNC.transpose(1, 2).unflatten(2, (H, W))
        return y_BCHW.contiguous() if x_BCHW.is_contiguous() else y_BCHW

    def extra_repr(self) -> str:
        return f"channels={self.channels}, kernel={tuple(self.kernel.shape)}, causal={self.causal}"


# The claim: small data, small transformers.


class _Attention(nn.Module):
    """Multi-head self-attention over a grid's tokens, with a learned embedding of positions."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(size * size, channels))  # as large as what it is added to
        self.attention = nn.MultiheadAttention(channels, 4, batch_first=True)

    def tokens(self, x_BNC: Tensor, size: tuple[int, int]) -> Tensor:
        x_BNC = x_BNC + self.position
        return self.attention(x_BNC, x_BNC, x_BNC, need_weights=False)[0]


class _Transformer(nn.Module):
    """Images (B, 1, S, S), a token a pixel -> logits (B, 10); pre-norm blocks, mean pooling."""

    def __init__(self, mixers: list[nn.Module], channels: int) -> None:
        super().__init__()
        self.embed = nn.Linear(1, channels)
        self.mixers = nn.ModuleList(mixers)
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(channels),
                nn.Linear(channels, 2 * channels),
                nn.GELU(),
                nn.Linear(2 * channels, channels),
            )
            for _ in mixers
        )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in mixers)
        self.head = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 10))

    def forward(self, image_B1SS: Tensor) -> Tensor:
        H, W = image_B1SS.shape[2:]
        x_BNC = self.embed(image_B1SS.flatten(2).transpose(1, 2))
        for mixer, mlp, norm in zip(self.mixers, self.mlps, self.norms, strict=True):
            x_BNC = x_BNC + mixer.tokens(norm(x_BNC), (H, W))  # type: ignore[operator]
            x_BNC = x_BNC + mlp(x_BNC)
        return self.head(x_BNC.mean(1))


def _claim(lab: Lab) -> ClaimResult:
    """Four-layer transformers on 400 digits with MSA, with one kernel, with a kernel a head; both views' curves."""
    source = lab.data.digits()
    channels, depth, size, count = 32, lab.size(4, 1), 8, lab.size(400, 8)
    test_images, test_labels = source.test_images[: lab.size(360, 8)], source.test_labels[: lab.size(360, 8)]
    seeds = lab.size(2, 1)

    def train(seed: int, steps: int, name: str, mixer: Callable[[], nn.Module]) -> tuple[nn.Module, list[float]]:
        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            drawn = torch.Generator().manual_seed(seed)
            while True:
                chosen = torch.randint(count, (lab.size(32, 4),), generator=drawn)
                yield source.train_images[chosen], source.train_labels[chosen]

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _Transformer([mixer() for _ in range(depth)], channels)
        return network, lab.train(network, batches(), _loss, steps, lr=2e-3, description=name)

    kinds: dict[str, Callable[[], nn.Module]] = {
        "msa": lambda: _Attention(channels, size),
        "lkca_one_kernel": lambda: LKCA(channels, size),
        "lkca_kernel_a_head": lambda: LKCA(channels, size, num_heads=4),
    }
    errors: dict[str, list[float]] = {name: [] for name in kinds}
    measured: dict[str, float] = {}
    for seed in lab.progress(range(lab.seed, lab.seed + seeds), "seeds"):
        for name, mixer in kinds.items():
            network, _ = train(seed, 300, name, mixer)
            measured[f"parameters_{name}"] = float(sum(p.numel() for p in network.parameters()))
            with torch.no_grad():
                wrong = network.eval()(test_images).argmax(1) != test_labels
            errors[name].append(100 * wrong.float().mean().item())
    views = [
        train(lab.seed, 10, view, lambda view=view: LKCA(channels, size, implementation=view))[1]  # type: ignore[misc]
        for view in ("conv", "attention")
    ]
    apart = max(abs(a - b) for a, b in zip(*views, strict=True))
    mean = {name: sum(values) / seeds for name, values in errors.items()}
    return ClaimResult(
        {
            **{f"error_{name}_percent": value for name, value in mean.items()},
            **{f"spread_{name}_percent": max(values) - min(values) for name, values in errors.items()},
            **measured,
            "largest_difference_of_the_views_losses": apart,
        },
        holds=mean["lkca_one_kernel"] < mean["msa"] and apart < 1e-3,
        note=f"means of {seeds} seeds; views compared over 10 steps; the verdict hangs on attention's position "
        "embedding: with a standard deviation of 0.02 instead of 1 it learns too slowly for these steps and is behind",
    )


def _loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(network(batch[0]), batch[1])


register(
    "lkca",
    kind="gate",
    summary="Token mixing by a static kernel as large as the grid: self-attention with one matrix for all inputs.",
    supports=(),
    taxonomy={
        "sequences": "self",
        "levels": "single",
        "positions": "soft",
        "representations": "single",
    },
    efficiency="",
    complexity="time O(N k^2 C) as a convolution, O(N^2 C + h N^2) as attention, O(C N log N) by FFT, and O(N C^2) for "
    "the projections; parameters h k^2 + 2 C^2 + 2 C",
    invariants=(
        "convolution, attention matrix and spectra give the same output and the same gradients",
        "the first row of the matrix is the kernel's lower right window, the last its upper left; it is Toeplitz",
        "a kernel of one at the centre is the identity, a constant full kernel the mean over all tokens",
        "every entry of a full kernel is used",
        "shifting a map whose support stays inside shifts the output",
        "a kernel per channel is a depthwise convolution",
        "the mixing is linear in its input",
    ),
    build=LKCA,
    example={"channels": 8, "size": 4, "num_heads": 2},
    claim=Claim(
        paper="static large-kernel mixing beats self-attention in compact vision transformers on small data; both of "
        "its implementations give the same accuracy",
        expected="lower error than self-attention at equal depth and width with fewer parameters; the same losses in "
        "both views",
        run=_claim,
    ),
)
