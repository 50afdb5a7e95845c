"""The same around a Swin of transformers, which is as before afterwards.

Shape letters: B batch, D width of a task's embedding, N tokens, T tokens of a window, C channels, H height, W width
of a map, or W windows of all images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from saccade.layers.patches import PatchMerging
from saccade.models.vit_adapters_mtl.adapters import Bottleneck, FiLM, TaskBias, scaled_norm


class _Adapted(nn.Module):
    """What a block of somebody else's reads the task by."""

    def __init__(self, dim: int, window: int, condition: int, scaled: bool) -> None:
        super().__init__()
        self.task_bias = TaskBias(condition, window**2)
        self.norm1, self.norm2 = (FiLM(condition, dim) if scaled else None for _ in range(2))


class SwinAdapters(nn.Module):
    """Task-adapted attention, task-scaled norms and the side stream, put around a Swin of transformers for some calls.

        adapters = SwinAdapters(swin, tasks=2)
        decoder = TaskDecoder(adapters.channels, classes, ...)
        with adapters(swin, task_id) as maps:
            swin(pixel_values)
        logits = decoder(maps)

    Swin's weights and code stay as they are, and are no part of this module: its own parameters alone are trained where
    Swin is frozen. With A and FiLM at 0 Swin's own output is what it was.

    Args:
        swin: a `SwinModel`, or a model that has one.
        tasks: how many.
        conditioned_blocks: of each stage, the blocks that read the task; the last third of the last stage but one
            where None, as the authors'.
        condition: D; the window's side to the power of 3 where None.
        task_scaled_norm: False leaves the norms of these blocks as they are.

    Attributes:
        channels: of the maps.

    Raises:
        ValueError: if the model has no stages of a Swin, or the blocks are not there.
    """

    def __init__(
        self,
        swin: nn.Module,
        tasks: int,
        *,
        conditioned_blocks: Sequence[Sequence[int]] | None = None,
        condition: int | None = None,
        task_scaled_norm: bool = True,
    ) -> None:
        super().__init__()
        if tasks < 1:
            raise ValueError(f"tasks must be positive, got {tasks}")
        stages = _stages(swin)
        depths = [len(stage.blocks) for stage in stages]
        if conditioned_blocks is None:
            chosen = max(0, len(depths) - 2)
            first = depths[chosen] - max(1, depths[chosen] // 3)
            conditioned_blocks = [range(first, depth) if i == chosen else () for i, depth in enumerate(depths)]
        fits = len(conditioned_blocks) == len(depths)
        if not fits or any(not 0 <= i < depth for each, depth in zip(conditioned_blocks, depths) for i in each):
            raise ValueError(f"conditioned_blocks must be blocks of stages of {depths}, got {conditioned_blocks}")
        window = int(stages[0].blocks[0].window_size)
        self.channels = tuple(int(stage.blocks[0].layernorm_before.normalized_shape[0]) for stage in stages)
        width, self.depths = window**3 if condition is None else condition, depths
        self.task_embedding = nn.Embedding(tasks, width)
        self.adapted = nn.ModuleList(
            nn.ModuleDict({str(i): _Adapted(dim, window, width, task_scaled_norm) for i in sorted(set(blocks))})
            for dim, blocks in zip(self.channels, conditioned_blocks)
        )
        self.bottlenecks = nn.ModuleList(
            nn.ModuleList(Bottleneck(width, dim) for _ in range(depth)) for dim, depth in zip(self.channels, depths)
        )
        self.merges = nn.ModuleList(PatchMerging(dim) for dim in self.channels[:-1])
        self.norm = nn.LayerNorm(self.channels[-1])

    @contextmanager
    def forward(self, swin: nn.Module, task_id: Tensor) -> Iterator[list[Tensor]]:
        """The maps of the last call of `swin` inside, (B, H, W, C): the input of each stage but the last, and the
        normed side stream.

        Args:
            swin: the model, or another of the same sizes.
            task_id: (B,), the task of each image.

        Raises:
            ValueError: if the sizes differ; in the call, if the images are not as many.
        """
        stages, omega_BD, maps = _stages(swin), self.task_embedding(task_id), list[Tensor]()
        if [len(stage.blocks) for stage in stages] != self.depths:
            raise ValueError("swin must have the stages and blocks of the one that the adapters were made for")
        stream = _Stream(self, omega_BD, maps)
        hooks: list[Any] = []
        try:
            for s, stage in enumerate(stages):
                hooks.append(stage.register_forward_pre_hook(partial(stream.enters, s)))
                for i, block in enumerate(stage.blocks):
                    hooks.append(block.register_forward_hook(partial(stream.leaves, s, i)))
                    if str(i) in self.adapted[s]:  # type: ignore[operator]
                        hooks += _adapt(block, self.adapted[s][str(i)], omega_BD)  # type: ignore[index]
            yield maps
        finally:
            for hook in hooks:
                hook.remove()


class _Stream:
    """The side stream of one call."""

    def __init__(self, adapters: SwinAdapters, omega_BD: Tensor, maps: list[Tensor]) -> None:
        self.adapters, self.omega, self.maps = adapters, omega_BD, maps
        self.side: Tensor | None = None
        self.size = (0, 0)

    def enters(self, s: int, stage: nn.Module, inputs: tuple[Any, ...]) -> None:
        x_BNC, self.size = inputs[0], tuple(inputs[1])
        if len(x_BNC) != len(self.omega):
            raise ValueError(f"task_id must be one for each of {len(x_BNC)} images, got {len(self.omega)}")
        if s == 0:
            self.side = None
            self.maps.clear()
        elif self.side is not None:
            self.side = self.adapters.merges[s - 1](self.side.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if s + 1 < len(self.adapters.channels):
            self.maps.append(x_BNC.unflatten(1, self.size))

    def leaves(self, s: int, i: int, block: nn.Module, inputs: tuple[Any, ...], said: Any) -> None:
        x_BNC = said[0] if isinstance(said, tuple) else said
        x_BHWC = x_BNC.unflatten(1, self.size)
        bottlenecks = self.adapters.bottlenecks[s]
        assert isinstance(bottlenecks, nn.ModuleList)
        self.side = bottlenecks[i](x_BHWC if self.side is None else x_BHWC + self.side, self.omega)
        if s + 1 == len(self.adapters.channels) and i + 1 == len(bottlenecks):
            self.maps.append(self.adapters.norm(self.side))


def _adapt(block: Any, by: nn.Module, omega_BD: Tensor) -> list[Any]:
    assert isinstance(by, _Adapted)
    hooks = [block.attention.register_forward_pre_hook(partial(_biased, by.task_bias(omega_BD)), with_kwargs=True)]
    for film, norm in ((by.norm1, block.layernorm_before), (by.norm2, block.layernorm_after)):
        if film is not None:
            hooks.append(norm.register_forward_hook(partial(_scaled, film, omega_BD)))
    return hooks


def _biased(
    bias_BTT: Tensor, attention: nn.Module, inputs: tuple[Any, ...], given: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The mask of shifted windows, given second or by name, with the task's matrix on it: one for each window."""
    windows = len(inputs[0]) // len(bias_BTT)
    bias_WTT = bias_BTT.repeat_interleave(windows, 0)
    mask = inputs[1] if len(inputs) > 1 else given.get("attention_mask")
    if mask is not None:
        bias_WTT = bias_WTT + mask.repeat(len(bias_BTT), 1, 1)
    if len(inputs) > 1:
        return (inputs[0], bias_WTT, *inputs[2:]), given
    return inputs, {**given, "attention_mask": bias_WTT}


def _scaled(film: FiLM, omega_BD: Tensor, norm: nn.LayerNorm, inputs: tuple[Any, ...], said: Tensor) -> Tensor:
    return scaled_norm(inputs[0], norm, film, omega_BD)


def _stages(swin: nn.Module) -> Sequence[Any]:
    """The stages of the first Swin in a model.

    Raises:
        ValueError: if there is none.
    """
    for module in swin.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers):
            blocks = [block for stage in layers for block in getattr(stage, "blocks", ())]
            if blocks and all(hasattr(block, "layernorm_before") and hasattr(block, "window_size") for block in blocks):
                return list(layers)
    raise ValueError(f"swin must be a Swin of transformers, got {type(swin).__name__}")
