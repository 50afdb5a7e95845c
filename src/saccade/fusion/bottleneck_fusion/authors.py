"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort
from saccade.fusion.bottleneck_fusion.fusion import MBT


def _build(args: dict[str, Any]) -> MBT:
    height, width, *frames = args["patches"]
    return MBT(
        args["num_classes"],
        modalities=args.get("modality_fusion", ("spectrogram", "rgb")),
        rgb_size=None,
        spectrogram_size=None,
        patch=(frames[0] if frames else 1, height, width),
        dim=args["hidden_size"],
        num_heads=args["num_heads"],
        depth=args["num_layers"],
        fusion_layer=args["fusion_layer"],
        num_bottlenecks=args.get("n_bottlenecks", 4),
        mlp_dim=args["mlp_dim"],
        classifier=args.get("classifier", "token"),
        share=args.get("share_encoder", False),
        bottleneck=args.get("use_bottleneck", True),
        test_with_bottlenecks=args.get("test_with_bottlenecks", True),
        drop_path=args.get("stochastic_droplayer_rate") or 0.0,
        dropout=args.get("dropout_rate", 0.0),
        attn_drop=args.get("attention_dropout_rate", 0.0),
    )


_BLOCK_NAMES = {
    "LayerNorm_0": "norm1",
    "LayerNorm_1": "norm2",
    "MlpBlock_0.Dense_0": "mlp.0",
    "MlpBlock_0.Dense_1": "mlp.3",
    "MultiHeadDotProductAttention_0.query": "attention.q_proj",
    "MultiHeadDotProductAttention_0.key": "attention.k_proj",
    "MultiHeadDotProductAttention_0.value": "attention.v_proj",
    "MultiHeadDotProductAttention_0.out": "attention.out_proj",
}


def _module_name(theirs: str) -> str:
    """Our name of the module (or the parameter outside of one) that the authors call `theirs`."""

    def modality(rest: str) -> str:
        return rest.removeprefix("_") or "rgb"

    outside = {"bottleneck": "encoder.bottleneck", "output_projection": "head", "Transformer.encoder_norm": "norm"}
    if theirs in outside:
        return outside[theirs]
    if theirs.startswith("cls"):
        return f"classes.{modality(theirs.removeprefix('cls'))}"
    if theirs.startswith("embedding"):
        return f"embeddings.{modality(theirs.removeprefix('embedding'))}"
    if theirs.startswith("Transformer.posembed_input"):
        return f"positions.{modality(theirs.removeprefix('Transformer.posembed_input'))}"
    if theirs.startswith("Transformer.encoderblock_"):
        block, _, inside = theirs.removeprefix("Transformer.encoderblock_").partition(".")
        number, _, name = block.partition("_")
        return f"encoder.layers.{number}.{modality(name)}.{_BLOCK_NAMES.get(inside, inside)}"
    return theirs


def _torch_layout(name: str, kernel: Tensor) -> Tensor:
    """A Flax kernel as PyTorch's weight: Dense (in, out), Conv (spatial..., in, out), heads (C, H, d) or (H, d, C)."""
    if name.startswith("embedding"):
        kernel = kernel.movedim((-1, -2), (0, 1))
        # frames one by one through a 2-D kernel are a 3-D kernel of one frame
        return kernel[:, :, None] if name == "embedding" and kernel.ndim == 4 else kernel
    if name.endswith(("query", "key", "value")):
        return kernel.flatten(1).T
    if name.endswith("MultiHeadDotProductAttention_0.out"):
        return kernel.flatten(0, 1).T
    return kernel.T


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "kernel":
            ours[f"{_module_name(module)}.weight"] = _torch_layout(module, tensor).contiguous()
        elif leaf == "scale":
            ours[f"{_module_name(module)}.weight"] = tensor
        elif leaf == "bias":
            ours[f"{_module_name(module)}.bias"] = tensor.flatten()
        elif leaf == "pos_embedding":
            ours[f"{_module_name(module)}.table"] = tensor
        else:
            ours[_module_name(name)] = tensor
    return ours


def _run(module: MBT, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    first = {
        name: inputs[name].movedim(-1, 1) if name in inputs and name in module.modalities else None
        for name in ("spectrogram", "rgb")
    }
    out = module(spectrogram_BCHW=first["spectrogram"], rgb_BCFHW=first["rgb"])
    return {"logits": out.logits, "tokens": out.tokens}


PORTS = (
    AuthorsPort("mbt", build=_build, convert=_convert, run=_run),
    AuthorsPort("mbt_shared", build=_build, convert=_convert, run=_run),
)
