"""Whose guesses does a language model accept? Drafts that are trained on what it says, and decode with it.

Shape letters: B texts, P tokens of a prompt, N tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saccade.layers.proposals import Drafter
from saccade.models.dream import DraftOutput, DreamDraft, DreamDrafter, Sample, draft_losses
from saccade.models.dream.drafting import head_of
from saccade.ops.folder import cache_folder, private_folder
from saccade.train import data as sources
from saccade.train import drafts, models
from saccade.train.data import generator_at
from saccade.train.drafts import ROWS, Decoded, Target, decoded
from saccade.train.entries import Entry
from saccade.train.result import Metric
from saccade.train.tasks.base import HELD_OUT, TRAIN, Task
from saccade.train.tasks.network import NetworkTask
from saccade.train.tasks.settings import Settings

#: the target
NAME = "smollm2-135m"
#: how often a text is learned from
PASSES = 6


class Speculate(NetworkTask):
    """Drafts that guess what SmolLM2 says; quality is the accepted length, tokens per pass of the target.

    What is learned from is what it says behind windows of Python's own documentation; what is judged on are its greedy
    tokens behind windows of another part. Beside the quality stand tokens per second, how many times as fast that is as
    plain decoding in the same run (`speedup`), the same of transformers' prompt lookup (`lookup_speedup`), all three
    from packed weights where the machine has such; how many times as fast as `generate` alone without these
    (`speedup_over_usual`); and the share of texts that are the same as its (`same`). What the target said is kept in
    the cache folder.

    Args:
        settings: the sizes; `length` is the tokens of a text, a quarter of which is its prompt.
        device: where models and batches are.

    Raises:
        ValueError: if the length is below 8.
        ImportError: if SmolLM2 is not installed, with the command that installs it.
    """

    name = "speculate"
    metric = Metric("accepted_length", "tokens a pass", higher_is_better=True)
    inputs = ("inputs_embeds", "target_features")
    budgets = {
        "quick": Settings(length=96, batch=8, steps=100, lr=1e-3, lengths=(256, 1024), evaluation_size=12),
        "standard": Settings(length=96, batch=8, steps=800, lr=1e-3, lengths=(256, 1024, 4096), evaluation_size=12),
        "long": Settings(length=256, batch=16, steps=5000, lr=1e-3, lengths=(256, 1024, 4096), evaluation_size=24),
    }

    def __init__(self, settings: Settings, device: torch.device) -> None:
        if settings.length < 8:
            raise ValueError(f"length must be at least 8 tokens for {self.name}, got {settings.length}")
        Task.__init__(self, settings, device)

    def use(self, model: Any, train_N: Tensor, held_N: Tensor, folder: Path | None = None) -> None:
        """Another target, and the tokens of another text.

        Args:
            model: of transformers.
            train_N, held_N: to learn from, and to judge on.
            folder: where what it said is kept.
        """
        prompt = self.settings.length // 4
        self.target = Target(model, train_N, held_N, prompt, self.settings.length - prompt, folder)

    @cached_property
    def target(self) -> Target:
        """SmolLM2, and the text."""
        model, tokenizer = models.load(NAME, fresh=self.device.type != "cpu")  # it is moved there
        texts = (bytes(sources.text_bytes(split).tolist()).decode(errors="ignore") for split in ("train", "held-out"))
        train_N, held_N = (torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in texts)
        name = f"{NAME}-{models.version(NAME)}-{self.settings.length}"
        folder = private_folder(cache_folder() / "drafts" / name)
        prompt = self.settings.length // 4
        return Target(model.to(self.device), train_N, held_N, prompt, self.settings.length - prompt, folder)

    def arguments(self, mechanism: Entry) -> dict[str, Any]:
        return self.target.head_arguments

    def model(self, mechanism: Entry, seed: int) -> nn.Module:
        network = super().model(mechanism, seed)
        return drafts.start_as(network, self.target.model) if isinstance(network, DreamDraft) else network

    def batch(self, seed: int, step: int) -> tuple[Any, ...]:
        """Embeddings, features, intermediate features and which tokens are learned."""
        generator = generator_at(seed, step, TRAIN)
        chunks = max(1, -(-self.settings.steps * self.settings.batch // (ROWS * PASSES)))
        number = int(torch.randint(chunks, (), generator=generator))
        sample = self.target.sample(number, torch.randperm(ROWS, generator=generator)[: self.settings.batch])
        return self.to_device((sample.embeds, sample.features, sample.mid, sample.learned))

    def call(self, model: nn.Module, batch: tuple[Any, ...]) -> DraftOutput:
        return model(batch[0], batch[1][:, :-1])

    def loss(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        """`draft_losses`, the KL summed over the text's vocabulary."""
        head = head_of(self.target.model, self.target.vocabulary)
        return draft_losses(self.call(model, batch), Sample(*batch), head, over="sum").total(0.3)

    def prompts(self, share: float = 1.0) -> Tensor:
        """Those that are judged on."""
        count = max(1, round(share * self.settings.evaluation_size))
        drawn = self.target.prompts(self.settings.evaluation_size, generator_at(0, 0, HELD_OUT), judge=True)
        return drawn[:count].to(self.device)

    def decoded(self, drafter: Drafter | None, share: float = 1.0, **options: Any) -> Decoded:
        """What the target says behind the prompts: with a drafter, or without and with `options` of `generate`."""
        return decoded(self.target.model, self.prompts(share), self.target.new, drafter, **options)

    def drafter(self, model: nn.Module) -> DreamDrafter:
        """Proposes by a draft; see `saccade.train.drafts.drafter`."""
        assert isinstance(model, DreamDraft)
        return drafts.drafter(model.eval(), self.target)

    @torch.no_grad()
    def quality(self, model: nn.Module, share: float = 1.0) -> float:
        report = self.decoded(self.drafter(model), share).report
        assert report is not None
        return report.accepted_length

    @torch.no_grad()
    def figures(self, model: nn.Module, share: float = 1.0) -> dict[str, float]:
        """The accepted length, and what else the class says; plain, lookup and draft one after the other."""
        usual, drafter = self.decoded(None, share), self.drafter(model)
        with drafts.quick_products(self.target.model), drafts.quick_products(drafter.draft):
            plain, lookup, ours = (
                self.decoded(who, share, **options)
                for who, options in ((None, {}), (None, {"prompt_lookup_num_tokens": 10}), (drafter, {}))
            )
        assert ours.report is not None
        same = [torch.equal(a, b) for a, b in zip(usual.texts, ours.texts, strict=True)]
        return {
            "accepted_length": ours.report.accepted_length,
            "tokens_per_second": ours.rate,
            "plain_tokens_per_second": plain.rate,
            "usual_tokens_per_second": usual.rate,
            "speedup": ours.rate / plain.rate,
            "lookup_speedup": lookup.rate / plain.rate,
            "speedup_over_usual": ours.rate / usual.rate,
            "same": sum(same) / len(same),
        }

    def held_out(self, share: float = 1.0) -> Iterator[tuple[Any, ...]]:
        yield (self.prompts(share),)

    def part_inputs(self, length: int) -> tuple[Any, ...]:
        """Random embeddings and features."""
        dim = self.target.head_arguments["dim"]
        return torch.randn(1, length, dim, device=self.device), torch.randn(1, length - 1, dim, device=self.device)

    def sample(self) -> tuple[Any, ...]:
        return self.part_inputs(self.settings.length)

    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        return {}

    def chance(self) -> float:
        """Without a draft."""
        return 1.0

    @property
    def tokens_per_step(self) -> int:
        return self.settings.batch * self.settings.length

    def trained(self, steps: int = 1200) -> DreamDraft:
        """A draft of the target that is trained once and kept in the cache folder; whoever interrupts goes on there.

        Args:
            steps: of the training.
        """
        torch.manual_seed(0)
        network = DreamDraft(**self.target.head_arguments, strict=True)
        start = drafts.start_as(network, self.target.model)
        return drafts.trained(self.target, start, steps=steps, batch=self.settings.batch, passes=PASSES)
