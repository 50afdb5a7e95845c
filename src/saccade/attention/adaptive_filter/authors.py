"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from saccade.attention.adaptive_filter.layer import AdaptiveFilterAttention
from saccade.attention.adaptive_filter.operator import Bias, InnerResidual
from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments

#: arguments of which one value only can be read back, since the places of the others are not known
_ONLY: dict[str, tuple[Any, ...]] = {"use_complex_input_norm": (0, 1), "epsilon": (1e-5,)}
_BIASES: dict[int, Bias] = {0: "none", 1: "precision", 2: "linear"}
_GATES: dict[int, InnerResidual] = {0: "sum", 1: "precision", 2: "learned"}


def _of_heads(name: str) -> Callable[[dict[str, Any]], int]:
    return lambda args: 2 * args[name] // args["n_heads"]


_BUILD = Arguments(
    AdaptiveFilterAttention,
    {
        "d_e": "dim",
        "n_heads": "num_heads",
        "seq_len": "seq_len",
        "sep_params": ("separate_dynamics", bool),
        "learn_rotations": ("rotation", {1: "learned", 0: "fixed"}),
        "rotate_values": ("rotate_values", bool),
        "use_robust_weight": ("robust", bool),
        "use_full_residual_norm": ("residual", {1: "full", 0: "dot"}),
        "additive_bias_type": ("additive", _BIASES),
        "multiplicative_bias_type": ("multiplicative", _BIASES),
        "lambda_real_zero": ("decay", operator.not_),
        "zero_process_noise": ("process_noise", operator.not_),
        "zero_key_measurement_noise": ("key_noise", operator.not_),
        "use_complex_input_norm": ("input_norm", bool),
        "use_complex_output_norm": ("output_norm", bool),
        "compute_next_step_pred": ("predict", bool),
    },
    needed=("seq_len",),
    defaults={
        "sep_params": 0,
        "learn_rotations": 1,
        "rotate_values": 1,
        "use_robust_weight": 1,
        "use_full_residual_norm": 1,
        "additive_bias_type": 1,
        "multiplicative_bias_type": 1,
        "lambda_real_zero": 0,
        "zero_process_noise": 0,
        "zero_key_measurement_noise": 0,
        "use_complex_input_norm": 0,
        "use_complex_output_norm": 0,
        "compute_next_step_pred": 1,
        "use_inner_residual": 1,
        "use_total_precision_gate": 2,
        "min_exponent": -10,
        "max_exponent": 10,
    },
    derived={
        "head_dim": _of_heads("d_k_total"),
        "value_head_dim": _of_heads("d_v_total"),
        "inner_residual": lambda args: (
            _GATES[args["use_total_precision_gate"]] if args["use_inner_residual"] else "none"
        ),
        "exponents": lambda args: (float(args["min_exponent"]), float(args["max_exponent"])),
    },
)


def _build(args: dict[str, Any]) -> nn.Module:
    for name, values in _ONLY.items():
        if args.get(name, values[0]) not in values:
            raise ValueError(f"{name} must be {' or '.join(map(str, values))}, got {args[name]}")
    return _BUILD(args)


_NAMES = {
    "W_q": "q_proj",
    "W_k": "k_proj",
    "W_v": "v_proj",
    "W_o": "out_proj",
    "cn_q": "q_norm",
    "cn_k": "k_norm",
    "cn_v": "v_norm",
    "cn_o": "output_norm",
    "lambda_imag": "frequency",
    "mu": "decay",
    "sigma": "process_noise",
    "eta": "key_noise",
    "gamma": "query_noise",
    "tau": "temperature",
    "nu_sqrt": "robustness",
    "P_scale": "gate_scale",
    "P_prior_param": "gate_prior",
}


_PLACES = Names({
    **{f"W_{x}.{{leaf}}": f"{_NAMES[f'W_{x}']}.{{leaf}}" for x in "qkvo"},
    **{f"cn_{x}.gamma": f"{_NAMES[f'cn_{x}']}.weight" for x in "qkvo"},
    **{name: _NAMES[name] for name in ("tau", "nu_sqrt", "P_scale", "P_prior_param")},
    **{
        f"{name}_{side}": f"{system}.{_NAMES[name]}"
        for name in ("lambda_imag", "mu", "sigma", "eta", "gamma")
        for side, system in (("v", "dynamics"), ("k", "key_dynamics"))
    },
})  # fmt: skip


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = _PLACES(state)
    heads, pairs = state["lambda_imag_v"].shape
    for name, tensor in ours.items():
        if "_proj." in name and name != "out_proj.bias":
            # theirs: the real parts of all heads, then the imaginary ones; ours: both parts of a head
            axis = 1 if name == "out_proj.weight" else 0
            ours[name] = tensor.unflatten(axis, (2, heads, -1)).transpose(axis, axis + 1).flatten(axis, axis + 2)
        elif "norm." in name or name.startswith("gate_"):
            ours[name] = tensor.reshape(heads, -1)
        elif name in ("temperature", "robustness"):
            ours[name] = tensor.flatten()
    # a recording without gate has no gate tensors
    return {name: torch.zeros(heads, 2 * pairs) for name in ("gate_scale", "gate_prior")} | ours


def _run(module: AdaptiveFilterAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x_BNC = inputs["x"][:, 0]
    B, N, _ = x_BNC.shape
    one_of_each = torch.eye(N).expand(B, module.num_heads, N, N)
    z_BHNE = module.estimate(x_BNC)[0]
    return {
        "y": module(x_BNC, sample=bool(args.get("add_gaussian_noise")))[:, None],
        "attn": module.mix(x_BNC, one_of_each, decay=False).permute(0, 2, 3, 1),
        "est_latent": z_BHNE.transpose(1, 2).unflatten(-1, (2, -1)).mT,
    }


PORTS = tuple(AuthorsPort(f"isotropic_afa{number}", _build, _convert, _run) for number in range(3))
