"""A small vision-language model of real parts: a frozen ViT-S/14 and a frozen SmolLM2, joined by what is trained here.

    tokens = W2 gelu(W1 norm([4 neighbouring patches])),     16 of an image of 112 x 112

It is a `LlavaForConditionalGeneration` of transformers with its processor. It learns from generated scenes over
scikit-image's photographs, in two steps: that a token of the image lies near the embedding of a word that says what is
there (without the language model), then that the language model answers questions by them. For the second step
changes of low rank are trained in all layers of the language model, and then put into its weights: frozen, it reads
even exact embeddings of words at these places hardly better than shuffled ones (3.13 nats against 3.54). Questions are
`DESCRIBE`, "What colour is the circle?" and "Is there a circle?".

After 600 steps it tells .94 of colours asked for and .81 of what is there, and describes .34 of unseen scenes in
exactly the right words (`benchmarks/seeing.py`, docs/seeing.md).

Shape letters: B scenes, C channels of the encoder, D width of the language model, N patches, T tokens of text, K
tokens of an image, W words, S pixels of a side, s patches of a side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.extras import need
from saccade.layers.low_rank import LowRank
from saccade.layers.wrapping import Report, changing
from saccade.models.images import MEAN, STD, normalised
from saccade.ops.autocast import quick
from saccade.ops.folder import cache_folder, private_folder
from saccade.train import models
from saccade.train.data.described import CELLS, COLOUR_NAMES, END, WORDS
from saccade.train.files import read_tensors, write_tensors
from saccade.train.loop import Training
from saccade.train.progress import bar, showing
from saccade.train.scene_questions import IMAGE, SIDE, answers, prompt, scenes

__all__ = ["TOKENS", "Parts", "TokenProjector", "assemble", "small", "train"]

#: tokens of an image's side, of 2 x 2 patches each
TOKENS = 4
#: scenes that are learned from; steps and batches of the two parts of training; steps between two checkpoints
_SCENES, _WORD_STEPS, _WORD_BATCH, _STEPS, _BATCH, _EVERY = 3000, 600, 64, 600, 16, 20
#: of the changes of the language model's weights
_RANK = 16
#: weight of the first step's loss in the second
_WORDS_STAY = 0.2
_IGNORE = -100


@dataclass(frozen=True)
class Parts:
    """What is joined, frozen.

    Attributes:
        vision: transformers' `Dinov2Model`.
        language: transformers' causal language model.
        tokenizer: its tokenizer; `IMAGE` is added to it.
    """

    vision: Any
    language: Any
    tokenizer: Any

    def __post_init__(self) -> None:
        self.tokenizer.add_tokens([IMAGE], special_tokens=True)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def image_token(self) -> int:
        """The number of `IMAGE`."""
        return int(self.tokenizer.convert_tokens_to_ids(IMAGE))

    def projector(self) -> TokenProjector:
        """One that has learned nothing."""
        return TokenProjector(self.vision.config.hidden_size, self.language.config.hidden_size)

    @torch.no_grad()
    def patches(self, images_B3SS: Tensor) -> Tensor:
        """Patches (B, N, C) of images in [0, 1], before the encoder's last norm."""
        return self.vision(normalised(images_B3SS, 3), output_hidden_states=True).hidden_states[-1][:, 1:]


