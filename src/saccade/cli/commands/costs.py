"""Commands that forecast and measure: `plan`, `bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from saccade.cli.commands.app import AsJson, Seed, integers, print_json
from saccade.tables import table


def plan(
    shape: Annotated[str, typer.Option(help="B,H,N,D of the queries.")] = "1,8,4096,64",
    keys: Annotated[int | None, typer.Option(help="Number of keys; as many as queries where not given.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key heads, a divisor of H.")] = None,
    mask: Annotated[
        str | None, typer.Option(help="e.g. 'causal & window(512)' or 'neighborhood((64,64), 13)'.")
    ] = None,
    normalize: Annotated[str, typer.Option(help="softmax, sigmoid, relu or abs-sum.")] = "softmax",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backend: Annotated[str | None, typer.Option(help="Ask for a path by name.")] = None,
    picture: Annotated[bool, typer.Option("--picture", help="Draw the mask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Forecast a call of saccade.attend: path, reason, FLOPs, bytes, density."""
    from dataclasses import asdict

    import torch

    import saccade
    from saccade.cli.masks import parse_mask

    sizes = integers(shape, "shape", 4)
    if dtype not in ("float32", "bfloat16", "float16", "float64"):
        raise ValueError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees none here")
    B, H, N, D = sizes
    heads, M = H if kv_heads is None else kv_heads, N if keys is None else keys
    if heads < 1 or M < 0:
        raise ValueError(f"kv_heads must be positive and keys not negative, got {heads} and {M}")
    if B * H * max(N, M) * D >= 2**63:
        raise ValueError(f"the shape has more numbers than torch can count: {shape}")
    # strided views of one number: shapes without memory
    query = torch.zeros((), dtype=getattr(torch, dtype), device=device).expand(B, H, N, D)
    key = torch.zeros((), dtype=getattr(torch, dtype), device=device).expand(B, heads, M, D)
    parsed = parse_mask(mask) if mask else None
    forecast = saccade.plan(query, key, key, mask=parsed, normalize=normalize, backend=backend)
    if as_json:
        print_json(asdict(forecast))
        return
    print(forecast)
    if picture and parsed is not None:
        print(parsed.picture(N, M))


def bench(
    slugs: Annotated[list[str], typer.Argument(help="Sequence mechanisms, e.g. moba lightning.")],
    lengths: Annotated[str, typer.Option(help="Comma-separated sequence lengths.")] = "512,2048,8192",
    dim: Annotated[int, typer.Option(help="Channels.")] = 256,
    num_heads: Annotated[int, typer.Option(help="Heads.")] = 4,
    batch: Annotated[int, typer.Option(help="Sequences a batch.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure speed and memory of layers against SDPA, with the share of the machine's matmul rate."""
    import torch

    from saccade.bench.machine import describe, matmul_rate
    from saccade.bench.parts import measure
    from saccade.ops.measure import busy, machine
    from saccade.train.progress import bar, showing

    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, got {dtype!r}")
    rows = []
    count = len({"softmax", *slugs}) * len(integers(lengths, "lengths"))
    with showing(False if as_json else None), bar("measuring", count) as update:
        for row in measure(
            slugs,
            lengths=integers(lengths, "lengths"),
            dim=dim,
            num_heads=num_heads,
            batch=batch,
            dtype=getattr(torch, dtype),
            seed=seed,
        ):
            rows.append(row)
            update(words=f"{row.slug} at {row.length} done")
    if as_json:
        print_json({"machine": machine(), "matmul_flops": matmul_rate(), "rows": [row.as_dict() for row in rows]})
        return
    columns = ("part", "length", "forward", "backward", "memory", "tokens/s", "dense FLOPs / matmul", "x softmax")
    lines = [
        (
            row.slug,
            f"{row.length:,}",
            f"{row.forward * 1e3:.1f} ms",
            "not measurable" if row.backward is None else f"{row.backward * 1e3:.1f} ms",
            f"{row.memory / 2**20:.1f} MiB",
            f"{row.tokens_per_second:,.0f}",
            f"{row.matmul_share:.2f}",
            f"{row.speedup:.2f}",
        )
        for row in rows
    ]
    print(table(columns, lines, title=describe()))
    note = busy(max((row.waited for row in rows if row.waited is not None), default=None))
    if note:
        print(note)
