"""The paper's claim at laptop size: shapes on textures that go with them in training, and against them afterwards."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.faithful_attention_maps.losses import TwoStageLoss, learning_rates
from saccade.models.faithful_attention_maps.network import TwoStageViT
from saccade.models.faithful_attention_maps.transformer import RegisterTransformer

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

_SIDE, _PATCH = 32, 4
#: of training: few enough that those where texture and shape go apart can be learned by heart
_IMAGES = 200


class Scenes(NamedTuple):
    """Images (B, 3, 32, 32), labels and textures (B,), and which patches are the object's (B, 8, 8)."""

    image: Tensor
    label: Tensor
    texture: Tensor
    there: Tensor


def _scenes(count: int, generator: Generator, together: float = 0.95) -> Scenes:
    """A square (0) or cross (1) of nine whole patches on a texture of stripes that run across (0) or down (1), whose
    number is the label's as often as `together` says."""
    cell, cells = torch.arange(_SIDE // _PATCH), _SIDE // _PATCH
    label_B = torch.randint(2, (count,), generator=generator)
    agrees_B = torch.rand(count, generator=generator) < together
    texture_B = torch.where(agrees_B, label_B, 1 - label_B)
    centre_B2 = torch.randint(2, cells - 2, (count, 2), generator=generator)
    y, x = ((cell - centre_B2[:, i, None]).abs() for i in (0, 1))
    y, x = y[:, :, None].expand(-1, -1, cells), x[:, None].expand(-1, cells, -1)
    square = torch.maximum(y, x) <= 1
    cross = (torch.maximum(y, x) <= 2) & (torch.minimum(y, x) == 0)
    there = torch.where(label_B[:, None, None] == 1, cross, square)
    inside = there.repeat_interleave(_PATCH, 1).repeat_interleave(_PATCH, 2)
    stripes = (torch.arange(_SIDE) // 2 % 2).float()
    down = (texture_B == 1)[:, None, None]
    ground = torch.where(down, stripes[None, :].expand(_SIDE, _SIDE), stripes[:, None].expand(_SIDE, _SIDE))
    image = torch.stack([torch.where(inside, 1.0, -0.5), ground - 0.5, torch.where(inside, -0.5, 0.5)], 1)
    image[:, 1].masked_fill_(inside, 0.0)
    image = image + 0.2 * torch.randn(count, 3, _SIDE, _SIDE, generator=generator)
    return Scenes(image, label_B, texture_B, there)


def _sizes(lab: Lab) -> dict[str, Any]:
    return {
        "image_size": _SIDE, "patch": _PATCH, "dim": lab.size(48, 16), "depth": 2, "num_heads": 4, "registers": 1,
        "layer_scale": None,
    }  # fmt: skip


class _Plain(nn.Module):
    def __init__(self, trunk: RegisterTransformer, classes: int = 2) -> None:
        super().__init__()
        self.trunk, self.head = copy.deepcopy(trunk), nn.Linear(trunk.norm.weight.numel(), classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.trunk(image)[:, 0])


def _pretrained(lab: Lab) -> RegisterTransformer:
    """A transformer that knows shapes and textures, from images where these do not go together."""
    with lab.seeded():
        network = _Plain(RegisterTransformer(**_sizes(lab)), 4)
    generator = lab.generator()
    drawn = (_scenes(lab.size(32, 4), generator, 0.5) for _ in itertools.count())
    batches = ((scene.image, 2 * scene.label + scene.texture) for scene in drawn)
    lab.train(network, batches, lambda model, pair: F.cross_entropy(model(pair[0]), pair[1]), 400, lr=1e-3)
    return network.trunk


def _two_stages(trunk: RegisterTransformer, sizes: dict[str, Any], through: bool = True) -> TwoStageViT:
    """Both stages start as the trunk; of the first one the tokens alone learn, as in the paper."""
    model = TwoStageViT(2, 2, drop=0.0, mask_drop=0.0, through=through, **sizes)
    model.first.load_state_dict(trunk.state_dict())
    model.second.load_state_dict(trunk.state_dict())
    learning_rates(model)
    return model


def _loss(model: nn.Module, batch: Scenes) -> Tensor:
    image, label, *_ = batch
    if isinstance(model, TwoStageViT):
        return TwoStageLoss(equivariance=0.0)(model, image, label).loss
    return F.cross_entropy(model(image), label)


def _claim(lab: Lab) -> ClaimResult:
    """Accuracy where texture and shape go together as in training, and where they do not; and what the mask covers."""
    count = lab.size(400, 8)
    usual, other = (_scenes(count, lab.held_out(), together) for together in (0.95, 0.0))

    def measure(trial: Trial) -> dict[str, float]:
        found = {}
        for name, (image, label, _, there) in (("usual", usual), ("other", other)):
            said = trial.model(image)
            logits = said.logits if isinstance(trial.model, TwoStageViT) else said
            found[f"{name}_percent"] = 100 * float((logits.argmax(1) == label).float().mean())
            if isinstance(trial.model, TwoStageViT):
                seen = said.mask[:, 0] > 0.5
                found["seen_percent"] = 100 * float(seen.float().mean())
                found["of_the_object_percent"] = 100 * float((seen & there).sum() / there.sum())
                found["of_the_ground_percent"] = 100 * float((seen & ~there).sum() / (~there).sum())
        if isinstance(trial.model, TwoStageViT):
            found["moved_by_what_is_hidden"] = _moved(cast(TwoStageViT, trial.model), other.image, lab.held_out())
        return found

    sizes, trunk = _sizes(lab), _pretrained(lab)
    forms: dict[str, Callable[[], nn.Module]] = {
        "plain": partial(_Plain, trunk),
        "two_stages": partial(_two_stages, trunk, sizes),
        # the second stage's loss does not reach the mask, as the authors' code has it
        "cut": partial(_two_stages, trunk, sizes, False),
    }
    learn = _scenes(lab.size(_IMAGES, 8), lab.generator())

    def draw(generator: Generator) -> Scenes:
        rows = torch.randint(len(learn.label), (lab.size(32, 4),), generator=generator)
        return Scenes(*(each[rows] for each in learn))

    measured = lab.forms(forms, draw, measure, 300, loss=_loss, lr=1e-3).means()
    fell, kept, _ = (measured[f"{name}_usual_percent"] - measured[f"{name}_other_percent"] for name in forms)
    return ClaimResult(
        measured,
        # what has learned nothing falls nowhere
        holds=kept < fell - 10
        and measured["two_stages_usual_percent"] > 80
        and measured["two_stages_moved_by_what_is_hidden"] < 1e-4,
        note=f"the texture has the number of the class in 95 of 100 of {_IMAGES} images of training and of usual "
        "tests, in none of the others; shapes fill whole patches; one seed. All start as a transformer that was "
        "taught shapes and textures where these go apart; of it the first stage's blocks stay as they are, as "
        "the paper's stay DINOv2's. `cut` has no gradient from the second stage to the mask, as in the authors' "
        "code. What is not shown: hidden pixels move nothing and none of the ground is seen, but which of the "
        "object's patches are shown tells the texture, since the first stage saw it and is taught by the label "
        "too. Tried once each besides: from unlimited images the plain one fell from 96 to 39 %, the two stages "
        "had learned nothing after 300 steps (51 %), `cut` fell from 88 to 16; of shapes that cut through "
        "patches, three quarters of whose patches show stripes too, the plain one kept 100 %, `cut` fell from 94"
        " to 0, and the card's drops of .3 with equivariance from 87 to .5",
    )


def _moved(model: TwoStageViT, image: Tensor, generator: Generator) -> float:
    """How far logits go when all pixels that the second stage does not see become noise, the mask as it was."""
    seen = model(image).mask[:, 0] > 0.5
    hidden = ~seen.repeat_interleave(_PATCH, 1).repeat_interleave(_PATCH, 2)[:, None]
    noisy = torch.where(hidden, torch.randn(image.shape, generator=generator), image)
    return float((model.masked(noisy, seen) - model.masked(image, seen)).abs().max())


CLAIM = Claim(
    paper="the second stage's mask makes the prediction independent of the background, and robust where backgrounds "
    "change (Waterbirds, MetaShift, SIIM-ACR); the card has no figures of the tables",
    expected="where textures go against shapes a plain vision transformer falls further than the two stages, which "
    "know the usual images and whose logits nothing moves that is hidden",
    run=_claim,
)
