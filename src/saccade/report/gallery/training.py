"""The same small CNN trained with each gate at the same place, and what the gates show afterwards.

Shape letters: B batch, P photographs, C channels, H and W height and width, N = H W positions, S side of a square
picture.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from datetime import date

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import catalogue
from saccade.integrations.insert import insert
from saccade.ops.maps import Mixes, attention_map
from saccade.ops.measure import machine
from saccade.report.gallery.exhibits import (
    ATTENDED,
    FROM_MIDDLE,
    MULTIPLIED,
    ONE_CHANNEL,
    PHOTOGRAPHS,
    Exhibit,
    Gallery,
    Picture,
    Settings,
)
from saccade.train import data
from saccade.train.entries import NONE, Entry, parse
from saccade.train.lab import Lab


def photographs(side: int, count: int = len(PHOTOGRAPHS)) -> dict[str, Tensor]:
    """The first `count` photographs in grey, (side, side) in [0, 1], cut to their middle square.

    Args:
        side: to which they are scaled.
        count: how many.

    Raises:
        ImportError: if scikit-image is not installed.
    """
    found = {}
    for name, (grey,) in zip(PHOTOGRAPHS, data.photographs(*PHOTOGRAPHS[:count], grey=True)):
        H, W = grey.shape
        S = min(H, W)
        square = grey[(H - S) // 2 :, (W - S) // 2 :][:S, :S]
        found[name] = F.interpolate(square[None, None], (side, side), mode="bicubic", antialias=True)[0, 0].clamp(0, 1)
    return found


def crops(photographs_PSS: Tensor, count: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Crops (B, 1, side, side), the numbers of their photographs (B,), and what is covered (B, 1, side, side).

    Contrast and brightness vary, there is a little noise, and a square of three to five eighths of the side is
    covered with a piece of another photograph, its pixels in random order.

    Args:
        photographs_PSS: of `photographs`.
        count: B.
        side: of a crop, at most S.
        generator: of all that is drawn.
    """
    P, S = photographs_PSS.shape[:2]

    def cut(which_B: Tensor) -> Tensor:
        corner_B2 = torch.randint(S - side + 1, (count, 2), generator=generator)
        rows, columns = (corner_B2[:, axis, None] + torch.arange(side) for axis in (0, 1))
        return photographs_PSS[which_B[:, None, None], rows[:, :, None], columns[:, None, :]]

    label_B = torch.randint(P, (count,), generator=generator)
    other_B = (label_B + torch.randint(1, P, (count,), generator=generator)) % P
    image_BSS, mess_BSS = cut(label_B), cut(other_B)
    order_BN = torch.rand(count, side * side, generator=generator).argsort(1)
    mess_BSS = mess_BSS.flatten(1).gather(1, order_BN).view_as(mess_BSS)
    length_B = torch.randint(3 * side // 8, 5 * side // 8 + 1, (count,), generator=generator)
    start_B2 = (torch.rand(count, 2, generator=generator) * (side - length_B + 1)[:, None]).long()
    within = [
        (torch.arange(side) >= start_B2[:, axis, None]) & (torch.arange(side) < (start_B2[:, axis] + length_B)[:, None])
        for axis in (0, 1)
    ]
    covered_BSS = within[0][:, :, None] & within[1][:, None, :]
    image_BSS = torch.where(covered_BSS, mess_BSS, image_BSS)
    contrast, brightness, noise = 0.7, 0.15, 0.03
    gain_B11 = contrast + 2 * (1 - contrast) * torch.rand(count, 1, 1, generator=generator)
    shift_B11 = brightness * (2 * torch.rand(count, 1, 1, generator=generator) - 1)
    image_BSS = (image_BSS - 0.5) * gain_B11 + 0.5 + shift_B11
    image_BSS = image_BSS + noise * torch.randn(image_BSS.shape, generator=generator)
    return image_BSS[:, None], label_B, covered_BSS[:, None]


#: the module of the network after which gates stand
PLACE = "body"


def network(classes: int) -> nn.Sequential:
    """The small CNN, (B, 1, H, W) -> (B, classes); gates stand at a quarter of the resolution.

    Args:
        classes: the number of logits.
    """

    def convolution(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(*convolution(1, 16, 2)),
            body=nn.Sequential(*convolution(16, 32, 2), *convolution(32, 32, 1)),
            deep=nn.Sequential(*convolution(32, 64, 2)),
            head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)),
        )
    )


