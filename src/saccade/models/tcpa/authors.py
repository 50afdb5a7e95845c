"""How the authors' module and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.names import split
from saccade.catalogue.ports import Arguments
from saccade.models.tcpa.network import TCPA

_BLOCK = "backbone.blocks.{i}."
#: of their options, those whose parameters no recording names
_NOT_RECORDED = ("ADVP", "IPrompt")


def _build(args: dict[str, Any]) -> nn.Module:
    """
    Raises:
        ValueError: if a part is asked for whose names are not known.
    """
    strange = [name for name in _NOT_RECORDED if args.get(name)]
    if strange:
        raise ValueError(f"the authors' names of what {strange[0]} adds are not known: it must be False")
    return _BUILD({**args, "image_size": args.get("grid", 14) * args.get("patch_size", 16)})


_BUILD = Arguments(
    TCPA,
    {
        "embed_dim": "dim",
        "num_heads": "num_heads",
        "patch_size": "patch",
        "depth": "depth",
        "image_size": "image_size",
        "num_classes": "num_classes",
        "pool_size_cls": "class_pool",
        "pool_size_image": "image_pool",
        "len_prompts_cls": "class_length",
        "len_prompts_image": "image_length",
        "topk_cls": "class_top_k",
        "topk_image": "image_top_k",
        "prompt_dropout_dvp": "drop",
        "RDVP": "roles",
        "TDVP": "matched",
        "simam": "attentive",
    },
    defaults={
        "pool_size_cls": 20, "pool_size_image": 20, "len_prompts_cls": 4, "len_prompts_image": 4, "topk_cls": 3,
        "topk_image": 3, "embed_dim": 768, "mlp_ratio": 4,
    },
    derived={"hidden": lambda args: int(args["embed_dim"] * args["mlp_ratio"])},
)  # fmt: skip


def _run(module: TCPA, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    said = module(inputs["image"])
    _, layers = module.tokens(inputs["image"])
    found = {"logits": said.logits, "dist": torch.zeros(()) if said.penalty is None else said.penalty}
    for i, layer in enumerate(layers):
        seen_BNL, ones_BNN = layer.visible, layer.visible.new_ones(len(said.logits), *[layer.visible.shape[1]] * 2)
        found[f"mask{i}"] = torch.cat([ones_BNN[:, :, :1], seen_BNL, ones_BNN[:, :, 1:]], 2).to(torch.uint8)
    return found


PORTS = (
    AuthorsPort(
        "model_vfpt_tcpa",
        build=_build,
        convert=Names(
            {
                "backbone.cls_token": "vit.class_token",
                "backbone.pos_embed": "vit.positions",
                "backbone.patch_embed.proj.{leaf}": "vit.embed.{leaf}",
                _BLOCK + "norm1.{leaf}": "vit.blocks.{i}.norm1.{leaf}",
                _BLOCK + "norm2.{leaf}": "vit.blocks.{i}.norm2.{leaf}",
                _BLOCK + "attn.qkv.{leaf}": split("vit.blocks.{i}.attention.{part}_proj.{leaf}", "q", "k", "v"),
                _BLOCK + "attn.proj.{leaf}": "vit.blocks.{i}.attention.out_proj.{leaf}",
                _BLOCK + "mlp.fc1.{leaf}": "vit.blocks.{i}.mlp.fc1.{leaf}",
                _BLOCK + "mlp.fc2.{leaf}": "vit.blocks.{i}.mlp.fc2.{leaf}",
                "backbone.norm.{leaf}": "norm.{leaf}",
                "backbone.head.{leaf}": "head.{leaf}",
                "Pool.Pool_cls.{leaf}": "prompts.of_class.{leaf}",
                "Pool.Pool_image.{leaf}": "prompts.of_image.{leaf}",
            }
        ),
        run=_run,
    ),
)
