"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.names import Place
from saccade.catalogue.ports import Arguments, calls
from saccade.models.vit_adapters_mtl.adapters import Bottleneck, FiLM, TaskScaledNorm, block_diagonal
from saccade.models.vit_adapters_mtl.attention import TaskAdaptedAttention
from saccade.models.vit_adapters_mtl.network import MultitaskSwin

_FILM = Names({"gb_weights.{leaf}": "modulation.{leaf}"})
_BOTTLENECK = Names(
    {
        "emb_transf.{leaf}": "embed.{leaf}",
        **_FILM.within("hidden_modulation.", "film."),
        "down_proj_layer.{leaf}": "down.{leaf}",
        "up_proj_layer.{leaf}": "up.{leaf}",
    }
)
_NORM = Names({"{leaf}": "{leaf}", **_FILM.within("ln_weight_modulation.", "film.")})
_ATTENTION = Names(
    {
        "qkv.{leaf}": "qkv.{leaf}",
        "proj.{leaf}": "proj.{leaf}",
        "relative_position_bias_table": "relative_position_bias_table",
        "relative_position_index": None,
        "random_weight_matrix": "task_bias.matrix",
        **_FILM.within("taa_attn.", "task_bias.film."),
    }
)
_BLOCK = Names(
    {
        **_ATTENTION.within("attn.", "attention."),
        **_NORM.within("norm1.", "norm1."),
        **_NORM.within("norm2.", "norm2."),
        "mlp.{layer}.{leaf}": "mlp.{layer}.{leaf}",
        "attn_mask": None,
    }
)
_MERGE = Names({"norm.{leaf}": "norm.{leaf}", "reduction.{leaf}": "reduction.{leaf}"})
_EXPAND = Names({"expand.{leaf}": "linear.{leaf}", "norm.{leaf}": "norm.{leaf}"})
#: stages of a decoder; theirs are numbered from 1, after the first expansion
_MOST = 8


def _decoders() -> dict[str, Place]:
    table: dict[str, Place] = {
        **_EXPAND.within("decoder_layers_layers_up.{t}.0.", "decoders.{t}.expand."),
        **_EXPAND.within("decoder_layers_up.{t}.", "decoders.{t}.final."),
        "decoder_layers_norm_up.{t}.{leaf}": "decoders.{t}.norm.{leaf}",
        "decoder_layers_output.{t}.weight": "decoders.{t}.head.weight",
    }
    for i in range(1, _MOST):
        theirs, ours = f"decoder_layers_layers_up.{{t}}.{i}.", f"decoders.{{t}}.stages.{i - 1}."
        table |= _BLOCK.within(theirs + "blocks.{i}.", ours + "blocks.{i}.")
        table |= _EXPAND.within(theirs + "upsample.", ours + "expand.")
        table[f"decoder_layers_concat_back_dim.{{t}}.{i}.{{leaf}}"] = ours + "reduce.{leaf}"
    return table


_NETWORK = Names(
    {
        "patch_embed.{layer}.{leaf}": "embed.{layer}.{leaf}",
        "task_type_embeddings.weight": "task_embedding.weight",
        "norm.{leaf}": "norm.{leaf}",
        **_BLOCK.within("layers.{s}.blocks.{i}.", "stages.{s}.blocks.{i}."),
        **_BOTTLENECK.within("layers.{s}.adapter_layer.{i}.", "stages.{s}.bottlenecks.{i}."),
        **_MERGE.within("layers.{s}.downsample.", "stages.{s}.merge."),
        **_MERGE.within("layers.{s}.downsample_bottleneck.", "stages.{s}.side_merge."),
        **_decoders(),
    }
)


def _bias(module: FiLM, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    rows_BNK = module.shared(inputs["matrix"], inputs["task_embedding"])
    return {"out": block_diagonal(rows_BNK, args["blocks"])}


def _windows(module: TaskAdaptedAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x, omega = inputs["x"], inputs["task_embedding"]
    return {"out": module(x, omega, mask=inputs["mask"]), "out_nomask": module(x, omega)}


def _answers(module: MultitaskSwin, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    logits = module(inputs["image"], inputs["task_id"]).logits
    return {f"logits_task{t}": each for t, each in enumerate(logits) if len(each)}


def _attention(args: dict[str, Any]) -> nn.Module:
    window, configs = args["window_size"], args["task_configs"]
    return TaskAdaptedAttention(
        args["dim"], args["num_heads"], configs["hidden_size"], window, scale=_scale(args.get("qk_scale")),
        qkv_bias=args.get("qkv_bias", True),
    )  # fmt: skip


def _scale(value: float | bool | None) -> float | None:
    """`qk_scale or head_dim ** -0.5`; the training script's True is 1."""
    return float(value) if value else None


PORTS = (
    AuthorsPort(
        "taa", build=Arguments(FiLM, {"input_size": "condition", "output_size": "channels"}), convert=_FILM, run=_bias
    ),
    AuthorsPort(
        "conditional_bottleneck",
        build=Arguments(Bottleneck, {"hidden_size": "condition", "output_size": "dim"}),
        convert=_BOTTLENECK,
        run=lambda module, inputs, args: {"out": module(inputs["hidden"], inputs["task_embedding"])},
    ),
    AuthorsPort(
        "task_scaled_norm",
        build=Arguments(TaskScaledNorm, {"normalized_shape": "dim", "condition_size": "condition"}),
        convert=_NORM,
        run=calls("x", "task_embedding", gives="out"),
    ),
    AuthorsPort("task_window_attention", build=_attention, convert=_ATTENTION, run=_windows),
    AuthorsPort(
        "swin_mtl",
        build=Arguments(
            MultitaskSwin,
            {
                "img_size": "image_size",
                "in_chans": "in_channels",
                "patch_size": "patch_size",
                "embed_dim": "embed_dim",
                "depths": "depths",
                "depths_decoder": "decoder_depths",
                "num_heads": "num_heads",
                "window_size": "window_size",
                "hidden_size": "condition",
                "conditioned_blocks": "conditioned_blocks",
                "adapter": "adapter",
                "use_tsn_layer": "task_scaled_norm",
                "tasks": "tasks",
                "task_classes": "task_classes",
                "mlp_ratio": "mlp_ratio",
                "qk_scale": ("scale", _scale),
                "drop_path_rate": "drop_path",
            },
            defaults={"use_tsn_layer": False},
        ),
        convert=_NETWORK,
        run=_answers,
    ),
)
