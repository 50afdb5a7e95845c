"""Sentences as real vectors: all-MiniLM-L6-v2 reads Python's language reference, topic by topic.

Shape letters: B sentences at once, N tokens, S sentences of a topic, D width.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.folder import cache_folder, private_folder
from saccade.train import models
from saccade.train.data import sentences
from saccade.train.files import read_tensors, write_tensors

__all__ = ["sentence_vectors"]

#: sentences that are read at once
_BATCH = 32


@cache
def sentence_vectors(split: str = "all") -> list[Tensor]:
    """Unit vectors (S, 384) of each topic's sentences; read once, in some ten seconds, and kept in the cache folder.

    Args:
        split: as of `saccade.train.data.sentences`.

    Raises:
        ImportError: if MiniLM is not installed, with the command that installs it.
        OSError: if the cache folder cannot be used.
        ValueError: for another split.
    """
    topics = sentences(split)
    file = private_folder(cache_folder() / "sentences") / f"minilm-{models.version('minilm')}-{split}.safetensors"
    flat = [each for topic in topics for each in topic]
    if file.exists() and len(kept := read_tensors(file)[0]["vectors"]) == len(flat):
        vectors = kept
    else:
        vectors = _read(flat)
        write_tensors(file, {"vectors": vectors})
    return list(vectors.split([len(topic) for topic in topics]))


@torch.no_grad()
def _read(texts: list[str]) -> Tensor:
    model, tokenizer = models.load("minilm")
    found = []
    for start in range(0, len(texts), _BATCH):
        inputs = tokenizer(texts[start : start + _BATCH], padding=True, truncation=True, return_tensors="pt")
        hidden_BND, seen_BN1 = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        found.append(F.normalize((hidden_BND * seen_BN1).sum(1) / seen_BN1.sum(1), dim=-1))
    return torch.cat(found)
