"""The authors' names and arguments, of the recorded parts and of the whole network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, Late, calls
from saccade.models.smaformer.modulator import Modulator, PatchEmbedding, SMAFormerBlock
from saccade.models.smaformer.network import SMAFormer

_EMBEDDING = Names({
    "pj_conv.{leaf}": "project.{leaf}",
    "pos_conv.{leaf}": "position.{leaf}",
    "layernorm.{leaf}": "norm.{leaf}",
})  # fmt: skip
_MODULATOR = Names({
    "bias": "bias",
    "CA_fc.0.weight": "channel.mlp.fc1.weight",
    "CA_fc.2.weight": "channel.mlp.fc2.weight",
    "PA_conv.weight": "pixel.0.weight",
    "PA_bn.{leaf}": "pixel.1.{leaf}",
    "SA_blocks.{i}.{j}.{leaf}": "spatial.{i}.{j}.{leaf}",
    "SA_out_conv.{leaf}": "spatial_out.{leaf}",
    "output_conv.{leaf}": "out.{leaf}",
    "norm.{leaf}": "norm.{leaf}",
})  # fmt: skip
#: a whole Modulator of the authors has both forms' parameters; each place uses one
_UNUSED_EMBEDDING = dict.fromkeys(_EMBEDDING.table)
_UNUSED_MODULATOR = dict.fromkeys(_MODULATOR.table)
_BLOCK = Names({
    "synergistic_multi_attention.attention.in_proj_{leaf}": "attention.in_proj.{leaf}",
    "synergistic_multi_attention.attention.out_proj.{leaf}": "attention.out_proj.{leaf}",
    **Names({**_MODULATOR.table, **_UNUSED_EMBEDDING}).within(
        "synergistic_multi_attention.combined_modulator.", "attention.modulator."
    ),
    "norm{i}.{leaf}": "norm{i}.{leaf}",
    "e_mlp.linear{i}.{leaf}": "mlp.fc{i}.{leaf}",
    "e_mlp.depthwise_conv.{leaf}": "mlp.conv1.{leaf}",
    "e_mlp.pixelwise_conv.{leaf}": "mlp.conv2.{leaf}",
    "e_mlp.feed_forward.{rest*}": None,
    "MSA.{rest*}": None,
})  # fmt: skip
_EVERY: dict[str, Any] = {
    "input_layer.{i}.{leaf}": "stem.{i}.{leaf}",
    "input_skip.0.{leaf}": "stem_shortcut.{leaf}",
    "adjust.upsample.{leaf}": "adjust.{leaf}",
    "output_layer1.0.{leaf}": "head.0.{leaf}",
    "output_layer2.0.{leaf}": "head.1.{leaf}",
}
for _i in (1, 2, 3, 4):
    _EVERY |= _BLOCK.within(f"EncoderBlock{_i}.layers.{{k}}.", f"encoder.{_i - 1}.{{k}}.")
    _EVERY |= _BLOCK.within(f"DecoderBlock{_i}.layers.{{k}}.", f"decoder.{_i - 1}.{{k}}.")
for _i in (1, 2, 3):
    _EVERY |= Names({**_UNUSED_MODULATOR, **_EMBEDDING.table}).within(f"patch_embedding{_i}.", f"embed.{_i - 1}.")
for _i in (1, 2):
    _EVERY[f"residual_conv{_i}.conv_block.{{k}}.{{leaf}}"] = f"down.{_i - 1}.branch.{{k}}.{{leaf}}"
    _EVERY[f"residual_conv{_i}.conv_skip.{{k}}.{{leaf}}"] = f"down.{_i - 1}.shortcut.{{k}}.{{leaf}}"
for _i in (1, 2, 3, 4, 5, 6):
    _EVERY[f"upsample_transpose{_i}.upsample.{{leaf}}"] = f"up.{_i - 1}.{{leaf}}"
_NETWORK = Names(_EVERY)

_ARGUMENTS = Arguments(
    SMAFormer,
    {
        "n_classes": "num_classes",
        "in_channels": "in_channels",
        "filters": "filters",
        "heads": "num_heads",
        "num_layers": "layers",
        "forward_expansion": "expansion",
        "dropout": "dropout",
        "fusion_gate": "fusion_gate",
    },
    over="batch",
    scrambled=True,
)


def _network(args: dict[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """The width of the channel gates, which no argument gives, stands in the weights of the widest."""
    gates = [t.shape for name, t in state.items() if name.endswith("channel.mlp.fc1.weight")]
    hidden, channels = max(gates, key=lambda shape: shape[1]) if gates else (1, 16)
    return SMAFormer(**_ARGUMENTS.ours(args), reduction=channels // hidden)


def _run_modulator(module: Modulator, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x = inputs["x"]
    return {
        "y": module(x),
        "pa": module.pixel_attention(x),
        "ca": module.channel_attention(x),
        "sa": module.spatial_attention(x),
    }


def _one_width(args: dict[str, Any]) -> int:
    if args["in_ch"] != args["out_ch"]:
        raise ValueError(f"a modulator keeps its channels, got {args['in_ch']} and {args['out_ch']}")
    return args["in_ch"]


PORTS = (
    AuthorsPort(
        "network",
        build=lambda args: Late(_network, args),
        convert=_NETWORK,
        run=calls("x", gives={"logits": "logits"}),
    ),
    AuthorsPort(
        "modulator",
        build=Arguments(Modulator, {}, needed=("in_ch", "out_ch"), derived={"channels": _one_width}),
        convert=Names({**_MODULATOR.table, **_UNUSED_EMBEDDING}),
        run=_run_modulator,
    ),
    AuthorsPort(
        "patch_embedding",
        build=Arguments(PatchEmbedding, {"in_ch": "in_channels", "out_ch": "channels"}),
        convert=Names({**_UNUSED_MODULATOR, **_EMBEDDING.table}),
        run=calls("x"),
    ),
    AuthorsPort(
        "block",
        build=Arguments(
            SMAFormerBlock,
            {
                "ch_out": "dim",
                "heads": "num_heads",
                "dropout": "dropout",
                "forward_expansion": "expansion",
                "fusion_gate": "fusion_gate",
            },
            over="batch",
        ),
        convert=_BLOCK,
        run=calls("x", "res"),
    ),
)
