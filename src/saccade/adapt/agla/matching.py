"""Image and prompt matched by BLIP: relevance of the patches, and how alike the two are.

Shape letters: B images, S side of the image, H heads, T tokens of the prompt, M keys, G side of the map of patches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.adapt.agla.relevance import relevance
from saccade.extras import need

#: what the paper takes
MATCHER = "Salesforce/blip-itm-large-coco"


class BlipMatcher:
    """transformers' `BlipForImageTextRetrieval` as a matcher: images and prompts -> (relevance, similarity).

        cor_j = (1 / H) sum_h sum_i max(0, d sim / d C^h_ij) C^h_ij,     C the cross attention of layer `block`

    The gradient is that of the matching head's logit "match"; the similarity is the cosine of the contrastive head.
    Only what stands behind that layer is differentiated, and no parameter.

    Args:
        model: with `vision_model`, `text_encoder`, `itm_head`, `vision_proj`, `text_proj`.
        processor: its processor: the tokenizer, and the mean and deviation of images.
        block: number of the layer, from 0.
        first_token: what stands first in the matching head's prompt; None: the tokenizer's "[ENC]", else the last of
            BLIP's vocabulary where that has the two tokens more than BERT's, else the tokenizer's own.

    Raises:
        ValueError: if the model has no such layer, or the processor no tokenizer.
    """

    def __init__(self, model: Any, processor: Any, *, block: int = 6, first_token: int | None = None) -> None:
        layers = getattr(getattr(getattr(model, "text_encoder", None), "encoder", None), "layer", ())
        if not 0 <= block < len(layers):
            raise ValueError(f"block must be a layer of the matching model, 0 to {len(layers) - 1}, got {block}")
        if not callable(getattr(processor, "tokenizer", None)):
            raise ValueError("the matching model's processor must have a tokenizer")
        self.model, self.processor, self.block = model.eval(), processor, block
        self.attention = layers[block].crossattention.self
        self.first_token = _first_token(model, processor.tokenizer) if first_token is None else first_token

    @classmethod
    def load(cls, name: str = MATCHER, **options: Any) -> BlipMatcher:
        """By its name on Hugging Face, or a folder.

        Args:
            name: of the model.
            **options: `BlipMatcher`'s.

        Raises:
            ImportError: if transformers is not installed.
            ValueError: if it cannot be had.
        """
        transformers = need("transformers", "AGLA's matching model")
        try:
            model = transformers.BlipForImageTextRetrieval.from_pretrained(name)
            return cls(model, transformers.AutoProcessor.from_pretrained(name), **options)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"the matching model {name!r} cannot be had ({type(error).__name__}): give matcher= a folder, a "
                "BlipMatcher(model, processor) or a function of images and prompts"
            ) from error

    @property
    def size(self) -> int:
        """S."""
        return int(self.model.config.vision_config.image_size)

    def __call__(self, image_B3SS: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Relevance (B, G, G) and cosine (B,).

        Args:
            image_B3SS: in [0, 1].
            prompts: one an image.
        """
        images = getattr(self.processor, "image_processor", None)
        mean, std = (getattr(images, name, None) or (fill,) for name, fill in (("image_mean", 0.0), ("image_std", 1.0)))
        parameter = next(self.model.parameters())
        text = self.processor.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        ids, mask = (text[name].to(parameter.device) for name in ("input_ids", "attention_mask"))
        with torch.inference_mode(False):
            x = image_B3SS.detach().clone().to(parameter)
            mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device)[:, None, None] for v in (mean, std))
            with torch.no_grad():
                seen = self.model.vision_model(pixel_values=(x - mean) / std).last_hidden_state
                said = self.model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
                pair = self.model.vision_proj(seen[:, 0]), self.model.text_proj(said[:, 0])
                similarity_B = F.cosine_similarity(*pair)
            attention, gradient = self._attended(seen, ids, mask)
        return relevance(attention, gradient, mask), similarity_B

    def _attended(self, seen: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Cross attention (B, H, T, M) and its gradient."""
        kept: list[Tensor] = []

        def start(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (args[0].detach().requires_grad_(), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}

        handles = [
            self.attention.register_forward_pre_hook(start, with_kwargs=True),
            self.attention.dropout.register_forward_pre_hook(lambda module, args: kept.append(args[0])),
        ]
        ids = ids if self.first_token is None else ids.index_fill(1, ids.new_zeros(1), self.first_token)
        try:
            with torch.enable_grad():
                hidden = self.model.text_encoder(
                    input_ids=ids,
                    attention_mask=mask,
                    encoder_hidden_states=seen,
                    encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
                ).last_hidden_state
                match = self.model.itm_head(hidden[:, 0])[:, 1].sum()
                (gradient,) = torch.autograd.grad(match, kept[0])
        finally:
            for handle in handles:
                handle.remove()
        return kept[0].detach(), gradient


def _first_token(model: Any, tokenizer: Any) -> int | None:
    added: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()
    if "[ENC]" in added:
        return int(added["[ENC]"])
    vocabulary = model.text_encoder.get_input_embeddings().num_embeddings
    return vocabulary - 1 if vocabulary == len(tokenizer) + 2 else None