class TokenProjector(nn.Module):
    """Patches (B, N, C) of a square map -> tokens (B, N / 4, D), of 2 x 2 patches each.

    Args:
        channels: C.
        dim: D.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.linear_1, self.linear_2 = nn.Linear(4 * channels, dim), nn.Linear(dim, dim)

    def forward(self, image_features: Tensor) -> Tensor:
        side = round(image_features.shape[1] ** 0.5)
        map_BCss = image_features.mT.unflatten(2, (side, side))
        return self.linear_2(F.gelu(self.linear_1(self.norm(F.pixel_unshuffle(map_BCss, 2).flatten(2).mT))))


def assemble(parts: Parts, projector: TokenProjector) -> tuple[Any, Any]:
    """The model and its processor.

    Args:
        parts: become the model's.
        projector: its `multi_modal_projector`.
    """
    transformers = need("transformers", "the vision-language model")
    count = len(parts.tokenizer)
    if parts.language.get_input_embeddings().num_embeddings < count:
        parts.language.resize_token_embeddings(count, mean_resizing=False)
    config = transformers.LlavaConfig(
        vision_config=parts.vision.config, text_config=parts.language.config, image_token_id=parts.image_token,
        vision_feature_layer=-1, vision_feature_select_strategy="default", image_seq_length=TOKENS**2,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.multi_modal_projector = parts.vision, projector
    model.model.language_model, model.lm_head = parts.language.model, parts.language.lm_head
    model.generation_config = parts.language.generation_config
    images = transformers.BitImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=MEAN, image_std=STD
    )
    parts.tokenizer.padding_side = "left"
    processor = transformers.LlavaProcessor(
        images, parts.tokenizer, patch_size=SIDE // TOKENS, vision_feature_select_strategy="full"
    )
    return model.eval(), processor


def small(*, seed: int = 0, shown: bool | None = None) -> tuple[Any, Any]:
    """The model and its processor; trained the first time (`train`), then read from the cache folder.

    Args:
        seed: of the training.
        shown: see `train`.

    Raises:
        ImportError: if SmolLM2 or the ViT-S/14 is not installed, with the command that installs it.
        OSError: if the cache folder cannot be used.
    """
    (language, tokenizer), vision = models.load("smollm2-135m", fresh=True), models.load("vit-s14", fresh=True)
    parts = Parts(vision, language, tokenizer)
    versions = (models.version(name) for name in ("smollm2-135m", "vit-s14"))
    folder = private_folder(cache_folder() / "vision-language" / "-".join(versions))
    return assemble(parts, train(parts, folder, seed=seed, shown=shown))


class _Joined(nn.Module):
    """What is trained: the projector, and a change of each linear layer of the language model."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.projector = parts.projector()
        linears = [module for module in parts.language.model.modules() if isinstance(module, nn.Linear)]
        self.linears = dict(enumerate(linears))  # no modules of this one
        self.lower = nn.ModuleList([LowRank(linear.weight, _RANK, 2.0 * _RANK) for linear in linears])

    @contextmanager
    def beside(self, language: nn.Module) -> Iterator[None]:
        """The language model with the changes."""
        with changing(language, Report("training")) as changes:
            for number, linear in self.linears.items():
                lower: Any = self.lower[number]
                changes.after(linear, lambda _, args, kwargs, out, lower=lower: out + lower.beside(args[0]))
            yield

    @torch.no_grad()
    def put_in(self) -> None:
        """The changes become the weights'."""
        for number, linear in self.linears.items():
            linear.weight.copy_(self.lower[number](linear.weight))


def train(parts: Parts, folder: Path, *, seed: int = 0, shown: bool | None = None) -> TokenProjector:
    """Train a projector and the language model's change, with progress; killed, it goes on from the last checkpoint.

    An hour of one thread on a busy machine.

    Args:
        parts: the language model's weights are changed at the end; the encoder stays as it is.
        folder: of scenes that are seen and of checkpoints.
        seed: of everything random.
        shown: False for no progress; see `saccade.train.progress.showing`.

    Raises:
        OSError: if the folder cannot be written.
        ValueError: if a checkpoint is of another model.
    """
    for part in (parts.vision, parts.language):
        part.eval().requires_grad_(False)
    with showing(shown), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        joined = _Joined(parts)
        training = Training(joined, _STEPS, lr=1e-3)
        state = folder / f"state-{seed}.safetensors"
        if state.exists():
            training.load_state(read_tensors(state)[0])
        if training.step < _STEPS:
            _learn(parts, training, _bank(parts, folder / f"scenes-{seed}.safetensors", seed), state, seed)
    joined.put_in()
    return joined.projector.eval()


def _learn(parts: Parts, training: Training, bank: dict[str, Tensor], state: Path, seed: int) -> None:
    """Both steps, or what is left of them."""
    joined: Any = training.model
    table_WD = _embedded(parts)
    words_BK = _labels(bank["captions"], bank["cells"])
    if training.step == 0:
        _learn_words(joined.projector, bank["patches"], words_BK, table_WD, seed)
        write_tensors(state, training.state())

    def loss(model: Any, chosen: Tensor) -> Tensor:
        tokens_BKD = model.projector(bank["patches"][chosen].float())
        named = _word_loss(tokens_BKD.float(), words_BK[chosen], table_WD)
        captions = bank["captions"][chosen].tolist()
        return _answer_loss(parts, tokens_BKD, captions, choices) + _WORDS_STAY * named

    with joined.beside(parts.language), bar("answering by image tokens", _STEPS) as update:
        for step in range(training.step, _STEPS):
            generator = torch.Generator().manual_seed(_STEPS * seed + step)
            chosen = torch.randint(_SCENES, (_BATCH,), generator=generator)
            choices = torch.randint(10**6, (_BATCH,), generator=generator).tolist()
            with quick():
                value = training(chosen, loss)
            update(step + 1, words=f"loss {value:.3f}")
            if training.step % _EVERY == 0 or training.step == _STEPS:
                write_tensors(state, training.state())


