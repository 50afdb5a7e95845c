"""One switched layer: its processor runs as it is, with the mechanism in the place of dense attention.

Shape letters: B batch, H heads, N tokens, V visual tokens, D head dim, E width of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from saccade.integrations.diffusers.models import Side
from saccade.integrations.diffusers.run import Run
from saccade.integrations.mechanisms import Mechanism
from saccade.integrations.switching import LayerReport
from saccade.ops import masks
from saccade.ops.sequences import attend_apart


@dataclass
class Layer:
    """One switched layer."""

    mechanism: Mechanism
    options: Mapping[str, Any]
    module: nn.Module
    block: nn.Module
    run: Run
    text: Side | None
    report: LayerReport | None
    visual: int = 0

    def enter_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Visual tokens come in as the block's `hidden_states`, text on its own."""
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.visual = hidden_states.shape[1]

    def __call__(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.run.clock.warming_up:
            self._count_dense()
            return inner(*args, **kwargs)
        with _native(self.module), _Replace(self.attend):
            return inner(*args, **kwargs)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """What the layer calls in the place of `scaled_dot_product_attention`, with its arguments."""

        def dense() -> Tensor:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )

        N = query.shape[2]
        if key.shape[2] != N:
            return dense()
        V, text = self.visual, N - self.visual
        if text < 0 or (text and self.text is None):
            model = type(self.run.model).__name__
            raise ValueError(f"{model} attends over {N} tokens, {V} of them visual: say where text is, text='first'")
        begin = text if self.text == "first" else 0
        valid = _padding(attn_mask, query.shape[0], N)
        if is_causal or (attn_mask is not None and valid is None):
            self._count_dense()
            return dense()
        if valid is not None and valid.all():
            valid = None
        if valid is not None and not valid[:, begin : begin + V].all():
            self._count_dense()  # the grid has holes
            return dense()

        known = self.mechanism.options
        front = True if "special_tokens" in known else False if "text_tokens" in known else None
        order = self.run.order(V, N, begin, front, query.device)
        q, k, v = (query, key, value) if order is None else (x[:, :, order] for x in (query, key, value))
        real = valid if valid is None or order is None else valid[:, order]
        out, kept, pairs = self._apply(q, k, v, real, dropout_p, scale)
        if order is not None:
            out = out[:, :, order.argsort()]
        if self.report is not None:
            with torch.no_grad():
                exact, ours = dense(), out
                if valid is not None:
                    exact, ours = (x * valid[:, None, :, None] for x in (exact, ours))
                self.report.add(kept, pairs, ours, exact)
        return out

    def _apply(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, dropout: float, scale: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mechanism's output, and with a report the pairs that it computed and those of dense attention, (H,)."""
        entry = self.mechanism
        H, N = q.shape[1:3]
        if valid is None or entry.masks == "any":
            mask = None if valid is None else masks.padding(valid)
            options = self._options(N, q.device)
            out = entry.run(q, k, v, mask=mask, dropout=dropout, scale=scale, options=options)
            return out, *self._work(q, k, v, mask, scale, options)
        kept = pairs = torch.zeros(H, dtype=torch.double, device=q.device)

        def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            nonlocal kept, pairs
            options = self._options(q.shape[2], q.device)
            work = self._work(q, k, v, None, scale, options)
            kept, pairs = kept + work[0], pairs + work[1]
            return entry.run(q, k, v, dropout=dropout, scale=scale, options=options)

        out = attend_apart(alone, q, k, v, valid)
        return out, kept, pairs

    def _options(self, tokens: int, device: torch.device) -> dict[str, Any]:
        """The user's options, and those that follow from the call."""
        known, text = self.mechanism.options, tokens - self.visual
        filled: dict[str, Any] = {}
        if "text_tokens" in known:
            filled["text_tokens"] = text
        if "special_tokens" in known:
            filled["special_tokens"] = text
        if "neighbors" in known and self.run.grid is not None:
            blocks = {**known, **self.options}
            filled["neighbors"] = self.run.neighbors(blocks["block_q"], blocks["block_k"], device)
        return {**filled, **self.options}

    def _work(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float | None, options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        if self.report is None:
            nothing_H = torch.zeros(q.shape[1], dtype=torch.double, device=q.device)
            return nothing_H, nothing_H
        with torch.no_grad():
            return self.mechanism.work(q, k, v, mask=mask, scale=scale, options=options)

    def _count_dense(self) -> None:
        if self.report is not None:
            self.report.dense_calls += 1


def _padding(mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """A mask that only says which keys are real, as (B, N); None for any other."""
    if mask is None or mask.dtype != torch.bool or mask.shape[-1] != tokens:
        return None
    if mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        return None
    return mask[:, 0, 0].expand(batch, tokens)


class _Replace(TorchFunctionMode):
    """Calls of `scaled_dot_product_attention` go to another function."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = self.attend if func is F.scaled_dot_product_attention else func
        return target(*args, **(kwargs or {}))


@contextmanager
def _native(module: nn.Module) -> Iterator[None]:
    """The module's processor dispatches to the backend that calls torch's function."""
    processor: Any = module.processor
    if getattr(processor, "_parallel_config", None) is not None:
        raise ValueError(f"{type(processor).__name__} runs context-parallel, which a mechanism cannot")
    if not hasattr(processor, "_attention_backend"):  # calls torch's function itself
        yield
        return
    from diffusers.models.attention_dispatch import AttentionBackendName

    own = vars(processor).get("_attention_backend", _native)
    processor._attention_backend = AttentionBackendName.NATIVE
    try:
        yield
    finally:
        if own is _native:
            del processor._attention_backend
        else:
            processor._attention_backend = own
