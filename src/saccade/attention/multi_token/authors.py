"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from saccade.attention.multi_token.layer import MultiTokenAttention
from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import calls


def _build(args: dict[str, Any]) -> MultiTokenAttention:
    """Attention(dim, head_dim, n_heads, n_kv_heads, rope_theta, layer_id, mta) of the authors' transformer."""
    mta = args.get("mta") or {}
    use = bool(mta.get("use_mta", False))

    def size(prefix: str) -> tuple[int, int] | None:
        sizes = [mta.get(f"{prefix}{name}_kernel_size") for name in ("query", "key")]
        return (int(sizes[0] or 1), int(sizes[1] or 1)) if any(sizes) else None

    heads = int(args["n_heads"])
    before = size("") if use and mta.get("query_kernel_size") else None
    norm = use and bool(mta.get("group_norm", False))
    gate = use and bool(mta.get("add_gating", False))
    return MultiTokenAttention(
        int(args["dim"]),
        heads,
        True,
        kernel_size=before,
        kernel_size_after=size("after_sm_") if before else None,
        pad_key=mta.get("pad_key") or "both",
        mix_heads=use and bool(mta.get("pre_sm_linear_head", False)),
        head_kernel=heads if mta.get("post_sm_linear_head") and use else int(mta.get("head_kernel_size") or 0) * use,
        group_norm=norm,
        depth=int(args.get("layer_id", 0)) if norm and mta.get("layer_norm_rescale") else None,
        gate=("scalar" if mta.get("gate_1d", True) else "vector") if gate else None,
        num_kv_heads=int(args.get("n_kv_heads") or heads),
        head_dim=args.get("head_dim"),
        rope_base=float(args.get("rope_theta", 10000.0)),
        rope_pairs="neighbours",
    )


_NAMES = Names(
    {
        "wq.weight": "q_proj.weight",
        "wk.weight": "k_proj.weight",
        "wv.weight": "v_proj.weight",
        "wo.weight": "out_proj.weight",
        "mta_kernel": "kernel",
        "mta_kernel_after_sm": "kernel_after",
        "head_kernel": "head_mixing",
        "wpsm.weight": "mixing",
        "subln.weight": "norm.weight",
        "gate.weight": "gate.weight",
        "gate.bias": "gate.bias",
    }
)


PORTS = tuple(
    AuthorsPort(
        f"mta_attention{number}",
        build=_build,
        convert=_NAMES,
        run=calls("x"),
    )
    for number in range(3)
)