def make(
    gates: Sequence[str] | None = None, settings: Settings | None = None, *, show_progress: bool | None = False
) -> Gallery:
    """Train the network with each gate and look at it.

    Args:
        gates: parts of kind "gate", options as in `cbam:reduction=8`; all of the catalogue where None.
        settings: the defaults where None.
        show_progress: False for none; bars on a terminal and lines elsewhere where None or True.

    Raises:
        ValueError: if a part is no gate.
        ImportError: if scikit-image is not installed.
    """
    settings = settings or Settings()
    wanted = parse(list(gates) if gates else [part.slug for part in catalogue.select(kind="gate")])
    lab = Lab(seed=settings.seed, show_progress=show_progress)
    squares = photographs(settings.side, settings.photographs)
    photographs_PSS = torch.stack(list(squares.values()))
    pictures = _pictures(squares, settings)
    images_P1SS = torch.stack([picture.image_SS for picture in pictures])[:, None]
    names_P = torch.tensor([list(squares).index(picture.name) for picture in pictures])
    fresh = torch.Generator().manual_seed(10**6 + settings.seed)
    test_B1SS, label_B, covered_B1SS = crops(photographs_PSS, settings.held_out, settings.crop, fresh)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator = lab.generator()
        while True:
            yield crops(photographs_PSS, settings.batch, settings.crop, generator)[:2]

    with lab.seeded():
        start = network(len(squares))
    built: list[tuple[Entry, nn.Sequential, nn.Module | None]] = []
    for gate in (Entry(NONE, NONE), *wanted):  # all of them before the first is trained: requests fail at once
        model = network(len(squares))
        model.load_state_dict(start.state_dict())
        inserted: nn.Module | None = None
        if gate.slug != NONE:
            with lab.seeded():
                report = insert(model, str(gate.slug), after=PLACE, example=test_B1SS[:1], **gate.options)
            inserted = model.get_submodule(report.places[0].gate)
        built.append((gate, model, inserted))
    exhibits = []
    for gate, model, inserted in built:
        began = time.perf_counter()
        lab.train(model, batches(), _loss, settings.steps, lr=4e-3, description=f"{gate.name:<16}")
        seconds = time.perf_counter() - began
        guess_B, shown = _look(model, inserted, test_B1SS)
        name_P, (maps, channels_PC) = _look(model, inserted, images_P1SS)
        exhibits.append(
            Exhibit(
                name=gate.name,
                slug=None if inserted is None else str(gate.slug),
                parameters=0 if inserted is None else sum(p.numel() for p in inserted.parameters()),
                accuracy=(guess_B == label_B).float().mean().item(),
                named=int((name_P == names_P).sum()),
                covered_share=covered_share_of(next(iter(shown[0].values()), None), covered_B1SS),
                seconds=seconds,
                maps=maps,
                channels_PC=channels_PC,
            )
        )
    parameters = sum(p.numel() for p in start.parameters())
    return Gallery(settings, pictures, exhibits, parameters, dict(machine()), date.today().isoformat())


