"""What a network of gaze can be asked in the task `look`: what it is called with, its loss, its figures.

A network answers the question that its `forward` can be asked:

| `forward` takes | question | besides the AUC |
|---|---|---|
| `pixel_values, bboxes` | where each person in the picture looks | L2, in/out AP |
| `people, there` | what they look at together, told by heads and directions alone | L2 |
| `objects, targets, fixations` | at which object next, in search of one | the measures of scanpaths |
| `pixel_values` | what in a photograph draws the eye | NSS, CC, SIM, KL, sAUC, IG |

Shape letters: B batch, S pixels of a map, C channels, P people (all scenes' in a row), K classes, N objects of an
array, T steps of a search, H, W image, h, w a network's map.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.explain import gaze as measures
from saccade.models.heatmap import HeatmapOutput, gaussian, warm
from saccade.models.scanpath import ScanpathOutput
from saccade.train.data.looking import Gazes, Salients, Searches
from saccade.train.tasks.network import SHOWN, shown

#: rows and columns of arrays
GRID = (3, 4)
#: of the bump on which maps of a gaze are trained, as a share of their side; half a side of the square of a target
BUMP, HALF = 3 / 64, 9 / 64
#: images are handed to networks about 0
_MIDDLE, _SPREAD = 0.5, 0.25
#: how many of a batch's tensors are of scenes and of arrays; the rest is of photographs
_PARTS = (len(Gazes._fields), len(Searches._fields))


class Question:
    """What a network can be asked; the batch is that of `Look.drawn`."""

    def ask(self, model: nn.Module, batch: tuple[Any, ...]) -> Any:
        """What the network returns."""
        raise NotImplementedError

    def alone(self, model: nn.Module, image_BCHW: Tensor) -> Any:
        """What it returns on an image of any size and whatever else it takes, for its time and memory."""
        raise NotImplementedError

    def loss(self, said: Any, batch: tuple[Any, ...]) -> Tensor:
        """Of what it returned."""
        raise NotImplementedError

    def scores(self, model: nn.Module, batches: list[tuple[Any, ...]]) -> dict[str, float]:
        """`auc` and other figures, over held-out batches."""
        raise NotImplementedError

    def pictures(self, model: nn.Module, batch: tuple[Any, ...]) -> dict[str, Tensor]:
        """Rows of pictures, by name."""
        raise NotImplementedError


class OfEach(Question):
    """Where does each person in the picture look?"""

    def ask(self, model: nn.Module, batch: tuple[Any, ...]) -> HeatmapOutput:
        scene = Gazes(*batch[: _PARTS[0]])
        heads = [boxes[there] for boxes, there in zip(scene.boxes, scene.there)]
        return model(pixel_values=about_0(scene.images), bboxes=heads)

    def alone(self, model: nn.Module, image_BCHW: Tensor) -> HeatmapOutput:
        box = image_BCHW.new_tensor([[0.1, 0.1, 0.3, 0.3]])
        return model(pixel_values=image_BCHW, bboxes=[box] * len(image_BCHW))

    def loss(self, said: HeatmapOutput, batch: tuple[Any, ...]) -> Tensor:
        scene = Gazes(*batch[: _PARTS[0]])
        inside_P = scene.inside[scene.there]
        targets_P2 = scene.targets[:, None].expand(-1, scene.there.shape[1], -1)[scene.there]
        loss = said.heatmap.sum() * 0
        if inside_P.any():
            loss = loss + map_loss(said, _bumps(targets_P2, said.heatmap), inside_P)
        if said.inside is not None:
            loss = loss + F.binary_cross_entropy(said.inside.float().clamp(1e-6, 1 - 1e-6), inside_P.float())
        return loss

    def scores(self, model: nn.Module, batches: list[tuple[Any, ...]]) -> dict[str, float]:
        aucs, distances, sure, truth = [], [], [], []
        for batch in batches:
            scene, said = Gazes(*batch[: _PARTS[0]]), self.ask(model, batch)
            people, inside_P = torch.nonzero(scene.there)[:, 0], scene.inside[scene.there]
            for heat_hw, number, inside in zip(said.heatmap, people.tolist(), inside_P.tolist()):
                if inside:
                    auc, distance = _at_target(heat_hw, scene.targets[number], scene.images.shape[-1])
                    aucs.append(auc)
                    distances.append(distance)
            truth.append(inside_P)
            if said.inside is not None:
                sure.append(said.inside)
        found = {"auc": _mean(aucs), "l2": _mean(distances)}
        if sure:
            found["inside_ap"] = measures.in_out_precision(torch.cat(sure), torch.cat(truth))
        return found

    def pictures(self, model: nn.Module, batch: tuple[Any, ...]) -> dict[str, Tensor]:
        """Scenes, and where the first person of each is said to look, and looks."""
        scene, said = Gazes(*batch[: _PARTS[0]]), self.ask(model, batch)
        first_B = (scene.there.sum(1).cumsum(0) - scene.there.sum(1))[:SHOWN]
        truth = _bumps(scene.targets, said.heatmap)[:SHOWN] * scene.inside[:SHOWN, 0, None, None]
        return _rows(scene.images, said.heatmap[first_B], truth)


class OfAll(Question):
    """What do the people look at together?"""

    def ask(self, model: nn.Module, batch: tuple[Any, ...]) -> HeatmapOutput:
        scene = Gazes(*batch[: _PARTS[0]])
        middle = (scene.boxes[..., :2] + scene.boxes[..., 2:]) / 2
        return model(people=torch.cat([middle, scene.directions], -1), there=scene.there)

    def alone(self, model: nn.Module, image_BCHW: Tensor) -> HeatmapOutput:
        """With as many pixels in the map, and two people."""
        people = image_BCHW.new_tensor([[[0.2, 0.2, 1.0, 0.0], [0.8, 0.5, 0.0, -1.0]]]).expand(len(image_BCHW), -1, -1)
        return model(people=people, size=tuple(image_BCHW.shape[2:]))

    def loss(self, said: HeatmapOutput, batch: tuple[Any, ...]) -> Tensor:
        return map_loss(said, self.truth(said, batch))

    @staticmethod
    def truth(said: HeatmapOutput, batch: tuple[Any, ...]) -> Tensor:
        """A bump at the target where somebody looks at it."""
        scene = Gazes(*batch[: _PARTS[0]])
        return _bumps(scene.targets, said.heatmap) * scene.inside.any(1)[:, None, None]

    def scores(self, model: nn.Module, batches: list[tuple[Any, ...]]) -> dict[str, float]:
        found = []
        for batch in batches:
            scene, said = Gazes(*batch[: _PARTS[0]]), self.ask(model, batch)
            found += [
                _at_target(heat_hw, target, scene.images.shape[-1])
                for heat_hw, target, inside in zip(said.heatmap, scene.targets, scene.inside)
                if inside.any()
            ]
        return {"auc": _mean([auc for auc, _ in found]), "l2": _mean([distance for _, distance in found])}

    def pictures(self, model: nn.Module, batch: tuple[Any, ...]) -> dict[str, Tensor]:
        said = self.ask(model, batch)
        return _rows(batch[0], said.heatmap[:SHOWN], self.truth(said, batch)[:SHOWN])


class OfOrder(Question):
    """Which object is looked at next, in search of one?"""

    def ask(self, model: nn.Module, batch: tuple[Any, ...]) -> ScanpathOutput:
        array = self.array(batch)
        return model(objects=array.objects, targets=array.targets, fixations=array.paths[:, :-1])

    @staticmethod
    def array(batch: tuple[Any, ...]) -> Searches:
        """The arrays of a batch."""
        return Searches(*batch[_PARTS[0] : sum(_PARTS)])

    def alone(self, model: nn.Module, image_BCHW: Tensor) -> ScanpathOutput:
        """With the image as an array of objects, and a search of three."""
        rows, columns = GRID
        height, width = (n // each for n, each in zip(image_BCHW.shape[2:], GRID))
        tiles = image_BCHW[:, :, : rows * height, : columns * width].unflatten(3, (columns, width))
        objects = tiles.unflatten(2, (rows, height)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        places = torch.arange(3, device=image_BCHW.device).expand(len(objects), -1)
        return model(objects=objects, targets=places[:, 0], fixations=places)

    def loss(self, said: ScanpathOutput, batch: tuple[Any, ...]) -> Tensor:
        array = self.array(batch)
        nothing = array.objects.shape[1] + 1
        return F.cross_entropy(said.logits.float().flatten(0, 1), array.paths.flatten(), ignore_index=nothing)

    def scores(self, model: nn.Module, batches: list[tuple[Any, ...]]) -> dict[str, float]:
        """Of the next object after the true ones, and of whole scanpaths that the network goes alone."""
        aucs, right, kept = [], [], dict[str, list[float]]()
        for batch in batches:
            array, said = self.array(batch), self.ask(model, batch)
            number = array.objects.shape[1]
            for logits_TK, path_T in zip(said.logits.float(), array.paths):
                for logits_K, place in zip(logits_TK, path_T.tolist()):
                    if place <= number:
                        right.append(float(logits_K[: number + 1].argmax() == place))
                    if place < number:
                        others = torch.arange(number, device=logits_K.device) != place
                        aucs.append(measures.area_under(logits_K[place, None], logits_K[:number][others]))
            gone: ScanpathOutput = model.generate(array.objects, array.targets)  # type: ignore[operator]
            assert gone.places is not None and gone.lengths is not None
            cells = tuple(n * array.objects.shape[-1] for n in GRID)
            paths = [places[:length] for places, length in zip(gone.places, gone.lengths.tolist())]
            for true_T, found_T in zip(array.paths, paths):
                for name, value in _compared(true_T[true_T < number].cpu(), found_T.cpu(), cells).items():
                    kept.setdefault(name, []).append(value)
        return {"auc": _mean(aucs), "next_accuracy": _mean(right), **{name: _mean(kept[name]) for name in kept}}

    def pictures(self, model: nn.Module, batch: tuple[Any, ...]) -> dict[str, Tensor]:
        """Arrays, and how soon each object is looked at, the brighter the sooner."""
        array = self.array(batch)
        gone: ScanpathOutput = model.generate(array.objects[:SHOWN], array.targets[:SHOWN])  # type: ignore[operator]
        assert gone.places is not None and gone.lengths is not None
        objects = array.objects[:SHOWN].unflatten(1, GRID)
        images = objects.permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3, 4)
        count = array.objects.shape[1]
        found = [places[:length] for places, length in zip(gone.places, gone.lengths.tolist())]
        true = [path[path < count] for path in array.paths[:SHOWN]]
        return _rows(images, _order(found, count), _order(true, count), nearest=True)


class OfPhotograph(Question):
    """What in a photograph draws the eye?"""

    def ask(self, model: nn.Module, batch: tuple[Any, ...]) -> HeatmapOutput:
        return model(about_0(self.photograph(batch).images))

    @staticmethod
    def photograph(batch: tuple[Any, ...]) -> Salients:
        """The photographs of a batch."""
        return Salients(*batch[sum(_PARTS) :])

    def alone(self, model: nn.Module, image_BCHW: Tensor) -> HeatmapOutput:
        return model(image_BCHW)

    def loss(self, said: HeatmapOutput, batch: tuple[Any, ...]) -> Tensor:
        """KL of the true density and the map, both with sum 1."""
        heat_BS = said.heatmap.float().flatten(1).clamp(min=1e-8)
        truth_BS = gaussian(self.photograph(batch).centres, _size(said), BUMP * said.heatmap.shape[-1]).flatten(1)
        found_BS, truth_BS = (x / x.sum(1, keepdim=True) for x in (heat_BS, truth_BS))
        return F.kl_div(found_BS.log(), truth_BS, reduction="batchmean")

    def scores(self, model: nn.Module, batches: list[tuple[Any, ...]]) -> dict[str, float]:
        side = batches[0][0].shape[-1]
        maps = [heat.cpu() for batch in batches for heat in self.ask(model, batch).heatmap.float()]
        points = [each.cpu() * side for batch in batches for each in self.photograph(batch).fixations]
        ats = [measures.fixation_map(each, (side, side)) for each in points]
        every = torch.stack(ats).sum(0)
        prior = measures.density_map(torch.cat(points), (side, side)) + 1e-6
        found: dict[str, list[float]] = {}
        for map_HW, at_HW, each in zip(maps, ats, points):
            density = measures.density_map(each, (side, side))
            others = every - at_HW if len(ats) > 1 else None
            scores = measures.map_scores(
                map_HW.clamp(min=0) + 1e-9, at_HW, density, others_HW=others, baseline_HW=prior
            )
            for name, value in scores.items():
                found.setdefault("auc" if name == "auc_judd" else name, []).append(value)
        return {name: _mean(values) for name, values in found.items()}

    def pictures(self, model: nn.Module, batch: tuple[Any, ...]) -> dict[str, Tensor]:
        said, photograph = self.ask(model, batch), self.photograph(batch)
        truth = gaussian(photograph.centres, _size(said), BUMP * said.heatmap.shape[-1])
        return _rows(photograph.images, said.heatmap[:SHOWN], truth[:SHOWN])


#: an argument of `forward` that only networks of a question have -> the question
QUESTIONS: dict[str, Question] = {"bboxes": OfEach(), "people": OfAll(), "fixations": OfOrder()}


def question(model: nn.Module) -> Question:
    """What a network can be asked, by the arguments of its `forward`.

    Args:
        model: a network, or a part that says of which it is (`network`).
    """
    taken = inspect.signature(model.forward).parameters
    return next((asked for name, asked in QUESTIONS.items() if name in taken), OfPhotograph())


def map_loss(said: HeatmapOutput, truth_Phw: Tensor, kept_P: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of maps that have logits, the squared error of others; the mean over pixels.

    Args:
        said: P maps.
        truth_Phw: of their size.
        kept_P: bool, those that count; all where None.
    """
    kept: Any = slice(None) if kept_P is None else kept_P
    truth_Phw = truth_Phw[kept].float()
    if said.logits is not None:
        return F.binary_cross_entropy_with_logits(said.logits[kept].float(), truth_Phw)
    return F.mse_loss(said.heatmap[kept].float(), truth_Phw)


