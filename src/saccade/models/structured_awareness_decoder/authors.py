"""Names of the recorded reading of the paper (there is no authors' code), of ACFA and SMMM."""

from __future__ import annotations

from saccade.catalogue import AuthorsPort, Names, laid
from saccade.catalogue.ports import Arguments, calls
from saccade.models.structured_awareness_decoder.parts import ACFA, SMMM

_ACFA = Names({
    # 1 x 1 convolutions of pooled channels are linear
    "channel_gate.mlp.0.weight": laid("channel_gate.mlp.fc1.weight", lambda weight: weight[..., 0, 0]),
    "channel_gate.mlp.2.weight": laid("channel_gate.mlp.fc2.weight", lambda weight: weight[..., 0, 0]),
    "spatial_gate.conv.weight": "spatial_gate.conv.weight",
    "tensor_hw": "plane",
    "tensor_h": "column",
    "tensor_w": "row",
    "hw_pwconv.weight": "plane_mix.weight",
    "hw_dwconv.weight": "plane_spread.weight",
    "h_pwconv1d.weight": laid("column_mix.weight", lambda weight: weight[..., None]),
    "h_dwconv1d.weight": laid("column_spread.weight", lambda weight: weight[..., None]),
    "w_pwconv1d.weight": laid("row_mix.weight", lambda weight: weight[..., None, :]),
    "w_dwconv1d.weight": laid("row_spread.weight", lambda weight: weight[..., None, :]),
    "branch4_dwconv.weight": "context_spread.weight",
    "branch4_pwconv.weight": "context_mix.weight",
    "norm.norm.{leaf}": "norm.{leaf}",
    "fuse.{i}.weight": "fuse.{i}.weight",
})  # fmt: skip
_SMMM = Names({
    "encoder_projection.{leaf}": "encoder_in.{leaf}",
    "decoder_projection.{leaf}": "decoder_in.{leaf}",
    "shared_multiscale_extractor.channel_layer_norm.{leaf}": "scales.norm.{leaf}",
    **{
        f"shared_multiscale_extractor.stage{stage}_dwconv{size}.{theirs}.{{leaf}}": f"scales.{ours}.{i}.{j}.{{leaf}}"
        for stage, ours in ((1, "first"), (2, "second"))
        for i, size in enumerate((3, 5))
        for j, theirs in enumerate(("conv", "batch_norm"))
    },
    "shared_multiscale_extractor.channel_fusion_conv.{leaf}": "scales.fuse.{leaf}",
    "mask_layer.pointwise_mask_conv.{leaf}": "masks.0.{leaf}",
    "mask_layer.depthwise_mask_conv_k3.{leaf}": "masks.1.{leaf}",
    "mask_layer.depthwise_mask_conv_k5.{leaf}": "masks.2.{leaf}",
    "dilated_fusion_conv.{leaf}": "fuse.{leaf}",
    "group_norm.{leaf}": "norm.{leaf}",
    "output_projection.{leaf}": "out.{leaf}",
})  # fmt: skip

PORTS = (
    AuthorsPort(
        "acfa",
        build=Arguments(ACFA, {"channels": "channels", "height": "height", "width": "width", "reduction": "reduction"}),
        convert=_ACFA,
        run=calls("x"),
    ),
    AuthorsPort(
        "smmm",
        build=Arguments(SMMM, {"channels": "channels"}),
        convert=_SMMM,
        run=calls("encoder", "decoder"),
    ),
)
