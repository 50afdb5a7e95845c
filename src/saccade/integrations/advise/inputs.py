"""What is measured on: the caller's inputs cut to the context length, or random ones, within the model's positions.

Shape letters: B batch, H query heads, K key heads, N tokens, D head dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: families of models whose first position comes after the padding token's number
_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "roberta-prelayernorm", "esm")


def positions(config: Any) -> int | None:
    """Tokens for which a transformers model has positions; None where its configuration sets no limit."""
    of_text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("max_position_embeddings", "n_positions", "max_sequence_length")
    found = next((getattr(of_text, name) for name in names if getattr(of_text, name, None)), None)
    if found is None or getattr(of_text, "model_type", "") not in _POSITIONS_AFTER_PADDING:
        return found
    return found - (getattr(of_text, "pad_token_id", None) or 0) - 1


def model_inputs(model: nn.Module, inputs: Any, context: int | None, generator: torch.Generator) -> Mapping[str, Any]:
    """The named arguments of the model's call; cut to `context` where it is given, without a cache."""
    limit = positions(model.config) if hasattr(model, "config") else None
    given = inputs if isinstance(inputs, Tensor) else inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    tokens = context or (given.shape[1] if isinstance(given, Tensor) and given.ndim > 1 else 0)
    if limit is not None and tokens > limit:
        raise ValueError(f"context must be at most the model's positions ({limit}), got {tokens}")
    if inputs is None:
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
        if context is None or vocabulary is None:
            raise ValueError("without sample inputs, advise needs a context length and a model of tokens")
        inputs = torch.randint(vocabulary, (1, context), generator=generator)
    if isinstance(inputs, Tensor):
        inputs = {"input_ids": inputs}
    if not isinstance(inputs, Mapping) or not any(isinstance(x, Tensor) and x.ndim > 1 for x in inputs.values()):
        raise ValueError(f"inputs must be token ids or a mapping of tensors, got {type(inputs).__name__}")
    call: dict[str, Any] = dict(inputs)
    if any(isinstance(x, Tensor) and not x.numel() for x in call.values()):
        raise ValueError("inputs must have at least one token, got none")
    if context is not None and "pixel_values" in call and "input_ids" not in call:
        raise ValueError("context cuts tokens: an image has those of its size, so give one of the size that is wanted")
    if context is not None:
        for name in ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids"):
            if name in call:
                if call[name].shape[1] < context:
                    raise ValueError(f"the sample {name} has {call[name].shape[1]} tokens, fewer than {context}")
                call[name] = call[name][:, :context]
    if "use_cache" in inspect.signature(model.forward).parameters:
        call["use_cache"] = False
    return call


def shape_inputs(
    shape: Sequence[int], inputs: Any, context: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, N, D), k and v (B, K, N, D); cut to `context` where it is given."""
    if inputs is not None:
        if len(inputs) != 3 or any(x.ndim != 4 for x in inputs):
            raise ValueError("inputs must be q, k and v of four axes where shapes are given")
        q, k, v = inputs
    else:
        if len(shape) not in (4, 5) or min(shape) < 1:
            raise ValueError(f"shapes must be (B, H, N, D) or (B, H, K, N, D), all positive, got {tuple(shape)}")
        B, H, K, N, D = shape if len(shape) == 5 else (*shape[:2], shape[1], *shape[2:])
        N = N if context is None else context
        q, k, v = (torch.randn(B, heads, N, D, generator=generator) for heads in (H, K, K))
    if context is not None:
        if q.shape[2] < context:
            raise ValueError(f"the sample queries have {q.shape[2]} tokens, fewer than {context}")
        q, k, v = (x[:, :, :context] for x in (q, k, v))
    return q, k, v
