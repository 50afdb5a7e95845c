"""The whole network: a Swin encoder whose blocks read the task, its side stream, and a decoder for each task.

Shape letters: B batch, T tasks, D width of a task's embedding, R rows of the batch that have a task, O channels of a
task, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.drop_path import drop_path_rates
from saccade.layers.initialization import start_transformer
from saccade.layers.patches import PatchEmbedding, PatchMerging, filled
from saccade.layers.pre_norm import PreNormBlock
from saccade.layers.window_attention import WindowAttention
from saccade.models.backbone import check_images
from saccade.models.multitask import Multitask, MultitaskNetwork
from saccade.models.vit_adapters_mtl.adapters import Bottleneck
from saccade.models.vit_adapters_mtl.affinity import TaskAffinity
from saccade.models.vit_adapters_mtl.attention import AdaptedBlock
from saccade.models.vit_adapters_mtl.decoder import TaskDecoder


class Stage(nn.Module):
    """Blocks of one resolution beside the side stream: x <- block(x), h <- bottleneck(x + h).

    Args:
        dim: C.
        depth: blocks.
        num_heads, mlp_ratio, scale: of the blocks; inner width of the MLP over C.
        window: side of a window; every other block shifts it by half, but where `shifted` is False.
        condition: D.
        adapted: which blocks read the task.
        adapter: False has no side stream.
        task_scaled_norm: of the adapted blocks.
        merges: both streams are halved in resolution at the end.
        drop, drop_paths: dropout, and the blocks' drop path rates.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        window: int,
        condition: int,
        *,
        adapted: Sequence[int] = (),
        adapter: bool = True,
        task_scaled_norm: bool = True,
        merges: bool = True,
        shifted: bool = True,
        mlp_ratio: float = 4.0,
        scale: float | None = None,
        drop: float = 0.0,
        drop_paths: Sequence[float] = (),
    ) -> None:
        super().__init__()
        hidden = int(mlp_ratio * dim)
        self.blocks = nn.ModuleList()
        for i, rate in enumerate(drop_paths or [0.0] * depth):
            options: dict[str, Any] = {"shift": window // 2 if shifted and i % 2 else 0, "scale": scale}
            if i in adapted:
                block: nn.Module = AdaptedBlock(
                    dim, num_heads, condition, hidden, task_scaled_norm=task_scaled_norm, window=window, drop=drop,
                    drop_path=rate, **options,
                )  # fmt: skip
            else:
                attention = WindowAttention(dim, num_heads, window_size=window, **options)
                block = PreNormBlock(attention, dim, hidden, drop=drop, attention_drop=drop, drop_path=rate)
            self.blocks.append(block)
        self.bottlenecks = nn.ModuleList(Bottleneck(condition, dim) for _ in range(depth)) if adapter else None
        self.merge = PatchMerging(dim) if merges else None
        self.side_merge = PatchMerging(dim) if merges and adapter else None

    def forward(self, x_BHWC: Tensor, side_BHWC: Tensor | None, omega_BD: Tensor) -> tuple[Tensor, Tensor | None]:
        for i, block in enumerate(self.blocks):
            x_BHWC = block(x_BHWC, omega_BD) if isinstance(block, AdaptedBlock) else block(x_BHWC)
            if self.bottlenecks is not None:
                side_BHWC = self.bottlenecks[i](x_BHWC if side_BHWC is None else x_BHWC + side_BHWC, omega_BD)
        if self.merge is not None:
            x_BHWC = _merged(self.merge, x_BHWC)
        if self.side_merge is not None and side_BHWC is not None:
            side_BHWC = _merged(self.side_merge, side_BHWC)
        return x_BHWC, side_BHWC


class MultitaskSwin(MultitaskNetwork):
    """One Swin for several dense tasks.

    Args:
        tasks: their names.
        task_classes: O of each: the classes, or 1 for a number at each pixel.
        image_size: at which windows are as large as given; stages with smaller maps have smaller windows. Images may
            have any size.
        in_channels: of the images.
        patch_size: side of a patch; the decoders enlarge by as much at their end.
        embed_dim: C of the first stage, which doubles at each merge.
        depths, num_heads: of each stage.
        decoder_depths: blocks of the decoders at each stage's resolution; the last one's are not built.
        window_size: side of a window.
        condition: D; window_size ** 3 where None.
        conditioned_blocks: of each stage, the numbers of the blocks that read the task.
        adapter: False decodes the encoder's own stream; there is no side stream then.
        task_scaled_norm: False leaves the layer norms of the conditioned blocks as they are.
        affinities: the tasks lend each other their embeddings (`TaskAffinity`, as `affinity`); False as the authors'
            code.
        mlp_ratio: inner width of the MLPs over C.
        scale: of the attention; 1 / sqrt(head dim) where None. The authors' training script has 1.
        drop_path: of the encoder's last block, rising linearly from 0.
        decoder_drop: dropout of the decoders' blocks.

    Raises:
        ValueError: if a number is out of range, or the arguments do not fit together.
    """

    slug = "vit-adapters-mtl"
    authors_module = "swin_mtl"

    def __init__(
        self,
        tasks: Sequence[str] = ("segmentation", "depth"),
        task_classes: Sequence[int] = (14, 1),
        *,
        image_size: int = 224,
        in_channels: int = 3,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        decoder_depths: Sequence[int] = (2, 2, 2, 2),
        window_size: int = 7,
        condition: int | None = None,
        conditioned_blocks: Sequence[Sequence[int]] = ((), (), (12, 13, 14, 15, 16, 17), ()),
        adapter: bool = True,
        task_scaled_norm: bool = True,
        affinities: bool = False,
        mlp_ratio: float = 4.0,
        scale: float | None = None,
        drop_path: float = 0.2,
        decoder_drop: float = 0.6,
    ) -> None:
        super().__init__()
        if not tasks or len(tasks) != len(task_classes):
            raise ValueError(f"tasks and task_classes must be one for each task, got {len(tasks)}, {len(task_classes)}")
        if min(*task_classes, image_size, in_channels, patch_size, embed_dim, window_size) < 1 or mlp_ratio <= 0:
            raise ValueError("sizes and numbers of channels and classes must be positive")
        given = (depths, num_heads, decoder_depths, conditioned_blocks)
        if not depths or min(depths) < 1 or len({len(each) for each in given}) != 1:
            raise ValueError(
                "depths, num_heads, decoder_depths and conditioned_blocks must have one entry for each stage, "
                f"got {', '.join(str(len(each)) for each in given)}"
            )
        for stage, (depth, blocks) in enumerate(zip(depths, conditioned_blocks)):
            if not all(0 <= block < depth for block in blocks):
                raise ValueError(f"conditioned_blocks of stage {stage} must be below {depth}, got {tuple(blocks)}")
        self.tasks, self.task_classes = tuple(tasks), tuple(task_classes)
        self.in_channels, self.patch_size = in_channels, patch_size
        self.channels = tuple(embed_dim * 2**stage for stage in range(len(depths)))
        sides = [-(-image_size // (patch_size * 2**stage)) for stage in range(len(depths))]
        windows = [min(window_size, side) for side in sides]
        shifted = [side > window_size for side in sides]
        width = window_size**3 if condition is None else condition
        self.embed = PatchEmbedding(in_channels, embed_dim, patch_size)
        self.task_embedding = nn.Embedding(len(tasks), width)
        self.affinity = TaskAffinity(len(tasks)) if affinities else None
        rates, first = drop_path_rates(drop_path, sum(depths)), [sum(depths[:i]) for i in range(len(depths))]
        self.stages = nn.ModuleList(
            Stage(
                dim, depths[i], num_heads[i], windows[i], width, adapted=conditioned_blocks[i], adapter=adapter,
                task_scaled_norm=task_scaled_norm, merges=i + 1 < len(depths), shifted=shifted[i],
                mlp_ratio=mlp_ratio, scale=scale, drop_paths=rates[first[i] : first[i] + depths[i]],
            )
            for i, dim in enumerate(self.channels)
        )  # fmt: skip
        self.norm = nn.LayerNorm(self.channels[-1])
        self.decoders = nn.ModuleList(
            TaskDecoder(
                self.channels, classes, decoder_depths, num_heads, windows, shifted=shifted, last=patch_size,
                mlp_ratio=mlp_ratio, scale=scale, drop=decoder_drop,
            )
            for classes in task_classes
        )  # fmt: skip
        self.apply(start_transformer)

    def forward(self, pixel_values: Tensor, task_id: Tensor | None = None) -> Multitask:
        """
        Args:
            pixel_values: images (B, channels, H, W) of any size.
            task_id: (B,), which task each image is asked for, from 0; all tasks of all images where None.

        Raises:
            ValueError: if they are no batch of images, or the tasks do not fit.
        """
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        features = self.encode(pixel_values, task_id)
        if task_id is None:
            count = len(pixel_values)
            parts = [[map_BHWC.split(count)[t] for map_BHWC in features] for t in range(len(self.tasks))]
            return Multitask([_decoded(decoder, maps, size) for decoder, maps in zip(self.decoders, parts)])
        rows = [(task_id == t).nonzero()[:, 0] for t in range(len(self.tasks))]
        parts = [[map_BHWC[each] for map_BHWC in features] for each in rows]
        return Multitask([_decoded(decoder, maps, size) for decoder, maps in zip(self.decoders, parts)], rows)

    def encode(self, pixel_values: Tensor, task_id: Tensor | None = None) -> list[Tensor]:
        """What the decoders read, maps (B, H, W, C): the input of each stage but the last, and the normed side stream.

        Without `task_id` all images for the first task, then all for the second ... so that `split` tells tasks apart;
        gradients of the tasks' losses by the last map, split so, are what `affinity.update` takes.

        Args:
            pixel_values, task_id: as in the call.

        Raises:
            ValueError: as there.
        """
        check_images(pixel_values, self.in_channels)
        table_TD = self.task_embedding.weight
        omega_TD = table_TD if self.affinity is None else self.affinity(table_TD)
        if task_id is None:
            omega_BD = omega_TD.repeat_interleave(len(pixel_values), 0)
            pixel_values = pixel_values.repeat(len(self.tasks), 1, 1, 1)
        else:
            if task_id.shape != pixel_values.shape[:1] or task_id.is_floating_point():
                raise ValueError(f"task_id must be a number for each of {len(pixel_values)} images, got {task_id}")
            if len(task_id) and not 0 <= int(task_id.min()) <= int(task_id.max()) < len(self.tasks):
                raise ValueError(f"task_id must be below {len(self.tasks)} and not negative, got {task_id.tolist()}")
            omega_BD = F.embedding(task_id, omega_TD)
        x_BHWC, side_BHWC, inputs = self.embed(filled(pixel_values, self.patch_size)), None, []
        for stage in self.stages:
            inputs.append(x_BHWC)
            x_BHWC, side_BHWC = stage(x_BHWC, side_BHWC, omega_BD)
        return [*inputs[:-1], self.norm(x_BHWC if side_BHWC is None else side_BHWC)]

    def freeze(self) -> MultitaskSwin:
        """Leave for training what the paper trains: all but the blocks that do not read the task, and the merging of
        the encoder's own stream. Call it when pretrained weights are in."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            for block in stage.blocks:
                block.requires_grad_(isinstance(block, AdaptedBlock))
            if stage.merge is not None:
                stage.merge.requires_grad_(False)
        return self


def _merged(merge: nn.Module, x_BHWC: Tensor) -> Tensor:
    return merge(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _decoded(decoder: nn.Module, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
    assert isinstance(decoder, TaskDecoder)
    if not len(maps[0]):
        return maps[0].new_zeros(0, decoder.head.out_channels, *size)
    return decoder(maps)[..., : size[0], : size[1]]
