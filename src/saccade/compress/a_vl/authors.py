"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Argument, Arguments
from saccade.compress.a_vl.cache import image_span
from saccade.compress.a_vl.compressor import AVLDecoder

_DECODER: dict[str, Argument] = {
    "hidden_size": "dim",
    "intermediate_size": "hidden",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "layers",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "eps",
    "rope_theta": "rope_base",
}
_POLICY: dict[str, Argument] = {
    "vision_adaptive_attention_rate": "rate",
    "vision_adaptive_attention_compute_rate": "compute_rate",
    "vision_adaptive_attention_update_interval": "update_interval",
    "text_pruning_rate": "text_rate",
    "text_init_cache": "text_init",
    "text_h20_hh_rate_in_cache": "heavy_rate",
    "text_use_h2o": ("text_policy", {True: "heavy-hitter", False: "direct"}),
    "prefill_filter_rate": "prefill_rate",
    "prefill_filter_layer": "prefill_layer",
}
#: whose rate counts only where it is switched on
_SWITCHES = {
    "vision_adaptive_attention": "vision_adaptive_attention_rate",
    "text_pruning_flag": "text_pruning_rate",
    "prefill_filter_flag": "prefill_filter_rate",
}
_BUILD = Arguments(
    AVLDecoder,
    {**_DECODER, **_POLICY},
    defaults={
        "vision_adaptive_attention_rate": 0.5,
        "vision_adaptive_attention_compute_rate": 0.6,
        "vision_adaptive_attention_update_interval": -1,
        "text_pruning_rate": 0.5,
        "text_init_cache": 20,
        "text_h20_hh_rate_in_cache": 0.7,
        "text_use_h2o": True,
        "prefill_filter_rate": 0.5,
        "prefill_filter_layer": 3,
    },
)


def _build(args: dict[str, Any]) -> nn.Module:
    config, options = args["config"], args.get("options", {})
    off = {rate: None for switch, rate in _SWITCHES.items() if not options.get(switch, False)}
    return _BUILD({**(config.get("rope_parameters") or {}), **config, **options, **off})


_NAMES = Names({"{module*}.o_proj.{leaf}": "{module}.out_proj.{leaf}", "{name*}": "{name}"})


def _run_authors(module: AVLDecoder, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """The authors' calls: the prompt's embeddings, then one embedding after the other."""
    cache = module.new_cache(image_span(inputs["image_mask"]))
    outputs: dict[str, Tensor] = {}
    lengths, steps = [], []

    def look(step: int) -> None:
        lengths.append(cache.kept)
        for number, layer in enumerate(cache.layers):
            if module.options.rate is not None:
                outputs[f"core_slots.step{step}.layer{number}"] = layer.core_slots[0]

    outputs["prefill"] = module(inputs["prefill_embeds"], cache)
    look(0)
    for number, layer in enumerate(cache.layers):
        outputs[f"key_cache_prefill.layer{number}"] = layer.ordered_keys()
    for step, x_B1C in enumerate(inputs["decode_embeds"].split(1, 1), 1):
        steps.append(module(x_B1C, cache))
        look(step)
    outputs["decode"] = torch.cat(steps, 1)
    for number, layer in enumerate(cache.layers):
        outputs[f"key_cache_end.layer{number}"] = layer.ordered_keys()
    outputs["cache_lengths"] = torch.tensor(lengths)
    return outputs


PORTS = tuple(AuthorsPort(module, build=_build, convert=_NAMES, run=_run_authors) for module in ("vision", "full"))
