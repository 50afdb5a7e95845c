"""After lifting: weights of the two branches voxel by voxel, and attention among the voxels that are sure.

Shape letters: B scenes, K classes, C channels, X, Y, Z voxels along the axes, P = X Y Z, N chosen voxels, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from saccade.layers.pre_norm import PreNormBlock
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.models.ms_occ.semantic import chosen
from saccade.ops.export import exporting

#: batch norms of the baseline's voxels
_EPS, _MOMENTUM = 1e-3, 0.01
#: channels between the encoders and the weight
_WEIGHT_WIDTH = 16


def conv_norm_relu_3d(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, batch norm (eps 1e-3, momentum 0.01), ReLU on voxels."""
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False),
        nn.BatchNorm3d(out_channels, eps=_EPS, momentum=_MOMENTUM),
        nn.ReLU(),
    )


class Fused(NamedTuple):
    """What adaptive fusion gives: the voxels (B, C, X, Y, Z), and the camera's share w (B, 1, X, Y, Z) of them."""

    voxels: Tensor
    weight: Tensor


class AdaptiveFusion(nn.Module):
    """w a + (1 - w) b, a and b encodings of camera's and scanner's voxels, w = sigmoid(conv(ReLU(BN(conv([a; b]))))).

    Args:
        in_channels: of both.
        channels: C of what comes out.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        if min(in_channels, channels) < 1:
            raise ValueError(f"in_channels and channels must be positive, got {in_channels} and {channels}")
        self.in_channels = in_channels
        self.camera, self.scanner = (conv_norm_relu_3d(in_channels, channels, 7) for _ in range(2))
        self.weight = nn.Sequential(
            *conv_norm_relu_3d(2 * channels, _WEIGHT_WIDTH), nn.Conv3d(_WEIGHT_WIDTH, 1, 1, bias=False)
        )

    def forward(self, camera_BCXYZ: Tensor, scanner_BCXYZ: Tensor) -> Fused:
        """
        Raises:
            ValueError: if the voxels differ in shape, or have other channels.
        """
        if camera_BCXYZ.shape != scanner_BCXYZ.shape or camera_BCXYZ.shape[1:2] != (self.in_channels,):
            raise ValueError(
                f"both must be (batch, {self.in_channels}, x, y, z) of one shape, got {tuple(camera_BCXYZ.shape)} and "
                f"{tuple(scanner_BCXYZ.shape)}"
            )
        # torch's 7 x 7 x 7 convolution in bfloat16 reads beyond its memory, backward, where channels lie together
        a, b = self.camera(camera_BCXYZ.contiguous()), self.scanner(scanner_BCXYZ.contiguous())
        w_B1XYZ = self.weight(torch.cat([a, b], 1)).sigmoid()
        return Fused(w_B1XYZ * a + (1 - w_B1XYZ) * b, w_B1XYZ)


class ConfidentAttention(nn.Module):
    """HCCVF: voxels of which either branch is sure attend to each other; the others stay.

        s = max_{k > 0} softmax(logits)_k;   S = the `most` surest of each branch with s > threshold
        token = W [F_C; F_L; F_AF] + MLP(centre),   F_AF[S] + V blocks(token)

    Args:
        dim: C of each of the three.
        num_classes: K, of the two classifiers made here; 0 is free.
        width: D of the tokens; C where None.
        num_heads, depth: of the blocks.
        most: voxels of each branch.
        threshold: of their confidence; 0 takes the surest in any case.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int = 17,
        *,
        width: int | None = None,
        num_heads: int = 8,
        depth: int = 1,
        most: int = 4096,
        threshold: float = 0.0,
    ) -> None:
        super().__init__()
        width = dim if width is None else width
        if min(dim, width, depth, most) < 1 or num_classes < 2 or not 0 <= threshold <= 1:
            raise ValueError(
                "dim, width, depth and most must be positive, num_classes at least 2 and threshold between 0 and 1, "
                f"got {dim}, {width}, {depth}, {most}, {num_classes} and {threshold}"
            )
        self.most, self.threshold = most, threshold
        self.classify_camera, self.classify_scanner = (nn.Conv3d(dim, num_classes, 1) for _ in range(2))
        self.embed = nn.Linear(3 * dim, width)
        self.place = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            PreNormBlock(SoftmaxAttention(width, num_heads, rope=False, qkv_bias=True, proj_bias=True), width)
            for _ in range(depth)
        )
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, dim)

    def sure(self, logits_BKXYZ: Tensor) -> Tensor:
        """Which voxels (B, P) a branch is sure about."""
        s_BP = logits_BKXYZ.softmax(1)[:, 1:].amax(1).flatten(1)
        # in the order of their numbers where they are equal, as voxels that hold nothing are
        most = min(self.most, s_BP.shape[1])
        if exporting():  # there by value alone, which exporters know
            value_BN, number_BN = s_BP.topk(most, 1)
        else:
            value_BN, number_BN = (x[:, :most] for x in s_BP.sort(dim=1, descending=True, stable=True))
        return torch.zeros_like(s_BP, dtype=torch.bool).scatter(1, number_BN, value_BN > self.threshold)

    def forward(self, camera_BCXYZ: Tensor, scanner_BCXYZ: Tensor, fused_BCXYZ: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The fused voxels with what the sure ones told each other, and the logits of both classifiers."""
        logits = [self.classify_camera(camera_BCXYZ), self.classify_scanner(scanner_BCXYZ)]
        number_BN, real_BN = chosen(self.sure(logits[0]) | self.sure(logits[1]))
        three_BPC = torch.cat([camera_BCXYZ, scanner_BCXYZ, fused_BCXYZ], 1).flatten(2).mT
        tokens_BNC = three_BPC.gather(1, number_BN[..., None].expand(-1, -1, three_BPC.shape[2]))
        x_BND = self.embed(tokens_BNC) + self.place(places(number_BN, fused_BCXYZ))
        for block in self.blocks:
            x_BND = block(x_BND, mask=real_BN)
        more_BNC = self.out(self.norm(x_BND)) * real_BN[..., None]
        # those that are not real have 0 to add, wherever their numbers point
        all_BPC = fused_BCXYZ.flatten(2).mT
        index_BNC = number_BN[..., None].expand(-1, -1, all_BPC.shape[2])
        all_BPC = all_BPC.scatter_add(1, index_BNC, more_BNC.to(all_BPC.dtype))
        return all_BPC.mT.unflatten(2, fused_BCXYZ.shape[2:]), logits


def places(number_BN: Tensor, like_BCXYZ: Tensor) -> Tensor:
    """The middles of voxels in [0, 1] along each axis, (B, N, 3), of their numbers in row-major order."""
    X, Y, Z = like_BCXYZ.shape[2:]
    place = torch.stack([number_BN // (Y * Z), number_BN // Z % Y, number_BN % Z], -1)
    size = torch.tensor([X, Y, Z], device=number_BN.device)
    return ((place + 0.5) / size).to(like_BCXYZ.dtype)
