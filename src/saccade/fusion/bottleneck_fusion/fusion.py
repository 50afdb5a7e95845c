"""MBT: the stack of layers on the modalities' tokens, and the paper's classifier of video and sound around it.

Shape letters: B batch, N tokens of a modality, T tokens of all, S bottlenecks, C channels, K classes, V modalities,
F frames, H height, W width (for a spectrogram time and frequency).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade.fusion.bottleneck_fusion.operator import MBTOutput, across, jointly, through_bottleneck
from saccade.layers.drop_path import drop_path_rates
from saccade.layers.mlp import MLP
from saccade.layers.pre_norm import PreNormBlock
from saccade.layers.softmax_attention import SoftmaxAttention


class Block(PreNormBlock):
    """The pre-norm transformer block of ViT, as the authors start it.

    Args:
        dim, num_heads, mlp_dim: channels, heads, hidden width of the MLP.
        drop_path: probability of dropping a branch of this layer.
        dropout, attn_drop: after each branch and in the MLP, and of attention weights.

    Raises:
        ValueError: if the heads do not divide the channels.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_dim: int, *, drop_path: float, dropout: float, attn_drop: float
    ) -> None:
        super().__init__(
            SoftmaxAttention(dim, num_heads, rope=False, qkv_bias=True, proj_bias=True, attn_drop=attn_drop),
            dim,
            mlp=MLP(dim, mlp_dim, activation="gelu-tanh", drop=dropout),
            attention_drop=dropout,
            drop_path=drop_path,
            norm_eps=1e-6,
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x_BNC: Tensor, mask_BN: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x_BNC, mask=mask_BN)