def views(gate: nn.Module, x_BCHW: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
    """What a gate shows on a map: pictures (B, H, W) by what they are, and its means over positions, (B, C).

    A picture that is flat everywhere is left out; so are the channels, where all are alike.

    Args:
        gate: a module that `attention_map` can show.
        x_BCHW: the maps that it is given.
    """
    B, C, H, W = x_BCHW.shape
    if isinstance(gate, Mixes):
        pictures: dict[str, list[Tensor]] = {ATTENDED: [], FROM_MIDDLE: []}
        middle = H // 2 * W + W // 2
        for x_1CHW in x_BCHW.split(1):  # a matrix of all pairs of positions: one photograph at a time
            share_NN = attention_map(gate, x_1CHW).abs().mean((0, 1))
            for name, share_N in ((ATTENDED, share_NN.mean(0)), (FROM_MIDDLE, share_NN[middle])):
                pictures[name].append((share_N / share_N.mean()).view(H, W))
        return {name: torch.stack(found) for name, found in pictures.items()}, None
    with torch.no_grad():
        factor_BCHW = attention_map(gate, x_BCHW).expand(B, C, H, W)
        maps_BHW, channels_BC = factor_BCHW.mean(1), factor_BCHW.mean((2, 3))
    flat = not bool((factor_BCHW != factor_BCHW[:, :, :1, :1]).any())
    alike = not bool((factor_BCHW != factor_BCHW[:, :1]).any())
    found = {} if flat else {MULTIPLIED: maps_BHW}
    # a channel gate times a spatial one has one picture, at as many sizes as there are channels
    separable_BCHW = channels_BC[:, :, None, None] * maps_BHW[:, None] / maps_BHW.mean((1, 2))[:, None, None, None]
    if not flat and not torch.allclose(factor_BCHW, separable_BCHW, rtol=1e-3, atol=1e-6):
        found[ONE_CHANNEL] = factor_BCHW[:, int(factor_BCHW.std((2, 3)).mean(0).argmax())]
    return found, None if alike else channels_BC


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _pictures(squares: dict[str, Tensor], settings: Settings) -> list[Picture]:
    """The photographs, then the first of them with a square of the next one's pixels in random order."""
    found = [Picture(name, image_SS) for name, image_SS in squares.items()]
    generator = torch.Generator().manual_seed(settings.seed)
    side = settings.side // 3
    for number, picture in enumerate(found[: settings.covered]):
        top, left = torch.randint(settings.side - side + 1, (2,), generator=generator).tolist()
        other_SS = found[(number + 1) % len(squares)].image_SS
        image_SS = picture.image_SS.clone()
        order = torch.randperm(other_SS.numel(), generator=generator)[: side * side]
        image_SS[top : top + side, left : left + side] = other_SS.flatten()[order].view(side, side)
        found.append(Picture(picture.name, image_SS, (top, left, side)))
    return found


@torch.no_grad()
def _look(
    model: nn.Module, gate: nn.Module | None, images_B1SS: Tensor
) -> tuple[Tensor, tuple[dict[str, Tensor], Tensor | None]]:
    """The network's answers, and `views` of its gate."""
    model.eval()
    seen: list[Tensor] = []
    hook = None if gate is None else gate.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        guess_B = model(images_B1SS).argmax(1)
    finally:
        if hook is not None:
            hook.remove()
    return guess_B, ({}, None) if gate is None else views(gate, seen[0])


def covered_share_of(map_BHW: Tensor | None, covered_B1SS: Tensor) -> float | None:
    """The mean of a map where positions are covered whole over its mean where they are not covered at all.

    Position by position over the images, then the mean over positions: that squares lie more often in the middle, and
    that maps differ at their rims, plays no part, and weights that do not depend on the image give 1.
    """
    if map_BHW is None:
        return None
    share_BHW = F.adaptive_avg_pool2d(covered_B1SS.float(), (map_BHW.shape[1], map_BHW.shape[2]))[:, 0]
    counts, means = [], []
    for chosen_BHW in (share_BHW == 1, share_BHW == 0):
        counts.append(chosen_BHW.sum(0))
        means.append((map_BHW * chosen_BHW).sum(0) / counts[-1].clamp(min=1))
    both_HW = (counts[0] > 0) & (counts[1] > 0)
    if not bool(both_HW.any()):
        return None
    return (means[0][both_HW].sum() / means[1][both_HW].sum()).item()
