"""Reading a softmax attention that somebody else built: its projections, its heads, its positions.

    q = x Wq + bq,   k = x Wk + bk,   v = x Wv + bv,   y = concat(softmax(q k^T / sqrt(D)) v) Wo + bo

What does not have this form (normalised queries, gates, partial or scaled rotary positions, those of neighbouring
channels, learned extra keys, ...) is refused: a part that starts from such a layer would not start equal to it. A
sliding window is told, as it is no matter of weights.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: the names under which libraries keep the projections, in the order in which they are looked for
_SEPARATE = {
    "q": ("q_proj", "query", "to_q", "q_lin", "q"),
    "k": ("k_proj", "key", "to_k", "k_lin", "k"),
    "v": ("v_proj", "value", "to_v", "v_lin", "v"),
}
#: not `query_key_value`, which has the rows of one head after the other
_FUSED = ("qkv", "c_attn", "to_qkv")
_OUT = ("out_proj", "o_proj", "to_out.0", "to_out", "out_lin", "output.dense", "dense", "c_proj", "proj")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
#: norms of queries and keys, which need not have parameters
_UNLIKE = ("q_norm", "k_norm", "qk_norm", "norm_q", "norm_k", "q_layernorm", "k_layernorm")
#: what may stand behind the output projection in a wrapper
_BEHIND = ("LayerNorm", "layer_norm")
#: what a configuration of transformers may say that changes scores or projections
_BENDING = ("attn_logit_softcapping", "clip_qkv")


@dataclass(frozen=True)
class SoftmaxLayer:
    """A softmax attention layer's shape and weights; a weight is (out, in), a bias None where there is none,
    `causal` None where the layer does not say, `window` the tokens that a query sees, its own among them, None for
    all."""

    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool | None
    rope: bool
    rope_base: float
    q: tuple[Tensor, Tensor | None]
    k: tuple[Tensor, Tensor | None]
    v: tuple[Tensor, Tensor | None]
    out: tuple[Tensor, Tensor | None]
    window: int | None = None

    @property
    def qkv_bias(self) -> bool:
        return any(bias is not None for _, bias in (self.q, self.k, self.v))

    @property
    def proj_bias(self) -> bool:
        return self.out[1] is not None


def read_softmax(module: nn.Module, *, beside: tuple[str, ...] = ()) -> SoftmaxLayer:
    """The projections and heads of a softmax attention layer.

    Knows `nn.MultiheadAttention`, this library's layers and what names its projections as transformers and diffusers
    do (Llama, BERT, ViT, GPT-2 ...); a wrapper around such a layer will do.

    Args:
        module: the layer.
        beside: names of parameters beside the projections that the caller sees to.

    Raises:
        ValueError: if projections or heads are not found, or the layer computes something else.
    """
    if isinstance(module, nn.MultiheadAttention):
        return _multihead(module)
    name = type(module).__name__
    for path, inner in _children(module):
        if path.rpartition(".")[2] in _UNLIKE and not isinstance(inner, nn.Identity):
            raise ValueError(f"{name} is no plain softmax attention: it has {path}")
    for bending in _BENDING:
        if getattr(getattr(module, "config", None), bending, None) is not None:
            raise ValueError(f"{name} is no plain softmax attention: it has {bending}")
    num_heads = _heads(module)
    linears = {path: m for path, m in _children(module) if isinstance(m, nn.Linear) or _is_conv1d(m)}
    found = {letter: _first(linears, names) for letter, names in _SEPARATE.items()}
    out = _first(linears, _OUT)
    fused = _first(linears, _FUSED)
    if out is None or (fused is None and None in found.values()):
        raise ValueError(f"{name} has no query, key, value and output projections that are known by name")
    read = (out, *((fused,) if None in found.values() else found.values()))
    for path, more in module.named_modules():
        own = [each for each, _ in more.named_parameters(recurse=False) if each not in beside]
        if own and more not in read and path.rpartition(".")[2] not in _BEHIND:
            raise ValueError(f"{name} is no plain softmax attention: it has {path or own[0]}")
    if fused is not None and None in found.values():
        weight, bias = _affine(fused)
        if weight.shape[0] % 3:
            raise ValueError(f"{name}'s fused projection has {weight.shape[0]} outputs, not three parts")
        weights = weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        q, k, v = zip(weights, biases)
    else:
        q, k, v = (_affine(layer) for layer in found.values() if layer is not None)
    return _layer(module, num_heads, q, k, v, _affine(out))


def _multihead(module: nn.MultiheadAttention) -> SoftmaxLayer:
    if module.bias_k is not None or module.add_zero_attn:
        raise ValueError("a MultiheadAttention with bias_k or add_zero_attn has keys that are no tokens")
    if module.in_proj_weight is None:
        raise ValueError("a MultiheadAttention with its own kdim or vdim has no self-attention to start from")
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = zip(module.in_proj_weight.chunk(3), biases)
    return _layer(module, module.num_heads, q, k, v, (module.out_proj.weight, module.out_proj.bias))


def _layer(
    module: nn.Module,
    num_heads: int,
    q: tuple[Tensor, Tensor | None],
    k: tuple[Tensor, Tensor | None],
    v: tuple[Tensor, Tensor | None],
    out: tuple[Tensor, Tensor | None],
) -> SoftmaxLayer:
    head_dim = q[0].shape[0] // num_heads
    rope, base = _rotary(module, head_dim)
    if q[0].shape[0] % num_heads or k[0].shape[0] % head_dim or k[0].shape != v[0].shape:
        raise ValueError(
            f"projections of {q[0].shape[0]}, {k[0].shape[0]} and {v[0].shape[0]} channels are no {num_heads} heads"
        )
    scale = getattr(module, "scaling", None)
    if isinstance(scale, float) and abs(scale * head_dim**0.5 - 1) > 1e-6:
        raise ValueError(f"{type(module).__name__} scales scores by {scale}, not by 1 / sqrt(head_dim)")
    causal = getattr(module, "causal", getattr(module, "is_causal", None))
    heads = num_heads, k[0].shape[0] // head_dim, head_dim
    return SoftmaxLayer(q[0].shape[1], *heads, causal, rope, base, q, k, v, out, _window(module))


def _of_layer(module: Any, config: Any) -> Any:
    """The kind of a layer of transformers, in a model whose layers are of several."""
    kinds, number = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    return kinds[number] if kinds and isinstance(number, int) and number < len(kinds) else None


def _window(module: Any) -> int | None:
    """The sliding window that a layer of transformers has."""
    config = getattr(module, "config", None)
    if hasattr(module, "sliding_window"):
        return module.sliding_window or None
    slides = _of_layer(module, config) in (None, "sliding_attention")
    return getattr(config, "sliding_window", None) or None if slides else None


def _rotary(module: nn.Module, head_dim: int) -> tuple[bool, float]:
    """Whether positions are rotary, and their base: an own layer says so, transformers' configuration does."""
    if isinstance(getattr(module, "rope", None), bool):
        return module.rope, float(getattr(module, "rope_base", 10000.0))  # type: ignore[return-value]
    config, name = getattr(module, "config", None), type(module).__name__
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parameters = parameters.get(_of_layer(module, config), parameters)
    base = parameters.get("rope_theta", getattr(config, "rope_theta", None))
    made_by = vars(sys.modules[type(module).__module__])
    if base is None:
        given = inspect.signature(module.forward).parameters
        if config is not None and ("position_embeddings" in given or "rotate_every_two" in made_by):
            raise ValueError(f"{name} has positions that its configuration does not tell")
        return False, 10000.0
    if not getattr(module, "use_rope", True):
        return False, 10000.0
    turned = made_by.get("rotate_half", lambda x: x)(torch.arange(4.0))
    if turned.tolist() != [-2.0, -3.0, 0.0, 1.0]:
        raise ValueError(f"{name} has rotary positions that pair other channels than this library's")
    kind = parameters.get("rope_type", "default")
    partial = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    if kind != "default" or partial != 1.0:
        raise ValueError(f"rotary positions of type {kind!r} on {partial} of the channels are not this library's")
    return True, float(base)


