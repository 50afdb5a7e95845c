"""The fused attention on windows, as a function and as Swin's layer, and how it takes that layer's place.

Shape letters: W windows, H heads, T tokens of a window, D head dim, E width of values, P masks.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from saccade.layers.pretrained import copy_affine, read_softmax
from saccade.layers.window_attention import WindowAttention
from saccade.ops.partitions import window_attend


def flash_window_attend(
    q_WHTD: Tensor,
    k_WHTD: Tensor,
    v_WHTE: Tensor,
    bias_HTT: Tensor | None = None,
    *,
    mask_PTT: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T + bias + mask) v of windows that are cut out already.

    Memory beyond the output is a piece of some windows; the backward pass keeps q, k, v, the output and a number per
    row. `saccade.ops.partitions.window_attend` does the same on a whole map, and cuts and shifts on the way.

    Args:
        q_WHTD, k_WHTD, v_WHTE: any number of tokens T and any widths.
        bias_HTT: (H, T, T) or (1, T, T); gradients reach it.
        mask_PTT: numbers to add; window i takes mask i mod P. No gradient.
        scale: D ** -0.5 where None.

    Returns:
        (W, H, T, E).

    Raises:
        ValueError: if shapes do not fit.

    >>> q = k = v = torch.randn(6, 2, 49, 32)
    >>> flash_window_attend(q, k, v, torch.zeros(2, 49, 49)).shape
    torch.Size([6, 2, 49, 32])
    """
    T = q_WHTD.shape[2] if q_WHTD.ndim == 4 else 1
    return window_attend(q_WHTD, k_WHTD, v_WHTE, T, T, 0, bias_HTT, mask=mask_PTT, scale=scale)


class FlashWindowAttention(WindowAttention):
    """Swin's layer by the fused attention; arguments and call are `WindowAttention`'s."""

    @classmethod
    def from_swin(cls, module: nn.Module, **arguments: Any) -> Self:
        """This layer with the weights of a trained Swin attention: transformers' SwinAttention, or any layer with
        projections that `saccade.layers.pretrained` knows and a `relative_position_bias_table` of square windows.

        Args:
            arguments: `shift` and `border` as the model around the layer has them.

        Raises:
            ValueError: if the layer is none of those, or drops weights out.
        """
        layer = read_softmax(module, beside=("relative_position_bias_table",))
        tables = [p for name, p in module.named_parameters() if name.split(".")[-1] == "relative_position_bias_table"]
        if len(tables) != 1:
            raise ValueError(f"{type(module).__name__} has {len(tables)} tables of relative positions, expected one")
        drop = getattr(module, "attention_dropout", 0.0)
        if isinstance(drop, float) and drop > 0:
            raise ValueError(f"the layer drops {drop} of the weights out, which no fused window attention does")
        side = round(tables[0].shape[0] ** 0.5)
        if "window_size" not in arguments and side * side != tables[0].shape[0]:
            raise ValueError(f"a table of {tables[0].shape[0]} rows is for no square window; give window_size")
        theirs = {"window_size": (side + 1) // 2, "qkv_bias": layer.qkv_bias, "proj_bias": layer.proj_bias}
        new = cls(layer.dim, layer.num_heads, **{**theirs, **arguments})
        projections = (layer.q, layer.k, layer.v)
        biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in projections]
        weight = torch.cat([weight for weight, _ in projections])
        copy_affine(new.qkv, (weight, torch.cat(biases) if layer.qkv_bias else None))
        copy_affine(new.proj, layer.out)
        table = new.relative_position_bias_table
        if table is None or table.shape != tables[0].shape:
            raise ValueError(f"a table of {tuple(tables[0].shape)} does not fit windows of {new.window_size}")
        with torch.no_grad():
            table.copy_(tables[0])
        return new.to(device=layer.q[0].device, dtype=layer.q[0].dtype).train(module.training)


class _SwinAttention(FlashWindowAttention):
    """The same with the call of transformers' SwinAttention."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, None]:
        if options.get("output_attentions"):
            raise ValueError("output_attentions must be False: fused attention has no weights to give out")
        return super().forward(hidden_states, mask=attention_mask), None


def retrofit_swin(model: nn.Module) -> dict[str, nn.Module]:
    """Put this attention in the place of the attention of a transformers Swin model, over the same weights.

    Args:
        model: SwinModel, SwinForImageClassification ...; changed in place.

    Returns:
        The layers that were replaced, by path; `model.set_submodule(path, layer)` puts one back.

    Raises:
        ValueError: if the model has no SwinAttention.
    """
    found = {path: module for path, module in model.named_modules() if type(module).__name__ == "SwinAttention"}
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer of type SwinAttention")
    layers = {path: _SwinAttention.from_swin(module) for path, module in found.items()}
    for path, layer in layers.items():
        model.set_submodule(path, layer)
    return found
