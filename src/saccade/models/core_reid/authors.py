"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names, laid
from saccade.catalogue.ports import Arguments, calls, of_function
from saccade.models.core_reid.head import ECAB, Ensemble, PartHead, embedding_of
from saccade.models.core_reid.losses import class_loss, soft_triplet_loss, triplet_loss

#: a network under DataParallel
_PREFIX = "module."


def _layer(texts: Mapping[str, str]) -> int:
    """The number of a linear map: they stand at 0, 2 .. 10, ReLUs between."""
    if not texts["n"].isdecimal() or int(texts["n"]) % 2:
        raise ValueError(f"se.{texts['n']} must be an even number")
    return int(texts["n"]) // 2


def _flat(weight: Tensor) -> Tensor:
    if weight.ndim != 4:
        raise ValueError(f"a convolution must have four axes, got {tuple(weight.shape)}")
    return weight.flatten(1)


_ECAB = Names({"se.{n}.weight": laid(lambda texts: f"layers.{_layer(texts)}.weight", _flat)})
_HEAD = Names(
    {
        "BN_g.{leaf}": "norm.{leaf}",
        "feat_bn.{leaf}": None,
        "classifier.{leaf}": "classifier.{leaf}",
        **{
            place: ours
            for part, theirs, norm, fc in (("upper", "ca_upper", "BN_u", "upper"), ("lower", "ca_low", "BN_l", "low"))
            for place, ours in (
                *_ECAB.within(f"{theirs}.", f"{part}.ecab.").items(),
                (f"{norm}.{{leaf}}", f"{part}.norm.{{leaf}}"),
                (f"adativeFC_{fc}.{{leaf}}", f"{part}.fc.{{leaf}}"),
            )
        },
    }
)
_NAMES = Names(
    {
        **_HEAD.within("model.", "student."),
        **_HEAD.within("model_ema.", "teacher."),
        **{f"fuse_net.bn_{n}.{{leaf}}": f"fuse.norms.{n - 1}.{{leaf}}" for n in (1, 2, 3)},
        # one network of the two, with its trunk
        **_HEAD.within("", "head."),
        "base.0.{leaf}": "trunk.stem.0.{leaf}",
        "base.1.{leaf}": "trunk.stem.1.{leaf}",
        **{
            f"base.{stage + 4}.{{j}}.{theirs}.{{leaf}}": f"trunk.stages.{stage}.{{j}}.{ours}.{{leaf}}"
            for stage in range(4)
            for theirs, ours in (
                *((f"conv{k}", f"conv{k}") for k in (1, 2, 3)),
                *((f"bn{k}", f"norm{k}") for k in (1, 2, 3)),
                *((f"downsample.{k}", f"shortcut.{k}") for k in (0, 1)),
            )
        },
    }
)


def _convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _NAMES({name.removeprefix(_PREFIX): tensor for name, tensor in state.items()})


def _build(args: dict[str, Any]) -> nn.Module:
    if args.get("num_split", 2) != 2:
        raise ValueError(f"num_split must be 2, the halves that are fused, got {args['num_split']}")
    student, teacher = (
        PartHead(args["channels"], args["num_classes"], reduction=args.get("reduction", 4)) for _ in range(2)
    )
    return Ensemble(student, teacher, args["channels"])


def _run(module: Ensemble, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    fused, student, teacher = module(inputs["x"])
    return {
        "student_global": student.whole,
        "student_upper": student.upper,
        "student_low": student.lower,
        "student_prob": student.logits,
        "student_upper_attn": student.upper_attention,
        "student_low_attn": student.lower_attention,
        "teacher_embedding": embedding_of(teacher),
        **dict(zip(("fused_global", "fused_upper", "fused_low"), fused)),
    }


def _losses(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    features, label = inputs["emb"], inputs["label"]
    margin = args.get("soft_margin", 0.0)
    return {
        "soft_triplet": soft_triplet_loss(features, label, margin=margin, teacher=features),
        "triplet_hard": triplet_loss(features, label, margin=args.get("triplet_margin", 0.3)),
        "ce_smooth": class_loss(inputs["logits"], inputs["targets"], smoothing=args.get("epsilon", 0.1)),
    }


PORTS = (
    AuthorsPort(
        "ecab", build=Arguments(ECAB, {"channel": "channels", "reduction": "reduction"}), convert=_ECAB,
        run=calls("x", gives="out"),
    ),
    AuthorsPort("ensemble_fusion", build=_build, convert=_convert, run=_run),
    of_function("losses", run=_losses),
)  # fmt: skip
