"""Sections of docs/real-models.md on models that see: what of ours stands beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade
from saccade.explain.gaze.maps import correlation
from saccade.models.images import normalised, read_image
from saccade.models.upsampling import backbone_features
from saccade.train import models
from saccade.train.data.looking import shapes
from saccade.train.data.pictures import crops, photographs
from saccade.train.lab import Lab
from saccade.train.samples import square

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

PATCH = 14

#: scikit-image's photographs that are looked at
JUDGE = ("astronaut", "coffee", "rocket", "chelsea")
#: gates and their arguments
GATES: dict[str, dict[str, Any]] = {"cbam": {"reduction": 4}, "triplet": {}, "das": {}}


def strip(*images: Tensor, side: int = 224) -> Picture:
    """Pictures (3, H, W) or (H, W) beside each other."""
    from PIL import Image

    tiles = []
    for image in images:
        image = image[None].expand(3, -1, -1) if image.ndim == 2 else image
        size = (side, max(1, round(image.shape[2] * side / image.shape[1])))
        tile = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
        tiles.append(F.pad(tile, (0, 4), value=1))
    pixels = (torch.cat(tiles, 2)[..., :-4].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous()
    return Image.fromarray(pixels.numpy()).quantize(96)


def spread(x: Tensor) -> Tensor:
    """To [0, 1]."""
    return (x - x.min()) / (x.max() - x.min()).clamp(min=1e-9)


def gates(lab: Lab) -> dict[str, Any]:
    """Gates put gently into EfficientNet-lite0 change nothing at the start."""
    network, row = models.load("efficientnet-lite0", fresh=True), {}
    images = torch.cat([square(image, 224) for image in photographs(*JUDGE)])
    with torch.no_grad():
        before = network(images).softmax(-1)
        row |= {"classes": before.argmax(-1).tolist(), "shares": before.amax(-1).tolist(), "gates": {}}
        for slug, options in GATES.items():
            arguments = {"after": "network._blocks.*", "example": images[:1], "gentle": True, **options}
            report = saccade.insert(network, slug, **arguments)
            after = network(images).softmax(-1)
            row["gates"][slug] = {
                "places": len(report.places),
                "parameters": report.added_parameters,
                "difference": float((after - before).abs().max()),
                "classes": after.argmax(-1).tolist(),
            }
            report.remove()
        row["removed"] = float((network(images).softmax(-1) - before).abs().max())
    return row


def fusion(lab: Lab) -> dict[str, Any]:
    """FSATFusion, trained for a minute on the task, on the thermal and visible picture of one place.

    The two cameras stood apart: the visible picture is laid over the thermal one by the homography of `CORNERS`, and
    both are cut to the front of the house. XFeat and LighterGlue find next to none between them.
    """
    from saccade.train.metrics.fusion import fusion_metrics

    thermal, visible = (read_image(path) for path in models.example_pair("thermal"))
    points, _, _ = models.load("xfeat-lighterglue")(thermal[None], visible[None])
    a, b = (x.mean(0)[None, None, 180:380, 180:460] for x in (thermal, over(visible, thermal)))
    task = lab.task("fuse")
    with lab.seeded():
        network = saccade.create("fsatfusion", **saccade.catalogue.part("fsatfusion").tasks["fuse"])
    steps = lab.steps(150)
    lab.train(network, (task.batch(0, step) for step in range(steps)), task.loss, steps, description="fsatfusion")
    network.eval()
    with torch.no_grad():
        fused = network(a, b).image.clamp(0, 1)
    row: dict[str, Any] = {"matches": len(points), "size": list(a.shape[2:]), "steps": steps}
    for form, image in (("fused", fused), ("mean", (a + b) / 2)):
        row[form] = fusion_metrics(a[0, 0], b[0, 0], image[0, 0])
    row["pictures"] = {"thermal-visible": strip(a[0, 0], b[0, 0], fused[0, 0], (a + b)[0, 0] / 2, side=200)}
    return row


#: of the pair of cameras: corners of windows and door, (x, y) in the thermal and in the visible picture, read by eye
CORNERS = (
    ((254, 272), (706, 574)),
    ((295, 272), (825, 576)),
    ((255, 307), (706, 660)),
    ((295, 307), (825, 662)),
    ((305, 273), (843, 578)),
    ((366, 274), (1024, 578)),
    ((366, 328), (1026, 712)),
    ((305, 329), (843, 714)),
    ((375, 275), (1042, 580)),
    ((405, 275), (1140, 582)),
    ((405, 306), (1140, 660)),
    ((375, 306), (1042, 660)),
)


def over(visible_CHW: Tensor, thermal_CHW: Tensor) -> Tensor:
    """The visible picture as the thermal camera would have seen the front of the house: (3, H, W)."""
    from skimage.transform import ProjectiveTransform, warp

    thermal, visible = (torch.tensor(points, dtype=torch.float64).numpy() for points in zip(*CORNERS, strict=True))
    found = ProjectiveTransform.from_estimate(thermal, visible)
    laid = warp(visible_CHW.permute(1, 2, 0).numpy(), found, output_shape=thermal_CHW.shape[1:])
    return torch.from_numpy(laid).float().permute(2, 0, 1)


def uplift(lab: Lab) -> dict[str, Any]:
    """UPLiFT learns a step on the ViT's features of four photographs, and is judged on others."""
    from saccade.models.uplift import UPLiFT, pyramid_loss

    vit = models.load("vit-s14")
    learn = [image.expand(3, -1, -1) for image in photographs("chelsea", "rocket", "camera", "coins")]
    torch.manual_seed(0)
    model = UPLiFT(384, PATCH)

    def batches() -> Iterator[Tensor]:
        generator = lab.generator()
        while True:
            yield normalised(lab.data.crops([(x,) for x in learn], 2, 16 * PATCH, generator)[0], 3)

    steps = lab.steps(400)
    losses = lab.train(
        model, batches(), lambda m, x: pyramid_loss(m, vit, x, depth=1), steps, lr=1e-3, description="uplift"
    )
    row: dict[str, Any] = {"steps": steps, "loss": losses[-1]}
    model.eval()
    shown: list[Tensor] = []
    for name, image in zip(("astronaut", "coffee"), photographs("astronaut", "coffee")):
        large = normalised(square(image, 32 * PATCH), 3)
        small = F.interpolate(large, scale_factor=0.5, mode="bilinear", antialias=True)
        truth, start = (backbone_features(vit, x, PATCH) for x in (large, small))
        with torch.no_grad():
            ours = model(small, start, iters=1).steps[0]
        bilinear = F.interpolate(start, truth.shape[2:], mode="bilinear")
        for form, found in (("uplift", ours), ("bilinear", bilinear)):
            row[f"{name}_{form}_mse"] = float((found - truth).square().mean())
            row[f"{name}_{form}_cosine"] = float(F.cosine_similarity(found, truth, dim=1).mean())
        with torch.no_grad():
            three = model(normalised(square(image, 16 * PATCH), 3), start, iters=3).steps[-1]
        tokens = truth.flatten(2)[0]
        basis = torch.pca_lowrank(tokens.T, 3, niter=4)[2]

        def colours(features: Tensor, basis: Tensor = basis, tokens: Tensor = tokens) -> Tensor:
            seen = torch.einsum("chw,ck->khw", features[0] - tokens.mean(1)[:, None, None], basis)
            reference = basis.T @ (tokens - tokens.mean(1, keepdim=True))
            low, high = reference.quantile(0.02, 1), reference.quantile(0.98, 1)
            return ((seen - low[:, None, None]) / (high - low)[:, None, None]).clamp(0, 1)

        near = [F.interpolate(colours(x)[None], (224, 224))[0] for x in (start, truth)]
        shown += [square(image, 224)[0], near[0], colours(bilinear), colours(ours), colours(three), near[1]]
    row["pictures"] = {f"uplift-{i}": strip(*shown[i * 6 : i * 6 + 6]) for i in range(2)}
    return row