def _heads(module: nn.Module) -> int:
    for owner in (module, *(m for _, m in _children(module)), getattr(module, "config", None)):
        for name in _HEADS:
            if isinstance(getattr(owner, name, None), int):
                return getattr(owner, name)
    raise ValueError(f"{type(module).__name__} does not say its number of heads ({', '.join(_HEADS)})")


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, m) for path, m in module.named_modules() if path]


def _first(linears: dict[str, nn.Module], names: tuple[str, ...]) -> nn.Module | None:
    for name in names:
        for path, layer in linears.items():
            if path == name or path.endswith("." + name):
                return layer
    return None


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)


def _affine(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return (weight.T if _is_conv1d(layer) else weight), layer.bias  # type: ignore[return-value]


@torch.no_grad()
def copy_affine(target: nn.Linear, source: tuple[Tensor, Tensor | None]) -> None:
    """Fill `target` with a weight and a bias (zeros where there is none).

    Raises:
        ValueError: if the shapes differ, or there is a bias that `target` has no place for.
    """
    weight, bias = source
    if target.weight.shape != weight.shape:
        raise ValueError(f"a projection is {tuple(weight.shape)}, its new place {tuple(target.weight.shape)}")
    if bias is not None and target.bias is None:
        raise ValueError("the layer has a bias and its new place has none")
    target.weight.copy_(weight)
    if target.bias is not None:
        target.bias.zero_() if bias is None else target.bias.copy_(bias)
