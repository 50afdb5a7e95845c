"""The published variants of AttentionEngine and FlexAttention, expressed through `attend`, on recorded vectors.

`golden/attention-engine` holds the authors' score_mod and OnlineFunc definitions evaluated tile by tile,
`golden/flex-attention` PyTorch's own eager implementation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import saccade
from saccade import masks
from saccade.ops.normalizers import Normalizer, Retention

GOLDEN = Path(__file__).parents[1] / "golden"

#: backend and memory; the smallest memory makes tiles of 16 x 16
PATHS = [("reference", 64.0), ("stream", 64.0), ("stream", 0.001)]


class Identity(Normalizer):
    """Scores are the weights: the online function of the authors' sigmoid and ReLU variants."""

    def update(self, scores: Tensor, allowed: Tensor, state: dict[str, Tensor]) -> Any:
        return scores.masked_fill(~allowed, 0.0), state, None


@pytest.fixture(scope="module")
def engine() -> dict[str, Tensor]:
    return load_file(GOLDEN / "attention-engine" / "parallel_variants.a.safetensors")


@pytest.fixture(scope="module")
def flex() -> dict[str, Tensor]:
    return load_file(GOLDEN / "flex-attention" / "flex_attention.a.safetensors")


def near(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("backend", "memory_mb"), [*PATHS, ("sdpa", 64.0)])
def test_softmax(engine: dict[str, Tensor], backend: str, memory_mb: float) -> None:
    q, k, v = (engine[f"input.{x}"] for x in "qkv")
    out, lse = saccade.attend(
        q, k, v, mask=masks.causal(), return_lse=True, backend=backend, memory_mb=memory_mb, scale=128**-0.5
    )
    near(out, engine["output.softmax.out"])
    near(lse, engine["output.softmax.lse"])


@pytest.mark.parametrize(("backend", "memory_mb"), PATHS)
def test_sigmoid(engine: dict[str, Tensor], backend: str, memory_mb: float) -> None:
    q, k, v = (engine[f"input.{x}"] for x in "qkv")
    bias = engine["input.sigmoid.bias"]
    options: dict[str, Any] = {"mask": masks.causal(), "backend": backend, "memory_mb": memory_mb}
    out = saccade.attend(q, k, v, score_mod=lambda s, *_: s + bias, normalize="sigmoid", **options)
    near(out, engine["output.sigmoid.out"])
    # as the authors write it: the sigmoid in the score modification, no normalisation
    mod = lambda s, *_: (((s + bias) / 2).tanh() + 1) / 2  # noqa: E731
    near(saccade.attend(q, k, v, score_mod=mod, normalize=Identity(), **options), out)


@pytest.mark.parametrize(("backend", "memory_mb"), PATHS)
def test_relu(engine: dict[str, Tensor], backend: str, memory_mb: float) -> None:
    q, k, v = (engine[f"input.{x}"] for x in "qkv")
    options: dict[str, Any] = {"scale": 64**-0.5, "backend": backend, "memory_mb": memory_mb}
    near(saccade.attend(q, k, v, normalize="relu", **options), engine["output.relu.out"])
    mod = lambda s, *_: s.clamp(min=0)  # noqa: E731
    near(saccade.attend(q, k, v, score_mod=mod, normalize=Identity(), **options), engine["output.relu.out"])


@pytest.mark.parametrize(("backend", "memory_mb"), PATHS)
@pytest.mark.parametrize("normalize", ["abs-sum", Retention()], ids=repr)
def test_retention(engine: dict[str, Tensor], backend: str, memory_mb: float, normalize: Any) -> None:
    q, k, v = (engine[f"input.{x}"] for x in "qkv")
    decay = engine["input.retention.decay_mask"]
    options: dict[str, Any] = {"mask": masks.causal(), "backend": backend, "memory_mb": memory_mb}
    mod = lambda s, b, h, i, j: s * decay[b, h, i, j]  # noqa: E731
    out = saccade.attend(q, k, v, score_mod=mod, normalize=normalize, **options)
    near(out, engine["output.retention.out"])
    size = lambda s, b, h, i, j: (s * decay[b, h, i, j]).abs()  # noqa: E731
    total = saccade.attend(q, k, torch.ones_like(v), score_mod=size, normalize=Identity(), **options)
    near(total[..., 0].clamp(min=1.0), engine["output.retention.r"])


