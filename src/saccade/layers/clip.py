"""CLIP's two towers, trained so that an image and its text have like vectors (Radford et al., arXiv 2103.00020).

    image:  a vision transformer, its tokens normalised before the first block;  f = norm(class token) W
    text:   a causal transformer;                                               f = norm(end token) W
    logits = exp(s) f_image f_text^T / (|f_image| |f_text|)

Blocks are pre-norm, their MLPs QuickGELU (x sigmoid(1.702 x)) as OpenAI's weights have it; OpenCLIP's have "gelu".
A room that changes the tokens between blocks takes `states(..., adapt=...)`; one that changes a block replaces its
`attention` or `mlp`.

Shape letters: B batch, C channels, H height, W width, N tokens, D their width, E width of the embedding, T texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue.names import Names, Place, laid, split
from saccade.layers.mlp import MLP
from saccade.layers.pre_norm import PreNormBlock
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.layers.vision_transformer import VisionTransformer, block_states

if TYPE_CHECKING:
    from typing_extensions import Self


class ClipVision(VisionTransformer):
    """CLIP's image tower: images (B, 3, H, W) -> embeddings (B, E), of any size: positions are resized bicubically.

    Args:
        embed_dim: E; None has no projection, and the embedding is the normalised class token.
        image_size, patch, dim, depth, num_heads, hidden, activation: as in `VisionTransformer`.
        norm_eps: of all norms.

    Raises:
        ValueError: as there.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch: int = 16,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        hidden: int | None = None,
        embed_dim: int | None = 512,
        activation: str = "quick-gelu",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(
            image_size=image_size, patch=patch, dim=dim, depth=depth, num_heads=num_heads, hidden=hidden,
            activation=activation, norm_eps=norm_eps, patch_bias=False, first_norm=True,
        )  # fmt: skip
        self.norm_last = nn.LayerNorm(dim, norm_eps)
        self.proj = None if embed_dim is None else nn.Linear(dim, embed_dim, bias=False)

    def tokens(self, x_BCHW: Tensor, *, skip: int = 0) -> Tensor:
        """All tokens (B, 1 + patches, D), the class token first, after the last norm.

        Args:
            x_BCHW: images.
            skip: how many of the last blocks are left out before it.

        Raises:
            ValueError: if there are not that many blocks.
        """
        return self.norm_last(self.states(x_BCHW, skip=skip)[-1])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        f_BD = self.norm_last(super().forward(x_BCHW)[:, 0])
        return f_BD if self.proj is None else self.proj(f_BD)


class ClipText(nn.Module):
    """CLIP's text tower: ids (B, N) -> embeddings (B, E) of their end token. What follows it does not matter.

    Args:
        vocabulary: number of ids.
        context: the most tokens of a text.
        dim: D.
        depth: blocks.
        num_heads, hidden: of a block; `hidden` is 4 D where None.
        embed_dim: E; None has no projection.
        activation: of the MLPs.
        norm_eps: of the norms.
        end: id of the end token, of which the first counts; where None it is the highest id of each text.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 49408,
        context: int = 77,
        dim: int = 512,
        depth: int = 12,
        num_heads: int = 8,
        hidden: int | None = None,
        embed_dim: int | None = 512,
        activation: str = "quick-gelu",
        norm_eps: float = 1e-5,
        end: int | None = None,
    ) -> None:
        super().__init__()
        if min(vocabulary, context) < 1 or depth < 0:
            raise ValueError(
                f"vocabulary and context must be positive, depth not negative, got {vocabulary}, {context} and {depth}"
            )
        self.context, self.end = context, end
        self.embed = nn.Embedding(vocabulary, dim)
        self.positions = nn.Parameter(0.01 * torch.randn(context, dim))
        self.blocks = nn.ModuleList(
            PreNormBlock(
                SoftmaxAttention(dim, num_heads, causal=True, rope=False, qkv_bias=True, proj_bias=True),
                dim, mlp=MLP(dim, hidden, activation=activation), norm_eps=norm_eps,
            )
            for _ in range(depth)
        )  # fmt: skip
        self.norm_last = nn.LayerNorm(dim, norm_eps)
        self.proj = None if embed_dim is None else nn.Linear(dim, embed_dim, bias=False)

    def start(self, ids_BN: Tensor) -> Tensor:
        """The tokens (B, N, D) that the first block takes.

        Raises:
            ValueError: if the ids are no texts, or longer than the context.
        """
        if ids_BN.ndim != 2 or ids_BN.is_floating_point():
            raise ValueError(f"input_ids must be integers (batch, tokens), got {tuple(ids_BN.shape)} {ids_BN.dtype}")
        if not 0 < ids_BN.shape[1] <= self.context:
            raise ValueError(f"a text must have between 1 and {self.context} tokens, got {ids_BN.shape[1]}")
        return self.embed(ids_BN) + self.positions[: ids_BN.shape[1]]

    def states(
        self, ids_BN: Tensor, *, skip: int = 0, adapt: Callable[[int, Tensor], Tensor] | None = None
    ) -> list[Tensor]:
        """The tokens before the first block and after each; as `VisionTransformer.states`."""
        return block_states(self.blocks, self.start(ids_BN), skip=skip, adapt=adapt)

    def tokens(self, ids_BN: Tensor) -> Tensor:
        """All tokens (B, N, D) after the last norm, before the projection."""
        x_BND = self.start(ids_BN)
        for block in self.blocks:
            x_BND = block(x_BND)
        return self.norm_last(x_BND)

    def at_end(self, x_BND: Tensor, ids_BN: Tensor) -> Tensor:
        """The token (B, D) of `x_BND` that stands at each text's end."""
        marks_BN = ids_BN if self.end is None else (ids_BN == self.end).int()
        return x_BND[torch.arange(len(x_BND), device=x_BND.device), marks_BN.argmax(1)]

    def forward(self, ids_BN: Tensor) -> Tensor:
        f_BD = self.at_end(self.tokens(ids_BN), ids_BN)
        return f_BD if self.proj is None else self.proj(f_BD)


