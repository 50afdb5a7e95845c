"""A text with images in it, as LLaVA, Qwen2-VL, Idefics3 and SmolVLM read it: parts are the tokens of the language
model, those of each image on the image's grid.

The images are looked at once; a token that is taken away, an image's too, is hidden from everybody's attention in the
language model, and the others keep their positions.

Shape letters: N tokens, M parts, S sets of parts, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saccade.explain.pairs import is_of_images
from saccade.explain.patches import places
from saccade.explain.recording import AttentionRecord
from saccade.explain.subjects import Run, Segment, Target, Text, Tower
from saccade.layers.vision_language import image_token
from saccade.layers.wrapping import Changes, Report, changing

__all__ = ["Prompt"]

#: what the decoder may be given of the images beside embeddings and positions, that a call without images lacks
_MORE = ("deepstack_visual_embeds", "visual_pos_masks", "cross_attention_states")


class Prompt(Text):
    """Tokens of a text and of images; see `Subject`.

    Args:
        model: of transformers, whose decoder is given embeddings of both.
        inputs: as the model's processor makes them, of one example.
        target: as of a language model.
        tokenizer: names the tokens.

    Raises:
        ValueError: if the model has no decoder of its own, or gives it more than embeddings and positions.
    """

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Tensor], target: Target = None, tokenizer: Any = None
    ) -> None:
        self.decoder = _own_decoder(model)
        self.seen: dict[str, Tensor] = {}
        with changing(model, Report("explained")) as changes:
            keep_state(model, changes)
            changes.before(self.decoder, self._look)
            super().__init__(model, inputs, target, tokenizer)
        ids = self.inputs[self.main][0]
        self.segments = self._segments((ids == image_token(model)).tolist())
        kept = {self.main, "attention_mask"}
        self.inputs = {name: x for name, x in self.inputs.items() if name in kept}

    def _look(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Keep what the decoder is given."""
        if kwargs.get("inputs_embeds") is None:
            raise ValueError(f"{type(self.decoder).__name__} is given no embeddings: its images cannot be explained")
        for name in _MORE:
            if kwargs.get(name) is not None:
                raise ValueError(f"{type(self.decoder).__name__} is given {name}, which cannot be explained")
        given = ("inputs_embeds", "position_ids")
        self.seen = {name: kwargs[name].detach() for name in given if kwargs.get(name) is not None}

    def _segments(self, of_image: list[bool]) -> list[Segment]:
        """Runs of tokens of one sort; those of images on their grid.

        An image whose tokens form none, as with marks of line ends among them, is shown as tokens.
        """
        starts = [i for i in range(len(of_image)) if i == 0 or of_image[i] != of_image[i - 1]]
        grids = iter(self.inputs["image_grid_thw"].tolist() if "image_grid_thw" in self.inputs else ())
        merge = getattr(getattr(self.model.config, "vision_config", None), "spatial_merge_size", 1)
        pixels = self.inputs["pixel_values"]
        runs = sum(of_image[start] for start in starts)
        regular = pixels.ndim < 4 or len(pixels.flatten(0, -4)) == runs  # one run of tokens for each picture
        found = []
        for start, stop in zip(starts, [*starts[1:], len(of_image)], strict=True):
            if not of_image[start]:
                found.append(Segment("text", start, stop))
                continue
            frames, high, wide = next(grids, (1, merge * math.isqrt(stop - start), merge * math.isqrt(stop - start)))
            grid = frames * high // merge, wide // merge
            if not regular or grid[0] * grid[1] != stop - start:
                found.append(Segment("text", start, stop))
                continue
            self.labels[start:stop] = places(grid)
            found.append(Segment("image", start, stop, grid))
        return found

    @contextmanager
    def _again(self, embeds_SNC: Tensor) -> Iterator[None]:
        """The decoder is given these embeddings, and the positions it was given first."""
        S, positions = len(embeds_SNC), self.seen.get("position_ids")

        def given(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            more = {"inputs_embeds": embeds_SNC, "input_ids": None}
            if positions is not None:  # the batch is the last axis but one
                more["position_ids"] = positions.expand(*positions.shape[:-2], S, positions.shape[-1])
            return args, kwargs | more

        with changing(self.model, Report("explained")) as changes:
            changes.before(self.decoder, given)
            yield

    @torch.no_grad()
    def score(self, kept_SM: Tensor) -> Tensor:
        with self._again(self.seen["inputs_embeds"].expand(len(kept_SM), -1, -1)):
            return super().score(kept_SM)

    def run(self) -> Run:
        self.embeds = self.seen["inputs_embeds"].clone().requires_grad_()
        with self._again(self.embeds):
            return super().run()

    def watched(self, changes: Changes[Report]) -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
        def gradient() -> Tensor:
            assert self.embeds.grad is not None
            return (self.embeds.detach() * self.embeds.grad).sum(-1)[0]

        return self.inputs, gradient

    def towers(self, records: Sequence[AttentionRecord]) -> list[Tower]:
        return super().towers([record for record in records if not is_of_images(record.name)])


def _own_decoder(model: nn.Module) -> nn.Module:
    """The language model in one that sees.

    Raises:
        ValueError: if it has none of its own.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    if not isinstance(decoder, nn.Module) or decoder is model or is_of_images(type(decoder).__name__):
        raise ValueError(f"{type(model).__name__} has no language model of its own that reads images")
    return decoder


def keep_state(model: nn.Module, changes: Changes[Report]) -> None:
    """What a call leaves in models with three-dimensional positions, put back afterwards."""
    for module in model.modules():
        if "rope_deltas" in vars(module):
            changes.finally_(setattr, module, "rope_deltas", module.rope_deltas)
