"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, nn

from saccade.attention.lightning.layer import LightningAttention, TransNormerLM
from saccade.attention.lightning.operator import lightning_attend
from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, calls, of_function


def _run_operator(module: nn.Module, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    q, k, v = (inputs[name] for name in "qkv")
    return {"o": lightning_attend(q, k, v, inputs["slope"]), "o_no_decay": lightning_attend(q, k, v)}


_ATTENTION = Names(
    {
        "output_gate.{name*}": "gate.{name}",
        "o_proj.{leaf}": "out_proj.{leaf}",
        "slope_rate": "slopes",
        "{name*}": "{name}",
    }
)
_MODEL = Names(
    {
        "model.embed_tokens.{leaf}": "embedding.{leaf}",
        **_ATTENTION.within("model.layers.{i}.token_mixer.", "layers.{i}.attention."),
        "model.layers.{i}.channel_mixer.l1.{leaf}": "layers.{i}.glu.gate_proj.{leaf}",
        "model.layers.{i}.channel_mixer.l2.{leaf}": "layers.{i}.glu.up_proj.{leaf}",
        "model.layers.{i}.channel_mixer.l3.{leaf}": "layers.{i}.glu.down_proj.{leaf}",
        "model.{name*}": "{name}",
        "lm_head.{leaf}": "head.{leaf}",
    }
)
_BUILD_MODEL = Arguments(
    TransNormerLM,
    {
        "vocab_size": "vocab_size",
        "decoder_embed_dim": "dim",
        "decoder_layers": "num_layers",
        "decoder_attention_heads": "num_heads",
        "hidden_dim": "hidden_dim",
        "glu_dim": "glu_dim",
        "linear_use_lrpe_list": "lrpe",
        "no_scale_embedding": ("scale_embedding", operator.not_),
        "bias": "bias",
    },
    defaults={
        "vocab_size": 64000,
        "decoder_embed_dim": 1024,
        "decoder_layers": 24,
        "decoder_attention_heads": 8,
        "hidden_dim": 1024,
        "glu_dim": 2816,
    },
    inert=("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id", "use_cache"),
)


def _run_model(module: TransNormerLM, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    cache = module.new_cache(inputs["input_ids"].shape[0])
    logits = module(inputs["input_ids"], cache=cache).logits_BNV
    return {"logits": logits, **{f"state.{index}": layer.state for index, layer in enumerate(cache.layers)}}


PORTS = (
    of_function("linear_attn", run=_run_operator),
    AuthorsPort(
        "tnl_attention",
        build=Arguments(
            LightningAttention,
            {"embed_dim": "dim", "num_heads": "num_heads", "layer_idx": "layer_index", "bias": "bias"},
            needed=("num_heads",),
            derived={"num_layers": lambda args: args.get("num_layers", args.get("layer_idx", 0) + 1)},
            form="gated",
        ),
        convert=_ATTENTION,
        run=calls("x"),
    ),
    AuthorsPort("transnormer_lm", build=_BUILD_MODEL, convert=_MODEL, run=_run_model),
)