def beside_heat_maps(
    lab: Lab, slug: str, on: str, count: int, read: Callable[[Any], Tensor], name: str
) -> dict[str, Any]:
    """A network trained on its task, and its maps of photographs beside those of the real one.

    Args:
        lab: of seeds and steps.
        slug, on: of network and task.
        count: of steps.
        read: what the network returns on one image -> its map (H, W).
        name: of the pictures.
    """
    real, task = models.load("saliency"), lab.task(on)
    with lab.seeded():
        network = saccade.create(slug, **saccade.catalogue.part(slug).tasks[on])
    steps = lab.steps(count)
    lab.train(network, (task.batch(0, step) for step in range(steps)), task.loss, steps, lr=2e-3, description=slug)
    network.eval()
    row: dict[str, Any] = {"steps": steps, task.metric.name: task.quality(network), "correlation": {}}
    shown = []
    for photograph, image in zip(JUDGE, photographs(*JUDGE), strict=True):
        picture = square(image, 224)
        heat = real(picture[0])
        with torch.no_grad():
            found = read(network(normalised(picture, 3)))
        row["correlation"][photograph] = correlation(found, heat)
        shown += [picture[0], heat, found]
    return row | {"pictures": {f"{name}-{i + 1}": strip(*shown[6 * i : 6 * i + 6], side=160) for i in range(2)}}


