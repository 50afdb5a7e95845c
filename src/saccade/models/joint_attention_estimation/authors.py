"""How the authors' estimator and fusion map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.catalogue import AuthorsPort, Names, split
from saccade.catalogue.ports import Arguments
from saccade.models.joint_attention_estimation.network import JointAttention

_HEAD = "estimator.person_person_attention_heatmap"
_NAMES = Names(
    {
        "estimator.head_info_feat_embeding.{i}.{leaf}": "people.embed.{i}.{leaf}",
        "estimator.ja_embedding": "people.token",
        "estimator.people_people_self_attention.{i}.in_proj_{leaf}": split(
            "people.blocks.{i}.attention.{part}_proj.{leaf}", "q", "k", "v"
        ),
        "estimator.people_people_self_attention.{i}.out_proj.{leaf}": "people.blocks.{i}.attention.out_proj.{leaf}",
        "estimator.people_people_fc.{i}.0.{leaf}": "people.blocks.{i}.mlp.fc1.{leaf}",
        "estimator.people_people_fc.{i}.2.{leaf}": "people.blocks.{i}.mlp.fc2.{leaf}",
        "estimator.trans_layer_norm_people_people.{leaf}": "people.norm.{leaf}",
        f"{_HEAD}.0.{{leaf}}": "people.field.first.{leaf}",
        f"{_HEAD}.2.{{i}}.{{leaf}}": "people.field.middle.{i}.{leaf}",
        f"{_HEAD}.3.{{leaf}}": "people.field.last.{leaf}",
        f"{_HEAD}_middle.{{i}}.{{leaf}}": None,  # the same tensors
        "fusion.final_fusion_weight": "fuse.weights",
    }
)


def _actions(args: dict[str, Any]) -> int:
    """Their networks know nine actions, or none."""
    return 9 if args["use_action"] else 0


def _run(module: JointAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """Their tensors have an axis of one frame; a row of zeros is nobody."""
    given_BPF, gaze_BP2 = inputs["input_feature"][:, 0], inputs["input_gaze"][:, 0]
    there_BP = given_BPF.sum(2) != 0
    people_BPF = torch.cat([given_BPF[..., :2], gaze_BP2, given_BPF[..., 2:]], 2)
    attends_BP = inputs["att_inside_flag"] > 0
    out = module(people_BPF, there_BP, inputs["person_scene_joint"][:, 0], attends=attends_BP, each=True)
    assert out.each is not None and out.branches is not None
    weights = module.people.weights(module.attributes(people_BPF), there_BP)
    return {
        "person_person_attention_heatmap": out.each[:, None],
        "person_person_joint_attention_heatmap": out.branches[0][:, None],
        "attention_weights": weights[:, None],
        "final_joint_attention_heatmap": out.heatmap[:, None],
    }


PORTS = (
    AuthorsPort(
        "estimator_and_fusion",
        build=Arguments(
            JointAttention,
            {
                "use_position": "position",
                "use_gaze": "gaze",
                "people_feat_dim": "dim",
                "people_people_trans_enc_num": "depth",
                "mha_num_heads_people_people": "num_heads",
                "head_embedding_type": ("embedding", {"liner": "linear", "mlp": "mlp"}),
                "p_p_estimator_type": (
                    "field",
                    {"field_middle": "middle", "field_deep": "deep", "field_shallow": "shallow"},
                ),
                "p_p_aggregation_type": (
                    "aggregation",
                    {"token_only": "token", "ind_only": "people", "ind_and_token_ind_based": "both"},
                ),
                "fusion_net_type": (
                    "fusion",
                    {"scalar_weight": "weights", "simple_average": "average", "early": "early", "mid": "mid"},
                ),
                "loss": ("activation", {"mse": "identity", "bce": "sigmoid"}),
            },
            defaults={"use_action": True},
            derived={
                "actions": _actions,
                "map_size": lambda args: (args["resize_height"], args["resize_width"]),
            },
        ),
        convert=_NAMES,
        run=_run,
    ),
)
