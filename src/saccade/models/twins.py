"""Twins: backbones of attention inside windows, and of attention to one representative per sub-window, in turn.

Chu, Tian, Wang, Zhang, Ren, Wei, Xia, Shen, "Twins: Revisiting the Design of Spatial Attention in Vision
Transformers", arXiv 2104.13840 (NeurIPS 2021).

    LSA(x) = W_o attention(q, k, v) inside windows of ws x ws tokens;  q, k, v = W_qkv x
    GSA(x) = W_o attention(W_q x, k, v);   k, v = W_kv LN(conv(x)), a convolution of kernel and stride sr
    PEG(x) = x + depthwise 3 x 3 convolution (x)
    block: x += attention(LN(x)), x += MLP(LN(x));  stage: embedding, a block, PEG, the other blocks

Twins-SVT has LSA in blocks 0, 2, ... of a stage and GSA in blocks 1, 3, ...; Twins-PCPVT has GSA alone. Positions are
known by PEG only, so maps of any size are taken. A pair costs 2 H W C (ws^2 + H W / sr^2) beside its projections.

| here             | paper | meaning                                                         | default (SVT-S) |
|------------------|-------|-----------------------------------------------------------------|-----------------|
| `windows`        | ws    | sides of LSA's windows per stage; 1, or None for all, has GSA alone | 7, 7, 7, 7  |
| `reductions`     | sr    | of GSA per stage                                                | 8, 4, 2, 1      |
| `padding`        |       | where a window is not filled: "mask" or "zeros"                 | "mask"          |

Where a map is no multiple of the window, the segmentation code fills it up, right and below, after the norm:
with "mask" the tokens that fill up are not seen (the authors' way, without the slip by which no filling at all marked
everything), with "zeros" they take part. Embeddings and GSA's convolution drop what they cannot cover, as the authors'
convolutions do; a map smaller than one patch is filled up with zeros, which is ours. Drop path grows linearly from 0
over the blocks. Dropout of attention weights, 0 in all runs of the authors, is not offered.

Shape letters: B batch, C channels, H height, W width, N = H W tokens, h heads of D channels, M keys, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import log
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Claim, ClaimResult, Published, register
from saccade.models.backbone import Backbone, Block, check_images
from saccade.ops.attend import attend
from saccade.ops.shifted import packed_window_attend

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

PADDINGS = ("mask", "zeros")


class LocallyGroupedAttention(nn.Module):
    """LSA: attention inside windows that do not shift and have no position bias.

    Args:
        dim: C.
        num_heads: h, a divisor of C.
        window: side of the windows.
        qkv_bias: bias of the projection to queries, keys and values.
        scale: D ** -0.5 where None.
        padding: where windows are not filled: "mask" sees no token outside of the map, "zeros" joins zero tokens.
        proj_drop: dropout of the output.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window: int = 7,
        *,
        qkv_bias: bool = True,
        scale: float | None = None,
        padding: str = "mask",
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        if window < 1:
            raise ValueError(f"window must be positive, got {window}")
        if padding not in PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
        self.dim, self.num_heads, self.window, self.scale, self.padding = dim, num_heads, window, scale, padding
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """The same shape, (B, H, W, C).

        Raises:
            ValueError: if `x` is no map of C channels.
        """
        _check_map(x_BHWC, self.dim)
        B, H, W, C = x_BHWC.shape
        down, right = (-n % self.window if self.padding == "zeros" else 0 for n in (H, W))
        if down or right:
            x_BHWC = F.pad(x_BHWC, (0, 0, 0, right, 0, down))
        full = (H + down, W + right)
        qkv_BN3hD = self.qkv(x_BHWC).view(B, full[0] * full[1], 3, self.num_heads, -1)
        # windows that the map does not fill are smaller windows here: the mask, without the tokens it hides
        out_BhND = packed_window_attend(qkv_BN3hD, full, self.window, scale=self.scale)
        out_BHWC = out_BhND.transpose(1, 2).reshape(B, *full, C)[:, :H, :W]
        return self.proj_drop(self.proj(out_BHWC))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, window={self.window}, padding={self.padding!r}"


