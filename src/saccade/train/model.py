"""The small models into which mechanisms are put: the same around each of them.

`SequenceModel` is a pre-norm transformer, `GatedCNN` a small residual network, `TwoStream` a pair of encoders with a
fusion part between them.

Shape letters: B batch, N tokens, C channels, V vocabulary, K classes, H and W height and width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.initialization import start_language_model
from saccade.layers.positions import sinusoids
from saccade.layers.pre_norm import PreNormBlock


class Block(PreNormBlock):
    """A pre-norm block that also takes weights under the names of its first version, as folders of runs have them."""

    #: first name -> name
    RENAMED: Mapping[str, str] = {"mixer.": "attention.", "mlp.up.": "mlp.fc1.", "mlp.down.": "mlp.fc2."}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for first, name in self.RENAMED.items():
            for key in [key for key in state_dict if key.startswith(prefix + first)]:
                state_dict[prefix + name + key.removeprefix(prefix + first)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def first_names(model: nn.Module) -> dict[str, str]:
    """The first names of a model's tensors that are called otherwise now, by their names."""
    prefixes = {
        f"{path}.{name}": f"{path}.{first}"
        for path, block in model.named_modules()
        if isinstance(block, Block)
        for first, name in Block.RENAMED.items()
    }
    tensors = (name for name, _ in (*model.named_parameters(), *model.named_buffers()))
    return {
        name: first + name.removeprefix(prefix)
        for name in tensors
        for prefix, first in prefixes.items()
        if name.startswith(prefix)
    }


class Caches(list[Any]):
    """A cache for each layer, and the last token seen, (B, 1)."""

    last: Tensor | None = None


class SequenceModel(nn.Module):
    """Tokens -> logits, at each token or, with `classes`, of the whole sequence (mean over its tokens).

    Sinusoidal positions are added to the embedding, so that mechanisms without positions of their own are not at a
    disadvantage; those with their own have both.

    Args:
        mixer: layer number -> the mechanism of that layer.
        vocab: V.
        dim: C.
        layers: how many.
        classes: K, or None for logits over the vocabulary at each token.
        pair: also embed the token before each, which spares a layer that would only learn to look there.
    """

    def __init__(
        self,
        mixer: Callable[[int], nn.Module],
        *,
        vocab: int,
        dim: int,
        layers: int,
        classes: int | None = None,
        pair: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.classes = dim, classes
        self.before = nn.Embedding(vocab, dim) if pair else None
        self.embedding = nn.Embedding(vocab, dim)
        for embedding in (self.embedding, self.before):
            if embedding is not None:  # the same size, or a token is not seen beside the one before it
                start_language_model(embedding)
        self.blocks = nn.ModuleList(Block(mixer(layer), dim) for layer in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab if classes is None else classes)
        start_language_model(self.head)

    def forward(self, tokens_BN: Tensor, mask_BN: Tensor | None = None, caches: Caches | None = None) -> Tensor:
        """Logits (B, N, V) or (B, K).

        Args:
            mask_BN: True where there is a token; handed on to the mechanisms.
            caches: of `new_caches`; then `tokens_BN` continue what they have seen.
        """
        start = caches[0].length if caches else 0
        x_BNC = self.embedding(tokens_BN)
        if self.before is not None:
            last_B1 = None if caches is None else caches.last
            before_BNC = F.pad(self.before(tokens_BN[:, :-1]), (0, 0, 1, 0))
            if last_B1 is not None:
                before_BNC = torch.cat([self.before(last_B1), before_BNC[:, 1:]], 1)
            x_BNC = x_BNC + before_BNC
        if caches is not None:
            caches.last = tokens_BN[:, -1:]
        positions_N = torch.arange(start, start + tokens_BN.shape[1], device=x_BNC.device)
        x_BNC = x_BNC + 0.02 * sinusoids(positions_N, self.dim).to(x_BNC.dtype)
        for layer, block in enumerate(self.blocks):
            arguments: dict[str, Any] = {} if mask_BN is None else {"mask": mask_BN}
            if caches is not None:
                arguments["cache"] = caches[layer]
            x_BNC = block(x_BNC, **arguments)
        if self.classes is not None:
            x_BNC = mean_pool(x_BNC, mask_BN)
        return self.head(self.norm(x_BNC))

    @property
    def mixers(self) -> list[Any]:
        """The mechanisms, by layer."""
        return [block.attention for block in self.blocks]

    @property
    def decodes(self) -> bool:
        """Whether every mechanism has a cache."""
        return all(hasattr(mixer, "new_cache") for mixer in self.mixers)

    def new_caches(self, batch_size: int, max_length: int | None = None) -> Caches:
        """An empty cache for each layer; `max_length` goes to those that want to know how long it will get.

        Raises:
            ValueError: if a mechanism has none.
        """
        if not self.decodes:
            raise ValueError("this mechanism has no cache to decode with")
        weight = self.embedding.weight
        caches = Caches()
        for mixer in self.mixers:
            arguments: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
            if max_length is not None and "max_length" in inspect.signature(mixer.new_cache).parameters:
                arguments["max_length"] = max_length
            caches.append(mixer.new_cache(batch_size, **arguments))
        return caches

    @torch.no_grad()
    def generate(self, prompt_BN: Tensor, tokens: int) -> Tensor:
        """Greedy continuation with caches, (B, tokens).

        Raises:
            ValueError: if the mechanism has no cache.
        """
        caches = self.new_caches(prompt_BN.shape[0], prompt_BN.shape[1] + tokens)
        step_BN, chosen = prompt_BN, []
        for _ in range(tokens):
            step_BN = self(step_BN, caches=caches)[:, -1:].argmax(-1)
            chosen.append(step_BN)
        return torch.cat(chosen, 1)


def mean_pool(x_BNC: Tensor, mask_BN: Tensor | None) -> Tensor:
    """Mean over the tokens that are there, (B, C); 0 where none is.

    Args:
        x_BNC: tokens.
        mask_BN: True = there is one; None where all are.
    """
    if mask_BN is None:
        return x_BNC.mean(1)
    weight_BN1 = mask_BN[..., None].to(x_BNC.dtype)
    return (x_BNC * weight_BN1).sum(1) / weight_BN1.sum(1).clamp(min=1)


class GatedCNN(nn.Module):
    """Images (B, 1, H, W) -> class logits: a stem and residual blocks with the gate on each residual branch.

    Args:
        gate: block number -> the gate of that block, or None for the plain network.
        channels: C.
        blocks: how many.
        classes: K.
    """

    def __init__(self, gate: Callable[[int], nn.Module] | None, *, channels: int, blocks: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels),
            )
            for _ in range(blocks)
        )
        self.gates = nn.ModuleList(nn.Identity() if gate is None else gate(block) for block in range(blocks))
        self.head = nn.Linear(channels, classes)

    def forward(self, images_B1HW: Tensor) -> Tensor:
        x_BCHW = self.stem(images_B1HW)
        for branch, gate in zip(self.branches, self.gates):
            x_BCHW = F.relu(x_BCHW + gate(branch(x_BCHW)))
        return self.head(x_BCHW.mean((2, 3)))