def flex_mask(name: str, ids: Tensor) -> masks.Mask:
    return {
        "causal": masks.causal(),
        "sliding_window": masks.window(9),
        "prefix_lm": masks.prefix(13) | masks.causal(),
        "document_causal": masks.documents(ids) & masks.causal(),
        "alibi_document_window": masks.documents(ids) & masks.window(9),
    }[name]


def flex_mod(name: str, bias: Tensor) -> Any:
    slope = lambda h: torch.exp2(-8.0 * (h + 1) / 4)  # noqa: E731
    return {
        "alibi": lambda s, b, h, i, j: s + slope(h) * (j - i),
        "softcap": lambda s, b, h, i, j: 5.0 * (s / 5.0).tanh(),
        "bias": lambda s, b, h, i, j: s + bias[h, i, j],
        "relative": lambda s, b, h, i, j: s + (i - j),
    }[name.split("_")[0]]


@pytest.mark.parametrize(("backend", "memory_mb"), [*PATHS, ("sdpa", 64.0)])
@pytest.mark.parametrize("name", ["causal", "sliding_window", "prefix_lm", "document_causal"])
def test_flex_masks(flex: dict[str, Tensor], name: str, backend: str, memory_mb: float) -> None:
    q, k, v = (flex[f"input.{x}"] for x in "qkv")
    mask = flex_mask(name, flex["input.document_id"])
    out, lse = saccade.attend(q, k, v, mask=mask, return_lse=True, backend=backend, memory_mb=memory_mb)
    near(out, flex[f"output.{name}.out"])
    near(lse, flex[f"output.{name}.lse"])
    blocks = mask.block_map(48, 48, 8)
    assert torch.equal((blocks != masks.EMPTY).int(), flex[f"output.{name}.dense_blocks"])


@pytest.mark.parametrize(("backend", "memory_mb"), PATHS)
@pytest.mark.parametrize(
    "name", ["alibi_causal", "softcap_causal", "bias_causal", "relative_causal", "alibi_document_window"]
)
def test_flex_score_mods(flex: dict[str, Tensor], name: str, backend: str, memory_mb: float) -> None:
    q, k, v = (flex[f"input.{x}"] for x in "qkv")
    mask = flex_mask("causal" if name.endswith("causal") else name, flex["input.document_id"])
    mod = flex_mod(name, flex["input.bias"])
    out = saccade.attend(q, k, v, mask=mask, score_mod=mod, backend=backend, memory_mb=memory_mb)
    near(out, flex[f"output.{name}.out"])


def test_any_function_by_its_logarithm(flex: dict[str, Tensor]) -> None:
    """Card flex-attention: softmax of log(f(s) + N), times exp(lse), less N sum v, is f(S) V."""
    q, k, v = (flex[f"input.{x}"] for x in "qkv")
    mask = masks.causal()
    mod = lambda s, *_: (s.tanh() + 2.0).log()  # noqa: E731
    out, lse = saccade.attend(q, k, v, mask=mask, score_mod=mod, return_lse=True, backend="stream")
    uniform = saccade.attend(q, k, v, mask=mask, score_mod=lambda s, *_: s * 0, normalize="sigmoid") * 2
    mod = lambda s, *_: s.tanh()  # noqa: E731
    direct = saccade.attend(q, k, v, mask=mask, score_mod=mod, normalize=Identity())
    near(out * lse.exp()[..., None] - 2.0 * uniform, direct)