@dataclass
class ClipOutput:
    """What CLIP says of images and texts; names are transformers'.

    Attributes:
        image_embeds: (B, E), of length 1.
        text_embeds: (T, E), of length 1.
        logits_per_image: (B, T).
    """

    image_embeds: Tensor
    text_embeds: Tensor
    logits_per_image: Tensor


class Clip(nn.Module):
    """Both towers and the learned scale of their products.

    Args:
        vision: the image tower.
        text: the text tower, of the same E.

    Raises:
        ValueError: if the towers have no embedding of one width.
    """

    def __init__(self, vision: ClipVision, text: ClipText) -> None:
        super().__init__()
        widths = [None if tower.proj is None else tower.proj.out_features for tower in (vision, text)]
        if None in widths or widths[0] != widths[1]:
            raise ValueError(f"both towers must project to one embed_dim, got {widths[0]} and {widths[1]}")
        self.vision, self.text = vision, text
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # log(1 / 0.07)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Embeddings (B, E) of images, as they come from the projection."""
        return self.vision(pixel_values)

    def get_text_features(self, input_ids: Tensor) -> Tensor:
        """Embeddings (T, E) of texts, as they come from the projection."""
        return self.text(input_ids)

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> ClipOutput:
        """
        Args:
            pixel_values: (B, 3, H, W), normalised as CLIP's are.
            input_ids: (T, N).

        Raises:
            ValueError: if the ids are no texts of the tower's context.
        """
        image_BE = F.normalize(self.vision(pixel_values), dim=-1)
        text_TE = F.normalize(self.text(input_ids), dim=-1)
        return ClipOutput(image_BE, text_TE, self.logit_scale.exp() * image_BE @ text_TE.mT)

    @classmethod
    def from_transformers(cls, model: nn.Module) -> Self:
        """The same network as a `CLIPModel` of transformers, with copies of its weights.

        Raises:
            ValueError: if it is no such model.
        """
        config: Any = getattr(model, "config", None)
        if getattr(config, "model_type", None) != "clip" or not hasattr(model, "logit_scale"):
            raise ValueError(f"a transformers CLIPModel was expected, got {type(model).__name__}")
        vision, text = config.vision_config, config.text_config
        end = text.eos_token_id
        new = cls(
            ClipVision(
                image_size=vision.image_size,
                patch=vision.patch_size,
                **_sizes(vision, config.projection_dim),
            ),
            ClipText(
                vocabulary=text.vocab_size,
                context=text.max_position_embeddings,
                end=None if end == 2 else end,  # 2 stands in old configurations, and is the end of no text
                **_sizes(text, config.projection_dim),
            ),
        )
        new.load_state_dict(TRANSFORMERS(model.state_dict()))
        scale: Any = model.logit_scale
        return new.to(device=scale.device, dtype=scale.dtype).train(model.training)


