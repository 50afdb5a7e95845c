"""ACD-CLIP: a frozen CLIP, adapters between its blocks, and two heads a level that ask for flaws.

Shape letters: B batch, C channels, H, W image, h, w patches, N = h w, D width of the image tower, E of the text tower,
G levels, T sentences of a state, L tokens of a sentence, K = 2 states, the normal one first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import load_state
from saccade.layers.clip import TRANSFORMERS, ClipText, ClipVision
from saccade.layers.patches import filled
from saccade.models.backbone import check_images
from saccade.models.segmentation import Saliency, SaliencyNetwork
from saccade.models.zsad_codesign.adapters import ConvLoRA, LoRA, mixed
from saccade.models.zsad_codesign.gateway import DOMAINS, DynamicFusionGateway, state_maps
from saccade.models.zsad_codesign.sentences import sentences

if TYPE_CHECKING:
    from typing_extensions import Self

#: CLIP's mean and spread of images
_MEAN, _SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ImageSide(nn.Module):
    """What is learned beside the image tower.

    Args:
        dim: D.
        out: E.
        levels: G.
        hidden: inner width of the heads.
        weight: w at the start.
        **arguments: of `ConvLoRA`.
    """

    def __init__(self, dim: int, out: int, levels: int, hidden: int, weight: float, **arguments: Any) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(ConvLoRA(dim, **arguments) for _ in range(levels))
        self.weights = nn.ParameterList(torch.full((dim,), weight) for _ in range(levels))
        self.to_map, self.to_image = (
            nn.ModuleList(
                nn.Sequential(nn.Linear(dim, hidden), nn.LeakyReLU(0.01), nn.Linear(hidden, out), nn.LayerNorm(out))
                for _ in range(levels)
            )
            for _ in range(2)
        )

    def adapt(self, level: int, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """All tokens after a level's block; the class token, which is first, passes."""
        patches_BND = x_BND[:, 1:]
        patches_BND = mixed(patches_BND, self.adapters[level](patches_BND, grid), self.weights[level])
        return torch.cat([x_BND[:, :1], patches_BND], 1)


class TextSide(nn.Module):
    """What is learned beside the text tower.

    Args:
        dim: E.
        levels: G.
        weight: w at the start.
        rank, alpha: of `LoRA`.
    """

    def __init__(self, dim: int, levels: int, weight: float, rank: int, alpha: float) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(LoRA(dim, rank, alpha) for _ in range(levels))
        self.weights = nn.ParameterList(torch.full((dim,), weight) for _ in range(levels))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(levels))

    def adapt(self, level: int, x_BLE: Tensor) -> Tensor:
        """All tokens after a level's block."""
        return mixed(x_BLE, self.adapters[level](x_BLE), self.weights[level])