def saliency(lab: Lab) -> dict[str, Any]:
    """CPDR, trained for minutes on generated scenes of the task, beside the heat maps of a real network."""
    return beside_heat_maps(lab, "cpdr", "salient", 400, lambda said: said.logits.sigmoid()[0, 0], "saliency")


def gaze(lab: Lab) -> dict[str, Any]:
    """Gaze-LLE's decoder learns on the frozen ViT where people of generated scenes look."""
    from saccade.models.gaze_lle import GazeLLE, gaze_loss
    from saccade.train.data.looking import Gazes, gazes

    side, count = lab.size(12 * PATCH, 4 * PATCH), lab.size(160, 8)
    torch.manual_seed(0)
    model = GazeLLE(384, dim=64, num_layers=2, num_heads=4, inout=True, out_size=None).on(models.load("vit-s14"))

    def seen(scenes: Gazes) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """Features, heads, targets and whether these are in the picture, the last two of each person."""
        maps = torch.cat([model.features(normalised(images, 3)) for images in scenes.images.split(16)])
        heads = [boxes[there] for boxes, there in zip(scenes.boxes, scenes.there, strict=True)]
        targets = scenes.targets[:, None].expand(-1, scenes.there.shape[1], -1)[scenes.there]
        return maps, heads, targets, scenes.inside[scenes.there]

    learn = gazes(count, side, lab.generator(), photographs("chelsea", "coffee", "rocket"))
    judge = gazes(lab.size(48, 8), side, lab.held_out(), photographs("astronaut"))
    maps, heads, targets, inside = seen(learn)
    people = torch.tensor([0, *(len(each) for each in heads)]).cumsum(0)

    def batches() -> Iterator[Tensor]:
        generator = lab.generator()
        while True:
            yield torch.randperm(count, generator=generator)[:16]

    def loss(model: nn.Module, chosen: Tensor) -> Tensor:
        rows = torch.cat([torch.arange(people[i], people[i + 1]) for i in chosen.tolist()])
        said = model(features=maps[chosen], bboxes=[heads[i] for i in chosen.tolist()])
        return gaze_loss(said, targets[rows], inside[rows], sigma=1.0)

    steps = lab.steps(300)
    losses = lab.train(model, batches(), loss, steps, lr=2e-3, description="gaze-lle")
    model.eval()
    held, held_heads, truth, shown = seen(judge)
    with torch.no_grad():
        heat = model(features=held, bboxes=held_heads).heatmap
    best = heat.flatten(1).argmax(1)
    found = torch.stack([best % heat.shape[2] + 0.5, best // heat.shape[2] + 0.5], 1) / heat.shape[2]
    first = torch.tensor([0, *(len(each) for each in held_heads)]).cumsum(0)[:6]
    tiles = []
    for number in range(4):
        tiles += [judge.images[number], spread(heat[first[number]])]
    return {
        "steps": steps,
        "loss": losses[-1],
        "l2": float((found - truth)[shown].norm(dim=1).mean()),
        "l2_of_the_middle": float((truth - 0.5)[shown].norm(dim=1).mean()),
        "pictures": {"gaze": strip(*tiles, side=140)},
    }


def conditions(lab: Lab) -> dict[str, Any]:
    """Conditional cross-attention on the frozen ViT finds by shape or by colour, beside one space for both."""
    from saccade.models.conditional_cross_attention import ConditionalViT, triplet_loss

    colours = torch.tensor([[0.9, 0.2, 0.2], [0.2, 0.8, 0.2], [0.25, 0.35, 0.95], [0.9, 0.8, 0.1]])
    side, drawn = 8 * PATCH, shapes(4 * PATCH)
    networks: dict[str, ConditionalViT] = {}
    for form, spaces in (("conditional", 2), ("shared", 1)):
        torch.manual_seed(0)
        networks[form] = ConditionalViT.from_vit(models.load("vit-s14"), spaces, embedding_dim=32, frozen=True)

    def things(count: int, generator: torch.Generator, *names: str) -> tuple[Tensor, Tensor, Tensor]:
        """Images of a shape before a photograph, their tokens, and shape and colour (count, 2)."""
        labels = torch.randint(4, (count, 2), generator=generator)
        (images,) = crops([[photograph] for photograph in photographs(*names)], count, side, generator)
        places = torch.randint(side - len(drawn[0]) + 1, (count, 2), generator=generator).tolist()
        for image, (shape, colour), (top, left) in zip(images, labels.tolist(), places, strict=True):
            window = image[:, top : top + len(drawn[0]), left : left + len(drawn[0])]
            window.copy_(torch.where(drawn[shape] > 0, colours[colour][:, None, None], window))
        with torch.no_grad():
            tokens = [networks["shared"].tokens(normalised(part, 3)) for part in images.split(32)]
        return images, torch.cat(tokens), labels

    def triplets(labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Which image is anchor, alike and unlike (count, 3) by half the triplets' shapes and the others' colours."""
        attribute = torch.arange(count) % 2
        alike = labels[:, None] == labels
        anchor = torch.randint(len(labels), (count,), generator=generator)
        same = alike[anchor, :, attribute].float()
        same[torch.arange(count), anchor] = 0
        chosen = [
            torch.multinomial(each, 1, generator=generator)[:, 0]
            for each in (same, 1 - alike[anchor, :, attribute].float())
        ]
        return torch.stack([anchor, *chosen], 1), attribute

    def embedded(model: ConditionalViT, tokens: Tensor, rows: Tensor, attribute: Tensor) -> tuple[Tensor, ...]:
        condition = (attribute * (model.head.num_attributes > 1)).repeat_interleave(3)
        said = F.normalize(model.head(tokens[rows.flatten()], condition), dim=-1)
        return said.unflatten(0, (-1, 3)).unbind(1)

    _, learn, learn_labels = things(lab.size(384, 16), lab.generator(), "chelsea", "coffee", "rocket")
    images, held, held_labels = things(lab.size(192, 16), lab.held_out(), "astronaut")
    judged, judged_by = triplets(held_labels, lab.size(1024, 8), lab.held_out())
    found: dict[str, Any] = {"steps": lab.steps(150)}
    for form, model in networks.items():

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            generator = lab.generator()
            while True:
                yield triplets(learn_labels, 32, generator)

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            anchor, alike, unlike = embedded(cast(ConditionalViT, model), learn, *batch)
            return triplet_loss(anchor, alike, unlike)

        lab.train(model, batches(), loss, found["steps"], lr=3e-4, description=form)
        model.eval()
        with torch.no_grad():
            anchor, alike, unlike = embedded(model, held, judged, judged_by)
        right = ((anchor * alike).sum(1) > (anchor * unlike).sum(1)).float()
        found[form] = {
            f"triplets in order by {name}": float(right[judged_by == k].mean())
            for k, name in enumerate(("shape", "colour"))
        }
    with torch.no_grad():
        spaces = F.normalize(networks["conditional"].head(held), dim=-1)
    tiles = []
    for k in range(2):
        near = spaces[:, k] @ spaces[0, k]
        tiles += [images[i] for i in near.topk(5).indices]
    return found | {"pictures": {"conditions": strip(*tiles, side=90)}}


def maps(lab: Lab) -> dict[str, Any]:
    """SUM, trained for minutes on discs before photographs, beside the heat maps of a real network."""
    return beside_heat_maps(lab, "sum", "look", 300, lambda said: spread(said.heatmap[0]), "maps")