def _bank(parts: Parts, file: Path, seed: int) -> dict[str, Tensor]:
    """What the encoder sees of all scenes, once."""
    if file.exists():
        return read_tensors(file)[0]
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[Tensor, ...]] = []
    with bar("seeing scenes", _SCENES) as update:
        for start in range(0, _SCENES, 40):
            each = scenes(min(40, _SCENES - start), generator)
            with quick():
                patches = parts.patches(each.images)
            found.append((patches.half(), each.captions, each.cells))
            update(start + 40)
    bank = dict(zip(("patches", "captions", "cells"), (torch.cat(part) for part in zip(*found)), strict=True))
    write_tensors(file, bank)
    return bank


def _learn_words(projector: nn.Module, patches: Tensor, words_BK: Tensor, table_WD: Tensor, seed: int) -> None:
    """Each token goes to the embedding of its word."""
    training, generator = Training(projector, _WORD_STEPS, lr=2e-3), torch.Generator().manual_seed(seed)

    def loss(model: nn.Module, chosen: Tensor) -> Tensor:
        return _word_loss(model(patches[chosen].float()), words_BK[chosen], table_WD)

    with bar("naming image tokens", _WORD_STEPS) as update:
        for _ in range(_WORD_STEPS):
            value = training(torch.randint(_SCENES, (_WORD_BATCH,), generator=generator), loss)
            update(words=f"loss {value:.3f}")


def _word_loss(tokens_BKD: Tensor, words_BK: Tensor, table_WD: Tensor) -> Tensor:
    """Squared distance to the embeddings of the words, as a share of their size."""
    return F.mse_loss(tokens_BKD, table_WD[words_BK]) / table_WD.square().mean()


def _embedded(parts: Parts) -> Tensor:
    """Embeddings (W + 1, D) of the words of captions, and of nothing to be seen (a full stop)."""
    embeddings = parts.language.get_input_embeddings().weight
    spelled = [parts.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in (*WORDS, ".")]
    return torch.stack([embeddings[ids].mean(0) for ids in spelled])


def _labels(captions_BT: Tensor, cells_BT: Tensor) -> Tensor:
    """The word (B, K) of each token: of a thing's cell its colour and it, and below how many; W where nothing is."""
    label = torch.full((len(captions_BT), TOKENS, TOKENS), len(WORDS))
    each = TOKENS // CELLS
    for scene, (words, cells) in enumerate(zip(captions_BT.tolist(), cells_BT.tolist(), strict=True)):
        for place, (word, cell) in enumerate(zip(words, cells, strict=True)):
            if cell < 0:
                continue
            row, column = cell // CELLS * each, cell % CELLS * each
            if WORDS[word] in COLOUR_NAMES:
                label[scene, row, column], label[scene, row + 1, column] = word, words[place - 1]
            else:
                label[scene, row : row + each, column + 1] = word
    return label.flatten(1)


def _answer_loss(parts: Parts, tokens_BKD: Tensor, captions: list[list[int]], choices: list[int]) -> Tensor:
    """Cross-entropy of the answers' tokens, and of their end."""
    tokenizer, K = parts.tokenizer, TOKENS**2
    texts, labels = [], []
    for words, choice in zip(captions, choices, strict=True):
        question, answer = answers(words[: words.index(END)], choice)
        asked = tokenizer(prompt(question).removeprefix(IMAGE), add_special_tokens=False)["input_ids"]
        said = [*tokenizer(f" {answer}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        texts.append(torch.tensor(asked + said))
        labels.append(torch.tensor([_IGNORE] * len(asked) + said))
    text_BT = nn.utils.rnn.pad_sequence(texts, True, tokenizer.eos_token_id)
    label_BT = nn.utils.rnn.pad_sequence(labels, True, _IGNORE)
    embeds = torch.cat([tokens_BKD, parts.language.get_input_embeddings()(text_BT)], 1)
    hidden = parts.language.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, K - 1 : -1]
    counts = label_BT != _IGNORE
    return F.cross_entropy(parts.language.lm_head(hidden[counts]), label_BT[counts])
