"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.names import Place
from saccade.catalogue.ports import Arguments
from saccade.models.mm_pyramid.network import MMPyramid
from saccade.models.mm_pyramid.pyramid import IntegrateBlock, Pyramid

_LAYER: dict[str, Place] = {
    "self_attn.layer_norm.{leaf}": None,  # never called
    **{
        f"self_attn.linears.{number}.{{leaf}}": f"attention.{ours}.{{leaf}}"
        for number, ours in enumerate(("q_proj", "k_proj", "v_proj", "out_proj"))
    },
    "feed_forward.w_1.{leaf}": "mlp.fc1.{leaf}",
    "feed_forward.w_2.{leaf}": "mlp.fc2.{leaf}",
    "sublayer.0.norm.{leaf}": "norm1.{leaf}",
    "sublayer.1.norm.{leaf}": "norm2.{leaf}",
}
_BLOCK = Names({
    **Names(_LAYER).within("vsablock.layer.", "video."),
    **Names(_LAYER).within("asablock.layer.", "audio."),
    **Names(_LAYER).within("cmablock.layer.", "cross."),
    "lv1.{leaf}": "video_sum.own_gate.{leaf}",
    "lv2.{leaf}": "video_sum.other_gate.{leaf}",
    "la1.{leaf}": "audio_sum.own_gate.{leaf}",
    "la2.{leaf}": "audio_sum.other_gate.{leaf}",
})  # fmt: skip
#: what the authors' modules were copied from, and never call
_PROTOTYPES: dict[str, Place] = {"multiheadattn.{rest*}": None, "feedforward.{rest*}": None}
_PYRAMID = Names({
    **_BLOCK.within("capture.msa.{i}.", "blocks.{i}."),
    **{
        f"capture.{theirs}network.{{i}}.{conv}.{{leaf}}": f"{ours}.{{i}}.{conv}.{{leaf}}"
        for theirs, ours in (("v", "video"), ("a", "audio"))
        for conv in ("conv1", "conv2")
    },
    "capture.vnetwork.{i}.net.{n}.{leaf}": None,  # the same convolutions again
    "capture.anetwork.{i}.net.{n}.{leaf}": None,
    **Names(_PROTOTYPES).within("capture.", ""),
    **Names(_PROTOTYPES).within("fusion.", ""),
    **Names(_LAYER).within("fusion.vadaptiveinteraction.", "video_fusion.layer."),
    **Names(_LAYER).within("fusion.aadaptiveinteraction.", "audio_fusion.layer."),
    "fusion.vselectfusion.{leaf}": "video_fusion.weight.{leaf}",
    "fusion.aselectfusion.{leaf}": "audio_fusion.weight.{leaf}",
})  # fmt: skip
_NETWORK = Names({
    **_PYRAMID.within("MMP.", "pyramid."),
    "fc_a.{leaf}": "audio_map.{leaf}",
    "fc_v.{leaf}": "video_map.{leaf}",
    "fc_st.{leaf}": "motion_map.{leaf}",
    "fc_fusion.{leaf}": "join.{leaf}",
    "fc_prob.{leaf}": "head.probability.{leaf}",
    "fc_frame_att.{leaf}": "head.over_time.{leaf}",
    "fc_av_att.{leaf}": "head.over_streams.{leaf}",
})  # fmt: skip


def _build_pyramid(args: dict[str, Any]) -> nn.Module:
    """`num_channels` has a width for each level; all are that of the input, or they could not stand beside each
    other."""
    widths = args["num_channels"]
    if set(widths) != {args["num_inputs"]}:
        raise ValueError(f"num_channels must all be num_inputs ({args['num_inputs']}), got {widths}")
    return Pyramid(
        args["num_inputs"], args["ffn_dim"], args["nhead"], levels=len(widths), kernel_size=args.get("kernel_size", 3)
    )


def _run_block(module: IntegrateBlock, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    video, audio = module(inputs["video"], inputs["audio"])
    return {"video": video, "audio": audio}


def _run_pyramid(module: Pyramid, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    levels = module.capture(inputs["video"], inputs["audio"])
    return {
        "video": module.video_fusion(levels[0]),
        "audio": module.audio_fusion(levels[1]),
        "video_capture": levels[0].flatten(0, 1),
        "audio_capture": levels[1].flatten(0, 1),
    }


def _run_network(module: MMPyramid, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """Their streams are (video, audio), and they call the first one's probability that of audio."""
    said = module(inputs["audio"], inputs["visual"], inputs["visual_st"])
    return {
        "global_prob": said.whole,
        "a_prob": said.streams[:, 1],
        "v_prob": said.streams[:, 0],
        "frame_prob": said.probabilities.flip(2),
    }


PORTS = (
    AuthorsPort(
        "integrate_block",
        build=Arguments(
            IntegrateBlock,
            {
                "size": "dim",
                "ffn_dim": "feedforward",
                "heads": "num_heads",
                "masksize": ("reach", lambda window: None if window == 1 else window // 2),
            },
        ),
        convert=_BLOCK,
        run=_run_block,
    ),
    AuthorsPort("pyramid", build=_build_pyramid, convert=_PYRAMID, run=_run_pyramid),
    AuthorsPort(
        "avvp_net",
        build=Arguments(
            MMPyramid,
            {
                "classes": "num_classes",
                "hidden_size": "hidden",
                "audio_dim": "audio_dim",
                "visual_dim": "video_dim",
                "st_dim": "motion_dim",
                "nhead": "num_heads",
                "ffn_dim": "feedforward",
                "levels": "levels",
            },
        ),
        convert=_NETWORK,
        run=_run_network,
    ),
)
