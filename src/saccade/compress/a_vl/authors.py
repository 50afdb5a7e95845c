"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.catalogue import AuthorsPort
from saccade.compress.a_vl.compressor import AVLDecoder
from saccade.compress.a_vl.operator import image_span


def _build_authors(args: dict[str, Any]) -> AVLDecoder:
    config, o = args["config"], args.get("options", {})
    vision, text = o.get("vision_adaptive_attention", False), o.get("text_pruning_flag", False)
    filtered = o.get("prefill_filter_flag", False)
    theta = config.get("rope_theta", (config.get("rope_parameters") or {}).get("rope_theta", 10000.0))
    rate = o.get("vision_adaptive_attention_rate", 0.5)
    return AVLDecoder(
        config["hidden_size"],
        config["intermediate_size"],
        config["num_attention_heads"],
        config["num_hidden_layers"],
        num_kv_heads=config.get("num_key_value_heads"),
        head_dim=config.get("head_dim"),
        eps=config.get("rms_norm_eps", 1e-5),
        rope_base=theta,
        rate=rate if vision else None,
        compute_rate=o.get("vision_adaptive_attention_compute_rate", 0.6),
        update_interval=o.get("vision_adaptive_attention_update_interval", -1),
        text_rate=o.get("text_pruning_rate", 0.5) if text else None,
        text_init=o.get("text_init_cache", 20),
        heavy_rate=o.get("text_h20_hh_rate_in_cache", 0.7),
        text_policy="heavy-hitter" if o.get("text_use_h2o", True) else "direct",
        prefill_rate=o.get("prefill_filter_rate", 0.5) if filtered else None,
        prefill_layer=o.get("prefill_filter_layer", 3),
    )


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


PORTS = tuple(
    AuthorsPort(
        module=module,
        build=_build_authors,
        convert=lambda state: {name.replace(".o_proj.", ".out_proj."): x for name, x in state.items()},
        run=_run_authors,
    )
    for module in ("vision", "full")
)
