"""BEVANet: two branches, three heads, and the loss that trains them; the classifier that it starts from.

Shape letters: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_relu, norm_relu_conv
from saccade.layers.norms import ChannelNorm
from saccade.layers.residual import BasicBlock, Bottleneck
from saccade.layers.resize import resize
from saccade.models.backbone import check_images
from saccade.models.bevanet.parts import BGAF, DLKPPM, EVA, PagFM
from saccade.models.segmentation import Segmentation, Segmenter

#: label of pixels that are not scored
IGNORE = -100


class _Branches(nn.Module):
    """What segmentation and classification share: the stem, and both branches up to their second exchange.

    A stage with a kernel is a plain block and EVA blocks with a norm each; one without is plain blocks and a ReLU.
    """

    def __init__(
        self,
        planes: int,
        blocks: Sequence[int],
        semantic_kernels: Sequence[int],
        detail_kernels: Sequence[int],
        expand: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        if len(blocks) != 5 or min(planes, *blocks, in_channels) < 1:
            raise ValueError(
                "planes, five numbers of blocks and in_channels must be positive, got "
                f"{planes}, {tuple(blocks)} and {in_channels}"
            )
        if len(semantic_kernels) != 3 or len(detail_kernels) != 2:
            raise ValueError(
                f"there are three semantic and two detail kernels, got {semantic_kernels} and {detail_kernels}"
            )
        p = planes
        self.in_channels = in_channels
        self.plain_semantic, self.plain_detail = ([not k for k in ks] for ks in (semantic_kernels, detail_kernels))
        self.stem = nn.Sequential(
            *conv_norm_relu(in_channels, p, 3, 2, bias=True), *conv_norm_relu(p, p, 3, 2, bias=True)
        )
        self.layer1, self.layer2 = _plain(p, p, blocks[0], 1), _plain(p, 2 * p, blocks[1], 2)
        self.semantic = nn.ModuleList(
            _stage(2 * p * 2**i, 4 * p * 2**i, blocks[2 + i], 2, semantic_kernels[i], 1 + i, expand) for i in range(2)
        )
        self.detail = nn.ModuleList(_stage(2 * p, 2 * p, blocks[0], 1, kernel, 1, expand) for kernel in detail_kernels)
        self.compress = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 2 * p, 1, bias=False), nn.BatchNorm2d(2 * p)) for c in (4 * p, 8 * p)
        )
        self.exchange = nn.ModuleList(PagFM(2 * p, p) for _ in range(2))
        self.to_detail = _double(2 * p, 2 * p)

    def _branches(self, x_BCHW: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Semantic maps, and the detail branch after its first and its second exchange."""
        check_images(x_BCHW, self.in_channels)
        quarter = F.relu(self.layer1(self.stem(x_BCHW)))
        eighth = F.relu(self.layer2(quarter))
        third = _relu(self.semantic[0](eighth), self.plain_semantic[0])
        # the auxiliary head reads it behind the ReLU too, which the authors' code does in place
        early = _relu(self.exchange[0](self.detail[0](eighth), self.compress[0](third)), self.plain_detail[0])
        fourth = _relu(self.semantic[1](third), self.plain_semantic[1])
        late = _relu(self.exchange[1](self.detail[1](early), self.compress[1](fourth)), self.plain_detail[1])
        return [quarter, eighth, third, fourth], early, late


