"""Domain attention: a bank of squeeze-and-excitation adapters, mixed by domains that nobody named.

Wang, Cai, Gao, Vasconcelos, "Towards Universal Object Detection by Domain Attention", CVPR 2019, arXiv 1904.04402.

    s   = mean over positions of x
    u_i = W2_i ReLU(W1_i s + b1_i) + b2_i,   i = 1 .. N              the universal bank; no sigmoid here
    w   = softmax(W_DA s + b_DA)                                      which domain the map looks like
    y   = x sigmoid(sum_i w_i u_i)                                    one gate per channel

Symbols: N `num_adapters`, r `reduction`: W1_i is (C/r, C), W2_i (C, C/r). The mixture is taken before the sigmoid. The
domains of w are learned without labels. N = 1 is one SE layer, with no assignment, as in the authors' "fixed" blocks.
`domain` switches by a label instead: the bank of domain-specific adapters that the paper compares with.

It stands where SE stands: on the residual branch, after its last norm (`DomainAttentionResNet`, the C4 detector's
shared trunk and heads; `UniversalHeads`, its layers of each data set). Not here: anchors, the choice of proposals and
the pooling of regions, for which the paper has no method of its own; the training script's frozen norms
(`module.eval()` of the norms) and its separate norms per domain.

Shape letters: B batch, C channels, R reduced channels, N adapters, H height, W width, P regions, A anchors, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Claim, ClaimResult, register
from saccade.vision.cbam import Bottleneck

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab


class DomainAttention(nn.Module):
    """x (B, C, H, W) -> y of the same shape and memory format, any H and W.

    Args:
        channels: C.
        num_adapters: N; the paper has 3 to 7 for five domains and 6 to 11 for eleven.
        reduction: r; an adapter is C // r wide, at least 1.

    Raises:
        ValueError: if an argument is below 1, or the input is not (B, C, H, W).
    """

    def __init__(self, channels: int, num_adapters: int = 11, reduction: int = 16) -> None:
        super().__init__()
        if min(channels, num_adapters, reduction) < 1:
            raise ValueError(
                f"channels, num_adapters and reduction must be positive, got {channels}, {num_adapters} and {reduction}"
            )
        self.channels, self.num_adapters = channels, num_adapters
        hidden = max(1, channels // reduction)
        self.reduce = nn.Linear(channels, num_adapters * hidden)
        self.expand_weight = nn.Parameter(torch.empty(num_adapters, channels, hidden))
        self.expand_bias = nn.Parameter(torch.empty(num_adapters, channels))
        self.assign = nn.Linear(channels, num_adapters) if num_adapters > 1 else None
        for parameter in (self.expand_weight, self.expand_bias):  # as N separate linear layers start
            nn.init.uniform_(parameter, -(hidden**-0.5), hidden**-0.5)

    def bank(self, pooled_BC: Tensor) -> Tensor:
        """U, what each adapter answers to the pooled map: (B, C, N)."""
        hidden_BNR = F.relu(self.reduce(pooled_BC)).unflatten(1, (self.num_adapters, -1))
        return torch.einsum("bnr,ncr->bcn", hidden_BNR, self.expand_weight) + self.expand_bias.T

    def assignment(self, pooled_BC: Tensor) -> Tensor:
        """w, the share of each domain: (B, N), rows sum to 1."""
        if self.assign is None:
            return torch.ones_like(pooled_BC[:, :1])
        return self.assign(pooled_BC).softmax(-1)

    def forward(self, x_BCHW: Tensor, domain_B: Tensor | None = None) -> Tensor:
        """Gate the map; with `domain_B` (integers below N) by the adapter of that number alone."""
        return x_BCHW * self._gate(x_BCHW, domain_B)

    def gate(self, x_BCHW: Tensor) -> Tensor:
        """The factor, (B, C, H, W): `module(x) == x * module.gate(x)`."""
        return self._gate(x_BCHW, None).expand_as(x_BCHW)

    def _gate(self, x_BCHW: Tensor, domain_B: Tensor | None) -> Tensor:
        if x_BCHW.ndim != 4 or x_BCHW.shape[1] != self.channels:
            raise ValueError(f"x must be (batch, {self.channels}, height, width), got {tuple(x_BCHW.shape)}")
        pooled_BC = x_BCHW.mean((2, 3))
        if domain_B is None:
            share_BN = self.assignment(pooled_BC)
        else:
            share_BN = F.one_hot(domain_B, self.num_adapters).to(pooled_BC.dtype)
        return (self.bank(pooled_BC) @ share_BN[..., None]).sigmoid()[..., None]

    def extra_repr(self) -> str:
        return f"channels={self.channels}, num_adapters={self.num_adapters}"


def adapters_of_blocks(
    counts: Sequence[int], num_adapters: int, *, less_blocks: bool = False, fixed_stages: int = 1
) -> list[list[int]]:
    """How many adapters each block of a network has, by stage; 1 where it is a single SE layer.

    Args:
        counts: blocks of each stage.
        num_adapters: N.
        less_blocks: N in every other block only: those of odd number in all stages but the fourth, those of even
            number there; blocks are numbered from 0.
        fixed_stages: so many first stages have single SE layers everywhere.
    """
    return [
        [
            1 if stage < fixed_stages or (less_blocks and block % 2 == (1 if stage == 3 else 0)) else num_adapters
            for block in range(count)
        ]
        for stage, count in enumerate(counts)
    ]


class DomainAttentionResNet(nn.Module):
    """The trunk that all domains share: a ResNet of bottlenecks with domain attention in each.

    Args:
        counts: blocks of the four stages, (3, 4, 6, 3) for ResNet-50.
        width: of the first stage, 64.
        num_adapters: N.
        reduction: r.
        less_blocks, fixed_stages: where the adapters are, see `adapters_of_blocks`.
        in_channels: 3, or 1 for grey images.
    """

    def __init__(
        self,
        counts: Sequence[int] = (3, 4, 6, 3),
        *,
        width: int = 64,
        num_adapters: int = 11,
        reduction: int = 16,
        less_blocks: bool = False,
        fixed_stages: int = 1,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if len(counts) != 4 or min(counts) < 1:
            raise ValueError(f"counts must be the blocks of four stages, got {tuple(counts)}")
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 7, 2, padding=3, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stages = nn.ModuleList()
        channels = width
        plan = adapters_of_blocks(counts, num_adapters, less_blocks=less_blocks, fixed_stages=fixed_stages)
        for stage, adapters in enumerate(plan):
            blocks = []
            for index, number in enumerate(adapters):
                stride = 2 if stage and index == 0 else 1
                blocks.append(_bottleneck(channels, width * 2**stage, stride, number, reduction))
                channels = width * 2**stage * Bottleneck.expansion
            self.stages.append(nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images to the map that proposals and regions are taken from, (B, 16 width, H / 16, W / 16)."""
        x_BCHW = self.stem(x_BCHW)
        x_BCHW = F.max_pool2d(x_BCHW, 3, 2, ceil_mode=True) if min(x_BCHW.shape[2:]) > 1 else x_BCHW
        for stage in self.stages[:3]:
            x_BCHW = stage(x_BCHW)
        return x_BCHW

    def regions(self, x_PCHW: Tensor) -> Tensor:
        """Pooled regions of that map to one vector each by the fourth stage, (P, 32 width)."""
        return self.stages[3](x_PCHW).mean((2, 3))


