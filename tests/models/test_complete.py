"""Complete networks on files: read, run, told, drawn; weights by name; and the command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from saccade import catalogue
from saccade.cli import main
from saccade.models.captioning import Captioner
from saccade.models.detection import Detector
from saccade.models.embedding import Embedder
from saccade.models.flow import FlowNetwork
from saccade.models.fusion import Fused, Fuser
from saccade.models.han import HAN
from saccade.models.heatmap import HeatmapNetwork
from saccade.models.images import colours, luma, middle, normalised, read_image, to_picture
from saccade.models.matching import Matcher
from saccade.models.moments import StreamNetwork
from saccade.models.multitask import MultitaskNetwork
from saccade.models.resnest import ResNeSt
from saccade.models.scene import SceneNetwork
from saccade.models.segmentation import SaliencyNetwork, Segmenter
from saccade.report import predictions

RUNNABLE = predictions.runnable()
#: on photographs; the files of the others are volumes, events, scenes or features, and tested in their rooms, as those
#: are that need an encoder in front of them
SEEING = [
    slug
    for slug in RUNNABLE
    if slug not in ("evenhancer", "hff-net", "taptrv2", "show-attend-tell", "token-gating", "visual-sentinel")
    and not issubclass(catalogue.part(slug).build, (SceneNetwork, StreamNetwork))
]
#: of two images one
FUSERS = [slug for slug in RUNNABLE if issubclass(catalogue.part(slug).build, Fuser)]
GOLDEN = Path(__file__).parent.parent / "golden"
#: a network of BEVANet's, small, as the command takes it
SMALL = (
    "bevanet:num_classes=3,planes=4,blocks=(1,1,1,1,1),semantic_kernels=(0,35,0),detail_kernels=(0,0),expand=2,"
    "pyramid_channels=4,head_channels=4"
)


def tiny(slug: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return catalogue.create(slug, **catalogue.part(slug).example)


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "photograph.png"
    to_picture(torch.rand(3, 40, 52)).save(path)
    return path


def test_every_model_but_the_heads_and_what_needs_a_backbone_runs_on_files() -> None:
    models = {part.slug for part in catalogue.parts() if part.kind.published}
    # dfyp's inputs are satellite bands by year
    told_more = {"joint-attention-estimation", "oat"}  # where people are and look, what is searched for
    told_more |= {"vinvl", "zsad-codesign"}  # what is written beside the image, and of what class it is
    # they read rows of tables, words, features of documents, and what a language model thinks
    no_images = {"ctr-representation-survey", "dream", "premise", "sentence-fusion"}
    assert set(RUNNABLE) == models - {"dfyp", "dynamic-head", "uplift"} - told_more - no_images


@pytest.mark.parametrize("slug", SEEING)
def test_files_in_answers_and_a_picture_out(slug: str, photograph: Path) -> None:
    model = tiny(slug).train()
    output = model.predict([photograph] * len(model.views))
    assert model.training and [image.shape for image in output.images] == [(3, 40, 52)] * len(model.views)
    assert torch.equal(output.images[0], read_image(photograph))
    (said,) = model.answer(output)
    assert said
    picture = model.picture(output)
    assert picture.width >= 52 and picture.height >= 40 and len(set(picture.getdata())) > 5
    assert not any(t.requires_grad for t in predictions.tensors(output).values())
    if len(model.views) == 1 and not getattr(model, "together", False):  # two images of one thing say more than one
        twice = model.predict([photograph, photograph])
        assert model.picture(twice).height == 2 * picture.height and model.answer(twice)[1] == pytest.approx(said)


@pytest.mark.parametrize("slug", FUSERS)
def test_two_files_in_one_picture_out(slug: str, photograph: Path, tmp_path: Path) -> None:
    model, warm = tiny(slug).train(), tmp_path / "warm.png"
    to_picture(torch.rand(1, 40, 52).expand(3, -1, -1)).save(warm)
    output = model.predict([warm, photograph])
    assert model.training and output.image.shape == (1, 3, 40, 52)
    assert output.image.min() >= 0 and output.image.max() <= 1
    infrared, visible = (read_image(path) for path in (warm, photograph))
    assert torch.equal(output.images[0], infrared) and torch.equal(output.images[1], visible)
    (said,) = model.answer(output)
    assert said["size"] == "52 x 40" and set(said) == {
        "size", "correlation with infrared", "correlation with visible"
    }  # fmt: skip
    assert model.picture(output).size == (3 * 52, 40)
    to_picture(torch.rand(3, 8, 9)).save(tmp_path / "small.png")
    for files, message in (
        ([warm], r"files must be 2 \(infrared, visible\), got 1"),
        ([warm, tmp_path / "small.png"], "infrared and visible images must have one size, got 52 x 40 and 9 x 8"),
    ):
        with pytest.raises(ValueError, match=message):
            model.predict(files)


class Mean(Fuser):
    def __init__(self) -> None:
        super().__init__()
        self.share = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, infrared: torch.Tensor, visible: torch.Tensor) -> Fused:
        return Fused(self.share * infrared + (1 - self.share) * visible)


def test_the_fused_image_has_the_visible_ones_colours(tmp_path: Path) -> None:
    torch.manual_seed(0)
    infrared, visible = 0.4 + 0.2 * torch.rand(2, 3, 6, 7)
    for name, image in (("warm", infrared), ("seen", visible)):
        to_picture(image).save(tmp_path / f"{name}.png")
    output = Mean().predict([tmp_path / "warm.png", tmp_path / "seen.png"])
    infrared, visible = output.images
    torch.testing.assert_close(luma(output.image)[0], (luma(infrared) + luma(visible)) / 2)
    for one, other in ((2, 1), (0, 1)):  # U and V are in proportion to what blue and red are above Y
        torch.testing.assert_close(output.image[0, one] - output.image[0, other], visible[one] - visible[other])


def test_the_command_takes_files_two_by_two(
    capsys: pytest.CaptureFixture[str], photograph: Path, tmp_path: Path
) -> None:
    small, warm = "fsatfusion:grid=(14,14)", tmp_path / "warm.png"
    to_picture(torch.rand(3, 40, 52)).save(warm)
    code, out, _ = said(capsys, "run", small, warm, photograph, "--out", tmp_path / "fused.png")
    assert code == 0 and "correlation with infrared" in out and "warm.png" in out
    assert Image.open(tmp_path / "fused.png").size == (3 * 52, 40)
    code, out, _ = said(capsys, "run", small, warm, photograph, photograph, warm, "--out", tmp_path / "both", "--json")
    assert code == 0 and [row["file"] for row in json.loads(out)] == [
        f"{warm} + {photograph}",
        f"{photograph} + {warm}",
    ]
    assert {path.name for path in (tmp_path / "both").iterdir()} == {
        "warm-fsatfusion.png", "photograph-fsatfusion.png"
    }  # fmt: skip
    code, _, err = said(capsys, "run", small, warm, "--out", tmp_path / "alone.png")
    assert code == 2 and "'fsatfusion' takes 2 files together (infrared, visible), got 1" in err
    assert not (tmp_path / "alone.png").exists()


@pytest.mark.parametrize("slug", SEEING)
def test_maps_have_the_size_of_the_image(slug: str, photograph: Path) -> None:
    model = tiny(slug)
    found = predictions.tensors(model.predict([photograph] * len(model.views)))
    if "image" in found:
        scale = getattr(model, "scale", 1)
        assert found["image"].shape == (1, 3, 40 * scale, 52 * scale)
        assert found["image"].min() >= 0 and found["image"].max() <= 1
    elif isinstance(model, SaliencyNetwork):
        assert found["logits"].shape == (1, 1, 40, 52)
    elif isinstance(model, FlowNetwork):
        assert found["flow"].shape == found["backward"].shape == (1, 2, 40, 52)
    elif isinstance(model, HeatmapNetwork):
        assert found["heatmap"].shape == (1, 40, 52)
    elif isinstance(model, Segmenter):
        classes = catalogue.part(slug).example["num_classes"]
        assert found["logits"].shape == (1, classes, 40, 52)
    elif isinstance(model, MultitaskNetwork):
        assert all(found[f"logits.{t}"].shape[2:] == (40, 52) for t in range(len(model.tasks)))
    elif isinstance(model, Detector):
        assert found["boxes"].shape == (1, 15, 4) and found["scores"].shape == (1, 15)
        if slug == "rt-detrv2":  # whose boxes come of a sigmoid
            assert (found["boxes"] <= torch.tensor([70, 60, 70, 60])).all()
    elif isinstance(model, Matcher):
        assert found["keypoints0"].shape == found["keypoints1"].shape == (len(found["confidence"]), 2)
    elif isinstance(model, HeatmapNetwork):
        assert found["heatmap"].shape == (1, 40, 52)
    elif isinstance(model, Captioner):
        assert found["words"].shape[0] == 1 and found["words"].ndim == 2
    elif isinstance(model, Embedder):
        assert found["embedding"].shape[0] == 1 and float(found["embedding"].square().sum()) == pytest.approx(1)
    else:
        assert found["logits"].ndim == 2
        # vtff also sees patterns of the image before it is normalised, diffssl it in [-1, 1]; tested in their rooms
        if slug in ("vtff", "diffssl"):
            return
        square = normalised(middle(read_image(photograph), model.image_size)[None], 3)
        torch.testing.assert_close(found["logits"], model.eval()(square).logits)


@pytest.mark.parametrize("slug", RUNNABLE)
def test_weights_of_our_own_names_and_of_the_authors(slug: str, tmp_path: Path) -> None:
    model, other = tiny(slug), tiny(slug)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    save_file({name: t.contiguous().clone() for name, t in model.state_dict().items()}, tmp_path / "own.safetensors")
    other.load(tmp_path / "own.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values()))
    save_file({"strange": torch.zeros(2)}, tmp_path / "strange.safetensors")
    with pytest.raises(ValueError, match=r"strange.safetensors does not fit"):
        other.load(tmp_path / "strange.safetensors")


def test_the_authors_whole_networks_are_taken(tmp_path: Path) -> None:
    # there is no authors' code of the whole, or no recording of it
    nobodys = {
        "conditional-cross-attention",
        "context-aware-fusion",
        "joint-fusion-encoder",
        "medusa",
        "ms-occ",
        "structured-awareness-decoder",
        "vtff",
    }
    with_port = [slug for slug in RUNNABLE if catalogue.part(slug).ports and slug not in nobodys]
    for slug in with_port:
        recording = GOLDEN / slug / f"{catalogue.part(slug).build.authors_module}.a.safetensors"
        assert recording.is_file(), recording
    recorded = load_file(GOLDEN / "han" / "han.a.safetensors")
    state = {name[6:]: tensor for name, tensor in recorded.items() if name.startswith("param.")}
    torch.save({"state_dict": state}, tmp_path / "han.pt")
    model = HAN.from_authors(tmp_path / "han.pt", scale=2, groups=10, blocks=1, channels=8, reduction=4)
    assert not model.training
    torch.testing.assert_close(model(recorded["input.x"]).image, recorded["output.y"], rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match=r"resnest was published as .*; got 'huge'"):
        ResNeSt.from_authors(tmp_path / "han.pt", "huge")


def test_images_of_every_mode_are_read(tmp_path: Path) -> None:
    grey = torch.arange(35, dtype=torch.float32).reshape(5, 7) / 34
    deep = Image.frombytes("I;16", (7, 5), (grey * 65535).round().to(torch.int32).numpy().astype("<u2").tobytes())
    deep.save(tmp_path / "deep.png")
    torch.testing.assert_close(read_image(tmp_path / "deep.png"), grey.expand(3, 5, 7), atol=1e-4, rtol=0)
    to_picture(grey.expand(3, 5, 7)).convert("L").save(tmp_path / "grey.png")
    torch.testing.assert_close(read_image(tmp_path / "grey.png"), grey.expand(3, 5, 7), atol=0.002, rtol=0)
    to_picture(grey.expand(3, 5, 7)).convert("RGBA").save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").shape == (3, 5, 7)
    turned = Image.Exif()
    turned[274] = 6  # to be turned by a quarter
    to_picture(grey.expand(3, 5, 7)).save(tmp_path / "turned.png", exif=turned)
    torch.testing.assert_close(read_image(tmp_path / "turned.png")[0], grey.rot90(-1), atol=0.002, rtol=0)


def test_what_networks_see() -> None:
    image = torch.rand(3, 100, 60)
    assert middle(image, 32).shape == (3, 32, 32) and middle(torch.rand(3, 1, 1), 8).shape == (3, 8, 8)
    flat = torch.tensor([0.485, 0.456, 0.406])[:, None, None].expand(3, 4, 4)[None]
    assert normalised(flat, 3).abs().max() < 1e-6 and normalised(flat, 1).shape == (1, 1, 4, 4)
    with pytest.raises(ValueError, match="this network takes 4"):
        normalised(flat, 4)
    assert len({tuple(colour) for colour in colours(40).tolist()}) == 40


def test_refusals(tmp_path: Path, photograph: Path) -> None:
    model = tiny("bevanet")
    (tmp_path / "text.png").write_text("no image")
    to_picture(torch.rand(3, 8, 9)).save(tmp_path / "small.png")
    for files, error, message in (
        ([], ValueError, "at least one image"),
        (tmp_path / "none.png", FileNotFoundError, "no image at"),
        (tmp_path, IsADirectoryError, "is a folder"),
        (tmp_path / "text.png", ValueError, "is no image that can be read"),
        ([photograph, tmp_path / "small.png"], ValueError, "one size, got 52 x 40, 9 x 8"),
    ):
        with pytest.raises(error, match=message):
            model.predict(files)
    with pytest.raises(ValueError, match="must be one of predict"):
        model.picture(model.eval()(torch.rand(1, 3, 40, 40)))
    with pytest.raises(ValueError, match="names must be one for each of 3 classes, got 2"):
        model.picture(model.predict(photograph), ["road", "sky"])
    headless = catalogue.create("twins", **{**catalogue.part("twins").example, "num_classes": 0})
    with pytest.raises(ValueError, match="has no head"):
        headless.answer(headless.predict(photograph))


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return int(exit_.value.code or 0), *capsys.readouterr()


def test_the_command_draws_tells_and_keeps(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, photograph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("road\nsky\ntree\n", encoding="utf-8")
    code, out, err = said(capsys, "run", SMALL, photograph, "--names", "names.txt")
    assert code == 0 and "untrained" in err and any(name in out for name in ("road", "sky", "tree"))
    assert Image.open(tmp_path / "runs" / "photograph-bevanet.png").size[1] >= 40

    model = tiny("bevanet")
    save_file({name: t.contiguous().clone() for name, t in model.state_dict().items()}, tmp_path / "own.safetensors")
    code, out, err = said(
        capsys, "run", SMALL, photograph, "--weights", "own.safetensors", "--out", "t.safetensors", "--json"
    )
    assert code == 0 and not err
    (row,) = json.loads(out)
    assert row["file"] == str(photograph) and sum(row["answer"].values()) == pytest.approx(1)
    expected = model.predict(photograph).logits
    torch.testing.assert_close(load_file(tmp_path / "t.safetensors")["logits"], expected)

    code, _, _ = said(capsys, "run", SMALL, photograph, photograph, "--out", "several")
    assert code == 0 and len(list((tmp_path / "several").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("moba", "a.png"), "'moba' does not run on files; .*bevanet.* do"),
        (("dynamic-head", "a.png"), "does not run on files"),
        (("bevanett", "a.png"), "did you mean 'bevanet'"),
        (("bevanet", "a.png", "--size", "huge"), "was published as BEVANet-S"),
        (("bevanet:num_clases=3", "a.png"), "has no option 'num_clases'"),
        ((SMALL, "a.png"), "no image at a.png"),
        ((SMALL, "a.png", "--weights", "b.pt"), "no checkpoint file at b.pt"),
        ((SMALL, "a.png", "--out", "a.tiff"), "out must end in .png"),
        ((SMALL, "a.png", "b.png", "--out", "a.png"), "out must be a folder"),
        ((SMALL, "a.png", "--names", "none.txt"), "none.txt"),
        ((SMALL, "a.png", "--device", "mps"), "device must be cpu"),
    ],
)
def test_bad_requests_are_one_line(
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = said(capsys, "run", *arguments)
    assert code == 2
    lines = [line for line in err.splitlines() if "untrained" not in line]
    assert len(lines) == 1 and re.search(message, lines[0]), err
