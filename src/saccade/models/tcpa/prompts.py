"""Prompts that belong to a role, chosen token by token, and attention in which each token sees its own alone.

Shape letters: B batch, N tokens (the class token and P patches), L prompts, D width, H heads, E head dim, m entries of
a pool, l prompts of an entry, k entries that a token chooses, M tokens or prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops.attend import attend

_EPS = 1e-12


class Prompting(NamedTuple):
    """What a layer adds to its tokens.

    Attributes:
        prompts: (B, L, D), those of the class token first.
        visible: M, (B, N, L), True where a token sees a prompt.
        distance: a scalar, that of both pools together; None where nothing is matched.
    """

    prompts: Tensor
    visible: Tensor
    distance: Tensor | None


def total_distance(layers: Sequence[Prompting]) -> Tensor | None:
    """The sum over layers; None where nothing is matched."""
    found = [layer.distance for layer in layers if layer.distance is not None]
    return torch.stack(found).sum() if found else None


def match(x_BND: Tensor, keys_mD: Tensor, top_k: int, *, random: bool = False) -> tuple[Tensor, Tensor]:
    """The `top_k` keys that are nearest to each token, and how far they are.

        s = cos(x, K),     chosen = top-k of s,     distance = mean over tokens and chosen of 1 - s

    Args:
        x_BND: tokens.
        keys_mD: K.
        top_k: k.
        random: choose uniformly instead; the distance is that of the chosen still.

    Returns:
        chosen (B, N, m), True for k of them, and the distance, a scalar in [0, 2].
    """
    near_BNm = F.normalize(x_BND, dim=-1, eps=_EPS) @ F.normalize(keys_mD, dim=-1, eps=_EPS).T
    index_BNk = (torch.rand_like(near_BNm) if random else near_BNm).topk(top_k, -1).indices
    chosen_BNm = torch.zeros_like(near_BNm, dtype=torch.bool).scatter(-1, index_BNk, True)
    return chosen_BNm, (1 - near_BNm.gather(-1, index_BNk)).mean()


def prompted_attention(
    q_BHNE: Tensor,
    k_BHNE: Tensor,
    v_BHNE: Tensor,
    prompt_k_BHLE: Tensor,
    prompt_v_BHLE: Tensor,
    visible_BNL: Tensor,
    *,
    renormalise: bool = False,
) -> Tensor:
    """out = (softmax(q [k; k_p]^T / sqrt(E)) * M) [v; v_p], with M = 1 for tokens and `visible` for prompts.

    What is hidden weighs in the denominator still, unless `renormalise`. Memory is linear in tokens: they are attended
    apart from the prompts, and the two are joined by the logarithms of their sums.

    Args:
        q_BHNE, k_BHNE, v_BHNE: of the tokens.
        prompt_k_BHLE, prompt_v_BHLE: of the prompts.
        visible_BNL: which prompts a token sees.
        renormalise: hide before the softmax, so that weights sum up to 1.
    """
    out_BHNE, lse_BHN = attend(q_BHNE, k_BHNE, v_BHNE, return_lse=True)
    if not prompt_k_BHLE.shape[2]:
        return out_BHNE
    wide = torch.promote_types(q_BHNE.dtype, torch.float32)
    score_BHNL = (q_BHNE @ prompt_k_BHLE.mT).to(wide) * q_BHNE.shape[-1] ** -0.5
    shown_B1NL = visible_BNL[:, None]
    if renormalise:
        score_BHNL = score_BHNL.masked_fill(~shown_B1NL, torch.finfo(wide).min)
    total_BHN = torch.logaddexp(lse_BHN.to(wide), score_BHNL.logsumexp(-1))
    weight_BHNL = (score_BHNL - total_BHN[..., None]).exp() * shown_B1NL
    kept_BHN = (lse_BHN.to(wide) - total_BHN).exp()
    return out_BHNE * kept_BHN[..., None].to(out_BHNE.dtype) + weight_BHNL.to(prompt_v_BHLE.dtype) @ prompt_v_BHLE


class PromptPool(nn.Module):
    """The prompts of one role: `size` entries a layer, each of `length` prompts under one key.

    Args:
        depth: layers.
        dim: D.
        size: m.
        length: l.
        top_k: k, None where all are seen, and there are no keys.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, depth: int, dim: int, size: int, length: int, top_k: int | None) -> None:
        super().__init__()
        if size < 0 or length < 1 or (top_k is not None and not min(1, size) <= top_k <= size):
            raise ValueError(f"a pool must have 0 <= top_k <= size and a length of 1, got {top_k}, {size} and {length}")
        self.top_k, self.size, self.length = top_k, size, length
        self.keys = None if top_k is None else nn.Parameter(torch.empty(depth, size, dim).uniform_(-1, 1))
        self.prompts = nn.Parameter(torch.empty(depth, size, length, dim).uniform_(-1, 1))

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *arguments: Any) -> None:
        """Keys of a checkpoint are left out where all is seen: the authors' pools have them in either case."""
        if self.keys is None:
            state_dict.pop(f"{prefix}keys", None)  # type: ignore[attr-defined]
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def see(self, layer: int, x_BND: Tensor, random: bool) -> tuple[Tensor, Tensor | None]:
        """Which prompts (B, N, m l) of a layer each token sees, and the distance of their keys."""
        if self.keys is None or not self.size:
            return x_BND.new_ones(*x_BND.shape[:2], self.size * self.length, dtype=torch.bool), None
        chosen_BNm, distance = match(x_BND, self.keys[layer], int(self.top_k or 0), random=random)
        return chosen_BNm.repeat_interleave(self.length, -1), distance


