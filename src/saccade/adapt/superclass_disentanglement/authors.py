"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from saccade.adapt.superclass_disentanglement.maps import quantile_stretched
from saccade.adapt.superclass_disentanglement.objective import SupER
from saccade.catalogue import AuthorsPort, Names

#: their weights of the terms -> ours
_WEIGHTS = {"bce": "reconstruction", "beta": "beta", "cls": "classes", "gcam": "attention", "l2": "penalty"}
#: their terms -> ours
_TERMS = {
    "recon_loss": "reconstruction", "kld": "kl", "ce_rel": "relevant", "ce_irr": "irrelevant", "align": "alignment",
    "anti_align": "anti_alignment", "l2_reg": "penalty",
}  # fmt: skip


def _build(args: dict[str, Any]) -> nn.Module:
    """The encoder of the recordings is one convolution."""
    channels, *rest = args["hidden_dims"]
    weights = args.get("weights", {})
    strange = set(weights) - set(_WEIGHTS)
    if strange:
        raise ValueError(f"weights must be among {', '.join(_WEIGHTS)}, got {', '.join(sorted(strange))}")
    return SupER(
        args["num_classes"],
        nn.Sequential(nn.Conv2d(3, channels, 3, 4, padding=1)),
        channels,
        latent=args["latent_dim"],
        widths=args["classifier_widths"],
        decoder_channels=rest,
        grid=args["grid"],
        threshold=args.get("threshold"),
        **{_WEIGHTS[name]: value for name, value in weights.items()},
    )


def _run(module: SupER, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    maps = quantile_stretched(inputs["teacher_raw"])
    said = module.say(inputs["image"], inputs["label"], noise=inputs["eps"])
    loss, terms = module(inputs["image"], inputs["label"], maps, target=inputs["recon_target"], noise=inputs["eps"])
    return {
        "recon": said.reconstruction,
        "mu": said.mean,
        "log_var": said.log_variance,
        "logits_rel": said.relevant,
        "logits_irr": said.irrelevant,
        "features": said.features,
        "cam_rel": said.relevant_map,
        "cam_irr": said.irrelevant_map,
        "teacher_map": maps,
        **{theirs: terms[ours] for theirs, ours in _TERMS.items()},
        "total": loss,
    }


PORTS = (
    AuthorsPort(
        "super_loss",
        build=_build,
        convert=Names(
            {
                "base.{rest*}": "encoder.{rest}",
                "fc_mu.{leaf}": "mean.{leaf}",
                "fc_var.{leaf}": "log_variance.{leaf}",
                "decoder_input.{leaf}": "decoder.start.{leaf}",
                "decoder.{i}.{leaf}": "decoder.layers.{i}.{leaf}",
                "classifier1.{i}.{leaf}": "relevant.{i}.{leaf}",
                "classifier2.{i}.{leaf}": "irrelevant.{i}.{leaf}",
            }
        ),
        run=_run,
    ),
)