class UniversalHeads(nn.Module):
    """What each data set has of its own: the last layers of proposals and of regions.

    Args:
        classes: K of each data set, its background among them.
        anchors: A of each data set.
        channels: of the map that proposals are taken from.
        region_channels: of a region's vector.
        hidden: of the shared 3 x 3 convolution.
        class_agnostic: 4 numbers for a box instead of 4 per class.
    """

    def __init__(
        self,
        classes: Sequence[int],
        anchors: Sequence[int],
        *,
        channels: int = 1024,
        region_channels: int = 2048,
        hidden: int = 512,
        class_agnostic: bool = False,
    ) -> None:
        super().__init__()
        if not classes or len(classes) != len(anchors) or min(*classes, *anchors) < 1:
            raise ValueError(f"classes and anchors must be one number per data set, got {classes} and {anchors}")
        self.shared = nn.Conv2d(channels, hidden, 3, padding=1)
        self.score = nn.ModuleList(nn.Conv2d(hidden, 2 * a, 1) for a in anchors)
        self.shift = nn.ModuleList(nn.Conv2d(hidden, 4 * a, 1) for a in anchors)
        self.label = nn.ModuleList(nn.Linear(region_channels, k) for k in classes)
        self.box = nn.ModuleList(nn.Linear(region_channels, 4 if class_agnostic else 4 * k) for k in classes)

    def proposals(self, x_BCHW: Tensor, domain: int) -> tuple[Tensor, Tensor]:
        """Scores (B, 2 A, H, W) and shifts (B, 4 A, H, W) of the anchors of data set `domain`."""
        x_BCHW = F.relu(self.shared(x_BCHW))
        return self.score[domain](x_BCHW), self.shift[domain](x_BCHW)

    def forward(self, x_PC: Tensor, domain: int) -> tuple[Tensor, Tensor]:
        """Logits (P, K) and boxes (P, 4 K or 4) of regions, as data set `domain` labels them."""
        return self.label[domain](x_PC), self.box[domain](x_PC)