def about_0(images: Tensor) -> Tensor:
    """Images in [0, 1] as networks take them."""
    return (images - _MIDDLE) / _SPREAD


def _size(said: HeatmapOutput) -> tuple[int, int]:
    return said.heatmap.shape[-2], said.heatmap.shape[-1]


def _bumps(points_P2: Tensor, like_Phw: Tensor) -> Tensor:
    height, width = like_Phw.shape[-2:]
    return gaussian(points_P2, (height, width), BUMP * width)


def _at_target(heat_hw: Tensor, target_2: Tensor, side: int) -> tuple[float, float]:
    """AUC of a heat map for the square about its target, and the distance of its peak."""
    target_2 = target_2.cpu()
    heat_HW = measures.resized(heat_hw.cpu(), (side, side))
    box = measures.target_box(target_2, (side, side), round(HALF * side))
    return measures.gaze_auc(heat_HW, box), measures.gaze_distance(heat_HW, target_2[None])[0]


def _compared(true_T: Tensor, found_T: Tensor, size: tuple[int, ...]) -> dict[str, float]:
    """Scanpaths over objects: those of points, and the sequence score with an object as symbol."""
    columns, cell = GRID[1], size[1] / GRID[1]
    points = [torch.stack([path % columns + 0.5, path // columns + 0.5], 1) * cell for path in (true_T, found_T)]
    found = {"sequence_score": measures.match(true_T.tolist(), found_T.tolist())}
    if len(found_T):
        scores = measures.scanpath_scores(points[0], points[1], (size[0], size[1]))
        found |= {name: value for name, value in scores.items() if name != "multimatch_duration"}
    return found


def _order(paths: list[Tensor], count: int) -> Tensor:
    """1 where a scanpath begins, falling to 0 where nothing is looked at, (B, rows, columns)."""
    maps = torch.zeros(len(paths), count)
    for map_N, path in zip(maps, paths):
        for step, place in enumerate(path.tolist()):
            map_N[place] = max(float(map_N[place]), 1 - step / count)
    return maps.unflatten(1, GRID)


def _rows(images: Tensor, found_Phw: Tensor, truth_Phw: Tensor, nearest: bool = False) -> dict[str, Tensor]:
    images = images[:SHOWN].float().cpu()
    rows = {"input": shown(images)}
    for name, maps in (("output", found_Phw), ("truth", truth_Phw)):
        mode = "nearest" if nearest else "bilinear"
        large = F.interpolate(maps.float().cpu()[:, None], images.shape[2:], mode=mode)
        rows[name] = shown(torch.stack([warm(image, each) for image, each in zip(images, large)]))
    return rows


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
