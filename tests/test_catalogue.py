from __future__ import annotations

import copy
import json
import operator
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import saccade
from saccade import catalogue
from saccade.catalogue.authors import read_checkpoint
from saccade.catalogue.ports import Arguments, Late, calls

GOLDEN = Path(__file__).parent / "golden"


def test_unknown_names_answer_with_the_nearest(planned: list[dict[str, object]]) -> None:
    with pytest.raises(ValueError, match=r"no part is called 'mobba'; did you mean 'moba'"):
        saccade.create("mobba", dim=8)
    with pytest.raises(ValueError, match="planned and not built yet"):
        saccade.create(str(planned[0]["slug"]))
    with pytest.raises(ValueError, match="has ports for cbam, bottleneck, not for 'nothing'"):
        catalogue.port("cbam", "nothing")


@pytest.mark.parametrize(
    ("slug", "given", "said"),
    [
        ("MoBA", {}, "no part is called 'MoBA'; did you mean 'moba'\\?"),
        ("set_transformer", {}, "did you mean 'set-transformer'\\?"),
        ("moba", {"dim": 8, "blocksize": 3}, "moba has no option 'blocksize'; did you mean 'block_size'"),
        ("moba", {"dim": 8, "kv_heads": 3}, "moba has no option 'kv_heads'; did you mean 'num_kv_heads'"),
        (
            "softmax",
            {"dim": 8, "zzz": 3},
            "softmax has no option 'zzz'; it has dim, num_heads, causal, attn_drop, num_kv",
        ),
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
    with pytest.raises(ValueError, match=r"kind must be one of sequence, gate, .*analysis, got 'engine'"):
        catalogue.register("loftr", kind="engine", summary="")


def test_a_kind_is_its_name_and_one_object() -> None:
    for name, kind in catalogue.KINDS.items():
        assert kind == name and json.dumps(kind) == json.dumps(name) and f"{kind}" == name
        assert copy.deepcopy(kind) is kind and pickle.loads(pickle.dumps(kind)) is kind
        assert kind.words.split()[0] in ("a", "an") and kind.call and kind.output
    assert catalogue.part("cbam").kind is catalogue.KINDS["gate"]


def test_a_kind_without_usual_inputs_asks_for_them() -> None:
    part = catalogue.Part("loftr", "", "", "", "wrapper", "")
    with pytest.raises(ValueError, match="'loftr' is a wrapper of models: its registration must say inputs="):
        part.kind.inputs(part, torch.nn.Identity(), 4)


def test_a_kind_says_what_is_wrong_with_an_output() -> None:
    scalar = torch.zeros(())
    for name, right, wrong, said in (
        ("gate", torch.zeros(2, 3), torch.zeros(3, 2), "must have the input's shape (2, 3), got torch.Size([3, 2])"),
        ("model", catalogue.ClaimResult({}, True), {}, "a whole model returns a dataclass, got dict"),
        ("analysis", catalogue.ClaimResult({}, True), [1], "an analysis returns a dataclass, got list"),
        ("objective", (scalar, {"square": scalar}), scalar, "a scalar and its named terms, got Tensor"),
        ("objective", (scalar, {}), (torch.zeros(1), {}), "a scalar and its named terms, got tuple"),
    ):
        kind = catalogue.KINDS[name]
        assert not kind.complaint((torch.zeros(2, 3),), right)
        assert said in kind.complaint((torch.zeros(2, 3),), wrong)


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


def test_whole_networks_are_the_default_port(tmp_path: Path) -> None:
    """`load_authors(slug, path)` takes the released file, under whatever usual name its state dict stands."""
    slugs = [s for s in (p.slug for p in catalogue.parts()) if (GOLDEN / s / "network.a.safetensors").is_file()]
    assert set(slugs) >= {"dat", "resnest", "residual-attention-network", "bevanet", "dynamic-head"}
    for number, slug in enumerate(slugs):
        with safe_open(GOLDEN / slug / "network.a.safetensors", "pt") as file:
            arguments = json.loads(file.metadata()["args"])
            state = {name[6:]: file.get_tensor(name) for name in file.keys() if name.startswith("param.")}  # noqa: SIM118
        key = ("state_dict", "model", "model_state", "params", "ema")[number % 5]
        torch.save({"epoch": 3, key: state, "optimizer": {"lr": 0.1}}, tmp_path / "released.pth")
        module = saccade.load_authors(slug, tmp_path / "released.pth", **arguments)
        expected = catalogue.port(slug, "network").convert(state)
        assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in expected.items())


def endless() -> dict[str, object]:
    around: dict[str, object] = {}
    around["state_dict"] = around
    return around


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (endless(), "holds no state dict of tensors"),
        ({"a": {"b": {}}}, "holds no state dict"),
        ([torch.zeros(2)], "holds no state dict"),
        ({}, "holds no state dict"),
        ({"weight": torch.zeros(2), "epoch": 3}, r"but also epoch \(int\)"),
        ({0: torch.zeros(2)}, "tensors without a name: 0"),
        ({"weight": torch.zeros(1).expand(10**6, 10**6)}, "does not hold all numbers of weight"),
        ({"weight": torch.zeros(10**6, 10**6, device="meta")}, "does not hold all numbers of weight"),
        ({"weight": torch.eye(3).to_sparse()}, "does not hold all numbers of weight"),
        ({"ChannelGate.mlp.1.weight": torch.zeros(4, 16, dtype=torch.int8)}, "of integers, expected"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        saccade.load_authors("cbam", tmp_path / "file.pth", **ARGUMENTS)


def test_crafted_files_are_refused_in_words(tmp_path: Path, checkpoint: dict[str, torch.Tensor]) -> None:
    """Whatever a reader raises: a ValueError or OSError of one line."""
    torch.save(checkpoint, tmp_path / "whole.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "whole.pth").read_bytes()
    generator = random.Random(0)
    contents = [
        b"\x80\x02" + bytes([op]) + tail
        for op in range(256)
        for tail in (b"", b"\xff" * 9 + b".", b"q\x00.", b"(lp0\n.", b"K\x01}.")
    ]
    contents += [b"\x80\x02X\xff\xff\xff\x7f", b"\x80\x04\x8d" + b"\xff" * 8, (10**15).to_bytes(8, "little") + b"{}"]
    for _ in range(150):
        broken = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            broken[generator.randrange(len(broken))] = generator.randrange(256)
        contents.append(bytes(broken))
    for number, content in enumerate(contents):
        path = tmp_path / ("crafted.safetensors" if number % 7 == 0 else "crafted.pth")
        path.write_bytes(content)
        try:
            read_checkpoint(path)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(OSError, match="is no regular file"):
        saccade.load_authors("cbam", tmp_path / "pipe.pth", **ARGUMENTS)


def test_reading_takes_time_with_the_number_of_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"module._orig_mod.{i}" for i in range(3000)]
    torch.save(dict.fromkeys(names, torch.zeros(1)), tmp_path / "many.pth")
    assert list(read_checkpoint(tmp_path / "many.pth")) == [str(i) for i in range(3000)]
    torch.save({f"{i}": torch.zeros(1) for i in range(20)}, tmp_path / "few.pth")
    save_file({f"{i}": torch.zeros(1) for i in range(20)}, tmp_path / "few.safetensors")
    monkeypatch.setattr("saccade.catalogue.authors._MOST_TENSORS", 19)
    for name in ("few.pth", "few.safetensors"):
        with pytest.raises(ValueError, match="at most 19 are read"):
            read_checkpoint(tmp_path / name)


def test_names_are_placed_once(tmp_path: Path) -> None:
    names = catalogue.Names({"a.{i}.w": "b.{i}.w", "c.{i}.w": "b.{i}.w", "index": None})
    assert names({"a.0.w": 1, "index": 2}) == {"b.0.w": 1}
    with pytest.raises(ValueError, match=r"a\.0\.w and c\.0\.w have the same place, b\.0\.w"):
        names({"a.0.w": 1, "c.0.w": 2})
    with pytest.raises(ValueError, match=r"no place for d\.0, d\.1, d\.2, d\.3, d\.4 and more"):
        names({f"d.{i}": i for i in range(10**5)})


def test_names_with_stars_parts_and_layouts() -> None:
    names = catalogue.Names(
        {
            "{rest*}": "{rest}",
            "body.{rest*}": "body.{rest}",
            "body.{i}.{rest*}": "blocks.{i}.{rest}",
            "body.{i}.mask": None,
            "body.{i}.attn.qkv.{leaf}": catalogue.split("blocks.{i}.attention.{part}_proj.{leaf}", "q", "k", "v"),
            "head.weight": catalogue.laid("head.weight", torch.t),
        }
    )
    qkv, head = torch.arange(6.0), torch.randn(2, 3)
    ours = names({"body.0.mask": qkv, "body.0.mlp.fc.weight": head, "body.1.attn.qkv.bias": qkv, "head.weight": head})
    assert ours.keys() == {
        "blocks.0.mlp.fc.weight",
        *(f"blocks.1.attention.{part}_proj.bias" for part in "qkv"),
        "head.weight",
    }
    assert torch.equal(ours["blocks.1.attention.k_proj.bias"], qkv[2:4]) and torch.equal(ours["head.weight"], head.T)
    inside = catalogue.Names(names.within("net/", "net."))
    assert inside({"net/body.1.attn.qkv.bias": qkv}).keys() == {
        f"net.blocks.1.attention.{part}_proj.bias" for part in "qkv"
    }
    with pytest.raises(ValueError, match=r"qkv\.bias must be 3 equal parts, got shape \(4,\)"):
        names({"body.1.attn.qkv.bias": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"head\.weight of shape \(2, 2, 2\) is not laid out as head\.weight needs"):
        names({"head.weight": torch.zeros(2, 2, 2)})


def test_names_that_are_joined() -> None:
    names = catalogue.Names({"layers.{i}.heads.{h}.w": catalogue.joined("blocks.{i}.w", "h", torch.cat)})
    parts = {f"layers.{i}.heads.{h}.w": torch.tensor([100.0 * i + h]) for i in range(2) for h in range(12)}
    inside = catalogue.Names(names.within("net.", "net."))({f"net.{name}": part for name, part in parts.items()})
    for state in (parts, dict(reversed(parts.items()))):
        ours = names(state)
        assert ours["blocks.1.w"].tolist() == [100 + h for h in range(12)] == inside["net.blocks.1.w"].tolist()
    with pytest.raises(ValueError, match=r"blocks\.0\.w is joined of parts 0 to 1, got 0, 2"):
        names({f"layers.0.heads.{h}.w": torch.zeros(1) for h in (0, 2)})
    with pytest.raises(ValueError, match=r"the parts of blocks\.0\.w have different shapes"):
        names({f"layers.0.heads.{h}.w": torch.zeros(2, h + 1, h + 2) for h in range(2)})


def test_tables_of_arguments_build_and_refuse() -> None:
    build = Arguments(
        nn.Conv1d,
        {
            "inp": "in_channels",
            "oup": "out_channels",
            "padding": ("padding_mode", {"constant": "zeros", "wrap": "circular"}),
            "no_bias": ("bias", operator.not_),
        },
        needed=("no_bias",),
        defaults={"size": 3},
        derived={"kernel_size": lambda args: 2 * args["size"] - 1},
        inert=("size", "dropout"),
        stride=2,
    )
    made = build({"inp": 4, "oup": 2, "padding": "wrap", "no_bias": True, "dropout": 0.5})
    assert isinstance(made, nn.Conv1d) and made.weight.shape == (2, 4, 5) and made.stride == (2,)
    assert made.bias is None and made.padding_mode == "circular"
    with pytest.raises(KeyError, match="oup"):
        build({"inp": 4, "no_bias": True})
    with pytest.raises(KeyError, match="no_bias"):
        build({"inp": 4, "oup": 2})
    with pytest.raises(ValueError, match="arguments must be among inp, oup, padding, no_bias, got 'groups'"):
        build({"inp": 4, "oup": 2, "groups": 2})
    with pytest.raises(ValueError, match="padding must be one of 'constant', 'wrap', got 'reflect'"):
        build({"inp": 4, "oup": 2, "no_bias": True, "padding": "reflect"})


def test_plain_calls_give_what_the_authors_name() -> None:
    given = {"a": torch.ones(2), "b": torch.full((2,), 3.0), "c": torch.zeros(1)}
    assert torch.equal(calls("b", "a", gives="less")(torch.sub, given, {})["less"], torch.full((2,), 2.0))
    out = calls("a", gives={"y": "real", "twice": lambda x: x * 2})(nn.Identity(), given, {})
    assert torch.equal(out["y"], given["a"]) and torch.equal(out["twice"], 2 * given["a"])


def test_a_module_made_late_has_the_widths_of_its_weights() -> None:
    late = Late(lambda args, state: nn.Linear(state["weight"].shape[1], args["out"]), {"out": 2})
    assert not late.state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        late.load_state_dict({"weight": torch.ones(3, 5), "bias": torch.zeros(3)})
    late.load_state_dict({"weight": torch.ones(2, 5), "bias": torch.zeros(2)})
    assert late(torch.ones(5)).tolist() == [5, 5] and isinstance(late.made, nn.Linear)


def test_arguments_that_are_missing_or_wrong_are_named(tmp_path: Path, checkpoint: dict[str, torch.Tensor]) -> None:
    save_file(checkpoint, tmp_path / "whole.safetensors")
    with pytest.raises(ValueError, match=r"cbam/cbam needs the authors' argument 'gate_channels'"):
        saccade.load_authors("cbam", tmp_path / "whole.safetensors", module="cbam")
    with pytest.raises(ValueError, match=r"cannot be built of \{'gate_channels': 'x'\}"):
        saccade.load_authors("cbam", tmp_path / "whole.safetensors", module="cbam", gate_channels="x")


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
