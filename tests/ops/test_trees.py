"""Trees of proposed tokens: who sees whom, and that what is accepted is the model's own."""

import pytest
import torch

from saccade import attend, masks
from saccade.ops.trees import accept_paths, ancestors, choose_child, depths, leaf_paths


def test_ancestors_depths_and_paths() -> None:
    parents = torch.tensor([-1, 0, 0, 1, 3, 1])
    assert depths(parents).tolist() == [0, 1, 1, 2, 3, 2]
    assert leaf_paths(parents).tolist() == [[0, 2, -1, -1], [0, 1, 3, 4], [0, 1, 5, -1]]
    chain = torch.arange(5) - 1
    assert torch.equal(ancestors(chain), torch.ones(5, 5, dtype=torch.bool).tril())
    assert ancestors(chain[:0]).shape == (0, 0) and leaf_paths(chain[:0]).shape == (0, 0)
    with pytest.raises(ValueError, match="must come before it, got 2 as the parent of 1"):
        ancestors(torch.tensor([-1, 2, 0]))


def test_a_tree_in_attend_is_each_of_its_paths() -> None:
    torch.manual_seed(0)
    parents, prefix = torch.tensor([-1, 0, 0, 1, 3, 1]), 5
    q, k, v = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 11, 8), torch.randn(1, 2, 11, 8)
    out = attend(q, k, v, mask=masks.tree(parents, prefix))
    for path in leaf_paths(parents):
        nodes = path[path >= 0]
        keys = torch.cat([torch.arange(prefix), prefix + nodes])
        alone = attend(q[:, :, nodes], k[:, :, keys], v[:, :, keys], mask=masks.causal(prefix))
        assert torch.allclose(out[:, :, nodes], alone, atol=1e-6)
    last = attend(q[:, :, 4:], k, v, mask=masks.tree(parents, prefix, queries=2))
    assert torch.allclose(last, out[:, :, 4:], atol=1e-6)
    with pytest.raises(ValueError, match="is for 6 queries and 11 keys"):
        attend(q, k[:, :, 1:], v[:, :, 1:], mask=masks.tree(parents, prefix))
    with pytest.raises(ValueError, match="queries at most 6, got 0 and 7"):
        masks.tree(parents, queries=7)


def test_the_longest_path_is_accepted() -> None:
    said = torch.tensor([[4, 5, 6, 0], [4, 2, 2, 2], [4, 5, 0, 0]])
    candidates = torch.tensor([[9, 4, 1, 6], [9, 4, 2, 2], [9, 4, -1, -1]])
    logits = torch.nn.functional.one_hot(said, 10).float()
    best, accepted, behind = accept_paths(candidates, logits)
    assert (int(best), int(accepted)) == (1, 3) and behind.argmax() == 2


@pytest.mark.parametrize("children", [(), (3,), (3, 0, 5), (1, 2, 3, 4, 5, 0, 6)])
def test_sampling_is_lossless_whatever_is_proposed(children: tuple[int, ...]) -> None:
    """Chi-square over 20,000 draws, 6 degrees of freedom: 22.5 is exceeded once in a thousand."""
    generator = torch.Generator().manual_seed(1)
    p = torch.tensor([0.30, 0.05, 0.20, 0.02, 0.13, 0.25, 0.05])
    draws = 20_000
    proposed = torch.tensor(children, dtype=torch.long).expand(draws, -1)
    token, chosen = choose_child(p.expand(draws, -1), proposed, generator)
    counts = token.bincount(minlength=7)
    assert ((counts - draws * p) ** 2 / (draws * p)).sum() < 22.5
    accepted = chosen >= 0
    assert abs(accepted.float().mean() - p[list(children)].sum()) < 0.015
    assert torch.equal(proposed[accepted].gather(1, chosen[accepted, None])[:, 0], token[accepted])
    assert not accepted.all() or len(children) == 7