def _bottleneck(
    in_channels: int, width: int, stride: int, num_adapters: int, reduction: int, projected: bool = False
) -> Bottleneck:
    return Bottleneck(
        in_channels, width, stride, gate=lambda c: DomainAttention(c, num_adapters, reduction), projected=projected
    )


# The authors' names: one module per adapter; their assignment layer is there in single blocks too, unused.


_ADAPTER = re.compile(r"(.*)SE_Layers\.(\d+)\.fc\.([02])\.(weight|bias)")


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    banks: dict[tuple[str, str, str], dict[int, Tensor]] = {}
    for name, tensor in state.items():
        found = _ADAPTER.fullmatch(name)
        if found:
            prefix, index, layer, kind = found.groups()
            banks.setdefault((_renamed(prefix), layer, kind), {})[int(index)] = tensor
        elif "fc_1." not in name:
            ours[_renamed(name)] = tensor
    for (prefix, layer, kind), adapters in banks.items():
        bank = [adapters[i] for i in sorted(adapters)]
        ours[prefix + (f"reduce.{kind}" if layer == "0" else f"expand_{kind}")] = (
            torch.cat(bank) if layer == "0" else torch.stack(bank)
        )
    for name, tensor in state.items():
        if "fc_1." in name:
            prefix, kind = name.split("fc_1.")
            if len(ours[_renamed(prefix) + "expand_bias"]) > 1:
                ours[f"{_renamed(prefix)}assign.{kind}"] = tensor
    return ours


def _renamed(name: str) -> str:
    name = re.sub(r"^bn(\d)\.", r"norm\1.", name)
    return name.replace("domain_attention.", "gate.").replace("downsample.", "shortcut.")


def _adapters(args: dict[str, Any]) -> int:
    return 1 if args.get("fixed_block", False) else args.get("num_adapters", 11)