class BottleneckFusion(nn.Module):
    """A transformer over two or more token streams that meet in bottleneck tokens; each stream keeps its shape.

    Args:
        dim: channels C of all streams.
        num_heads: of the attention.
        depth: L.
        fusion_layer: L_f, the first layer that fuses: 0 is early, `depth` late fusion (no exchange at all).
        num_bottlenecks: N_b.
        weights: a name for each modality's blocks, in the order of the call; modalities of one name share them.
            ("a", "b") are two separate encoders, ("a", "a") two modalities in one.
        mlp_dim: hidden width of the blocks, 4 dim where None.
        drop_path: probability of dropping a branch in the last layer, rising linearly from 0.
        dropout, attn_drop: after each branch and in the MLP, and of attention weights.
        bottleneck: False exchanges by cross attention (separate weights) or joint self-attention (shared weights).
        test_with_bottlenecks: False runs all layers apart in eval mode, for tests on one modality.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        depth: int = 2,
        fusion_layer: int = 0,
        num_bottlenecks: int = 4,
        *,
        weights: Sequence[str] = ("a", "b"),
        mlp_dim: int | None = None,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        attn_drop: float = 0.0,
        bottleneck: bool = True,
        test_with_bottlenecks: bool = True,
    ) -> None:
        super().__init__()
        if depth < 1 or not 0 <= fusion_layer <= depth:
            raise ValueError(f"depth must be positive and fusion_layer from 0 to depth, got {depth} and {fusion_layer}")
        if num_bottlenecks < 1:
            raise ValueError(f"num_bottlenecks must be positive, got {num_bottlenecks}")
        if isinstance(weights, str) or not weights or len(set(weights)) not in (1, len(weights)):
            raise ValueError(f"weights must be a name for each modality, all different or all equal, got {weights!r}")
        for name, rate in (("drop_path", drop_path), ("dropout", dropout), ("attn_drop", attn_drop)):
            if not 0 <= rate < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {rate}")
        self.dim, self.num_heads, self.depth, self.fusion_layer = dim, num_heads, depth, fusion_layer
        self.weights, self.test_with_bottlenecks = tuple(weights), test_with_bottlenecks
        self.bottleneck = None
        if bottleneck:
            self.bottleneck = nn.Parameter(0.02 * torch.randn(1, num_bottlenecks, dim))
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    name: Block(
                        dim,
                        num_heads,
                        4 * dim if mlp_dim is None else mlp_dim,
                        drop_path=rate,
                        dropout=dropout,
                        attn_drop=attn_drop,
                    )
                    for name in dict.fromkeys(weights)
                }
            )
            for rate in drop_path_rates(drop_path, depth)
        )

    def forward(
        self,
        a_BNC: Tensor | None,
        b_BNC: Tensor | None = None,
        *more_BNC: Tensor | None,
        masks: Sequence[Tensor | None] | None = None,
    ) -> tuple[Tensor | None, ...]:
        """The streams after the last layer, in the order given.

        Args:
            a_BNC, b_BNC, more_BNC: a stream for each of `weights`; any may be None (missing), but not all.
            masks: for each stream a bool (B, N), True = real token, or None. A row without real tokens is missing in
                that stream: it counts in no mean, and what comes out for it means nothing.

        Returns:
            a tuple with the shapes of the input, None where a stream was None.

        Raises:
            ValueError: if number, shapes or masks do not fit.
        """
        streams = (a_BNC, b_BNC, *more_BNC)
        if len(self.weights) == 1 and len(streams) == 2 and b_BNC is None:
            streams = (a_BNC,)
        masks = (None,) * len(streams) if masks is None else tuple(masks)
        self._check(streams, masks)
        there = [i for i, stream in enumerate(streams) if stream is not None]
        z = [stream for stream in streams if stream is not None]
        real = [masks[i] for i in there]
        names = [self.weights[i] for i in there]
        first = z[0]
        exchange = self.training or self.test_with_bottlenecks or self.bottleneck is None
        bottleneck_BSC = None if self.bottleneck is None else self.bottleneck.expand(first.shape[0], -1, -1)
        for number, blocks in enumerate(self.layers):
            assert isinstance(blocks, nn.ModuleDict)
            own = [blocks[name] for name in names]
            if number < self.fusion_layer or not exchange:
                z = [block(x, mask) for block, x, mask in zip(own, z, real, strict=True)]
            elif bottleneck_BSC is not None:
                z, bottleneck_BSC = through_bottleneck(own, z, bottleneck_BSC, real)
            elif len(set(self.weights)) == 1:
                z = jointly(own[0], z, real)
            else:
                z = across(own, z, real)
        out: list[Tensor | None] = [None] * len(streams)
        for i, x in zip(there, z, strict=True):
            out[i] = x
        return tuple(out)

    def extra_repr(self) -> str:
        return f"depth={self.depth}, fusion_layer={self.fusion_layer}, weights={self.weights}"

    def _check(self, streams: Sequence[Tensor | None], masks: Sequence[Tensor | None]) -> None:
        if len(streams) != len(self.weights):
            raise ValueError(f"expected {len(self.weights)} modalities, got {len(streams)}")
        if len(masks) != len(streams):
            raise ValueError(f"masks must be one for each of {len(streams)} modalities, got {len(masks)}")
        sizes = {stream.shape[0] for stream in streams if stream is not None}
        if not sizes:
            raise ValueError("at least one modality must be given, got None for all")
        if len(sizes) > 1:
            raise ValueError(f"all modalities must have one batch size, got {sorted(sizes)}")
        for stream, mask in zip(streams, masks, strict=True):
            if stream is not None and (stream.ndim != 3 or stream.shape[-1] != self.dim):
                raise ValueError(f"a modality must be (batch, tokens, {self.dim}), got {tuple(stream.shape)}")
            if stream is not None and mask is not None:
                if mask.dtype != torch.bool or mask.shape != stream.shape[:2]:
                    raise ValueError(
                        f"a mask must be bool (batch, tokens) = {tuple(stream.shape[:2])}, "
                        f"got {mask.dtype} of shape {tuple(mask.shape)}"
                    )


class _Positions(nn.Module):
    """A learned vector for each token. Without a size the table is made by the first state dict that is loaded."""

    def __init__(self, tokens: int | None, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(1, tokens or 0, dim))

    def forward(self, x_BNC: Tensor) -> Tensor:
        if self.table.shape[1] != x_BNC.shape[1]:
            raise ValueError(
                f"the position table is for {self.table.shape[1]} tokens (class token included), "
                f"got {x_BNC.shape[1]}: give the model the sizes of its inputs"
            )
        return x_BNC + self.table

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        loaded = state_dict.get(prefix + "table")
        if self.table.shape[1] == 0 and loaded is not None:
            self.table = nn.Parameter(self.table.new_empty(loaded.shape))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


#: pooling over all tokens, (B, T, C) -> (B, C)
_POOLS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gap": lambda x_BTC: x_BTC.mean(1),
    "gmp": lambda x_BTC: x_BTC.amax(1),
    "gsp": lambda x_BTC: x_BTC.sum(1),
}


class MBT(nn.Module):
    """The paper's classifier of video with sound. The defaults are MBT-B on 8 seconds.

    Args:
        num_classes: K.
        modalities: "spectrogram" and "rgb", one or both, in the order of tokens.
        rgb_size: frames, height, width of a clip; None takes the position table of a checkpoint.
        spectrogram_size: time bins, frequency bins; None likewise.
        patch: frames, height, width of a token; spectrogram tokens use the last two.
        in_channels: of pictures and spectrograms.
        classifier: "token" (a class token in each modality), or a pooling over all tokens: "gap" (mean), "gmp" (max),
            "gsp" (sum).
        share_encoder: one encoder for all modalities (embeddings and positions stay apart).
        num_bottlenecks: N_b; with class tokens one more is used, as in the authors' code.
        dim, num_heads, depth, fusion_layer, mlp_dim: see `BottleneckFusion`.
        drop_path, dropout, attn_drop, bottleneck, test_with_bottlenecks: see `BottleneckFusion`.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        modalities: Sequence[str] = ("spectrogram", "rgb"),
        rgb_size: Sequence[int] | None = (32, 224, 224),
        spectrogram_size: Sequence[int] | None = (800, 128),
        patch: Sequence[int] = (2, 16, 16),
        in_channels: int = 3,
        dim: int = 768,
        num_heads: int = 12,
        depth: int = 12,
        fusion_layer: int = 8,
        num_bottlenecks: int = 4,
        mlp_dim: int | None = None,
        classifier: Literal["token", "gap", "gmp", "gsp"] = "token",
        share_encoder: bool = False,
        bottleneck: bool = True,
        test_with_bottlenecks: bool = True,
        drop_path: float = 0.3,
        dropout: float = 0.0,
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(modalities, str) or not modalities or not set(modalities) <= {"spectrogram", "rgb"}:
            raise ValueError(f"modalities must be some of spectrogram, rgb, got {modalities!r}")
        if len(set(modalities)) != len(modalities):
            raise ValueError(f"modalities must be different, got {modalities!r}")
        if classifier != "token" and classifier not in _POOLS:
            raise ValueError(f"classifier must be one of token, {', '.join(_POOLS)}, got {classifier!r}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be positive, got {num_classes}")
        if len(patch) != 3 or min(patch) < 1:
            raise ValueError(f"patch must be three positive sizes (frames, height, width), got {patch}")
        self.modalities, self.classifier = tuple(modalities), classifier
        sizes = {"rgb": rgb_size, "spectrogram": spectrogram_size}
        patches = {"rgb": tuple(patch), "spectrogram": tuple(patch[1:])}
        self.embeddings, self.positions, self.classes = nn.ModuleDict(), nn.ModuleDict(), nn.ParameterDict()
        for name in self.modalities:
            convolution: Callable[..., nn.Module] = nn.Conv3d if name == "rgb" else nn.Conv2d
            self.embeddings[name] = convolution(in_channels, dim, patches[name], stride=patches[name])
            tokens = _token_count(name, sizes[name], patches[name])
            self.positions[name] = _Positions(None if tokens is None else tokens + (classifier == "token"), dim)
            if classifier == "token":
                self.classes[name] = nn.Parameter(torch.zeros(1, 1, dim))
        # the authors' shared encoder is the one of rgb
        shared = "rgb" if "rgb" in self.modalities else self.modalities[0]
        self.encoder = BottleneckFusion(
            dim,
            num_heads,
            depth,
            fusion_layer,
            num_bottlenecks + (classifier == "token"),
            weights=(shared,) * len(self.modalities) if share_encoder else self.modalities,
            mlp_dim=mlp_dim,
            drop_path=drop_path,
            dropout=dropout,
            attn_drop=attn_drop,
            bottleneck=bottleneck,
            test_with_bottlenecks=test_with_bottlenecks,
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(dim, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, *, spectrogram_BCHW: Tensor | None = None, rgb_BCFHW: Tensor | None = None) -> MBTOutput:
        """Classify.

        Args:
            spectrogram_BCHW: (B, C, time, frequency), or None where it is missing.
            rgb_BCFHW: (B, C, frames, height, width), or None where it is missing.

        Raises:
            ValueError: if none is given, or one does not fit the model.
        """
        inputs = {"spectrogram": spectrogram_BCHW, "rgb": rgb_BCFHW}
        for name, axes in (("spectrogram", 4), ("rgb", 5)):
            picture = inputs[name]
            if picture is None:
                continue
            if name not in self.modalities:
                raise ValueError(f"this model has the modalities {', '.join(self.modalities)}, got {name}")
            if picture.ndim != axes:
                raise ValueError(f"{name} must have {axes} axes, got shape {tuple(picture.shape)}")
        given = [inputs[name] for name in self.modalities]
        streams = self.encoder(
            *(None if x is None else self._tokens(name, x) for name, x in zip(self.modalities, given, strict=True))
        )
        z = [stream for stream in streams if stream is not None]
        tokens_BTC = self.norm(torch.cat(z, 1))
        if self.classifier != "token":
            return MBTOutput(self.head(_POOLS[self.classifier](tokens_BTC)), None, tokens_BTC)
        class_VBC = torch.stack([part[:, 0] for part in tokens_BTC.split([x.shape[1] for x in z], 1)])
        logits_VBK = self.head(class_VBC)
        return MBTOutput(logits_VBK.mean(0), logits_VBK, tokens_BTC)

    def _tokens(self, name: str, picture: Tensor) -> Tensor:
        x_BNC = self.embeddings[name](picture).flatten(2).transpose(1, 2)
        if self.classifier == "token":
            x_BNC = torch.cat([self.classes[name].expand(x_BNC.shape[0], -1, -1), x_BNC], 1)
        return self.dropout(self.positions[name](x_BNC))


def _token_count(name: str, size: Sequence[int] | None, patch: Sequence[int]) -> int | None:
    if size is None:
        return None
    if len(size) != len(patch) or any(s < p for s, p in zip(size, patch)):
        raise ValueError(f"{name}_size must be {len(patch)} sizes of at least a patch {tuple(patch)}, got {size}")
    return prod(s // p for s, p in zip(size, patch))
