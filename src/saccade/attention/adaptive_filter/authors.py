"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.attention.adaptive_filter.layer import AdaptiveFilterAttention
from saccade.attention.adaptive_filter.operator import Bias, InnerResidual
from saccade.catalogue import AuthorsPort, Names


def _build(args: dict[str, Any]) -> nn.Module:
    given = {
        "max_exponent": 10,
        "min_exponent": -10,
        "sep_params": 0,
        "lambda_real_zero": 0,
        "use_full_residual_norm": 1,
        "use_robust_weight": 1,
        "additive_bias_type": 1,
        "multiplicative_bias_type": 1,
        "compute_next_step_pred": 1,
        "learn_rotations": 1,
        "rotate_values": 1,
        "zero_process_noise": 0,
        "zero_key_measurement_noise": 0,
        "use_total_precision_gate": 2,
        "use_complex_input_norm": 0,
        "use_complex_output_norm": 0,
        "use_inner_residual": 1,
        "epsilon": 1e-5,
        **args,
    }
    if given["use_complex_input_norm"] not in (0, 1):
        raise ValueError(f"use_complex_input_norm must be 0 or 1, got {given['use_complex_input_norm']}")
    if given["epsilon"] != 1e-5:
        raise ValueError(f"epsilon must be 1e-5, the only one whose places are known, got {given['epsilon']}")
    heads = given["n_heads"]
    biases: tuple[Bias, ...] = ("none", "precision", "linear")
    gates: tuple[InnerResidual, ...] = ("sum", "precision", "learned")
    return AdaptiveFilterAttention(
        given["d_e"],
        heads,
        seq_len=given["seq_len"],
        head_dim=2 * given["d_k_total"] // heads,
        value_head_dim=2 * given["d_v_total"] // heads,
        separate_dynamics=bool(given["sep_params"]),
        rotation="learned" if given["learn_rotations"] else "fixed",
        rotate_values=bool(given["rotate_values"]),
        robust=bool(given["use_robust_weight"]),
        residual="full" if given["use_full_residual_norm"] else "dot",
        additive=biases[given["additive_bias_type"]],
        multiplicative=biases[given["multiplicative_bias_type"]],
        decay=not given["lambda_real_zero"],
        process_noise=not given["zero_process_noise"],
        key_noise=not given["zero_key_measurement_noise"],
        inner_residual=gates[given["use_total_precision_gate"]] if given["use_inner_residual"] else "none",
        input_norm=bool(given["use_complex_input_norm"]),
        output_norm=bool(given["use_complex_output_norm"]),
        predict=bool(given["compute_next_step_pred"]),
        exponents=(float(given["min_exponent"]), float(given["max_exponent"])),
    )


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