def _run_gate(module: DomainAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x_BCHW = inputs["x"]
    pooled_BC = x_BCHW.mean((2, 3))
    return {
        "domain_weights": module.assignment(pooled_BC),
        "adapter_bank": module.bank(pooled_BC),
        "y": module(x_BCHW),
    }


# The claim: digits of three domains that disagree about which channel counts.


def drawn(images_B1HW: Tensor, labels_B: Tensor, count: int, domain: int, generator: torch.Generator) -> Any:
    """(count, 4, 8, 8) and labels: three digits in three channels, of which that of channel `domain` is meant.

    The fourth channel is noise around 0, 1 or 2: all that tells the domain, and only in the mean over many positions.
    """
    chosen_B3 = torch.randint(len(labels_B), (count, 3), generator=generator)
    style = domain + 2 * torch.randn(count, 1, 8, 8, generator=generator)
    return torch.cat([images_B1HW[chosen_B3, 0], style], 1), labels_B[chosen_B3[:, domain]]


def _network(num_adapters: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((4, 24, 1), (24, 48, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        layers += [DomainAttention(outputs, num_adapters), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 10))


def _claim(lab: Lab) -> ClaimResult:
    """One network for three domains: one adapter, three mixed, and three networks of one domain each; two seeds."""
    data = lab.data.digits()
    batch, seeds = lab.size(48, 6), lab.size(2, 1)

    def batches(domains: Sequence[int], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            parts = [drawn(data.train_images, data.train_labels, batch // len(domains), d, generator) for d in domains]
            yield torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    generator = torch.Generator().manual_seed(10**6)
    tests = [drawn(data.test_images, data.test_labels, lab.size(500, 6), d, generator) for d in range(3)]
    errors: dict[str, list[float]] = {"one_adapter": [], "three_adapters": [], "three_networks": []}
    alike = []
    for seed in lab.progress(range(lab.seed, lab.seed + seeds), "seeds"):
        for name, adapters in (("one_adapter", 1), ("three_adapters", 3), ("three_networks", 1)):
            wrong = []
            for domains in [[0], [1], [2]] if name == "three_networks" else [[0, 1, 2]]:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    model = _network(adapters)
                lab.train(model, batches(domains, seed), loss, 240 // (3 if len(domains) == 1 else 1), lr=1e-2)
                model.eval()
                with torch.no_grad():
                    wrong += [100 * (model(tests[d][0]).argmax(1) != tests[d][1]).float().mean() for d in domains]
            errors[name].append(float(sum(wrong) / 3))
            if adapters == 3:
                alike.append(_likeness(model, [image for image, _ in tests]))
    measured = {f"{name}_error_percent": sum(values) / seeds for name, values in errors.items()}
    measured |= {f"{name}_spread_percent": max(values) - min(values) for name, values in errors.items()}
    measured["assignment_cosine"] = sum(alike) / seeds
    gain = measured["one_adapter_error_percent"] - measured["three_adapters_error_percent"]
    return ClaimResult(
        measured,
        holds=gain > 0 and measured["assignment_cosine"] < 0.9,
        note="only where the domain shows in the mean of the map alone; with style noise of 0.2 instead of 2 "
        "convolutions tell the domain at each position, and one adapter did as well as three",
    )


@torch.no_grad()
def _likeness(model: nn.Module, images: Sequence[Tensor]) -> float:
    """Cosine of the mean assignments of two domains: the most alike two, in the layer that tells them apart best."""
    cosines = []
    for gate in (m for m in model.modules() if isinstance(m, DomainAttention)):
        share_DN = torch.stack([_mean_assignment(model, gate, image) for image in images])
        unit_DN = F.normalize(share_DN, dim=1)
        cosines.append((unit_DN @ unit_DN.T - torch.eye(len(images))).max().item())
    return min(cosines)


def _mean_assignment(model: nn.Module, gate: DomainAttention, images_BCHW: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = gate.register_forward_pre_hook(lambda m, x: seen.append(m.assignment(x[0].mean((2, 3))).mean(0)))
    model(images_BCHW)
    handle.remove()
    return seen[0]


register(
    "domain-attention",
    kind="gate",
    summary="A bank of squeeze-and-excitation adapters, mixed by a softmax over domains learned without labels.",
    supports=(),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "multi-dimensional"},
    efficiency="",
    complexity="time O(N C^2 / r + C H W), parameters N (2 C^2 / r + C / r + C) + N (C + 1)",
    invariants=(
        "one adapter is squeeze-and-excitation; equal adapters are too, whatever the assignment",
        "a large bias in the assignment leaves the adapter of that number alone, as a label does",
        "the assignment sums to 1, the gate lies between 0 and 1, so no magnitude grows",
        "adapters are mixed before the sigmoid, not after",
        "a zero assignment takes the plain mean of the bank",
    ),
    build=DomainAttention,
    example={"channels": 8, "num_adapters": 3, "reduction": 4},
    ports=(
        AuthorsPort(
            "domain_attention",
            build=lambda args: DomainAttention(args["planes"], _adapters(args), args.get("reduction", 16)),
            convert=_convert,
            run=_run_gate,
        ),
        AuthorsPort(
            "da_bottleneck",
            build=lambda args: _bottleneck(
                args["inplanes"],
                args["planes"],
                args.get("stride", 1),
                _adapters(args),
                args.get("reduction", 16),
                projected=bool(args.get("downsample")),
            ),
            convert=_convert,
            run=lambda module, inputs, args: {"y": module(inputs["x"])},
        ),
    ),
    claim=Claim(
        paper="one detector with domain attention beats a detector per domain and a plain universal one, at 1.3 times "
        "the parameters of one",
        expected="lower error than the same network with one adapter; domains that come apart in the assignment "
        "without labels. Three networks, of a third of the steps each, are beside it",
        run=_claim,
    ),
)
