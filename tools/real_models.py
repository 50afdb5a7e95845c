"""What stands beside real pretrained models: figures and pictures for docs/real-models.md.

    python tools/real_models.py [SECTION ...] [--quick]

Sections whose packages are not installed are left out and say so; `saccade.train.models` names the packages. Figures
are kept in docs/real-models.json, so that a run of one section leaves the others as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade
from saccade.bench import records
from saccade.explain.gaze.maps import correlation
from saccade.models.images import normalised, read_image
from saccade.models.upsampling import backbone_features
from saccade.train import models
from saccade.train.data.looking import shapes
from saccade.train.data.pictures import crops, photographs
from saccade.train.files import write_text
from saccade.train.lab import Lab

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

DOCS = Path(__file__).parent.parent / "docs"
PATCH = 14

#: scikit-image's photographs that are looked at
JUDGE = ("astronaut", "coffee", "rocket", "chelsea")
#: gates and their arguments
GATES: dict[str, dict[str, Any]] = {"cbam": {"reduction": 4}, "triplet": {}, "das": {}}


# ---------------------------------------------------------------------------- what sections share


def square(image_CHW: Tensor, side: int) -> Tensor:
    """The middle square at another size, (1, C, side, side)."""
    least = min(image_CHW.shape[1:])
    top, left = ((n - least) // 2 for n in image_CHW.shape[1:])
    cut = image_CHW[None, :, top : top + least, left : left + least]
    return F.interpolate(cut, (side, side), mode="bilinear", antialias=True).clamp(0, 1)


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


def saved(pictures: Mapping[str, Picture], page: Path) -> list[str]:
    """Write pictures into the folder beside a page that has its name; the lines by which the page shows them."""
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png", optimize=True)
    return [f"![{name}]({folder.name}/{name}.png)" for name in pictures]


# ---------------------------------------------------------------------------- sections


def gates(lab: Lab) -> dict[str, Any]:
    """Gates put gently into EfficientNet-lite0 change nothing at the start."""
    network, row = models.load("efficientnet-lite0"), {}
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


def paragraph_pairs(pairs: int, generator: torch.Generator, held_out: bool) -> tuple[list[str], list[str], Tensor]:
    """Ends and beginnings of paragraphs of Python's reference, and whether a new topic begins between them (B,).

    Half of them follow each other in one topic. A fifth of the topics is held out, whole; no paragraph is taken twice.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    texts = []
    for number, name in enumerate(sorted(topics)):
        paragraphs = [p for p in topics[name].split("\n\n") if len(p.split()) >= 20 and p not in seen]
        seen.update(paragraphs)
        if (number % 5 == 4) == held_out and len(paragraphs) > 2:
            texts.append(paragraphs)
    sizes = torch.tensor([len(paragraphs) - 1.0 for paragraphs in texts])
    lefts, rights = [], []
    label_B = torch.arange(pairs) % 2
    for label in label_B.tolist():
        here, there = torch.multinomial(sizes, 2, generator=generator).tolist()
        i, j = (int(torch.randint(len(texts[t]) - 1, (), generator=generator)) for t in (here, there))
        lefts.append(texts[here][i])
        rights.append(texts[there][j] if label else texts[here][i + 1])
    return lefts, rights, label_B