class Prompts(nn.Module):
    """The prompts of all layers, with which token sees which.

    Args:
        dim: D.
        depth: layers.
        class_pool, image_pool: entries m of the class token's pool, and of the patches'.
        class_length, image_length: prompts l of an entry.
        class_top_k, image_top_k: entries k that a token chooses.
        roles: the class token sees prompts of its own alone, and patches of theirs; False shows all to all, as VPT.
        matched: each token chooses; False shows it all of its role.
        fourier: prompts go through a two-dimensional Fourier transform whose real part is taken, as in VFPT.
        drop: dropout of the prompts.
        modulation: values of prompts are v w + b, with w and b of all layers.
        renormalise: see `prompted_attention`.

    Attributes:
        random: whether choices are random in training: the first epochs'.

    Raises:
        ValueError: if a number is out of range, or tokens are to choose without roles.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        *,
        class_pool: int = 18,
        image_pool: int = 18,
        class_length: int = 1,
        image_length: int = 1,
        class_top_k: int = 10,
        image_top_k: int = 10,
        roles: bool = True,
        matched: bool = True,
        fourier: bool = True,
        drop: float = 0.1,
        modulation: bool = False,
        renormalise: bool = False,
    ) -> None:
        super().__init__()
        if dim < 1 or depth < 0:
            raise ValueError(f"dim must be positive and depth not negative, got {dim} and {depth}")
        if matched and not roles:
            raise ValueError("tokens that choose must have roles: roles must be True where matched is")
        self.dim, self.depth, self.roles, self.fourier, self.renormalise = dim, depth, roles, fourier, renormalise
        self.of_class = PromptPool(depth, dim, class_pool, class_length, class_top_k if matched else None)
        self.of_image = PromptPool(depth, dim, image_pool, image_length, image_top_k if matched else None)
        self.drop = nn.Dropout(drop)
        self.count = class_pool * class_length + image_pool * image_length
        self.weight = nn.Parameter(1 + 0.1 * _kaiming(self.count, dim)) if modulation else None
        self.bias = nn.Parameter(0.1 * _kaiming(self.count, dim)) if modulation else None
        self.random = False

    def forward(self, layer: int, x_BND: Tensor) -> Prompting:
        """The prompts of a layer for the tokens that it takes, which are not normalised yet.

        Args:
            layer: its number.
            x_BND: tokens, the class token first.
        """
        flat_LD = torch.cat([pool.prompts[layer].flatten(0, 1) for pool in (self.of_class, self.of_image)])
        prompts_BLD = self.drop(flat_LD.expand(len(x_BND), -1, -1)).to(x_BND.dtype)
        if self.fourier and self.count:
            wide = torch.promote_types(prompts_BLD.dtype, torch.float32)
            prompts_BLD = torch.fft.fft2(prompts_BLD.to(wide)).real.to(x_BND.dtype)
        random = self.random and self.training
        of_class_B1L, class_distance = self.of_class.see(layer, x_BND[:, :1], random)
        of_image_BPL, image_distance = self.of_image.see(layer, x_BND[:, 1:], random)
        if not self.roles:
            return Prompting(prompts_BLD, x_BND.new_ones(*x_BND.shape[:2], self.count, dtype=torch.bool), None)
        visible_BNL = torch.cat(
            [
                F.pad(of_class_B1L, (0, of_image_BPL.shape[2])),
                F.pad(of_image_BPL, (of_class_B1L.shape[2], 0)),
            ],
            1,
        )
        distances = [each for each in (class_distance, image_distance) if each is not None]
        return Prompting(prompts_BLD, visible_BNL, torch.stack(distances).sum() if distances else None)

    def modulated(self, values_BLD: Tensor) -> Tensor:
        """Values of the prompts, all heads side by side."""
        return values_BLD if self.weight is None or self.bias is None else values_BLD * self.weight + self.bias


def attend_with(
    prompts: Prompts,
    project: tuple[Callable[[Tensor], Tensor], ...],
    num_heads: int,
    x_BND: Tensor,
    normed_BLD: Tensor,
    visible_BNL: Tensor,
) -> Tensor:
    """A layer's attention, its own projections given, with prompts as further keys.

    Args:
        prompts: whose options hold.
        project: query, key, value and output projection of the layer.
        num_heads: H.
        x_BND: tokens, normalised as the layer takes them.
        normed_BLD: its prompts, by the same norm.
        visible_BNL: see `prompted_attention`.
    """
    to_q, to_k, to_v, to_out = project

    def heads(x_BMD: Tensor) -> Tensor:
        return x_BMD.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    q_BHNE, k_BHNE, v_BHNE = heads(to_q(x_BND)), heads(to_k(x_BND)), heads(to_v(x_BND))
    prompt_k_BHLE, prompt_v_BHLE = heads(to_k(normed_BLD)), heads(prompts.modulated(to_v(normed_BLD)))
    out_BHNE = prompted_attention(
        q_BHNE, k_BHNE, v_BHNE, prompt_k_BHLE, prompt_v_BHLE, visible_BNL, renormalise=prompts.renormalise
    )
    return to_out(out_BHNE.transpose(1, 2).flatten(2))


class PromptedAttention(SoftmaxAttention):
    """Softmax attention that takes prompts too; without them it is what it was."""

    def forward(  # type: ignore[override]
        self, x_BND: Tensor, *, prompts: Prompts | None = None, prompting: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """
        Args:
            x_BND: tokens, normalised.
            prompts: whose options hold.
            prompting: the layer's prompts (B, L, D), normalised, and which token sees which.
        """
        if prompts is None or prompting is None:
            return super().forward(x_BND)
        project = self.q_proj, self.k_proj, self.v_proj, self.out_proj
        return attend_with(prompts, project, self.num_heads, x_BND, *prompting)


def _kaiming(count: int, dim: int) -> Tensor:
    """(1, count, dim), as torch's `kaiming_uniform_` draws a matrix of that shape."""
    return nn.init.kaiming_uniform_(torch.empty(1, count, dim)) if count else torch.empty(1, 0, dim)
