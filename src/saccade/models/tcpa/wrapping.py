"""Prompts on somebody else's vision transformer, which is as before afterwards.

Shape letters: B batch, N tokens, L prompts, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.pretrained import SoftmaxLayer, read_softmax
from saccade.layers.wrapping import Report, changing
from saccade.models.tcpa.prompts import Prompting, Prompts, attend_with, total_distance


@dataclass
class Seen(Report):
    """What is changed, and what the last call of a prompted transformer made of its prompts.

    Attributes:
        layers: the prompting of each layer.
    """

    layers: list[Prompting] = field(default_factory=list)

    @property
    def distance(self) -> Tensor | None:
        """The sum over layers; None where nothing is matched."""
        return total_distance(self.layers)

    def figures(self) -> dict[str, str]:
        shown = sum(float(layer.visible.float().mean()) for layer in self.layers) / max(1, len(self.layers))
        prompts = self.layers[0].prompts.shape[1] if self.layers else 0
        return {**super().figures(), "prompts a layer": str(prompts), "seen by a token": f"{shown:.0%}"}


@contextmanager
def prompted(model: nn.Module, prompts: Prompts) -> Iterator[Seen]:
    """A vision transformer under prompts: transformers' ViT, DINOv2, CLIP, timm's, or one of this library.

        prompts = Prompts(vit.config.hidden_size, vit.config.num_hidden_layers)
        with prompted(vit, prompts) as seen:
            logits = head(vit(pixel_values).last_hidden_state[:, 0])
        loss = F.cross_entropy(logits, labels) + 0.01 * seen.distance

    Hooks alone do it, and are removed at the end, after an exception too. Its attention sees the class token alone
    meanwhile, and what it says of it is replaced; so it costs what it costs without them, and the prompts.

    Args:
        model: whose blocks normalise before attention, and whose first token is the class token.
        prompts: of as many layers as the model has blocks, and of their width.

    Raises:
        ValueError: if there are no such blocks, or prompts of another width or depth.
    """
    blocks = _blocks(model, prompts.depth)
    for _, _, layer in blocks:
        if layer.dim != prompts.dim or layer.num_kv_heads != layer.num_heads or layer.rope:
            raise ValueError(f"prompts must be as wide as the model's attention ({layer.dim}), got {prompts.dim}")
    with changing(model, Seen("tcpa")) as changes:
        for i, (block, attention, layer) in enumerate(blocks):
            of_block = _Block(i, prompts, changes.report, _norm(block), layer)
            changes.before(block, of_block.enter)
            changes.before(attention, of_block.shorten)
            changes.after(attention, of_block.replace)
        yield changes.report


class _Block:
    """The three hooks of a block, and what they hand on."""

    def __init__(self, number: int, prompts: Prompts, seen: Seen, norm: nn.Module, layer: SoftmaxLayer) -> None:
        self.number, self.prompts, self.seen, self.norm, self.layer = number, prompts, seen, norm, layer
        self.project = tuple(
            partial(F.linear, weight=weight, bias=bias) for weight, bias in (layer.q, layer.k, layer.v, layer.out)
        )

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens_BND = args[0] if args else kwargs["hidden_states"]
        if not self.number:
            self.seen.layers.clear()
            self.seen.calls += 1
        self.prompting = self.prompts(self.number, tokens_BND)
        self.seen.layers.append(self.prompting)

    def shorten(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.normed_BND = args[0] if args else kwargs["hidden_states"]
        first = self.normed_BND[:, :1]
        return ((first, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": first})

    def replace(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], said: Any) -> Any:
        prompts_BLD = self.norm(self.prompting.prompts)
        out_BND = attend_with(
            self.prompts, self.project, self.layer.num_heads, self.normed_BND, prompts_BLD, self.prompting.visible
        )
        return (out_BND, *said[1:]) if isinstance(said, tuple) else out_BND


def _blocks(model: nn.Module, depth: int) -> list[tuple[nn.Module, nn.Module, SoftmaxLayer]]:
    """The blocks, each with its attention and what this is made of.

    Raises:
        ValueError: if there is no row of `depth` blocks with an attention that is known.
    """
    counts = []
    for row in model.modules():
        if isinstance(row, (nn.ModuleList, nn.Sequential)) and len(row):
            found = [_attention(block) for block in row]
            if all(found):
                counts.append(len(found))
                if len(found) == depth:
                    return [(block, *each) for block, each in zip(row, found) if each is not None]
    raise ValueError(
        f"prompts are of {depth} layers, and {type(model).__name__} has "
        + (f"{counts[0]} blocks of attention" if counts else "no row of blocks whose attention is known")
    )


def _attention(block: nn.Module) -> tuple[nn.Module, SoftmaxLayer] | None:
    """The child of a block that is a softmax attention; None where there is none beside a norm."""
    if not any(isinstance(child, nn.LayerNorm) for child in block.children()):
        return None
    for child in block.children():
        try:
            return child, read_softmax(child)
        except ValueError:
            continue
    return None


def _norm(block: nn.Module) -> nn.Module:
    """Its first norm."""
    return next(child for child in block.children() if isinstance(child, nn.LayerNorm))