class BEVANet(_Branches, Segmenter):
    """Bilateral efficient visual attention network.

    Args:
        num_classes: K.
        planes: P, the width at a quarter of the image; 32 in BEVANet-S, 64 in BEVANet.
        blocks: of layer 1 (and the plain detail branch), of layer 2, of plain semantic stages 3, 4 and 5.
        semantic_kernels: of stages 3, 4 and 5; 0 is a stage of plain convolutions.
        detail_kernels: of the detail branch's stages 3 and 4; 0 likewise.
        expand: of the blocks' MLPs.
        pyramid_channels: of each scale of the DLKPPM.
        head_channels: of the two heads for classes.
        in_channels: 3, or 1 for grey images.

    Raises:
        ValueError: if a number is out of range or a kernel is unknown.
    """

    #: of the maps that `features` gives
    slug = "bevanet"
    strides = (4, 8, 16, 32, 64)

    def __init__(
        self,
        num_classes: int = 19,
        *,
        planes: int = 32,
        blocks: Sequence[int] = (2, 2, 3, 3, 2),
        semantic_kernels: Sequence[int] = (0, 35, 35),
        detail_kernels: Sequence[int] = (0, 23),
        expand: int = 4,
        pyramid_channels: int = 96,
        head_channels: int = 128,
        in_channels: int = 3,
    ) -> None:
        super().__init__(planes, blocks, semantic_kernels, detail_kernels, expand, in_channels)
        if min(num_classes, pyramid_channels, head_channels) < 1:
            raise ValueError(
                "num_classes, pyramid_channels and head_channels must be positive, got "
                f"{num_classes}, {pyramid_channels} and {head_channels}"
            )
        p = planes
        self.channels = (p, 2 * p, 4 * p, 8 * p, 16 * p)
        self.semantic.append(_stage(8 * p, 16 * p, blocks[4], 2, semantic_kernels[2], 2, expand))
        self.pyramid = DLKPPM(16 * p, pyramid_channels, 4 * p)
        self.to_boundary = _double(2 * p, 2 * p)
        self.fuse = BGAF(4 * p)
        self.head = _head(4 * p, head_channels, num_classes)
        self.auxiliary_head = _head(2 * p, head_channels, num_classes)
        self.boundary_head = _head(2 * p, p, 1)

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        """The semantic branch's maps from fine to coarse, of `channels` and `strides`."""
        maps = self._branches(x_BCHW)[0]
        return [*maps, self.semantic[2](maps[-1])]

    def forward(self, pixel_values: Tensor) -> Segmentation:
        """Images of any size (the authors' code takes multiples of 64).

        Raises:
            ValueError: if they are no batch of images.
        """
        maps, early, detail = self._branches(pixel_values)
        logits = resize(self._classes(maps[-1], detail), pixel_values)
        if not self.training:
            return Segmentation(logits)
        return Segmentation(logits, self.auxiliary_head(early), self.boundary_head(detail))

    def heads(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of classes, those of the auxiliary head and of the boundary, at an eighth of the image."""
        maps, early, detail = self._branches(x_BCHW)
        return self._classes(maps[-1], detail), self.auxiliary_head(early), self.boundary_head(detail)

    def _classes(self, fourth_BCHW: Tensor, detail_BCHW: Tensor) -> Tensor:
        semantic = resize(self.pyramid(self.semantic[2](fourth_BCHW)), detail_BCHW)
        fused = self.fuse(self.to_detail(detail_BCHW), semantic, self.to_boundary(detail_BCHW))
        return self.head(fused)


class BEVANetClassifier(_Branches):
    """The form that is trained on ImageNet first: the semantic branch stays at 1/32, the detail branch comes down.

    Args:
        num_classes, planes, blocks, semantic_kernels, detail_kernels, expand, in_channels: see `BEVANet`.
        last_channels: of the layer before the mean over positions.

    Raises:
        ValueError: if a number is out of range or a kernel is unknown.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        planes: int = 32,
        blocks: Sequence[int] = (2, 2, 3, 3, 2),
        semantic_kernels: Sequence[int] = (0, 35, 35),
        detail_kernels: Sequence[int] = (0, 23),
        expand: int = 4,
        last_channels: int = 2048,
        in_channels: int = 3,
    ) -> None:
        super().__init__(planes, blocks, semantic_kernels, detail_kernels, expand, in_channels)
        if min(num_classes, last_channels) < 1:
            raise ValueError(f"num_classes and last_channels must be positive, got {num_classes} and {last_channels}")
        p, kernel = planes, semantic_kernels[2]
        last: list[nn.Module] = [_double(8 * p, 8 * p)]
        if kernel:
            for _ in range(2):
                last += [EVA(16 * p, kernel, expand), ChannelNorm(16 * p)]
            last.append(_double(16 * p, 8 * p))
        else:
            last += [_double(16 * p, 8 * p, relu=i < blocks[4] - 1) for i in range(1, blocks[4])]
        self.semantic.append(nn.Sequential(*last))
        self.down = nn.Sequential(
            *conv_norm_relu(4 * p, 8 * p, 3, 2),
            nn.Conv2d(8 * p, 16 * p, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16 * p),
        )  # fmt: skip
        self.last = conv_norm_relu(16 * p, last_channels, 1)
        self.head = nn.Linear(last_channels, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, K) of images.

        Raises:
            ValueError: if `x` is no batch of images.
        """
        maps, _, detail = self._branches(x_BCHW)
        total = F.relu(self.semantic[2](maps[-1]) + self.down(self.to_detail(detail)))
        return self.head(self.last(total).mean((2, 3)))


def boundaries(labels_BHW: Tensor, width: int = 4) -> Tensor:
    """1.0 where a pixel's label differs from that of the pixel to the right or below, widened to `width` pixels.

    Args:
        labels_BHW: a class for each pixel.
        width: pixels across a boundary.
    """
    edge_BHW = torch.zeros_like(labels_BHW, dtype=torch.float32)
    edge_BHW[:, :, :-1] += labels_BHW[:, :, 1:] != labels_BHW[:, :, :-1]
    edge_BHW[:, :-1] += labels_BHW[:, 1:] != labels_BHW[:, :-1]
    edge_BHW = F.pad(edge_BHW, (width // 2, (width - 1) // 2, width // 2, (width - 1) // 2))
    return F.max_pool2d(edge_BHW[:, None], width, 1)[:, 0].clamp(max=1)


def hard_cross_entropy(
    logits_BKHW: Tensor, labels_BHW: Tensor, *, threshold: float = 0.9, keep: int = 131_072
) -> Tensor:
    """Mean cross-entropy of the pixels whose true class is less probable than `threshold`, or of the `keep` worst.

    Args:
        logits_BKHW, labels_BHW: of the same size; labels of `IGNORE` do not count.
        threshold: probability of the true class from which a pixel is easy.
        keep: pixels that are counted at least, those of the greatest loss.
    """
    loss = F.cross_entropy(logits_BKHW, labels_BHW, ignore_index=IGNORE, reduction="none")
    loss = loss[labels_BHW != IGNORE]
    if not loss.numel():
        return logits_BKHW.sum() * 0
    probability = (-loss.detach()).exp()
    limit = probability.kthvalue(min(keep, loss.numel())).values.clamp(min=threshold)
    hard = loss[probability < limit]
    return hard.mean() if hard.numel() else loss.sum() * 0


def segmentation_loss(output: Segmentation, labels_BHW: Tensor, *, keep: int = 131_072) -> Tensor:
    """0.4 CE(auxiliary) + OHEM(logits) + 20 BCE(boundary) + OHEM(logits where a boundary is seen, above 0.8).

    The boundary's BCE weighs the few boundary pixels by the share of the others, and the others by theirs.

    Args:
        output: of a `BEVANet` in training mode.
        labels_BHW: a class for each pixel of the images.
        keep: see `hard_cross_entropy`.

    Raises:
        ValueError: if the output is not from training mode.
    """
    if output.auxiliary is None or output.boundary is None:
        raise ValueError("the loss needs the output of a network in training mode")
    auxiliary, boundary = resize(output.auxiliary, output.logits), resize(output.boundary, output.logits)[:, 0]
    edge_BHW = boundaries(labels_BHW)
    share = edge_BHW.mean()
    weight = torch.where(edge_BHW > 0, 1 - share, share)
    near = torch.where(boundary.detach().sigmoid() > 0.8, labels_BHW, IGNORE)
    return (
        0.4 * F.cross_entropy(auxiliary, labels_BHW, ignore_index=IGNORE)
        + hard_cross_entropy(output.logits, labels_BHW, keep=keep)
        + 20 * F.binary_cross_entropy_with_logits(boundary, edge_BHW, weight)
        + hard_cross_entropy(output.logits, near, keep=keep)
    )


def _relu(x_BCHW: Tensor, wanted: bool) -> Tensor:
    return F.relu(x_BCHW) if wanted else x_BCHW


def _double(inputs: int, width: int, relu: bool = False) -> Bottleneck:
    """A bottleneck to twice the width."""
    return Bottleneck(inputs, width, expansion=2, relu=relu)


def _plain(inputs: int, outputs: int, count: int, stride: int) -> nn.Sequential:
    """BasicBlocks; the last of several has no ReLU."""
    return nn.Sequential(
        *(
            BasicBlock(outputs if i else inputs, outputs, 1 if i else stride, relu=i == 0 or i < count - 1)
            for i in range(count)
        )
    )


def _stage(
    inputs: int, outputs: int, count: int, stride: int, kernel: int, attentions: int, expand: int
) -> nn.Sequential:
    """`count` plain blocks for kernel 0; else one, and `attentions` blocks with that kernel, each with its norm."""
    if not kernel:
        return _plain(inputs, outputs, count, stride)
    layers: list[nn.Module] = [BasicBlock(inputs, outputs, stride)]
    for _ in range(attentions):
        layers += [EVA(outputs, kernel, expand), ChannelNorm(outputs)]
    return nn.Sequential(*layers)


def _head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        *norm_relu_conv(inputs, hidden, 3), nn.BatchNorm2d(hidden), nn.ReLU(), nn.Conv2d(hidden, outputs, 1)
    )