def _sizes(config: Any, embed_dim: int) -> dict[str, Any]:
    activation = {"quick_gelu": "quick-gelu", "gelu_pytorch_tanh": "gelu-tanh"}.get(
        config.hidden_act, config.hidden_act
    )
    return {
        "dim": config.hidden_size, "depth": config.num_hidden_layers, "num_heads": config.num_attention_heads,
        "hidden": config.intermediate_size, "embed_dim": embed_dim, "activation": activation,
        "norm_eps": config.layer_norm_eps,
    }  # fmt: skip


def _openai_blocks(theirs: str, ours: str) -> dict[str, Place]:
    return Names(
        {
            "attn.in_proj_{leaf}": split("attention.{part}_proj.{leaf}", "q", "k", "v"),
            "attn.out_proj.{leaf}": "attention.out_proj.{leaf}",
            "ln_{n}.{leaf}": "norm{n}.{leaf}",
            "mlp.c_fc.{leaf}": "mlp.fc1.{leaf}",
            "mlp.c_proj.{leaf}": "mlp.fc2.{leaf}",
        }
    ).within(theirs, ours)


def _transformers_tower(theirs: str, ours: str) -> dict[str, Place]:
    return Names(
        {
            "layers.{i}.self_attn.{part}.{leaf}": "blocks.{i}.attention.{part}.{leaf}",
            "layers.{i}.layer_norm{n}.{leaf}": "blocks.{i}.norm{n}.{leaf}",
            "layers.{i}.mlp.{part}.{leaf}": "blocks.{i}.mlp.{part}.{leaf}",
        }
    ).within(f"{theirs}encoder.", ours)


def transposed(weight: Tensor) -> Tensor:
    """OpenAI's projections multiply from the right."""
    return weight.T


#: OpenAI's and OpenCLIP's names of the image tower -> `ClipVision`'s; `Names(VISION).within("visual.", "vision.")`
VISION: Mapping[str, Place] = {
    "conv1.weight": "embed.weight",
    "class_embedding": laid("class_token", lambda token: token[None, None]),
    "positional_embedding": laid("positions", lambda table: table[None]),
    "ln_pre.{leaf}": "norm_first.{leaf}",
    "ln_post.{leaf}": "norm_last.{leaf}",
    "proj": laid("proj.weight", transposed),
    **_openai_blocks("transformer.resblocks.{i}.", "blocks.{i}."),
}
#: the same of the text tower -> `ClipText`'s; `logit_scale` is not in it
TEXT: Mapping[str, Place] = {
    "token_embedding.weight": "embed.weight",
    "positional_embedding": "positions",
    "ln_final.{leaf}": "norm_last.{leaf}",
    "text_projection": laid("proj.weight", transposed),
    **_openai_blocks("transformer.resblocks.{i}.", "blocks.{i}."),
}
#: OpenAI's names of the whole network -> `Clip`'s
OPENAI = Names(
    {
        **Names(VISION).within("visual.", "vision."),
        **Names(TEXT).within("", "text."),
        "logit_scale": "logit_scale",
        **dict.fromkeys(("input_resolution", "context_length", "vocab_size")),
    }
)
#: transformers' names of a `CLIPModel` -> `Clip`'s
TRANSFORMERS = Names(
    {
        "logit_scale": "logit_scale",
        "{tower}_projection.weight": lambda texts: {"visual": "vision"}.get(texts["tower"], "text") + ".proj.weight",
        "{tower}_model.embeddings.position_ids": None,
        "vision_model.embeddings.class_embedding": laid("vision.class_token", lambda token: token[None, None]),
        "vision_model.embeddings.patch_embedding.weight": "vision.embed.weight",
        "vision_model.embeddings.position_embedding.weight": laid("vision.positions", lambda table: table[None]),
        "vision_model.pre_layrnorm.{leaf}": "vision.norm_first.{leaf}",
        "vision_model.post_layernorm.{leaf}": "vision.norm_last.{leaf}",
        "text_model.embeddings.token_embedding.weight": "text.embed.weight",
        "text_model.embeddings.position_embedding.weight": "text.positions",
        "text_model.final_layer_norm.{leaf}": "text.norm_last.{leaf}",
        **_transformers_tower("vision_model.", "vision."),
        **_transformers_tower("text_model.", "text."),
    }
)
