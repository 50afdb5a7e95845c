"""What queries, keys and values must be."""

from __future__ import annotations

import pytest
import torch

from saccade.ops.heads import check_qkv


def test_queries_keys_and_values_that_do_not_fit_are_named() -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 3)
    check_qkv(q, k, v)
    check_qkv(q, k, v.bfloat16(), tokens="last")
    check_qkv(k, k, v, tokens="same")
    for bad, message in (
        ((None, k, v), "query must be a tensor, got NoneType"),
        ((q, k[0], v), r"key must have 4 axes \(batch, heads, tokens, head_dim\), got shape \(2, 7, 8\)"),
        ((q, k, v.long()), "value must be floating point, got torch.int64"),
        ((q[:1], k, v), r"do not fit: \(1, 4, 5, 8\), \(2, 2, 7, 8\), \(2, 2, 7, 3\)"),
        ((q[..., :7], k, v), "do not fit"),
        ((q, k, v[:, :, :6]), "do not fit"),
        ((q[:, :3], k, v), r"the key heads must divide the query heads \(3\), got 2"),
        ((q, k[:, :0], v[:, :0]), r"the key heads must divide the query heads \(4\), got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            check_qkv(*bad)
    with pytest.raises(ValueError, match="do not fit"):
        check_qkv(q, k, v, tokens="same")
    with pytest.raises(ValueError, match="the queries are the last of the tokens: at most 3, got 5"):
        check_qkv(q, k[:, :, :3], v[:, :, :3], tokens="last")
