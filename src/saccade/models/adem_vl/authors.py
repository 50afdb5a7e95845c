"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.names import Place
from saccade.catalogue.ports import Arguments, Late, calls
from saccade.layers.clip import VISION
from saccade.models.adem_vl.fusion import SharedEmbeddings, VisualFusion, multiscale, silu_fusion
from saccade.models.adem_vl.network import ADEMVL, FusedBlock, NeighbourAttention

_BLOCK: Mapping[str, Place] = {
    "attention.w{part}.weight": lambda texts: (
        f"self_attn.{ {'o': 'out'}.get(texts['part'], texts['part']) }_proj.weight"
    ),
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
}
_EMBEDDINGS: Mapping[str, Place] = {"adapter_emb1": "embeddings.key", "adapter_emb2": "embeddings.value"}
_FUSION: Mapping[str, Place] = {
    **_EMBEDDINGS,
    "adapter_proj.{fc}.{leaf}": "projector.{fc}.{leaf}",
    "adapter_proj_cls.{fc}.{leaf}": "class_projector.{fc}.{leaf}",
}
#: an adapter stands beside the MLP here, around it there
_ADAPTED: Mapping[str, Place] = {
    "transformer.resblocks.{i}.mlp.c_fc.{leaf}": "blocks.{i}.mlp.mlp.fc1.{leaf}",
    "transformer.resblocks.{i}.mlp.c_proj.{leaf}": "blocks.{i}.mlp.mlp.fc2.{leaf}",
    "transformer.resblocks.{i}.adapter_mlp.fc1.weight": "blocks.{i}.mlp.down.weight",
    "transformer.resblocks.{i}.adapter_mlp.fc2.weight": "blocks.{i}.mlp.up.weight",
}
_VISUAL = "backbone.visual."
_NETWORK: Mapping[str, Place] = {
    "tok_embeddings.weight": "language.model.embed_tokens.weight",
    "norm.weight": "language.model.norm.weight",
    "output.weight": "language.lm_head.weight",
    "rope.freqs": None,
    **Names(_BLOCK).within("layers.{layer}.", "language.model.layers.{layer}."),
    **Names(_FUSION).within("", "fusion."),
}
_RESBLOCK = re.compile(re.escape(_VISUAL) + r"transformer\.resblocks\.(\d+)\.")


def _convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's last block and projection are dropped: nothing comes of them."""
    places = {name: _RESBLOCK.match(name) for name in state}
    last = max((int(place[1]) for place in places.values() if place), default=-1)
    adapted = any("adapter_mlp" in name for name in state)
    visual = {**VISION, **(_ADAPTED if adapted else {}), "proj": None}
    table = {**_NETWORK, **Names(visual).within(_VISUAL, "vision.")}
    return Names(table)({n: t for n, t in state.items() if (place := places[n]) is None or int(place[1]) < last})


def _hidden(args: Mapping[str, Any]) -> int:
    """LLaMA's: two thirds of 4 D, rounded up."""
    width, multiple = int(2 * 4 * args["dim"] / 3), args["multiple_of"]
    return multiple * -(-width // multiple)


def _of_clip(name: str, default: int) -> Callable[[dict[str, Any]], int]:
    return lambda args: args["clip"].get(name, default)


class _Block(nn.Module):
    """One block, and the embeddings that all blocks share."""

    def __init__(self, args: dict[str, Any], state: Mapping[str, Tensor]) -> None:
        super().__init__()
        dim, alpha, drop_ratio = args["dim"], args.get("s", 0.1), args.get("drop_ratio", 0.1)
        attention = NeighbourAttention(dim, args["n_heads"])
        self.block = FusedBlock(attention, dim, _hidden(args), eps=args.get("norm_eps", 1e-5))
        self.embeddings = SharedEmbeddings(state["embeddings.key"].shape[1], dim)
        self.fusion = lambda u, memory: alpha * silu_fusion(u, memory, drop_ratio=drop_ratio)

    def forward(self, hidden: Tensor, image_embeds: Tensor) -> Tensor:
        return self.block(hidden, fusion=self.fusion, memory=self.embeddings(image_embeds))


def _run_fusion(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    fusion: VisualFusion = module
    embeds = fusion.embed(inputs["patch_features"])
    fused = silu_fusion(inputs["hidden"], fusion.embeddings(embeds), drop_ratio=fusion.drop_ratio)
    return {"multiscale": multiscale(inputs["patch_features"], fusion.scales), "image_embeds": embeds, "fused": fused}


def _run_network(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    logits, loss = module.read(
        inputs["examples"],
        inputs["images"],
        present=inputs["indicators"],
        image_words=inputs["prefix_img"],
        no_image_words=inputs["prefix_nonimg"],
        labels=inputs["labels"],
    )
    return {"loss": loss.reshape(1), "logits": logits}


PORTS = (
    AuthorsPort(
        "network",
        build=Arguments(
            ADEMVL,
            {
                "vocab_size": "vocab_size",
                "dim": "dim",
                "n_layers": "layers",
                "n_heads": "num_heads",
                "norm_eps": "norm_eps",
                "hidden_proj": "projector_dim",
                "down_sample_num": ("scales", tuple),
                "beta": "beta",
                "clip_width": "clip_dim",
                "drop_ratio": "drop_ratio",
                "s": ("alpha", float),
                "adapter_dim": "adapter_dim",
                "with_cls": "class_prompt",
            },
            defaults={"dim": 4096, "multiple_of": 256, "s": 0.1, "clip": {}},
            derived={
                "hidden": _hidden,
                "adapter_scale": lambda args: args["s"],
                "image_size": _of_clip("res", 224),
                "patch": _of_clip("patch", 14),
                "clip_layers": _of_clip("layers", 24),
                "clip_heads": _of_clip("heads", 16),
            },
        ),
        convert=_convert,
        run=_run_network,
    ),
    AuthorsPort(
        "llama_block",
        build=lambda args: Late(_Block, args),
        convert=Names({**_EMBEDDINGS, **Names(_BLOCK).within("", "block.")}),
        run=calls("hidden", "image_embeds", gives="hidden"),
    ),
    AuthorsPort(
        "fusion",
        build=Arguments(
            VisualFusion,
            {
                "dim": "dim",
                "clip_width": "clip_dim",
                "hidden_proj": "hidden",
                "down_sample_num": ("scales", tuple),
                "drop_ratio": "drop_ratio",
                "beta": "beta",
            },
            class_prompt=False,
        ),
        convert=Names(_FUSION),
        run=_run_fusion,
    ),
)
