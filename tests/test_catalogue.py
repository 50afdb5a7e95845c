from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import saccade
from saccade import catalogue

GOLDEN = Path(__file__).parent / "golden"


def test_unknown_names_answer_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no part is called 'mobba'; did you mean 'moba'"):
        saccade.create("mobba", dim=8)
    with pytest.raises(ValueError, match="planned and not built yet"):
        saccade.create("loftr")
    with pytest.raises(ValueError, match="has ports for cbam, bottleneck, not for 'nothing'"):
        catalogue.port("cbam", "nothing")


@pytest.mark.parametrize(
    ("slug", "given", "said"),
    [
        ("MoBA", {}, "no part is called 'MoBA'; did you mean 'moba'\\?"),
        ("set_transformer", {}, "did you mean 'set-transformer'\\?"),
        ("moba", {"dim": 8, "blocksize": 3}, "moba has no option 'blocksize'; did you mean 'block_size'"),
        ("moba", {"dim": 8, "kv_heads": 3}, "moba has no option 'kv_heads'; did you mean 'num_kv_heads'"),
        ("softmax", {"dim": 8, "zzz": 3}, "softmax has no option 'zzz'; it has dim, num_heads, causal, num_kv_heads"),
        ("moba", {"dim": 8, "block_size": "x"}, "moba: block_size must be an int, got 'x'"),
        ("softmax", {"dim": 8, "rope": "false"}, "softmax: rope must be True or False, got 'false'"),
        ("softmax", {"num_heads": 2}, r"softmax needs dim \(an int\)"),
        ("mra", {"dim": 8, "num_blocks": (1, "x")}, "num_blocks must be an int or a sequence of ints or None, got"),
        ("nexus", {"dim": 8, "sharing": 3}, "nexus: sharing must be 'S', 'R' or 'U', got 3"),
        ("cnntention", {"channels": 8, "num_heads": 2}, "form 'self' has no option 'num_heads'"),
    ],
)
def test_options_that_do_not_fit_are_named(slug: str, given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        saccade.create(slug, **given)


def test_options_count_those_of_the_base_classes() -> None:
    moba = catalogue.options("moba")
    assert (
        moba["dim"] == (int, catalogue.REQUIRED) and moba["block_size"] == (int, 512) and moba["rope"] == (bool, True)
    )
    assert {"text_rate", "num_kv_heads"} <= set(catalogue.options("a-vl"))
    assert {"combine", "head_dim"} <= set(catalogue.options("layerwise-shortcuts"))
    assert "hosts" not in catalogue.options("aila")
    catalogue.check_options("moba", block_size=3)
    with pytest.raises(ValueError, match="did you mean 'top_k'"):
        catalogue.check_options("moba", topk=3)


def test_parts_are_listed_without_importing_their_rooms() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from saccade import catalogue; names = [p.slug for p in catalogue.parts()];"
        "assert 'cbam' in names; print('torch' in sys.modules, 'saccade.vision.cbam' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_select_by_capability_and_taxonomy() -> None:
    assert "softmax" in {part.slug for part in catalogue.select(supports="decoding", sequences="self")}
    assert {part.kind for part in catalogue.select(kind="gate")} == {"gate"}
    with pytest.raises(ValueError, match="not in the taxonomy"):
        catalogue.select(positions="everywhere")
    with pytest.raises(ValueError, match="supports must be one of"):
        catalogue.select(supports="flying")


def test_register_refuses_what_is_not_in_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="supports must be among"):
        catalogue.register("loftr", kind="model", summary="", supports=("flying",))
    with pytest.raises(ValueError, match="taxonomy"):
        catalogue.register("loftr", kind="model", summary="", taxonomy={"levels": "seven"})


@pytest.fixture
def checkpoint() -> dict[str, torch.Tensor]:
    recorded = load_file(GOLDEN / "cbam" / "cbam.a.safetensors")
    return {key[len("param.") :]: value for key, value in recorded.items() if key.startswith("param.")}


ARGUMENTS = {"module": "cbam", "gate_channels": 16, "reduction_ratio": 4}


@pytest.mark.parametrize(
    "wrap",
    [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}],
)
def test_authors_checkpoints_load(tmp_path: Path, checkpoint: dict[str, torch.Tensor], wrap) -> None:
    torch.save(wrap(checkpoint), tmp_path / "authors.pth")
    save_file(checkpoint, tmp_path / "authors.safetensors")
    ours = saccade.load_authors("cbam", tmp_path / "authors.pth", **ARGUMENTS)
    other = saccade.load_authors("cbam", tmp_path / "authors.safetensors", **ARGUMENTS)
    recorded = load_file(GOLDEN / "cbam" / "cbam.a.safetensors")
    for module in (ours, other):
        torch.testing.assert_close(module.eval()(recorded["input.x"]), recorded["output.y"])


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_execute_is_refused(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    torch.save({"weight": torch.zeros(1), "payload": Malicious(trap)}, tmp_path / "bad.pth")
    (tmp_path / "bad.bin").write_bytes(pickle.dumps(Malicious(trap)))
    for name in ("bad.pth", "bad.bin"):
        with pytest.raises(ValueError, match="was not loaded"):
            saccade.load_authors("cbam", tmp_path / name, **ARGUMENTS)
    assert not trap.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_give_one_line(tmp_path: Path, suffix: str, checkpoint: dict[str, torch.Tensor]) -> None:
    path = tmp_path / f"file{suffix}"
    with pytest.raises(FileNotFoundError):
        saccade.load_authors("cbam", path, **ARGUMENTS)
    torch.save(checkpoint, path) if suffix == ".pth" else save_file(checkpoint, path)
    whole = path.read_bytes()
    for content in (b"", b"not a checkpoint at all", whole[: len(whole) // 2], whole[:-3], os.urandom(300)):
        path.write_bytes(content)
        with pytest.raises((ValueError, OSError)) as error:
            saccade.load_authors("cbam", path, **ARGUMENTS)
        assert "\n" not in str(error.value)
    with pytest.raises(OSError):
        saccade.load_authors("cbam", tmp_path, **ARGUMENTS)


def test_weights_that_do_not_fit_are_named(tmp_path: Path, checkpoint: dict[str, torch.Tensor]) -> None:
    missing = {key: value for key, value in checkpoint.items() if key != "ChannelGate.mlp.1.weight"}
    save_file(missing, tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match="does not fit cbam/cbam"):
        saccade.load_authors("cbam", tmp_path / "missing.safetensors", **ARGUMENTS)
    save_file(checkpoint, tmp_path / "whole.safetensors")
    with pytest.raises(ValueError, match="does not fit cbam/cbam"):
        saccade.load_authors("cbam", tmp_path / "whole.safetensors", module="cbam", gate_channels=32, reduction_ratio=4)
    with pytest.raises(ValueError, match="several ports"):
        saccade.load_authors("cbam", tmp_path / "whole.safetensors")
