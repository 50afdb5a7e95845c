"""Tiny vision-language models of transformers, random, with a prompt and a processor: for tests and benchmarks.

Shape letters: B batch, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saccade.extras import need
from saccade.train.data.described import WORDS
from saccade.train.scene_questions import SIDE
from saccade.train.vision_language import Parts, assemble

__all__ = ["TINY", "Prompted", "blind", "blind_parts", "tiny"]

#: words of the tokenizer: the image's piece, markers, the instruction's words, and as many more as there is room for
_WORDS = (
    *("<pad>", "<s>", "</s>", "<image>", "<end>", "USER:", "ASSISTANT:", "what", "is", "this", "one", "word"),
    *("write", "a", "general", "description", "of", "the", "image.", "[ENC]"),
)
_VOCABULARY = 64


class _Tokenizer:
    """Words between blanks, by number."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2
    all_special_ids = [0, 1, 2, 3, 4]
    words = [*_WORDS, *(f"w{i}" for i in range(len(_WORDS), _VOCABULARY))]

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        text = text.replace("<image>", " <image> ")
        return [self.words.index(word) if word in self.words else 63 for word in text.split()]

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        known = [int(i) for i in ids if not (skip_special_tokens and int(i) in self.all_special_ids)]
        return " ".join(self.words[i] for i in known)

    def __call__(self, text: list[str], **options: Any) -> dict[str, Tensor]:
        rows = [self.encode(t) for t in text]
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.pad_token_id] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}


@dataclass
class _Images:
    image_mean: tuple[float, ...] = (0.5, 0.4, 0.3)
    image_std: tuple[float, ...] = (0.3, 0.3, 0.4)


@dataclass
class _Processor:
    tokenizer: _Tokenizer
    image_processor: _Images


@dataclass(frozen=True)
class Prompted:
    """A model and what it is called with.

    Attributes:
        model: in evaluation, its attention "sdpa".
        processor: with `tokenizer` and `image_processor`, as far as wrappers need them.
        inputs: of `model(**inputs)` and `model.generate(**inputs)`: two prompts, one of them padded on the left.
        visual: tokens of an image.
    """

    model: Any
    processor: Any
    inputs: dict[str, Tensor]
    visual: int


_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}


def _llava(side: int, **text: Any) -> tuple[Any, int, dict[str, Tensor]]:
    transformers = need("transformers", "a tiny LLaVA")
    vision = transformers.CLIPVisionConfig(**_VISION, image_size=4 * side, patch_size=4)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**{**_TEXT, **text}),
        image_token_id=3,
        vision_feature_layer=-2,
    )
    pixels = torch.rand(2, 3, 4 * side, 4 * side)
    return transformers.LlavaForConditionalGeneration(config), side * side, {"pixel_values": pixels}


def _qwen2_vl(side: int, **text: Any) -> tuple[Any, int, dict[str, Tensor]]:
    transformers = need("transformers", "a tiny Qwen2-VL")
    vision = {"depth": 2, "embed_dim": 24, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = transformers.Qwen2VLConfig(
        text_config={**_TEXT, **text, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=3,
        video_token_id=61,
        vision_start_token_id=60,
        vision_end_token_id=4,
    )
    grid = torch.tensor([[1, 2 * side, 2 * side]] * 2)
    pixels = torch.rand(int(grid.prod(-1).sum()), 3 * 2 * 4 * 4)
    inputs = {"pixel_values": pixels, "image_grid_thw": grid}
    return transformers.Qwen2VLForConditionalGeneration(config), side * side, inputs


def _smolvlm(side: int, **text: Any) -> tuple[Any, int, dict[str, Tensor]]:
    transformers = need("transformers", "a tiny SmolVLM")
    vision = {**_VISION, "image_size": 8 * side, "patch_size": 4}
    config = transformers.SmolVLMConfig(
        vision_config=vision, text_config={"model_type": "llama", **_TEXT, **text}, image_token_id=3, scale_factor=2
    )
    pixels = torch.rand(2, 1, 3, 8 * side, 8 * side)
    return transformers.SmolVLMForConditionalGeneration(config), side * side, {"pixel_values": pixels}


#: name -> what makes it
TINY = {"llava": _llava, "qwen2-vl": _qwen2_vl, "smolvlm": _smolvlm}


def tiny(name: str, side: int = 4, seed: int = 0, **text: Any) -> Prompted:
    """A random model of a few thousand parameters, the same for the same seed, with two prompts about an image each.

    Args:
        name: one of `TINY`.
        side: of the square of an image's tokens.
        seed: of weights and pixels; torch's global generator stays as it was.
        **text: of the language model's config, instead of the tiny one's.

    Raises:
        ValueError: if there is no such name.
        ImportError: if transformers is not installed.
    """
    if name not in TINY:
        raise ValueError(f"there is no tiny model {name!r}; there are {', '.join(TINY)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, visual, pixels = TINY[name](side, **text)
        for parameter in model.parameters():  # far from the zeros of a start, so that images and words matter
            nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.1)
    tokenizer = _Tokenizer()
    image = "<image> " * visual
    long = tokenizer.encode(f"<s> USER: {image}<end> what is this one ASSISTANT:")
    short = tokenizer.encode(f"<pad> <pad> <s> USER: {image}<end> what is ASSISTANT:")
    ids = torch.tensor([long, short])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), **pixels}
    if name == "qwen2-vl":
        inputs["mm_token_type_ids"] = (ids == 3).int()
    return Prompted(model.eval(), _Processor(tokenizer, _Images()), inputs, visual)


def blind() -> tuple[Any, Any]:
    """A tiny model of random weights that knows the words of captions alone, and its processor: for tests."""
    parts = blind_parts()
    return assemble(parts, parts.projector())


def blind_parts() -> Parts:
    """Parts of random weights whose tokenizer knows the words of captions and questions alone: for tests."""
    transformers, tokenizers = need("transformers", "the model"), need("tokenizers", "the model")
    asked = [
        "Question",
        ":",
        "What",
        "colour",
        "are",
        "is",
        "the",
        "in",
        "picture",
        "Is",
        "there",
        "Answer",
        "yes",
        "no",
        ".",
        "?",
    ]
    names = list(dict.fromkeys(["<end>", "<unk>", *WORDS, *asked, "yes", "no", "."]))
    table = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    table.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=table, eos_token="<end>", pad_token="<end>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vision = transformers.Dinov2Model(
            transformers.Dinov2Config(
                hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE, mlp_ratio=1
            )
        )
        language = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=len(names), hidden_size=16, intermediate_size=16, num_hidden_layers=8,
                num_attention_heads=2, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
            )
        )  # fmt: skip
    return Parts(vision.eval(), language.eval(), tokenizer)
