"""The task `compress`: caches that hold fewer keys and values, on a pretrained language model.

    saccade compare --task compress window heavy-hitters key-norm random --model smollm2
    result = saccade.train.arena.arena(["window", "heavy-hitters"], "smollm2");  print(result.table())

Nothing is trained. For each cache at each share of the tokens: perplexity of a text's last tokens, told one by one
after the rest was read and compressed; retrieval (`passkey`, `multi-key`, and `multi-key` asked after the compression);
the bytes that are held; how many tokens a second follow; and how long the first one takes.
"""

from saccade.train.arena.contestants import Contestant
from saccade.train.arena.result import ArenaResult
from saccade.train.arena.rows import Row
from saccade.train.arena.running import arena
from saccade.train.arena.sizes import Sizes

__all__ = ["ArenaResult", "Contestant", "Row", "Sizes", "arena"]