class TwoStream(nn.Module):
    """Two views (B, 1, H, W) as tokens -> class logits: an encoder each, the fusion part, the mean of each, one head.

    Without a fusion part the streams meet in the head alone (late fusion).

    Args:
        fusion: the part: (tokens a, tokens b) -> both streams, or one tensor. Missing views are marked where its
            `forward` takes `masks`, and are zeros for it where not.
        encoder: the mechanism of each stream's own block (None: none).
        dim: C.
        classes: K.
        size: height and width of a view.
        patch: side of a token's square of pixels.
    """

    def __init__(
        self,
        fusion: nn.Module | None,
        encoder: Callable[[int], nn.Module],
        *,
        dim: int,
        classes: int,
        size: int = 8,
        patch: int = 2,
    ) -> None:
        super().__init__()
        self.patch, self.tokens = patch, (size // patch) ** 2
        self.embeddings = nn.ModuleList(nn.Linear(patch * patch, dim) for _ in range(2))
        self.positions = nn.ParameterList(nn.Parameter(0.02 * torch.randn(self.tokens, dim)) for _ in range(2))
        self.encoders = nn.ModuleList(Block(encoder(stream), dim) for stream in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.head = nn.Linear(2 * dim, classes)
        self.fusion = fusion
        self.takes_masks = fusion is not None and "masks" in inspect.signature(fusion.forward).parameters

    def streams(self, a_B1HW: Tensor, b_B1HW: Tensor, present_B2: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The encoded tokens of both views, and their masks (B, N)."""
        tokens, masks = [], []
        for index, view in enumerate((a_B1HW, b_B1HW)):
            patches_BNC = F.unfold(view, self.patch, stride=self.patch).transpose(1, 2)
            x_BNC = self.encoders[index](self.embeddings[index](patches_BNC) + self.positions[index])
            tokens.append(x_BNC * present_B2[:, index, None, None])
            masks.append(present_B2[:, index, None].expand(-1, self.tokens))
        return tokens, masks

    def forward(self, a_B1HW: Tensor, b_B1HW: Tensor, present_B2: Tensor) -> Tensor:
        tokens, masks = self.streams(a_B1HW, b_B1HW, present_B2)
        if self.fusion is not None:
            tokens = self.fused(tokens, masks)
        pooled = [
            norm(x if x.ndim == 2 else mean_pool(x, mask if mask.shape[1] == x.shape[1] else None))
            for norm, x, mask in zip(self.norms, tokens, masks)
        ]
        there = [p * present_B2[:, index, None] for index, p in enumerate(pooled)] if self.fusion is None else pooled
        return self.head(torch.cat(there, -1))

    def fused(self, tokens: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
        """What the fusion part makes of the streams, as two tensors."""
        assert self.fusion is not None
        out = self.fusion(*tokens, masks=tuple(masks)) if self.takes_masks else self.fusion(*tokens)
        if hasattr(out, "__dataclass_fields__"):
            out = tuple(vars(out).values())
        streams = [out] if isinstance(out, Tensor) else [x for x in out if isinstance(x, Tensor)]
        return [streams[0], streams[1] if len(streams) > 1 else streams[0]]
