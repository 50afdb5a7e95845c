"""Where things are in somebody else's vision-language model: its decoder, the image's tokens, the images' pixels.

Models of transformers are known by what they have, not by name: a decoder with `layers` and `embed_tokens`, an image
token in the config, `pixel_values` in the call.

Shape letters: B batch, N tokens, n image tokens, H heads, M keys, I images, C channels, P patches, H and W of an image.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saccade.layers.wrapping import Changes


def decoder_of(model: nn.Module) -> Any:
    """The language model's stack of blocks.

    Args:
        model: a vision-language model, or a language model.

    Raises:
        ValueError: if it has none with `layers` and `embed_tokens`.
    """
    for module in model.modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and hasattr(module, "embed_tokens"):
            return module
    raise ValueError(f"{type(model).__name__} has no decoder with layers and embed_tokens")


def image_token(model: nn.Module) -> int:
    """The token that stands in the prompt for a piece of an image.

    Args:
        model: with transformers' config.

    Raises:
        ValueError: if the config names none.
    """
    config = getattr(model, "config", None)
    for name in ("image_token_id", "image_token_index"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    raise ValueError(f"{type(model).__name__}'s config names no image token: set model.config.image_token_id")


def image_tokens(model: nn.Module, ids_BN: Tensor | None) -> Tensor:
    """Which tokens of the prompt stand for images, bool (B, N).

    Args:
        model: with transformers' config.
        ids_BN: the prompt's `input_ids`.

    Raises:
        ValueError: if there is no prompt as ids, or a row has no image token.
    """
    if ids_BN is None:
        raise ValueError("the call must have input_ids: in inputs_embeds nothing tells where the image is")
    found_BN = ids_BN == image_token(model)
    if not found_BN.any(1).all():
        row = int((~found_BN.any(1)).nonzero()[0])
        raise ValueError(f"row {row} of the batch has no image token ({image_token(model)}): give each prompt an image")
    return found_BN


def images_of(call: Mapping[str, Any]) -> int | None:
    """How many images a call of the model brings, as pixels, or as features of them (as `generate` hands them on); None
    where it brings none.

    Args:
        call: its named arguments.
    """
    pixels, grids, encoded = (call.get(name) for name in ("pixel_values", "image_grid_thw", "mm_encoder_outputs"))
    if isinstance(encoded, Mapping) and encoded.get("image") is not None:
        return len(encoded["image"].pooler_output)
    if pixels is None:
        return None
    return len(grids) if grids is not None and pixels.ndim == 2 else len(pixels.flatten(0, -4))


def named(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments, all by name.

    Args:
        function: that is called, or a module.
        args: that are given by place.
        kwargs: that are given by name.
    """
    function = getattr(function, "_orig_mod", function)  # compiled
    given = inspect.signature(getattr(function, "forward", function)).bind_partial(*args, **kwargs)
    loose = {p.name for p in given.signature.parameters.values() if p.kind is p.VAR_KEYWORD}
    found = {name: value for name, value in given.arguments.items() if name not in loose}
    return found | {name: value for rest in loose for name, value in given.arguments.get(rest, {}).items()}


def attention_modules(stack: nn.Module) -> list[nn.Module]:
    """The self-attention of each block, in order: the blocks' `self_attn`, `attention`, or `attn`.

    Args:
        stack: a decoder or an encoder with `layers`, or `blocks`, or `layer`, or one within.

    Raises:
        ValueError: if there is none.
    """
    for module in stack.modules():
        for name in ("layers", "blocks", "layer"):
            blocks = getattr(module, name, None)
            if isinstance(blocks, nn.ModuleList) and len(blocks):
                for attention in ("self_attn", "attention", "attn"):
                    if all(isinstance(getattr(block, attention, None), nn.Module) for block in blocks):
                        return [getattr(block, attention) for block in blocks]
    raise ValueError(f"{type(stack).__name__} has no blocks with self_attn, attention or attn")


def attend_openly(changes: Changes[Any], stack: nn.Module) -> str:
    """Have a stack's layers give their attention weights, as "eager" attention does; returns what it was before.

    Args:
        changes: within which it lasts.
        stack: of which the config is changed.

    Raises:
        ValueError: if it has no config that says how it attends.
    """
    config: Any = getattr(stack, "config", None)
    if getattr(config, "_attn_implementation", None) is None:
        raise ValueError(f"{type(stack).__name__} has no config of attention: its weights cannot be asked for")
    return str(changes.put(config, "_attn_implementation", "eager"))


def weights_of(output: Any, layer: int, otherwise: str = "") -> Tensor:
    """The attention weights (B, H, N, M) in what an attention module gave.

    Args:
        output: (attended, weights, ...).
        layer: for the message.
        otherwise: what else the message proposes.

    Raises:
        ValueError: if there are none.
    """
    weights = output[1] if isinstance(output, (tuple, list)) and len(output) > 1 else None
    if not isinstance(weights, Tensor) or weights.ndim != 4:
        raise ValueError(
            f"layer {layer} gives no attention weights: load the model with attn_implementation='eager', "
            f"call model.set_attn_implementation('eager'){otherwise and ', or '}{otherwise}"
        )
    return weights


