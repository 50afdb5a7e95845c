"""Scenes: photographs with their cameras, read from one file, and the base of the networks that take them.

The file is JSON as NeRF, Blender and nerfstudio write it:

    {"camera_angle_x": 0.69,                          # or "fl_x", "fl_y", "cx", "cy" in pixels; of all, or of a frame
     "frames": [{"file_path": "a.png",                # beside the scene file; without a suffix: .png
                 "transform_matrix": [[..], ..]}],    # camera to world, the camera looks along -z with y up
     "render": [[..], ..],                            # a pose from which nobody took a photograph; may be missing
     "points": "lidar.xyz"}                           # a point a line, "x y z ..."; may be missing

There "cx" counts from the outer edge of the image; what is read follows `ops.rays`, where 0 is a pixel's middle.

Shape letters: V views, N points, H height, W width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.models.complete import Complete, batch
from saccade.models.images import read_image
from saccade.ops.rays import extrinsics

#: of a scene
_MOST_VIEWS, _MOST_POINTS = 10_000, 10_000_000


@dataclass(frozen=True)
class Scene:
    """Photographs of one place, and where they were taken; conventions of `ops.rays`.

    Attributes:
        images: (V, 3, H, W) in [0, 1].
        intrinsics: (V, 3, 3).
        extrinsics: (V, 3, 4), world to camera.
        target: extrinsics (3, 4) of a view that is asked for; None where the file asks for none.
        points: (N, 3) of a scanner in the world; None where there are none.
    """

    images: Tensor
    intrinsics: Tensor
    extrinsics: Tensor
    target: Tensor | None = None
    points: Tensor | None = None

    def to(self, like: Tensor) -> Scene:
        """On the device and in the precision of another tensor."""
        held = (self.images, self.intrinsics, self.extrinsics, self.target, self.points)
        return Scene(*(None if t is None else t.to(like.device, like.dtype) for t in held))  # type: ignore[arg-type]


def read_scene(path: str | Path) -> Scene:
    """A scene file with its photographs.

    Args:
        path: of the JSON file; names in it are beside it.

    Raises:
        OSError: if a file is not there or cannot be read.
        ValueError: if it is no scene, it has no views, or these have several sizes.
    """
    path = Path(path)
    said = _parsed(path)
    frames = said.get("frames")
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        raise ValueError(f"{path} must have a list of frames")
    if not 1 <= len(frames) <= _MOST_VIEWS:
        raise ValueError(f"{path} must have from 1 to {_MOST_VIEWS} frames, got {len(frames)}")
    images, places, lenses = [], [], []
    for number, frame in enumerate(frames):
        name = frame.get("file_path")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{path}: frame {number} names no file_path")
        file = path.parent / name
        images.append(read_image(file if file.suffix else file.with_suffix(".png")))
        places.append(_pose(frame.get("transform_matrix"), f"{path}: transform_matrix of frame {number}"))
        lenses.append(
            _intrinsics({**said, **frame}, images[-1].shape[2], images[-1].shape[1], f"{path}: frame {number}")
        )
    target = None if said.get("render") is None else _pose(said["render"], f"{path}: render")
    points = None if said.get("points") is None else read_points(path.parent / str(said["points"]))
    return Scene(batch(images), torch.stack(lenses), torch.stack(places), target, points)


def read_points(path: str | Path) -> Tensor:
    """Points (N, 3) of a text file with a point a line, x y z and whatever else, by white space or commas.

    Args:
        path: of the file; lines that begin with # are left out.

    Raises:
        OSError: if it cannot be read.
        ValueError: if a line holds no point, or there is none.
    """
    path, found = Path(path), []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8") from error
    for number, line in enumerate(lines[:_MOST_POINTS], 1):
        if line.strip() and not line.lstrip().startswith("#"):
            found.append(_numbers(line.replace(",", " ").split()[:3], 3, f"{path}: line {number}"))
    if not found:
        raise ValueError(f"{path} holds no points")
    return torch.tensor(found)


class SceneNetwork(Complete):
    """Base of the networks that see a scene: `predict` takes a scene file; a subclass gives `see_scene`."""

    views = ("scene",)

    def predict(self, files: str | Path | Sequence[str | Path]) -> Any:
        """What the network says of a scene file (`saccade.models.scene`), in evaluation and without gradients.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if it is not one scene, or the network cannot take it.
        """
        paths = [files] if isinstance(files, (str, Path)) else list(files)
        if len(paths) != 1:
            raise ValueError(f"files must be one scene, got {len(paths)}")
        scene, training = read_scene(paths[0]).to(next(self.parameters())), self.training
        try:
            with torch.no_grad():
                return self.eval().see_scene(scene)
        finally:
            self.train(training)

    def see_scene(self, scene: Scene) -> Any:
        """The output of a scene: run, with what `picture` needs."""
        raise NotImplementedError


def _parsed(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a scene file")
    if not path.exists():
        raise FileNotFoundError(f"no scene file at {path}")
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no scene file: {' '.join(str(error).split())}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} is no scene file: it must be an object with frames")
    return said


def _pose(rows: Any, what: str) -> Tensor:
    if not isinstance(rows, list) or len(rows) not in (3, 4) or not all(isinstance(row, list) for row in rows):
        raise ValueError(f"{what} must be 3 or 4 rows of 4 numbers")
    pose = torch.tensor([_numbers(row, 4, what) for row in rows])
    turn = pose[:3, :3]
    if not torch.allclose(turn @ turn.T, torch.eye(3), atol=1e-2):
        raise ValueError(f"{what} must be a rotation and a place, got rows {turn.tolist()}")
    return extrinsics(pose, "opengl")


def _intrinsics(said: Mapping[str, Any], width: int, height: int, what: str) -> Tensor:
    given = {name: said[name] for name in ("camera_angle_x", "fl_x", "fl_y", "cx", "cy") if said.get(name) is not None}
    known = dict(zip(given, _numbers(list(given.values()), len(given), what)))
    if "fl_x" in known:
        focal = known["fl_x"]
    elif 0 < known.get("camera_angle_x", 0) < math.pi:
        focal = width / 2 / math.tan(known["camera_angle_x"] / 2)
    else:
        raise ValueError(f"{what} must have fl_x, or camera_angle_x between 0 and pi")
    other = known.get("fl_y", focal)
    if min(focal, other) <= 0:
        raise ValueError(f"{what} must have focal lengths above 0, got {focal} and {other}")
    centre = [known.get("cx", width / 2) - 0.5, known.get("cy", height / 2) - 0.5]
    return torch.tensor([[focal, 0.0, centre[0]], [0.0, other, centre[1]], [0.0, 0.0, 1.0]])


def _numbers(values: Any, count: int, what: str) -> list[float]:
    try:
        found = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        found = []
    if len(found) != count or not all(map(math.isfinite, found)):
        raise ValueError(f"{what} must be {count} numbers, got {values!r}"[:300])
    return found