class GlobalSubsampledAttention(nn.Module):
    """GSA: all tokens attend to one representative of each sub-window, made by a convolution.

    Args:
        dim: C.
        num_heads: h, a divisor of C.
        reduction: sr, side of the sub-windows; with 1 it is plain multi-head attention.
        qkv_bias: biases of the projections to queries, keys and values.
        scale: D ** -0.5 where None.
        proj_drop: dropout of the output.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        reduction: int = 1,
        *,
        qkv_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        if reduction < 1:
            raise ValueError(f"reduction must be positive, got {reduction}")
        self.dim, self.num_heads, self.reduction, self.scale = dim, num_heads, reduction, scale
        self.q, self.kv = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(proj_drop)
        self.reduce = nn.Conv2d(dim, dim, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(dim) if reduction > 1 else None

    def representatives(self, x_BHWC: Tensor) -> Tensor:
        """What keys and values are made of, (B, M, C)."""
        if self.reduce is None or self.norm is None:
            return x_BHWC.flatten(1, 2)
        reduced_BCHW = self.reduce(_at_least(x_BHWC.permute(0, 3, 1, 2), self.reduction))
        return self.norm(reduced_BCHW.flatten(2).mT)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """The same shape, (B, H, W, C).

        Raises:
            ValueError: if `x` is no map of C channels.
        """
        _check_map(x_BHWC, self.dim)
        heads = (self.num_heads, self.dim // self.num_heads)
        q_BhND = self.q(x_BHWC).flatten(1, 2).unflatten(2, heads).transpose(1, 2)
        k_BMhD, v_BMhD = self.kv(self.representatives(x_BHWC)).unflatten(2, (2, *heads)).unbind(2)
        out_BhND = attend(q_BhND, k_BMhD.transpose(1, 2), v_BMhD.transpose(1, 2), scale=self.scale)
        return self.proj_drop(self.proj(out_BhND.transpose(1, 2).reshape(x_BHWC.shape)))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, reduction={self.reduction}"


class PositionEncoding(nn.Conv2d):
    """PEG, the conditional position encoding: a map plus its depthwise 3 x 3 convolution, (B, H, W, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return x_BHWC + super().forward(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Stage(nn.Module):
    """An embedding, a block, the position encoding, the other blocks: (B, C', H, W) to (B, H / patch, W / patch, C)."""

    def __init__(self, inputs: int, dim: int, patch: int, blocks: Sequence[Block], drop: float, norm: bool) -> None:
        super().__init__()
        self.embed, self.embed_norm = nn.Conv2d(inputs, dim, patch, patch), nn.LayerNorm(dim)
        self.drop = nn.Dropout(drop)
        self.blocks, self.position = nn.ModuleList(blocks), PositionEncoding(dim)
        self.norm = nn.LayerNorm(dim) if norm else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BHWC = self.embed(_at_least(x_BCHW, self.embed.kernel_size[0])).permute(0, 2, 3, 1)
        x_BHWC = self.drop(self.embed_norm(x_BHWC))
        for i, block in enumerate(self.blocks):
            x_BHWC = block(x_BHWC)
            if i == 0:
                x_BHWC = self.position(x_BHWC)
        return x_BHWC


class Twins(Backbone):
    """Twins-SVT, or with `windows=None` Twins-PCPVT.

    Args:
        dims, num_heads, depths, mlp_ratios, reductions: C, heads, blocks, width of the MLP over C, and sr, per stage.
        windows: sides of LSA's windows per stage; where 1, or None, all blocks have GSA.
        patch_size: of the first embedding; later ones halve the map.
        in_channels: of the images.
        num_classes: K; 0 has no head, and `classify` gives None.
        qkv_bias, scale, padding: see `LocallyGroupedAttention`.
        global_attention: False has LSA in all blocks that have a window (the paper's ablation).
        stage_norm: normalise the map of each stage that `features` gives (the segmentation code for SVT-L); the next
            stage takes the map without it.
        drop, drop_path: dropout of MLPs, projections and embeddings; drop path of the last block.
        norm_eps: of the norms of blocks and head.

    Raises:
        ValueError: if an argument is out of range.
    """

    slug = "twins"

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        depths: Sequence[int] = (2, 2, 10, 4),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        reductions: Sequence[int] = (8, 4, 2, 1),
        windows: Sequence[int] | None = (7, 7, 7, 7),
        *,
        patch_size: int = 4,
        in_channels: int = 3,
        num_classes: int = 1000,
        qkv_bias: bool = True,
        scale: float | None = None,
        padding: str = "mask",
        global_attention: bool = True,
        stage_norm: bool = False,
        drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        windows = (1,) * len(dims) if windows is None else tuple(windows)
        lengths = [len(x) for x in (dims, num_heads, depths, mlp_ratios, reductions, windows)]
        if len(set(lengths)) > 1 or not lengths[0]:
            raise ValueError(
                "dims, num_heads, depths, mlp_ratios, reductions and windows must have one entry per stage, got "
                f"{', '.join(map(str, lengths))}"
            )
        if min(depths) < 1 or min(patch_size, in_channels) < 1 or num_classes < 0:
            raise ValueError(
                "depths, patch_size and in_channels must be positive and num_classes at least 0, got "
                f"{tuple(depths)}, {patch_size}, {in_channels} and {num_classes}"
            )
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {drop_path}")
        self.channels = tuple(dims)
        self.strides = tuple(patch_size * 2**i for i in range(len(dims)))
        self.in_channels = in_channels
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        shared: dict[str, Any] = {"qkv_bias": qkv_bias, "scale": scale, "proj_drop": drop}
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks = []
            for j in range(depths[i]):
                attention: nn.Module
                if windows[i] == 1 or (j % 2 and global_attention):
                    attention = GlobalSubsampledAttention(dim, num_heads[i], reductions[i], **shared)
                else:
                    attention = LocallyGroupedAttention(dim, num_heads[i], windows[i], padding=padding, **shared)
                blocks.append(Block(dim, attention, mlp_ratios[i], drop=drop, drop_path=next(rates), norm_eps=norm_eps))
            inputs, patch = (dims[i - 1], 2) if i else (in_channels, patch_size)
            self.stages.append(Stage(inputs, dim, patch, blocks, drop, stage_norm))
        self.norm = nn.LayerNorm(dims[-1], norm_eps) if num_classes else None
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else None
        self.apply(_initialise)

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        check_images(x_BCHW, self.in_channels)
        maps = []
        for stage in self.stages:
            assert isinstance(stage, Stage)
            x_BHWC = stage(x_BCHW)
            x_BCHW = x_BHWC.permute(0, 3, 1, 2)
            maps.append(x_BCHW if stage.norm is None else stage.norm(x_BHWC).permute(0, 3, 1, 2))
        return maps

    def classify(self, x_BCHW: Tensor) -> Tensor | None:
        return None if self.head is None else self.head(self.pool(x_BCHW))

    def pool(self, x_BCHW: Tensor) -> Tensor:
        """The mean of a map's tokens, normalised where there is a head, (B, C)."""
        tokens_BNC = x_BCHW.flatten(2).mT
        return (tokens_BNC if self.norm is None else self.norm(tokens_BNC)).mean(1)

    def no_weight_decay(self) -> set[str]:
        """Parameters that the authors train without weight decay: those of the position encodings."""
        return {name for name, _ in self.named_parameters() if ".position." in name}


def _check_heads(dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim < 1 or dim % num_heads:
        raise ValueError(f"num_heads must be positive and divide dim ({dim}), got {num_heads}")


def _check_map(x_BHWC: Tensor, dim: int) -> None:
    if x_BHWC.ndim != 4 or x_BHWC.shape[3] != dim or 0 in x_BHWC.shape[1:3]:
        raise ValueError(f"x must be (batch, height, width, {dim}), got {tuple(x_BHWC.shape)}")


def _at_least(x_BCHW: Tensor, size: int) -> Tensor:
    """The map, filled up with zeros, right and below, to one patch."""
    down, right = (max(0, size - n) for n in x_BCHW.shape[2:])
    return F.pad(x_BCHW, (0, right, 0, down)) if down or right else x_BCHW


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
    if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------- the authors' names

_NAMES = (
    (r"^patch_embeds\.(\d+)\.proj\.", r"stages.\1.embed."),
    (r"^patch_embeds\.(\d+)\.norm\.", r"stages.\1.embed_norm."),
    (r"^pos_block\.(\d+)\.proj\.0\.", r"stages.\1.position."),
    (r"^blocks\.(\d+)\.(\d+)\.attn\.sr\.", r"stages.\1.blocks.\2.attention.reduce."),
    (r"^blocks\.(\d+)\.(\d+)\.attn\.", r"stages.\1.blocks.\2.attention."),
    (r"^blocks\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^sr\.", "reduce."),
)


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    converted = {}
    for key, tensor in state.items():
        for pattern, name in _NAMES:
            renamed, found = re.subn(pattern, name, key)
            if found:
                key = renamed
                break
        converted[key] = tensor
    return converted


def _shared(args: dict[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": args.get("qkv_bias", False), "scale": args.get("qk_scale")}


def _build_local(args: dict[str, Any]) -> nn.Module:
    drop = args.get("proj_drop", 0.0)
    return LocallyGroupedAttention(args["dim"], args.get("num_heads", 8), args["ws"], **_shared(args), proj_drop=drop)


def _build_global(args: dict[str, Any]) -> nn.Module:
    drop = args.get("proj_drop", 0.0)
    return GlobalSubsampledAttention(
        args["dim"], args.get("num_heads", 8), args.get("sr_ratio", 1), **_shared(args), proj_drop=drop
    )


def _run_attention(module: nn.Module, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return {"y": module(inputs["x"].unflatten(1, (args["H"], args["W"]))).flatten(1, 2)}


_SIZES = {
    "dims": "embed_dims",
    "num_heads": "num_heads",
    "depths": "depths",
    "mlp_ratios": "mlp_ratios",
    "reductions": "sr_ratios",
    "windows": "wss",
    "patch_size": "patch_size",
    "in_channels": "in_chans",
    "num_classes": "num_classes",
    "drop": "drop_rate",
    "drop_path": "drop_path_rate",
}


def _build_model(args: dict[str, Any], **defaults: Any) -> Twins:
    given = {ours: args[theirs] for ours, theirs in _SIZES.items() if theirs in args}
    stages = len(given.get("depths", _DEPTHS))
    # the authors' models read as many entries as there are stages
    given = {k: v[:stages] if isinstance(v, (list, tuple)) else v for k, v in {**defaults, **given}.items()}
    eps = re.search(r"eps\D*([\d.]+(?:e-?\d+)?)", str(args.get("norm_layer", "")))
    return Twins(**given, **_shared(args), norm_eps=float(eps[1]) if eps else 1e-6)


def _run_model(module: Twins, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    last = module.features(inputs["x"])[-1]
    pooled, logits = module.pool(last), module.classify(last)
    return {"features": pooled, "logits": pooled if logits is None else logits}


# ---------------------------------------------------------------------------- the claim


def _growth(lab: Lab) -> dict[str, float]:
    """Seconds of an LSA and a GSA block of SVT-S's first stage, and of two blocks of global attention, by the map."""
    dim, heads = lab.size((64, 2), (8, 1))
    with lab.seeded():
        twins = nn.Sequential(
            Block(dim, LocallyGroupedAttention(dim, heads, 7)), Block(dim, GlobalSubsampledAttention(dim, heads, 8))
        ).eval()
        plain = nn.Sequential(*(Block(dim, GlobalSubsampledAttention(dim, heads, 1)) for _ in range(2))).eval()
        sides = lab.size((28, 56, 112), (7, 14))
        maps = [torch.randn(1, side, side, dim) for side in sides]
    measured = {}
    with torch.no_grad():
        for name, model in (("twins", twins), ("global", plain)):
            seconds = [lab.seconds(lambda x=x, model=model: model(x), repeats=3) for x in maps]  # type: ignore[misc]
            for side, s in zip(sides, seconds):
                measured[f"{name}_{side}x{side}_tokens_ms"] = 1e3 * s
            measured[f"{name}_exponent_in_pixels"] = log(seconds[-1] / seconds[-2]) / log((sides[-1] / sides[-2]) ** 2)
    return measured


def _patches(seed: int, batch: int, side: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """Noise with a patch of one colour somewhere in the upper left quarter, and the colour, (B, 3) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    cell = torch.arange(side) // 4
    while True:
        noise = 0.1 * torch.randn(batch, 3, side, side, generator=generator)
        y, x = torch.randint(side // 8, (2, batch, 1), generator=generator)
        colour_B3 = torch.rand(batch, 3, generator=generator) * 2 - 1
        inside_BHW = (cell == y)[:, :, None] & (cell == x)[:, None]
        yield noise + inside_BHW[:, None] * colour_B3[:, :, None, None], colour_B3


class _Corner(nn.Module):
    """The colour, told from the lower right token of one stage: PEG, beside attention, reaches one token further."""

    def __init__(self, global_attention: bool) -> None:
        super().__init__()
        self.twins = Twins(
            (32,), (4,), (2,), (2,), (2,), (2,), num_classes=0, global_attention=global_attention, stage_norm=True
        )
        self.head = nn.Linear(32, 3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.head(self.twins.features(x_BCHW)[-1][:, :, -1, -1])


def _claim(lab: Lab) -> ClaimResult:
    measured = _growth(lab)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    seeds = range(lab.seed, lab.seed + lab.size(2, 1))
    for name, global_attention in (("windows_and_representatives", True), ("windows_alone", False)):
        found = []
        for seed in lab.progress(seeds, name):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = _Corner(global_attention)
            lab.train(model, _patches(seed, lab.size(32, 4)), loss, 400, lr=5e-3, description=f"{name}, seed {seed}")
            images, colours = next(_patches(10**6 + seed, lab.size(512, 8)))
            with torch.no_grad():
                error = F.mse_loss(model.eval()(images), colours) / (colours - colours.mean(0)).square().mean()
            found.append(1 - error.item())
        measured[f"{name}_explained_share"] = sum(found) / len(found)
        measured[f"{name}_explained_spread"] = max(found) - min(found)
    return ClaimResult(
        measured,
        holds=measured["twins_exponent_in_pixels"] < 1.3 < measured["global_exponent_in_pixels"]
        and measured["windows_and_representatives_explained_share"] > 0.5 > measured["windows_alone_explained_share"],
        note="exponents between the two largest maps; share of the variance of colours; best less worst of two seeds",
    )


_DEPTHS = (2, 2, 10, 4)
_PCPVT = {
    "dims": (64, 128, 320, 512),
    "num_heads": (1, 2, 5, 8),
    "depths": (3, 4, 6, 3),
    "mlp_ratios": (8, 8, 4, 4),
    "windows": None,
}
_B = {"dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24), "depths": (2, 2, 18, 2)}
_L = {"dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32), "depths": (2, 2, 18, 2)}

# ours without them: 3.67, 6.44, 9.50, 2.81, 8.33, 14.81
_COUNTED = "the paper's FLOPs leave out the products of queries with keys and of weights with values"

register(
    "twins",
    kind="model",
    summary="Backbones that alternate attention in windows with attention to one representative per sub-window.",
    supports=(),
    taxonomy={"sequences": "self", "levels": "multi", "positions": "local", "representations": "single"},
    efficiency="",
    complexity="LSA: time 2 ws^2 H W C; GSA: 2 (H W)^2 C / sr^2; memory O(H W C)",
    invariants=(
        "LSA in one window as large as the map is multi-head attention",
        "LSA: a token changes outputs of its own window only; GSA: it changes all",
        "GSA with sr = 1 is multi-head attention; with an averaging kernel, attention to normalised means",
        "windows that are not filled are windows of fewer tokens (padding 'mask')",
        "PEG with zero weights is the identity, and moves with its input inside the map",
        "the parameters of the published sizes, exactly",
    ),
    build=Twins,
    example={
        "dims": (8, 16),
        "num_heads": (1, 2),
        "depths": (2, 2),
        "mlp_ratios": (2, 2),
        "reductions": (2, 1),
        "windows": (3, 2),
        "num_classes": 5,
    },
    inputs=lambda module, size: (torch.randn(2, 3, size, size + 5),),
    ports=(
        AuthorsPort("lsa", build=_build_local, convert=_convert, run=_run_attention),
        AuthorsPort("gsa", build=_build_global, convert=_convert, run=_run_attention),
        AuthorsPort("svt", build=_build_model, convert=_convert, run=_run_model),
        AuthorsPort("pcpvt", build=lambda args: _build_model(args, **_PCPVT), convert=_convert, run=_run_model),
    ),
    claim=Claim(
        paper="windows and representatives in turn: nearly linear in pixels, and far better than windows alone",
        expected="time grows about linearly with pixels where global attention's grows quadratically; a token tells "
        "the colour of a far patch with both attentions, and not with windows alone",
        run=_claim,
    ),
    published=tuple(
        Published(f"Twins-{name}", arguments, parameters, flops, tolerance=0.05, note=_COUNTED)
        for name, arguments, parameters, flops in (
            ("PCPVT-S", _PCPVT, 24.106216, 3.7),
            ("PCPVT-B", {**_PCPVT, "depths": (3, 4, 18, 3)}, 43.828456, 6.4),
            ("PCPVT-L", {**_PCPVT, "depths": (3, 8, 27, 3)}, 60.989672, 9.5),
            ("SVT-S", {"depths": _DEPTHS}, 24.060776, 2.8),
            ("SVT-B", _B, 56.070952, 8.3),
            ("SVT-L", _L, 99.271400, 14.8),
        )
    ),
)
