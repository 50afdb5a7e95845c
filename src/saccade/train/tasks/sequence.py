"""Tasks on token sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.train.entries import Entry
from saccade.train.model import SequenceModel
from saccade.train.tasks.base import Task


class SequenceTask(Task):
    """Tasks on token sequences: a transformer whose mixers are the mechanism."""

    vocab: int
    classes: int | None = None
    #: whether each token is embedded together with the one before it
    pair = False

    def causal(self, mechanism: Entry) -> bool:
        """Whether the mechanism is built causal: where the task needs it, or its card knows nothing else."""
        return "causal" in self.needs or ("causal" in mechanism.supports and "bidirectional" not in mechanism.supports)

    def _arguments(self, mechanism: Entry) -> dict[str, Any]:
        arguments: dict[str, Any] = {"dim": self.settings.dim, "num_heads": self.settings.heads}
        return arguments | ({"causal": True} if self.causal(mechanism) else self._not_causal(mechanism))

    def _not_causal(self, mechanism: Entry) -> dict[str, Any]:
        return {"causal": False} if mechanism.slug is None or "bidirectional" in mechanism.supports else {}

    def model(self, mechanism: Entry, seed: int) -> nn.Module:
        size = self.settings
        torch.manual_seed(seed)

        def mixer(layer: int) -> nn.Module:
            return mechanism.build(
                size.length,
                seed=seed * 1000 + layer,
                layer_index=layer,
                num_layers=size.layers,
                **self._arguments(mechanism),
            )

        return SequenceModel(
            mixer, vocab=self.vocab, dim=size.dim, layers=size.layers, classes=self.classes, pair=self.pair
        )

    def part(self, mechanism: Entry, length: int) -> nn.Module:
        # the options of the trained model, so that the sweep shows how this very mechanism grows
        return mechanism.build(
            self.settings.length, seed=0, layer_index=0, num_layers=self.settings.layers, **self._arguments(mechanism)
        )

    def part_inputs(self, length: int) -> tuple[Any, ...]:
        return (torch.randn(1, length, self.settings.dim, device=self.device),)

    def parts_of(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        assert isinstance(model, SequenceModel)
        return [(f"layer {layer}", mixer) for layer, mixer in enumerate(model.mixers)]

    def prompt(self, length: int) -> Tensor:
        """Held-out tokens to decode from, (1, N)."""
        return next(iter(self.held_out()))[0][:1, :length]
