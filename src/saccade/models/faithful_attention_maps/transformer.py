"""A vision transformer with registers whose keys can be closed: what stands behind a closed one is never read.

    y_i = sum_j m_j exp(q_i . k_j) v_j / sum_j m_j exp(q_i . k_j)

m in {0, 1} is a mask, m between is the bias log m; either way it has a gradient.

Shape letters: B batch, C channels, H height and W width of images and of the map of patches, or H heads, N tokens, of
which P stand before the patches, M keys, D width, K key heads, E width of values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.layers.patches import filled
from saccade.layers.positions import positions_at
from saccade.layers.pre_norm import PreNormBlock
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops.pattern import Pattern


class GatedKeysAttention(SoftmaxAttention):
    """Softmax attention whose keys have factors, by which it can be differentiated.

    Args:
        dim: D.
        num_heads: H.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads, rope=False, qkv_bias=True, proj_bias=True)

    def forward(self, x_BND: Tensor, *, gate_BM: Tensor | None = None, mask: Any = None) -> Tensor:  # type: ignore[override]
        """(B, N, D); m are factors of keys (B, M), or `mask` bool (B, M) where they are 0 or 1 without a gradient."""
        return self.steps(x_BND, None, mask, None, gate_BM=gate_BM)

    def project(
        self, x_BNC: Tensor, context_BMC: Tensor | None, positions: Tensor | None, *, gate_BM: Tensor | None = None
    ) -> tuple[Any, ...]:
        return (*super().project(x_BNC, context_BMC, positions), gate_BM)

    def attend(
        self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern, gate_BM: Tensor | None = None
    ) -> Tensor:
        if gate_BM is None:
            return super().attend(q_BHND, k_BKMD, v_BKME, pattern)
        gate_BKM1 = gate_BM.to(v_BKME.dtype)[:, None, :, None].expand(*v_BKME.shape[:3], 1)
        both_BHNE = super().attend(q_BHND, k_BKMD, torch.cat([gate_BKM1 * v_BKME, gate_BKM1], -1), pattern)
        total_BHN1 = both_BHNE[..., -1:].clamp(min=torch.finfo(v_BKME.dtype).tiny)
        return both_BHNE[..., :-1] / total_BHN1


class RegisterTransformer(nn.Module):
    """Images to tokens: class token, registers, patches; pre-norm blocks and a last norm, as timm lays it out.

    Args:
        image_size, patch: sides in pixels; other images have their positions interpolated, and are filled to whole
            patches.
        dim: D.
        depth, num_heads: of the blocks.
        mlp_ratio: inner width of their MLPs over D.
        registers: how many.
        class_positions: positions of the class token and registers too, not of patches alone.
        layer_scale: where it starts; None has none.
        drop_path: of branches in training.
        in_channels: C.

    Raises:
        ValueError: if a number is not positive, or patches do not fill the image.
    """

    def __init__(
        self,
        *,
        image_size: int = 518,
        patch: int = 14,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        registers: int = 4,
        class_positions: bool = False,
        layer_scale: float | None = 1e-5,
        drop_path: float = 0.0,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if min(image_size, patch, dim, depth, in_channels, registers + 1) < 1 or image_size % patch:
            raise ValueError(
                "image_size must be whole patches, patch, dim, depth and in_channels positive, registers not negative, "
                f"got {image_size}, {patch}, {dim}, {depth}, {in_channels} and {registers}"
            )
        self.patch, self.side, self.prefix = patch, image_size // patch, 1 + registers
        self.class_positions = class_positions
        self.embed = nn.Conv2d(in_channels, dim, patch, patch)
        self.class_token = nn.Parameter(1e-6 * torch.randn(1, 1, dim))
        self.registers = nn.Parameter(1e-6 * torch.randn(1, registers, dim)) if registers else None
        places = self.side**2 + (self.prefix if class_positions else 0)
        self.positions = nn.Parameter(0.02 * torch.randn(1, places, dim))
        self.blocks = nn.ModuleList(
            PreNormBlock(
                GatedKeysAttention(dim, num_heads), dim, int(mlp_ratio * dim), layer_scale=layer_scale,
                drop_path=drop_path, norm_eps=1e-6,
            )
            for _ in range(depth)
        )  # fmt: skip
        self.norm = nn.LayerNorm(dim, 1e-6)

    def grid(self, x_BCHW: Tensor) -> tuple[int, int]:
        """Height and width of the map of patches."""
        height, width = (-(-n // self.patch) for n in x_BCHW.shape[2:])
        return height, width

    def start(self, x_BCHW: Tensor) -> Tensor:
        """The tokens (B, N, D) that the first block takes."""
        map_BDHW = self.embed(filled(x_BCHW, self.patch))
        height, width = map_BDHW.shape[2:]
        patches_BND = map_BDHW.flatten(2).mT
        before: list[Tensor] = [self.class_token] if self.registers is None else [self.class_token, self.registers]
        prefix_BPD = torch.cat(before, 1).expand(len(patches_BND), -1, -1)
        first = self.prefix if self.class_positions else 0
        table = torch.cat([self.positions[:, :1], self.positions[:, first:]], 1)  # the first place is left out again
        patches_BND = patches_BND + positions_at(table, self.side, height, width)[:, 1:]
        if self.class_positions:
            prefix_BPD = prefix_BPD + self.positions[:, : self.prefix]
        return torch.cat([prefix_BPD, patches_BND], 1)

    def forward(self, x_BCHW: Tensor, seen: Tensor | None = None, *, prune: bool = False) -> Tensor:
        """
        Args:
            x_BCHW: images.
            seen: of the patches (B, H W): bool, or factors with a gradient; what is before them is always seen.
            prune: with a bool mask, only patches that some image of the batch has room for are computed; those that
                are left out are not returned.

        Returns:
            tokens (B, N, D).
        """
        x_BND = self.start(x_BCHW)
        if seen is None:
            given: dict[str, Tensor] = {}
        else:
            if seen.dtype == torch.bool and prune:
                x_BND, seen = self._pruned(x_BND, seen)
            always = seen.new_ones(len(seen), self.prefix)
            given = {"mask" if seen.dtype == torch.bool else "gate_BM": torch.cat([always, seen], 1)}
        for block in self.blocks:
            x_BND = block(x_BND, **given)
        return self.norm(x_BND)

    def _pruned(self, x_BND: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """As many patches of each image as the image with the most of them has, in their order."""
        most = int(seen.sum(1).max())
        kept = seen.int().argsort(dim=1, descending=True, stable=True)[:, :most].sort(1).values
        patches = x_BND[:, self.prefix :].gather(1, kept[..., None].expand(-1, -1, x_BND.shape[2]))
        return torch.cat([x_BND[:, : self.prefix], patches], 1), seen.gather(1, kept)
