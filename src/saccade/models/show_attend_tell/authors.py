"""How the authors' functions map to ours; all their matrices act as x @ W, and steps come before the batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.catalogue import AuthorsPort, Names, laid
from saccade.catalogue.ports import Arguments
from saccade.models.show_attend_tell.losses import word_costs
from saccade.models.show_attend_tell.network import ShowAttendTell


def _turned(name: str) -> Any:
    return laid(f"{name}.weight", lambda matrix: matrix.t())


def _plain(theirs: str, ours: str) -> dict[str, Any]:
    return {f"{theirs}_W": _turned(ours), f"{theirs}_b": f"{ours}.bias"}


#: further layers are numbered from 1, and are fewer; those of the output are not among the recordings
_MOST = 8

_NAMES = Names(
    {
        "Wemb": "words.weight",
        **{name: place for i in range(1, _MOST) for name, place in _plain(f"ff_init_{i}", f"initial.{i - 1}").items()},
        **_plain("ff_state", "to_hidden"),
        **_plain("ff_memory", "to_memory"),
        "decoder_Wc_att": _turned("attention.of_region"),
        "decoder_b_att": "attention.of_region.bias",
        "decoder_Wd_att": _turned("attention.of_state"),
        **{f"decoder_W_att_{i}": _turned(f"attention.deeper.{i - 1}") for i in range(1, _MOST)},
        **{f"decoder_b_att_{i}": f"attention.deeper.{i - 1}.bias" for i in range(1, _MOST)},
        "decoder_U_att": _turned("attention.score"),
        "decoder_c_tt": "attention.score.bias",
        "decoder_W_sel": _turned("selector"),
        "decoder_b_sel": laid("selector.bias", lambda bias: bias.reshape(1)),
        "decoder_W": _turned("of_word"),
        "decoder_b": "of_word.bias",
        "decoder_U": _turned("of_hidden"),
        "decoder_Wc": _turned("of_seen"),
        **_plain("ff_logit_lstm", "hidden_out"),
        **_plain("ff_logit_ctx", "seen_out"),
        **{name: place for i in range(1, _MOST) for name, place in _plain(f"ff_logit_h{i}", f"final.{i - 1}").items()},
        **_plain("ff_logit", "logits"),
        "history_errs": None,  # of training, kept in the same archive
    }
)


def _none(name: str, only: Any) -> Any:
    """An argument that has one value where this network is meant."""

    def check(args: dict[str, Any]) -> None:
        if args.get(name, only) != only:
            raise ValueError(f"{name} must be {only}, got {args[name]}")

    return check


_ONLY = tuple(
    _none(name, only) for name, only in (("n_layers_lstm", 1), ("use_dropout_lstm", False), ("lstm_encoder", False))
)


def _build(attention: str) -> Any:
    build = Arguments(
        ShowAttendTell,
        {
            "n_words": "vocab_size",
            "ctx_dim": "dim",
            "dim_word": "word_dim",
            "dim": "hidden",
            "n_layers_att": ("deep", lambda layers: layers - 1),
            "n_layers_init": ("initial", lambda layers: layers - 1),
            "n_layers_out": ("final", lambda layers: layers - 1),
            "selector": "selector",
            "prev2out": "prev2out",
            "ctx2out": "ctx2out",
            "use_dropout": "dropout",
            "alpha_c": "alpha_c",
            "alpha_entropy_c": "entropy_c",
            "semi_sampling_p": "semi_sampling",
            "temperature": "temperature",
            "attn_type": ("attention", {"deterministic": "soft", "stochastic": "hard"}),
        },
        defaults={
            "n_words": 10000,
            "ctx_dim": 512,
            "dim_word": 100,
            "dim": 1000,
            "n_layers_att": 1,
            "n_layers_init": 1,
            "n_layers_out": 1,
            "selector": False,
            "prev2out": False,
            "ctx2out": False,
            "use_dropout": False,
            "alpha_c": 0.0,
            "attn_type": attention,
        },
    )

    def checked(args: dict[str, Any]) -> ShowAttendTell:
        for check in _ONLY:
            check(args)
        network = build(args)
        assert isinstance(network, ShowAttendTell)
        return network

    return checked


def _run(module: ShowAttendTell, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    words_BT, mask_BT = inputs["x"].T.contiguous(), inputs["mask"].T.bool()
    samples = inputs.get("alpha_sample")
    said = module(inputs["ctx"], words_BT, mask=mask_BT, samples=None if samples is None else samples.transpose(0, 1))
    costs_BT = word_costs(said.logits, words_BT, mask_BT)
    found = {"alphas": said.attention.transpose(0, 1), "cost": costs_BT.sum(1)}
    if said.looks is not None:
        found["selector"] = said.looks.T
    if samples is not None:
        found["masked_cost"] = costs_BT.T
    return found


PORTS = (
    AuthorsPort("soft_attention", build=_build("deterministic"), convert=_NAMES, run=_run),
    AuthorsPort("hard_attention", build=_build("stochastic"), convert=_NAMES, run=_run),
)
