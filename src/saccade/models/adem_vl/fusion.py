"""Fusion without softmax, heads or projections, in parallel to the feed-forward network, and what it looks at.

    A = silu(u) silu(K)^T,   A_ts <- 0 where A_ts < tau_t,   fused = A V
    K = v + e1,  V = v + e2,   v = beta z (W2 silu(W1 c + b1) + b2),   c = patches at several scales

tau_t is the value at index floor(gamma S) of row t in ascending order.

Shape letters: B batch, T tokens of text, S tokens of the image, D their width, N patches, C their width, h, w map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import floor, isqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.vision_language import decoder_of
from saccade.layers.wrapping import Report, changing


class VisualMemory(NamedTuple):
    """What every layer and every step looks at; it is the same for all of them.

    Attributes:
        key_BSD: silu(K).
        value_BSD: V.
    """

    key_BSD: Tensor
    value_BSD: Tensor

    def take_rows(self, index: Tensor) -> VisualMemory:
        """The rows of the batch at `index`."""
        return VisualMemory(self.key_BSD[index], self.value_BSD[index])


def silu_fusion(u_BTD: Tensor, memory: VisualMemory, *, drop_ratio: float = 0.1) -> Tensor:
    """What text takes of an image, (B, T, D).

    Where nothing is dropped, the product is taken in the cheaper order: silu(u) (silu(K)^T V) for long texts and
    narrow tokens.

    Args:
        u_BTD: what the feed-forward network takes.
        memory: of `VisualFusion.remember`.
        drop_ratio: gamma, the share of a token's scores that are dropped, the lowest ones.

    Raises:
        ValueError: if `drop_ratio` is not at least 0 and below 1, or the widths differ.
    """
    key_BSD, value_BSD = memory
    if u_BTD.ndim != 3 or u_BTD.shape[-1] != key_BSD.shape[-1]:
        raise ValueError(f"text must be (batch, tokens, {key_BSD.shape[-1]}), got {tuple(u_BTD.shape)}")
    if len(key_BSD) not in (1, len(u_BTD)):
        raise ValueError(f"there must be an image for each of {len(u_BTD)} texts, got {len(key_BSD)}")
    query_BTD, (T, D), S = F.silu(u_BTD), u_BTD.shape[1:], key_BSD.shape[1]
    dropped = _dropped(drop_ratio, S)
    if not dropped and 2 * T * S > D * (T + S):
        return query_BTD @ (key_BSD.mT @ value_BSD)
    score_BTS = query_BTD @ key_BSD.mT
    if dropped:
        tau_BT1 = score_BTS.detach().kthvalue(dropped + 1, -1, keepdim=True).values
        score_BTS = score_BTS.masked_fill(score_BTS < tau_BT1, 0.0)
    return score_BTS @ value_BSD


def _dropped(drop_ratio: float, tokens: int) -> int:
    if not 0 <= drop_ratio < 1:
        raise ValueError(f"drop_ratio must be at least 0 and below 1, got {drop_ratio}")
    return floor(drop_ratio * tokens)


def multiscale(c_BNC: Tensor, scales: Sequence[int] = (256, 64)) -> Tensor:
    """Patches of a square map, pooled to several sizes, one after the other: (B, sum of `scales`, C).

    Args:
        c_BNC: patches row by row, without a class token.
        scales: tokens of each size, squares; the map's own is left as it is.

    Raises:
        ValueError: if a number is no square.
    """
    side = isqrt(c_BNC.shape[1])
    if side**2 != c_BNC.shape[1]:
        raise ValueError(f"patches must be those of a square map, got {c_BNC.shape[1]}")
    _check_scales(scales)
    map_BChw = c_BNC.mT.unflatten(2, (side, side))
    sizes = (isqrt(n) for n in scales)
    pooled = (map_BChw if g == side else F.adaptive_avg_pool2d(map_BChw, g) for g in sizes)
    return torch.cat([each.flatten(2) for each in pooled], 2).mT


def _check_scales(scales: Sequence[int]) -> None:
    if not scales or any(n < 1 or isqrt(n) ** 2 != n for n in scales):
        raise ValueError(f"scales must be square numbers of tokens, got {tuple(scales)}")


class Projector(nn.Module):
    """W2 silu(W1 c + b1) + b2: (..., C) -> (..., D).

    Args:
        clip_dim: C.
        hidden: of the bottleneck.
        dim: D.
    """

    def __init__(self, clip_dim: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(clip_dim, hidden), nn.Linear(hidden, dim)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, c: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(c)))


class SharedEmbeddings(nn.Module):
    """e1 and e2, one pair for all layers: projected patches (B, S, D) -> `VisualMemory`.

    Args:
        tokens: S.
        dim: D.
    """

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.key = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.value = nn.Parameter(torch.zeros(1, tokens, dim))

    def forward(self, v_BSD: Tensor) -> VisualMemory:
        return VisualMemory(F.silu(v_BSD + self.key), v_BSD + self.value)


class VisualFusion(nn.Module):
    """All that is learned beside a frozen language model and a frozen image encoder, but for the encoder's adapters.

    >>> fusion = VisualFusion(32, 24, scales=(16, 4))
    >>> fusion(torch.randn(2, 7, 32), fusion.remember(torch.randn(2, 16, 24))).shape
    torch.Size([2, 7, 32])

    Args:
        dim: D of the language model.
        clip_dim: C of the image encoder.
        hidden: of the projectors' bottlenecks.
        scales: tokens of each scale, squares; S is their sum.
        alpha: factor of what is fused.
        beta: factor of projected patches.
        drop_ratio: gamma, in [0, 1).
        class_prompt: whether the class token, by a projector of its own, stands among the words too.

    Raises:
        ValueError: if `drop_ratio` is out of range or a scale no square.
    """

    def __init__(
        self,
        dim: int,
        clip_dim: int,
        *,
        hidden: int = 128,
        scales: Sequence[int] = (256, 64),
        alpha: float = 0.1,
        beta: float = 0.01,
        drop_ratio: float = 0.1,
        class_prompt: bool = True,
    ) -> None:
        super().__init__()
        _check_scales(scales)
        _dropped(drop_ratio, 1)
        self.scales, self.alpha, self.beta, self.drop_ratio = tuple(scales), alpha, beta, drop_ratio
        self.projector = Projector(clip_dim, hidden, dim)
        self.class_projector = Projector(clip_dim, hidden, dim) if class_prompt else None
        self.embeddings = SharedEmbeddings(sum(scales), dim)

    def embed(self, patches_BNC: Tensor, present_B: Tensor | None = None) -> Tensor:
        """v, (B, S, D).

        Args:
            patches_BNC: of a square map.
            present_B: 1 or True where a text has an image; all have one where None.
        """
        v_BSD = self.beta * self.projector(multiscale(patches_BNC, self.scales))
        return v_BSD if present_B is None else v_BSD * present_B.to(v_BSD.dtype)[:, None, None]

    def remember(self, patches_BNC: Tensor, present_B: Tensor | None = None) -> VisualMemory:
        """What all layers and steps look at; arguments as of `embed`."""
        return self.embeddings(self.embed(patches_BNC, present_B))

    def without_image(self, batch: int) -> VisualMemory:
        """The memory of texts that have no image: v = 0."""
        return self.embeddings(self.embeddings.key.new_zeros(batch, 1, 1))

    def forward(self, u_BTD: Tensor, memory: VisualMemory) -> Tensor:
        """What is added behind the feed-forward network that takes `u_BTD`."""
        return self.alpha * silu_fusion(u_BTD, memory, drop_ratio=self.drop_ratio)


@contextmanager
def fused(model: nn.Module, fusion: VisualFusion, memory: VisualMemory) -> Iterator[Report]:
    """A language model of transformers that sees an image in each of its blocks; afterwards it is as it was.

    Every decoder takes it whose blocks are `layers[i]` with an `mlp` on the normalised stream (Llama, Qwen2, Mistral,
    SmolLM2 ...). Positions and KV cache stay those of the text alone. With beams, or several sequences of a prompt,
    rows of the memory follow the batch.

        with fused(model, fusion, fusion.remember(patches)):
            model.generate(**tokenizer(prompts, return_tensors="pt"))

    Args:
        model: the language model.
        fusion: of its width.
        memory: an image for each text.

    Raises:
        ValueError: if the model has no such blocks, or another width.
    """
    layers: Any = decoder_of(model).layers
    if not all(isinstance(getattr(layer, "mlp", None), nn.Module) for layer in layers):
        raise ValueError(f"model must have blocks with an mlp (model.layers[i].mlp), {type(model).__name__} has none")
    width = getattr(getattr(model, "config", None), "hidden_size", memory.key_BSD.shape[-1])
    if width != memory.key_BSD.shape[-1]:
        raise ValueError(f"fusion must have the model's width {width}, got {memory.key_BSD.shape[-1]}")

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        u_BTD = args[0]
        rows, images = len(u_BTD), len(memory.key_BSD)
        if rows % images:
            raise ValueError(f"there must be an image for each of {rows} texts, got {images}")
        seen = memory
        if rows != images:  # of beams
            seen = memory.take_rows(torch.arange(rows, device=u_BTD.device) // (rows // images))
        changes.report.calls += 1
        return output + fusion(u_BTD, seen).to(output.dtype)

    with changing(model, Report("adem-vl")) as changes:
        for layer in layers:
            changes.after(layer.mlp, add)
        yield changes.report