class ACDCLIP(SaliencyNetwork):
    """Images (B, 3, H, W), and sentences of both states -> where, and how likely, something is wrong.

    Args:
        image_size, patch, dim, depth, num_heads: of the image tower.
        text_dim, text_depth, text_heads, vocabulary, context: of the text tower; E is its width.
        hidden: inner widths of both towers' MLPs; 4 times theirs where None.
        activation: of these.
        norm_eps: of both towers' norms.
        levels: G, a divisor of both depths: adapters stand after every depth / G-th block.
        head_dim: inner width of heads and gates.
        rank, alpha, conv_rank, conv_alpha, kernels: of the adapters.
        weight: w at the start, on both sides.
        domain: "industrial" or "medical", see `DOMAINS`.

    Raises:
        ValueError: if a number is out of range.
    """

    slug = "zsad-codesign"
    image_size = 518
    runs_alone = False

    def __init__(
        self,
        *,
        image_size: int = 336,
        patch: int = 14,
        dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        text_dim: int = 768,
        text_depth: int = 12,
        text_heads: int = 12,
        vocabulary: int = 49408,
        context: int = 77,
        hidden: tuple[int | None, int | None] = (None, None),
        activation: str = "quick-gelu",
        norm_eps: float = 1e-5,
        levels: int = 4,
        head_dim: int = 256,
        rank: int = 16,
        alpha: float = 2.0,
        conv_rank: int = 8,
        conv_alpha: float = 2.0,
        kernels: Sequence[int] = (3, 5),
        weight: float = 0.2,
        domain: str = "industrial",
    ) -> None:
        super().__init__()
        if levels < 1 or depth < levels or text_depth < levels or depth % levels or text_depth % levels:
            raise ValueError(f"levels must divide both depths ({depth} and {text_depth}), got {levels}")
        if domain not in DOMAINS:
            raise ValueError(f"domain must be one of {', '.join(DOMAINS)}, got {domain!r}")
        self.levels, self.domain = levels, DOMAINS[domain]
        self.vision = ClipVision(
            image_size=image_size, patch=patch, dim=dim, depth=depth, num_heads=num_heads, hidden=hidden[0],
            embed_dim=None, activation=activation, norm_eps=norm_eps,
        )  # fmt: skip
        self.text = ClipText(
            vocabulary=vocabulary, context=context, dim=text_dim, depth=text_depth, num_heads=text_heads,
            hidden=hidden[1], embed_dim=None, activation=activation, norm_eps=norm_eps,
        )  # fmt: skip
        for tower in (self.vision, self.text):  # what follows the last block is not used
            tower.norm_last = nn.Identity()  # type: ignore[assignment]
            tower.requires_grad_(False).eval()
        self.image_side = ImageSide(
            dim, text_dim, levels, head_dim, weight,
            kernels=kernels, rank=rank, alpha=alpha, conv_rank=conv_rank, conv_alpha=conv_alpha,
        )  # fmt: skip
        self.text_side = TextSide(text_dim, levels, weight, rank, alpha)
        self.gateway = DynamicFusionGateway(text_dim, levels, head_dim)
        self.register_buffer("kept", None, persistent=False)  # descriptors of the class that `predict` judges
        self.kept: Tensor | None
        self._ids_of: Callable[[list[str]], Tensor] | None = None

    def train(self, mode: bool = True) -> Self:
        """As of any module, but for CLIP, which is frozen."""
        super().train(mode)
        self.vision.eval()
        self.text.eval()
        return self

    def describe(self, input_ids: Tensor | Sequence[Tensor]) -> Tensor:
        """Descriptors of both states, (G, E, 2), of length 1; made once for a class, where nothing is trained.

        Args:
            input_ids: sentences of both states, (2, T, L), or one (T, L) for each state.

        Raises:
            ValueError: if there are not two states, or the ids are no texts of the tower's context.
        """
        if len(input_ids) != 2:
            raise ValueError(f"input_ids must be sentences of two states, got {len(input_ids)}")
        return torch.stack([self._state(ids_TL) for ids_TL in input_ids], -1)

    def _state(self, ids_TL: Tensor) -> Tensor:
        """(G, E)."""
        step = len(self.text.blocks) // self.levels
        found: list[Tensor] = []

        def adapt(block: int, x_TLE: Tensor) -> Tensor:
            if (block + 1) % step:
                return x_TLE
            level = len(found)
            x_TLE = self.text_side.adapt(level, x_TLE)
            vector_TE = self.text_side.norms[level](self.text.at_end(x_TLE, ids_TL))
            found.append(F.normalize(F.normalize(vector_TE, dim=-1).mean(0), dim=-1))
            return x_TLE

        self.text.states(ids_TL, adapt=adapt)
        return torch.stack(found)

    def see_patches(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Vectors of length 1 of patches (G, B, N, E), the mean of others for each image (G, B, E), and the grid.

        Raises:
            ValueError: if they are no colour images.
        """
        check_images(pixel_values, 3)
        height, width = filled(pixel_values, self.vision.patch).shape[2:]
        grid = height // self.vision.patch, width // self.vision.patch
        step = len(self.vision.blocks) // self.levels
        maps: list[Tensor] = []
        images: list[Tensor] = []

        def adapt(block: int, x_BND: Tensor) -> Tensor:
            if (block + 1) % step:
                return x_BND
            level = len(maps)
            x_BND = self.image_side.adapt(level, x_BND, grid)
            maps.append(F.normalize(self.image_side.to_map[level](x_BND[:, 1:]), dim=-1))
            images.append(F.normalize(self.image_side.to_image[level](x_BND[:, 1:]), dim=-1).mean(1))
            return x_BND

        self.vision.states(pixel_values, adapt=adapt)
        return torch.stack(maps), torch.stack(images), grid

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | Sequence[Tensor] | None = None,
        *,
        descriptors: Tensor | None = None,
    ) -> Saliency:
        """`logits` (B, 1, H, W) of a flaw at each pixel, `score` (B,) of one in the image, before the map has a say.

        The map is blurred in evaluation only.

        Args:
            pixel_values: (B, 3, H, W), about CLIP's mean.
            input_ids: see `describe`.
            descriptors: in their place, (G, E, 2), or (G, B, E, 2) where images are of different classes; those that
                are kept where there is neither.

        Raises:
            ValueError: if there are none, or shapes do not fit.
        """
        text_GBEK = self._descriptors(input_ids, descriptors)
        maps_GBNE, images_GBE, grid = self.see_patches(pixel_values)
        logits_GBNK = self.gateway(maps_GBNE, text_GBEK)
        size = (pixel_values.shape[2], pixel_values.shape[3])
        states_BKHW = state_maps(logits_GBNK, size, grid, None if self.training else self.domain)
        whole_BK = (images_GBE[:, :, None] @ text_GBEK).mean(0)[:, 0]
        return Saliency(states_BKHW[:, 1:] - states_BKHW[:, :1], score=whole_BK.softmax(-1)[:, 1])

    def scores(self, output: Saliency) -> Tensor:
        """(B,) of images: their probability, and the map's largest value by the domain's share."""
        if output.score is None:
            raise ValueError("output must have the scores of this network")
        peak_B = output.logits.sigmoid().flatten(1).amax(1)
        return (1 - self.domain.peak) * output.score + self.domain.peak * peak_B

    def keep(self, input_ids: Tensor | Sequence[Tensor] | None = None, *, name: str | None = None) -> Self:
        """From now on images are of this class, for calls without sentences and for `predict`.

        Args:
            input_ids: see `describe`.
            name: of the class, in words, where a tokenizer is there; see `zsad`.

        Raises:
            ValueError: if there is neither, or no tokenizer.
        """
        if name is not None:
            if self._ids_of is None:
                raise ValueError("a name needs CLIP's tokenizer: give zsad(model, processor), or keep(input_ids)")
            input_ids = [self._ids_of(each) for each in sentences(name)]
        if input_ids is None:
            raise ValueError("keep must get input_ids or a name, got neither")
        with torch.no_grad():
            self.kept = self.describe(input_ids)
        return self

    def _descriptors(self, input_ids: Tensor | Sequence[Tensor] | None, descriptors: Tensor | None) -> Tensor:
        if descriptors is None:
            descriptors = self.kept if input_ids is None else self.describe(input_ids)
        if descriptors is None:
            raise ValueError("ACDCLIP needs input_ids, descriptors, or a class that is kept: see keep")
        return descriptors[:, None] if descriptors.ndim == 3 else descriptors

    def prepared(self, images_B3HW: Tensor) -> Tensor:
        mean, spread = (images_B3HW.new_tensor(x)[:, None, None] for x in (_MEAN, _SPREAD))
        return (images_B3HW - mean) / spread

    def on(self, model: nn.Module, ids_of: Callable[[list[str]], Tensor] | None = None) -> Self:
        """Take the towers' weights of a CLIP of transformers, which stays as it is: its tensors are shared, not copied.

        Args:
            model: a `CLIPModel` of this network's sizes.
            ids_of: sentences -> ids (T, L).

        Raises:
            ValueError: if it is no such model, or of other sizes.
        """
        own = self.state_dict()
        theirs = {name: t for name, t in TRANSFORMERS(model.state_dict()).items() if name in own}
        load_state(self, {**own, **theirs})
        for name, tensor in theirs.items():
            self.get_parameter(name).data = tensor
        self._ids_of = ids_of
        return self


def zsad(model: nn.Module, processor: Any = None, **arguments: Any) -> ACDCLIP:
    """A detector around a CLIP of transformers, which stays as it is; only what is new is trained.

        detector = zsad(CLIPModel.from_pretrained(...), CLIPProcessor.from_pretrained(...)).keep(name="bottle")

    Args:
        model: a `CLIPModel`.
        processor: its processor or tokenizer, with which classes are named in words.
        **arguments: of `ACDCLIP`, but for the towers' sizes.

    Raises:
        ValueError: if it is no `CLIPModel`, or the levels do not divide its depths.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "clip" or not hasattr(model, "logit_scale"):
        raise ValueError(f"model must be a CLIPModel of transformers, got {type(model).__name__}")
    vision, text = config.vision_config, config.text_config
    sizes = {
        "image_size": vision.image_size, "patch": vision.patch_size, "dim": vision.hidden_size,
        "depth": vision.num_hidden_layers, "num_heads": vision.num_attention_heads, "text_dim": text.hidden_size,
        "text_depth": text.num_hidden_layers, "text_heads": text.num_attention_heads, "vocabulary": text.vocab_size,
        "context": text.max_position_embeddings, "hidden": (vision.intermediate_size, text.intermediate_size),
        "activation": _ACTIVATIONS.get(vision.hidden_act, vision.hidden_act), "norm_eps": vision.layer_norm_eps,
    }  # fmt: skip
    detector = ACDCLIP(**{**sizes, **arguments})
    if text.eos_token_id != 2:  # which stands in old configurations, and is the end of no text
        detector.text.end = text.eos_token_id
    weight = next(model.parameters())
    detector.to(device=weight.device, dtype=weight.dtype)
    tokenizer = getattr(processor, "tokenizer", processor)
    return detector.on(model, None if tokenizer is None else partial(_ids, tokenizer, weight.device))


#: transformers' names -> ours
_ACTIVATIONS = {"quick_gelu": "quick-gelu", "gelu_pytorch_tanh": "gelu-tanh"}


def _ids(tokenizer: Any, device: torch.device, texts: list[str]) -> Tensor:
    return tokenizer(texts, padding=True, return_tensors="pt")["input_ids"].to(device)