def patterns(lab: Lab) -> dict[str, Any]:
    """MiniLM says where a new topic begins: patterns found in its heads, and put into it.

    It is fine-tuned once; then the paper's patterns are looked for, and it is fine-tuned again as it is, with them in
    the heads where they were found, in four heads of every layer, and in projected layers, beside such without them.
    """
    import copy
    from contextlib import nullcontext

    from saccade.explain.human_guided_patterns import (
        BoundaryClassifier,
        ProjectedLayers,
        injected,
        projected,
        relevance,
        segmentation,
    )

    side, steps, size = 24, lab.size(40, 1), lab.size(12, 2)
    encoder, tokenizer = models.load("minilm")
    encoder.requires_grad_(True)
    named = segmentation(tokenizer.sep_token_id)

    def inputs(lefts: list[str], rights: list[str]) -> dict[str, Tensor]:
        ids = [
            [tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in texts]
            for texts in (lefts, rights)
        ]
        rows = [
            [tokenizer.cls_token_id, *left[-side:], tokenizer.sep_token_id, *right[:side]]
            for left, right in zip(*ids, strict=True)
        ]
        longest = max(map(len, rows))
        return {
            "input_ids": torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        }

    lefts, rights, held_B = paragraph_pairs(lab.size(240, 8), lab.held_out(), True)
    held = [inputs(lefts[i : i + 50], rights[i : i + 50]) for i in range(0, len(lefts), 50)]

    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head, self.beside = encoder, BoundaryClassifier(384), nn.ModuleList()

        def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
            return self.head(self.encoder(**batch).last_hidden_state)

    def batches(seed: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            lefts, rights, label_B = paragraph_pairs(size, generator, False)
            yield inputs(lefts, rights), label_B

    def loss(model: nn.Module, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
        return cast(Segmenter, model).head.loss(model(batch[0]), batch[1]).loss

    @torch.no_grad()
    def percent(model: nn.Module) -> float:
        model.eval()
        said = torch.cat([model(batch) for batch in held])
        return 100 * float(((said > 0) == held_B.bool()).float().mean())

    with lab.seeded():
        model = Segmenter()
    lab.train(model, batches(1), loss, 3 * steps // 2, lr=1e-4, description="MiniLM")
    found: dict[str, Any] = {"held-out pairs": len(held_B), "percent after fine-tuning": percent(model)}
    labels = {id(batch): part for batch, part in zip(held, held_B.split(50))}

    def errors(said: Any, batch: Mapping[str, Tensor]) -> Tensor:
        logits = model.head(said.last_hidden_state)
        return F.binary_cross_entropy_with_logits(logits, labels[id(batch)].float(), reduction="none")

    seen = relevance(encoder, held[:4], named, loss=errors)
    kept = seen.kept(alone=True)
    for p, name in enumerate(named):
        best = seen.relevance[..., p]
        found[f"relevance of {name}: mean of heads, best head, density"] = [
            float(best.mean()), float(best.max()), float(seen.density[p]),
        ]  # fmt: skip
        found[f"heads of {name} (layer.head)"] = [f"{layer}.{head}" for layer, head in kept.get(name, [])]
    state = copy.deepcopy(model.state_dict())
    with lab.seeded():
        plain, special = (ProjectedLayers.beside(encoder, 128, 4) for _ in range(2))
        special.load_state_dict(plain.state_dict())
    forms = {
        "as it is": lambda: nullcontext(),
        "patterns where they were found": lambda: injected(encoder, named, heads=kept),
        "patterns in 4 of 12 heads": lambda: injected(encoder, named),
        "projected layers without patterns": lambda: projected(encoder, plain),
        "projected layers with patterns": lambda: projected(encoder, special, named),
    }
    beside = {"projected layers without patterns": plain, "projected layers with patterns": special}
    for name, form in forms.items():
        model.load_state_dict(state)
        model.beside = nn.ModuleList([beside[name]] if name in beside else [])
        with form():
            if "heads" in name or "found" in name:
                found[f"percent, {name}, at once"] = percent(model)
            lab.train(model, batches(2), loss, steps, lr=1e-4, description=name)
            found[f"percent, {name}, fine-tuned again"] = percent(model)
        model.beside = nn.ModuleList()
    return found


def spread(x: Tensor) -> Tensor:
    """To [0, 1]."""
    return (x - x.min()) / (x.max() - x.min()).clamp(min=1e-9)


def text(kept: records.Kept) -> str:
    """The page of the kept figures."""
    lines = [
        "# Beside real pretrained models",
        "",
        "Made by `python tools/real_models.py`; do not edit. The models are those of `saccade.train.models`; what of",
        "ours stands beside them was trained here for minutes, from nothing.",
        "",
    ]
    for name, row in kept.items():
        section = SECTIONS[name]
        lines += [f"## {(section.__doc__ or '').splitlines()[0].rstrip('.')}", ""]
        lines += [f"{row['machine']}, {row['date']}.", ""]
        lines += [*row.get("pictures", ()), ""] if row.get("pictures") else []
        lines += [f"{CAPTIONS[name]}", ""] if name in CAPTIONS else []
        lines += [*records.table(["figure", "value"], flat(row)), ""]
    return "\n".join(lines)


#: what the pictures of a section show, from left to right
CAPTIONS = {
    "uplift": "Photograph; features of a 16 x 16 grid (three principal components of the truth); bilinear to 32 x 32; "
    "one step of UPLiFT; three steps; the ViT's own features at 32 x 32.",
    "fusion": "Thermal, visible (laid over it), fused, the mean of both.",
    "saliency": "Photograph, the real network's heat map, ours; two photographs a row.",
    "gaze": "Scenes, each with where its first person is said to look.",
    "conditions": "An image that was not learned from and the four nearest to it by shape; the same by colour.",
    "maps": "Photograph, the real network's heat map, ours; two photographs a row.",
}


def flat(row: dict[str, Any], before: str = "") -> list[list[str]]:
    """Figures of a section, a line each."""
    lines = []
    for name, value in row.items():
        if isinstance(value, dict):
            lines += flat(value, f"{before}{name} ")
        elif name not in ("machine", "date", "pictures"):
            values = value if isinstance(value, list) else [value]
            lines.append([before + name, ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values)])
    return lines


SECTIONS: dict[str, Callable[[Lab], dict[str, Any]]] = {
    "gates": gates,
    "uplift": uplift,
    "saliency": saliency,
    "fusion": fusion,
    "gaze": gaze,
    "conditions": conditions,
    "maps": maps,
    "patterns": patterns,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="a step or two of training; what comes out means nothing")
    parser.add_argument("--json", type=Path, default=DOCS / "real-models.json", help="where figures are kept")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(sorted(unknown))}; there is {', '.join(SECTIONS)}")
    kept = records.known(options.json)
    for name in options.sections or SECTIONS:
        try:
            row = SECTIONS[name](Lab(seed=0, smoke=options.quick))
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        kept[name] = records.stamp() | row | {"pictures": saved(row.get("pictures", {}), options.json)}
        kept = {each: kept[each] for each in SECTIONS if each in kept}
        records.keep(options.json, kept)
        print(name, *(": ".join(line) for line in flat(kept[name])), sep="\n  ", flush=True)
    write_text(options.json.with_suffix(".md"), text(kept))


if __name__ == "__main__":
    main()
