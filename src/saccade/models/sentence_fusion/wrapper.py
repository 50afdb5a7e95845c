"""The shared head in somebody else's BERT, as long as a `with` lasts.

Shape letters: B batch, T words (N see, M are seen), C channels, K chains, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saccade.layers.wrapping import Report, changing
from saccade.models.sentence_fusion.correspondence import shared_weights


@dataclass
class SharingReport(Report):
    """What was shared.

    Attributes:
        words: how many belonged to a chain, in all calls.
    """

    words: int = 0

    def figures(self) -> dict[str, str]:
        return {**super().figures(), "words in chains": str(self.words)}


@contextmanager
def sharing(
    model: nn.Module, chains: Tensor, seen: Tensor, *, layer: int = 4, head: int = 4
) -> Iterator[SharingReport]:
    """Trans-ShareRepr in any BERT of transformers: a head of a layer averages the values of each word's chains.

    >>> seen = visible(source_lengths, real)                                              # doctest: +SKIP
    >>> with sharing(model, chains, seen):                                                # doctest: +SKIP
    ...     model(input_ids, attention_mask=torch.where(seen, 0.0, -1e4)[:, None])

    Args:
        model: `BertModel`, or a model that has one.
        chains: bool (B, K, T), of the batches that it will be called with.
        seen: bool (B, N, M), who sees whom; of `visible`, the same as the model's attention mask.
        layer, head: from 0.

    Raises:
        ValueError: if the model has no such layer or head, or is called with another batch than the chains'.
    """
    attentions = [module for name, module in model.named_modules() if name.endswith("attention.self")]
    attentions = [module for module in attentions if isinstance(getattr(module, "value", None), nn.Linear)]
    if not attentions:
        raise ValueError("model must be a BERT of transformers, with modules attention.self that have a value")
    if not 0 <= layer < len(attentions):
        raise ValueError(f"layer must be from 0 to {len(attentions) - 1}, got {layer}")
    attention: Any = attentions[layer]
    heads = int(attention.num_attention_heads)
    if not 0 <= head < heads:
        raise ValueError(f"head must be from 0 to {heads - 1}, got {head}")
    if chains.dtype != torch.bool or chains.ndim != 3 or seen.shape != (len(chains), *chains.shape[2:] * 2):
        raise ValueError(
            f"chains must be bool (batch, chains, words) and seen (batch, words, words), got {tuple(chains.shape)} "
            f"{chains.dtype} and {tuple(seen.shape)}"
        )
    weights_BNM = shared_weights(chains, seen.bool())
    report = SharingReport("sharing")

    def shared(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x_BTC = args[0] if args else kwargs["hidden_states"]
        if x_BTC.shape[:2] != weights_BNM.shape[:2]:
            expected = tuple(weights_BNM.shape[:2])
            raise ValueError(f"the batch must be that of the chains, {expected}, got {tuple(x_BTC.shape[:2])}")
        width = x_BTC.shape[2] // heads
        place = slice(head * width, (head + 1) * width)
        said = output[0] if isinstance(output, tuple) else output
        values_BTD = attention.value(x_BTC)[..., place]
        own_BND = weights_BNM.to(values_BTD) @ values_BTD
        said = torch.cat([said[..., : place.start], own_BND, said[..., place.stop :]], -1)
        report.calls += 1
        report.words += int(chains.any(1).sum())
        return (said, *output[1:]) if isinstance(output, tuple) else said

    with changing(model, report) as changes:
        changes.after(attention, shared)
        yield report
