"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.names import Place, split
from saccade.catalogue.ports import Arguments, calls
from saccade.fusion.visuo_tactile.force import ForceDenoiser
from saccade.fusion.visuo_tactile.fusion import CrossAttentionFusion, ForceGuidedFusion, SelfAttentionFusion


def _layer(memory: bool = True) -> Names:
    """The names of torch's decoder layer, or of its encoder layer."""
    attentions = {"self_attn": "attention", **({"multihead_attn": "memory"} if memory else {})}
    table: dict[str, Place] = {"linear1.{leaf}": "mlp.fc1.{leaf}", "linear2.{leaf}": "mlp.fc2.{leaf}"}
    for theirs, ours in attentions.items():
        table[f"{theirs}.in_proj_weight"] = split(f"{ours}.{{part}}_proj.weight", "q", "k", "v")
        table[f"{theirs}.in_proj_bias"] = split(f"{ours}.{{part}}_proj.bias", "q", "k", "v")
        table[f"{theirs}.out_proj.{{leaf}}"] = f"{ours}.out_proj.{{leaf}}"
    for i in range(len(attentions) + 1):
        table[f"norm{i + 1}.{{leaf}}"] = f"norms.{i}.{{leaf}}"
    return Names(table)


class _Both(nn.Module):
    """Both comparisons, as they are recorded."""

    def __init__(self, args: Mapping[str, Any]) -> None:
        super().__init__()
        dim, heads = args["hidden_dim"], args["num_heads"]
        self.alone = SelfAttentionFusion(dim, args["visual_dim"], args["tactile_dim"], num_heads=heads)
        self.across = CrossAttentionFusion(dim, num_heads=heads, hidden=args["ff_dim"])


def _guided(module: ForceGuidedFusion, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    fused = module(inputs["visual_feat"], inputs["tactile_feat"], inputs["predicted_force"])
    return {"attended_feat": fused.features, "attention_weights": fused.weights[:, :, None]}


def _denoiser(args: dict[str, Any]) -> nn.Module:
    """Of the authors' options those of the policy: time and observations are conditions, which an MLP encodes."""
    wanted = {"time_as_cond": True, "obs_as_cond": True, "n_cond_layers": 0, "output_dim": args["input_dim"]}
    for name, value in wanted.items():
        if args.get(name, value) != value:
            raise ValueError(f"{name} must be {value}, got {args[name]}")
    return _DENOISER(args)


_DENOISER = Arguments(
    ForceDenoiser,
    {
        "input_dim": "force",
        "cond_dim": "condition",
        "horizon": "horizon",
        "n_obs_steps": "observations",
        "n_layer": "depth",
        "n_head": "num_heads",
        "n_emb": "dim",
        "p_drop_emb": "embedding_drop",
        "p_drop_attn": "drop",
        "causal_attn": "causal",
    },
)

PORTS = (
    AuthorsPort(
        "force_guided_cross_attention",
        build=Arguments(
            ForceGuidedFusion,
            {
                "visual_dim": "visual",
                "tactile_dim": "tactile",
                "force_dim": "force",
                "hidden_dim": "dim",
                "num_heads": "num_heads",
                "dropout": "drop",
            },
            form="decoder",
        ),
        convert=Names({"{proj}.{leaf}": "{proj}.{leaf}", **_layer().within("cross_attn.", "layer.")}),
        run=_guided,
    ),
    AuthorsPort(
        "other_fusions",
        build=_Both,
        convert=Names(
            {
                "self.{proj}.{leaf}": "alone.{proj}.{leaf}",
                **_layer(memory=False).within("self.self_attn_layer.", "alone.layer."),
                **_layer().within("cross.cross_attn_layer.", "across.layer."),
            }
        ),
        run=lambda module, inputs, args: {
            "self": module.alone(inputs["visual"], inputs["tactile"]),
            "cross": module.across(inputs["visual_seq"], inputs["tactile_seq"]),
        },
    ),
    AuthorsPort(
        "force_predictor_denoiser",
        build=_denoiser,
        convert=Names(
            {
                "_dummy_variable": None,
                "mask": None,
                "memory_mask": None,
                "input_emb.{leaf}": "input.{leaf}",
                "cond_obs_emb.{leaf}": "observed.{leaf}",
                "pos_emb": "positions",
                "cond_pos_emb": "condition_positions",
                "encoder.{i}.{leaf}": "encoder.{i}.{leaf}",
                **_layer().within("decoder.layers.{i}.", "layers.{i}."),
                "ln_f.{leaf}": "norm.{leaf}",
                "head.{leaf}": "head.{leaf}",
            }
        ),
        run=calls("sample", "timestep", "cond", gives="output"),
    ),
)
