"""Neighbours' words for `explain` and `recorded`: captum's `attribute`, transformer-lens's `run_with_cache`.

    Attribution(model, "gradient x attention").attribute(inputs, target=1)          # (1, M)
    said, cache = run_with_cache(model, **inputs)
    cache["pattern", 3], cache["blocks.3.attn.hook_q"]

Shape letters: M parts (tokens of a text, patches of an image).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from saccade.explain.explanation import explain
from saccade.explain.recording import Recording, recorded
from saccade.explain.subjects import Target

__all__ = ["Attribution", "run_with_cache"]


class Attribution:
    """One method on one model, as captum has it.

    Args:
        model: as of `explain`.
        method: of `saccade.explain.methods.METHODS`.
        tokenizer: makes tokens of a text, and names them.

    >>> import torch, saccade
    >>> part = saccade.create("softmax", dim=8, num_heads=2)
    >>> Attribution(part, "raw").attribute(torch.randn(1, 5, 8), target=4).shape
    torch.Size([1, 5])
    """

    def __init__(self, model: nn.Module, method: str = "gradient x attention", *, tokenizer: Any = None) -> None:
        self.model, self.method, self.tokenizer = model, method, tokenizer

    def attribute(self, inputs: Mapping[str, Tensor] | Tensor | str, target: Target = None) -> Tensor:
        """Relevance of each part, (1, M); whether to believe it, `explain` says.

        Args:
            inputs, target: as of `explain`.

        Raises:
            ValueError: as of `explain`.
        """
        found = explain(
            self.model, inputs, target, tokenizer=self.tokenizer, methods=[self.method], faithful=False
        )  # fmt: skip
        return found.maps[self.method][None]


def run_with_cache(model: nn.Module, *args: Any, **inputs: Any) -> tuple[Any, Recording]:
    """What a transformers model says, and what its attention did meanwhile.

    The same as `with recorded(model) as cache: said = model(...)`; gradients flow where they flow without it.

    Args:
        model: as of `recorded`.
        *args: of its call.
        **inputs: of its call.

    Raises:
        ValueError: as of `recorded`.
    """
    with recorded(model) as cache:
        said = model(*args, **inputs)
    return said, cache
