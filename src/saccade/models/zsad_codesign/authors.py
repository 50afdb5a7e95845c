"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.names import Place, laid
from saccade.catalogue.ports import Arguments
from saccade.layers.clip import TEXT, VISION
from saccade.models.zsad_codesign.adapters import ConvLoRA, mixed
from saccade.models.zsad_codesign.gateway import DOMAINS, DynamicFusionGateway, state_maps
from saccade.models.zsad_codesign.losses import map_loss
from saccade.models.zsad_codesign.network import ACDCLIP

_CONV_LORA: dict[str, Place] = {
    "conv_lora_blocks.{k}.lora_A": "blocks.{k}.down",
    "conv_lora_blocks.{k}.lora_B": "blocks.{k}.up",
    "conv_lora_blocks.{k}.conv_lora_A.weight": "blocks.{k}.conv_down.weight",
    "conv_lora_blocks.{k}.conv_lora_B.weight": "blocks.{k}.conv_up.weight",
    "fusion_conv.weight": laid("join.weight", lambda weight: weight.flatten(1)),
}
#: authors' arguments of the adapters -> ours
_RANKS = {
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "conv_lora_rank": "conv_rank",
    "conv_lora_alpha": "conv_alpha",
}


class _Mixture(nn.Module):
    """An adapter and its mixing weight, of which the recording consists."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.adapter = ConvLoRA(**arguments)
        self.weight = nn.Parameter(torch.full((arguments["dim"],), 0.2))


def _run_conv_lora(module: _Mixture, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """Their tokens have the batch on the second axis."""
    x_BNC = inputs["tokens"].transpose(0, 1)
    side = round(x_BNC.shape[1] ** 0.5)
    adapted_BNC = module.adapter(x_BNC, (side, side))
    both = {"adapter": adapted_BNC, "mixed": mixed(x_BNC, adapted_BNC, module.weight)}
    return {name: x.transpose(0, 1) for name, x in both.items()}


def _domain(args: dict[str, Any]) -> str:
    return args.get("domain", "Industrial").lower()


def _run_gateway(module: DynamicFusionGateway, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    logits_GBNK = module(inputs["vision_tokens"], inputs["text_features"])
    size = (args["img_size"],) * 2
    train = state_maps(logits_GBNK, size).softmax(1)
    return {
        "prob_train": train,
        "prob_test": state_maps(logits_GBNK, size, domain=DOMAINS[_domain(args)]).softmax(1)[:, 1],
        "seg_loss": map_loss(train, inputs["mask"][:, 0]).loss[None],
    }


def _run_network(module: ACDCLIP, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    text = module.describe(inputs["tokens"])
    seg, det, _ = module.see_patches(inputs["x"])
    said = module(inputs["x"], descriptors=text)
    logits_GBNK, size = module.gateway(seg, text[:, None]), (args["img_size"],) * 2
    return {
        "seg_tokens": seg,
        "det_tokens": det,
        "text": text,
        "probability": said.score,
        "map_test": state_maps(logits_GBNK, size, domain=module.domain).softmax(1)[:, 1],
        "map_train": state_maps(logits_GBNK, size).softmax(1),
    }


def _tower(table: Any, theirs: str, ours: str) -> dict[str, Place]:
    """A tower of theirs, whose end is not used."""
    used = {name: place for name, place in table.items() if name.split(".")[0] not in _UNUSED}
    return Names(used).within(theirs, ours)


_UNUSED = ("ln_post", "proj", "ln_final", "text_projection")

_NETWORK = Names(
    {
        **_tower(VISION, "clipmodel.visual.", "vision."),
        **_tower(TEXT, "clipmodel.", "text."),
        "clipmodel.visual.ln_post.{leaf}": None,
        "clipmodel.visual.proj": None,
        "clipmodel.ln_final.{leaf}": None,
        "clipmodel.text_projection": None,
        "clipmodel.logit_scale": None,
        "clipmodel.attn_mask": None,
        "image_encoder.{rest*}": None,
        "image_adapter.m_i_w.{j}.i_w": laid("image_side.weights.{j}", torch.flatten),
        **Names(_CONV_LORA).within("image_adapter.lora_adapters.{j}.", "image_side.adapters.{j}."),
        **{
            f"image_adapter.{theirs}_proj.{{j}}.fc.{{n}}.{{leaf}}": f"image_side.{ours}.{{j}}.{{n}}.{{leaf}}"
            for theirs, ours in (("seg", "to_map"), ("det", "to_image"))
        },
        **{
            f"image_adapter.{theirs}_layer_norms.{{j}}.{{leaf}}": f"image_side.{ours}.{{j}}.3.{{leaf}}"
            for theirs, ours in (("seg", "to_map"), ("det", "to_image"))
        },
        "image_adapter.vision_text_gate.{j}.{n}.{leaf}": "gateway.gates.{j}.{n}.{leaf}",
        "text_adapter.m_t_w.{j}.i_w": laid("text_side.weights.{j}", torch.flatten),
        "text_adapter.lora_adapters.{j}.lora_A": "text_side.adapters.{j}.down",
        "text_adapter.lora_adapters.{j}.lora_B": "text_side.adapters.{j}.up",
        "text_adapter.layer_norms.{j}.{leaf}": "text_side.norms.{j}.{leaf}",
    }
)

PORTS = (
    AuthorsPort(
        "conv_lora",
        build=Arguments(_Mixture, {"c_in": "dim", **_RANKS, "conv_kernel_size_list": "kernels"}),
        convert=Names(
            {
                **Names(_CONV_LORA).within("", "adapter."),
                "m_i_w": laid("weight", torch.flatten),
            }
        ),
        run=_run_conv_lora,
    ),
    AuthorsPort(
        "dynamic_fusion_gateway",
        build=Arguments(DynamicFusionGateway, {"n_groups": "levels", "dim": "dim", "gate_hidden": "hidden"}),
        convert=Names({"{g}.{n}.{leaf}": "gates.{g}.{n}.{leaf}"}),
        run=_run_gateway,
    ),
    AuthorsPort(
        "network",
        build=Arguments(
            ACDCLIP,
            {
                "Lv": "depth",
                "Lt": "text_depth",
                "Wv": "dim",
                "Wt": "text_dim",
                "gate_hidden": "head_dim",
                "n_groups": "levels",
                "vision_heads": "num_heads",
                "text_heads": "text_heads",
                "image": "image_size",
                "patch": "patch",
                "context": "context",
                "vocab": "vocabulary",
                "kernels": "kernels",
                **_RANKS,
            },
            derived={"domain": _domain},
        ),
        convert=_NETWORK,
        run=_run_network,
    ),
)
