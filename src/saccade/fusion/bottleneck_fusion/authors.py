"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saccade.catalogue import AuthorsPort, Names, laid
from saccade.catalogue.names import Place
from saccade.catalogue.ports import Arguments
from saccade.fusion.bottleneck_fusion.fusion import MBT

_BUILD = Arguments(
    MBT,
    {
        "num_classes": "num_classes",
        "modality_fusion": "modalities",
        "hidden_size": "dim",
        "num_heads": "num_heads",
        "num_layers": "depth",
        "fusion_layer": "fusion_layer",
        "n_bottlenecks": "num_bottlenecks",
        "mlp_dim": "mlp_dim",
        "classifier": "classifier",
        "share_encoder": "share_encoder",
        "use_bottleneck": "bottleneck",
        "test_with_bottlenecks": "test_with_bottlenecks",
        "stochastic_droplayer_rate": ("drop_path", lambda rate: rate or 0.0),
        "dropout_rate": "dropout",
        "attention_dropout_rate": "attn_drop",
    },
    needed=("hidden_size", "num_heads", "num_layers", "fusion_layer", "mlp_dim"),
    defaults={"stochastic_droplayer_rate": 0.0},
    derived={"patch": lambda args: _patch(*args["patches"])},
    rgb_size=None,
    spectrogram_size=None,
)


def _patch(height: int, width: int, frames: int = 1) -> tuple[int, int, int]:
    return frames, height, width


# Flax's kernels: Dense (in, out), Conv (spatial..., in, out), into heads (C, H, d), out of heads (H, d, C)


def _transposed(kernel: Tensor) -> Tensor:
    return kernel.mT.contiguous()


def _into_heads(kernel_CHD: Tensor) -> Tensor:
    return kernel_CHD.flatten(1).mT.contiguous()


def _out_of_heads(kernel_HDC: Tensor) -> Tensor:
    return kernel_HDC.flatten(0, 1).mT.contiguous()


def _convolution(kernel: Tensor) -> Tensor:
    return kernel.movedim((-1, -2), (0, 1)).contiguous()


def _of_frames(kernel: Tensor) -> Tensor:
    """Frames one by one through a 2-D kernel are a 3-D kernel of one frame."""
    return _convolution(kernel if kernel.ndim == 5 else kernel[None])


def _layer(theirs: str, ours: str, layout: Callable[[Tensor], Tensor] = _transposed) -> dict[str, Place]:
    return {f"{theirs}.kernel": laid(f"{ours}.weight", layout), f"{theirs}.bias": laid(f"{ours}.bias", torch.flatten)}


def _norm(theirs: str, ours: str) -> dict[str, Place]:
    return {f"{theirs}.scale": f"{ours}.weight", f"{theirs}.bias": f"{ours}.bias"}


_ATTENTION = "MultiHeadDotProductAttention_0"
_BLOCK = Names(
    {
        **_norm("LayerNorm_0", "norm1"),
        **_norm("LayerNorm_1", "norm2"),
        **_layer("MlpBlock_0.Dense_0", "mlp.fc1"),
        **_layer("MlpBlock_0.Dense_1", "mlp.fc2"),
        **_layer(f"{_ATTENTION}.query", "attention.q_proj", _into_heads),
        **_layer(f"{_ATTENTION}.key", "attention.k_proj", _into_heads),
        **_layer(f"{_ATTENTION}.value", "attention.v_proj", _into_heads),
        **_layer(f"{_ATTENTION}.out", "attention.out_proj", _out_of_heads),
    }
)


def _modality(theirs: str, ours: str, patches: Callable[[Tensor], Tensor]) -> dict[str, Place]:
    """The names of what each modality has of its own; `theirs` ends them."""
    return {
        f"cls{theirs.removeprefix('_')}": f"classes.{ours}",
        **_layer(f"embedding{theirs}", f"embeddings.{ours}", patches),
        f"Transformer.posembed_input{theirs}.pos_embedding": f"positions.{ours}.table",
        **_BLOCK.within(f"Transformer.encoderblock_{{i}}{theirs}.", f"encoder.layers.{{i}}.{ours}."),
    }


_NAMES = Names(
    {
        **_modality("", "rgb", _of_frames),
        **_modality("_spectrogram", "spectrogram", _convolution),
        "bottleneck": "encoder.bottleneck",
        **_norm("Transformer.encoder_norm", "norm"),
        **_layer("output_projection", "head"),
    }
)


def _run(module: MBT, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    first = {
        name: inputs[name].movedim(-1, 1) if name in inputs and name in module.modalities else None
        for name in ("spectrogram", "rgb")
    }
    out = module(spectrogram_BCHW=first["spectrogram"], rgb_BCFHW=first["rgb"])
    return {"logits": out.logits, "tokens": out.tokens}


PORTS = (
    AuthorsPort("mbt", build=_BUILD, convert=_NAMES, run=_run),
    AuthorsPort("mbt_shared", build=_BUILD, convert=_NAMES, run=_run),
)
