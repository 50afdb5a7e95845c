"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.names import Place
from saccade.catalogue.ports import Arguments
from saccade.models.stya2k.attention import A2K
from saccade.models.stya2k.network import WIDTHS, StyA2K, Transform

#: where convolutions stand in their sequences, and here
_ENCODER = {
    2: "0.0", 5: "0.1", 9: "1.0", 12: "1.1", 16: "2.0", 19: "2.1", 22: "2.2", 25: "2.3",
    29: "3.0", 32: "3.1", 35: "3.2", 38: "3.3", 42: "4.0",
}  # fmt: skip
_DECODER = {1: 0, 4: 1, 7: 2, 10: 3, 14: 4, 17: 5, 21: 6, 24: 7}
#: convolutions of the released VGG-19 behind relu5_1, and side of a region by layer
_UNUSED, _REGIONS = (45, 48, 51), {"3": 8, "4": 8, "5": 4}

_A2K = Names({"{conv}.{leaf}": "{conv}.{leaf}", "sim_alpha": "alpha", "sim_beta": "beta"})
_TRANSFORM = Names(
    {
        **_A2K.within("attn_adain_4_1.", "attention4."),
        **_A2K.within("attn_adain_5_1.", "attention5."),
        "merge_conv.{leaf}": "merge.{leaf}",
    }
)


def _at(stem: str, places: Mapping[int, object]) -> dict[str, Place]:
    return {f"{number}.{{leaf}}": f"{stem}.{place}.{{leaf}}" for number, place in places.items()}


_NETWORK = Names(
    {
        **_A2K.within("A2K.", "attention3."),
        **_TRANSFORM.within("transform.", "transform."),
        "encoder.0.{leaf}": "encoder.colours.{leaf}",
        **Names(_at("encoder.stages", _ENCODER)).within("encoder.", ""),
        **{f"encoder.{number}.{{leaf}}": None for number in _UNUSED},
        "decoder.decoder_layer_1.1.{leaf}": "decoder.first.{leaf}",
        **Names(_at("decoder.convs", _DECODER)).within("decoder.decoder_layer_2.", ""),
    }
)


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Files that were saved on several devices have `module.` in front, behind this project's prefix."""
    return _NETWORK({name.replace("module.", "", 1): tensor for name, tensor in state.items()})


def _run_a2k(module: A2K, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    content, style = inputs["content"], inputs["style"]
    return {"y": module(content, style), "region_index": module.chosen(content, style)}


def _run_transform(module: Transform, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return {"y": module(*(inputs[name] for name in ("content4", "style4", "content5", "style5")))}


def _run_network(module: StyA2K, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    content, style = inputs["content"], inputs["style"]
    return {"y": module(content, style).image, "relu4_1": module.encoder(content)[3]}


def _widths(divisor: str) -> Callable[[dict[str, Any]], tuple[int, ...]]:
    return lambda args: tuple(width // int(args[divisor]) for width in WIDTHS)


PORTS = (
    AuthorsPort(
        "a2k",
        build=Arguments(A2K, {"in_planes": "dim", "layer": ("region", lambda layer: _REGIONS[str(layer)])}),
        convert=_A2K,
        run=_run_a2k,
    ),
    AuthorsPort("transform", build=Arguments(Transform, {"in_planes": "dim"}), convert=_TRANSFORM, run=_run_transform),
    AuthorsPort(
        "network",
        build=Arguments(
            StyA2K,
            {"skip_connection_3": "skip"},
            defaults={"widths_divided_by": 1},
            derived={"widths": _widths("widths_divided_by")},
        ),
        convert=_convert,
        run=_run_network,
        tolerance=2e-4,
        reason="logits without a scale amplify what is rounded, as the card says",
    ),
)