def tokenizer_of(processor: Any, what: str) -> Any:
    """The tokenizer of a processor, or the processor itself if it is one.

    Args:
        processor: of the model.
        what: who needs it, for the message.

    Raises:
        ValueError: if it is none.
    """
    found = getattr(processor, "tokenizer", processor)
    if not callable(getattr(found, "decode", None)):
        raise ValueError(f"{what} must read the prompt: give the model's processor, with its tokenizer")
    return found


@dataclass(frozen=True)
class Pictures:
    """The images of a call, as pixels in [0, 1], and the way back.

    Args:
        pixels: `pixel_values` of the call: (I, C, H, W), (B, images, C, H, W), or Qwen2-VL's patches (P, values).
        grids: `image_grid_thw` of the call, with patches: (I, 3).
        mean, std: of the normalisation, a value a channel.
        merge: side of the squares in which Qwen2-VL's patches are ordered.
        patch, frames: side of a patch, and times that it has the image.

    Raises:
        ValueError: if the pixels have another shape.
    """

    pixels: Tensor
    mean: Sequence[float]
    std: Sequence[float]
    grids: Tensor | None = None
    merge: int = 2
    patch: int = 14
    frames: int = 2

    def __post_init__(self) -> None:
        if self.pixels.ndim not in (4, 5) and not (self.pixels.ndim == 2 and self.grids is not None):
            raise ValueError(
                "pixel_values must be (images, channels, height, width), (batch, images, channels, height, width) or "
                f"patches with image_grid_thw, got {tuple(self.pixels.shape)}"
            )

    @classmethod
    def of(cls, model: nn.Module, processor: Any, call: Mapping[str, Any], what: str = "this") -> Pictures:
        """Those of a call.

        Args:
            model: whose config knows the patches.
            processor: with the mean and deviation of the normalisation; (0, 1) where it has none.
            call: its named arguments.
            what: who asks, for the message.

        Raises:
            ValueError: if there are no pixels.
        """
        pixels = call.get("pixel_values")
        if pixels is None:
            raise ValueError(f"{what} needs images: the call has no pixel_values")
        images = getattr(processor, "image_processor", processor)
        vision = getattr(getattr(model, "config", None), "vision_config", None)
        sizes = {
            "merge": getattr(vision, "spatial_merge_size", 2),
            "patch": getattr(vision, "patch_size", 14),
            "frames": getattr(vision, "temporal_patch_size", 2),
        }
        normalised = getattr(images, "do_normalize", True)
        mean, std = (getattr(images, name, None) if normalised else None for name in ("image_mean", "image_std"))
        return cls(pixels, tuple(mean or (0.0,)), tuple(std or (1.0,)), call.get("image_grid_thw"), **sizes)

    def images(self) -> list[Tensor]:
        """Each image (C, H, W), in fp32 or fp64, in [0, 1], padding (images of zeros) too."""
        if self.pixels.ndim == 2:
            assert self.grids is not None
            sizes = self.grids.prod(-1).tolist()
            parts = [self._image(x, grid) for x, grid in zip(self.pixels.split(sizes), self.grids.tolist())]
        else:
            parts = list(self.pixels.flatten(0, -4))
        parts = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in parts]
        return [(x * self._of(self.std, x) + self._of(self.mean, x)).clamp(0, 1) for x in parts]

    def owners(self, batch: int) -> list[int]:
        """The row of the batch of each image.

        Args:
            batch: B.

        Raises:
            ValueError: if the images cannot be shared out: not as many for each row.
        """
        count = len(self.grids) if self.grids is not None and self.pixels.ndim == 2 else len(self.pixels.flatten(0, -4))
        if count % batch:
            raise ValueError(f"each of the {batch} rows must have as many images, got {count} images")
        return [image // (count // batch) for image in range(count)]

    def back(self, images: Sequence[Tensor]) -> Tensor:
        """`pixel_values` of other images of the same sizes.

        Args:
            images: as `images` gives them.
        """
        parts = [(x - self._of(self.mean, x)) / self._of(self.std, x) for x in images]
        if self.pixels.ndim == 2:
            assert self.grids is not None
            found = torch.cat([self._patches(x, grid) for x, grid in zip(parts, self.grids.tolist())])
        else:
            found = torch.stack(parts).view_as(self.pixels)
            if self.pixels.ndim == 5:  # what is no image stays none
                empty = (self.pixels == 0).flatten(2).all(-1)
                found = found.masked_fill(empty[..., None, None, None], 0.0)
        return found.to(self.pixels.dtype)

    def _of(self, values: Sequence[float], like_CHW: Tensor) -> Tensor:
        return torch.as_tensor(values, dtype=like_CHW.dtype, device=like_CHW.device)[:, None, None]

    def _image(self, patches: Tensor, grid: list[int]) -> Tensor:
        (time, rows, columns), m, p = grid, self.merge, self.patch
        x = patches.view(time, rows // m, columns // m, m, m, -1, self.frames, p, p)[0, ..., 0, :, :]
        return x.permute(4, 0, 2, 5, 1, 3, 6).reshape(-1, rows * p, columns * p)

    def _patches(self, image_CHW: Tensor, grid: list[int]) -> Tensor:
        (time, rows, columns), m, p = grid, self.merge, self.patch
        x = image_CHW.reshape(-1, rows // m, m, p, columns // m, m, p).permute(1, 4, 2, 5, 0, 3, 6)
        x = x[None, ..., None, :, :].expand(time, -1, -1, -1, -1, -1, self.frames, -1, -1)
        return x.reshape(time * rows * columns, -1)
