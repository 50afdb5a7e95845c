"""Bidirectional WKV: each token takes a mean of all, weighted by their keys and, channel by channel, by distance.

    y_t = (sum_{i != t} e^(k_i - w d(t, i)) v_i + e^(u + k_t) v_t) / (sum_{i != t} e^(k_i - w d(t, i)) + e^(u + k_t))

Two scans in O(T C), one over what came before a token and one over what comes after it, forward and backward. Weights
are never exponentials of anything positive: each sum is kept relative to its largest term, and that term is kept as its
key and its age, not as the number key - w age, which would lose all digits of the key where w age is large. So decay
of either sign (w < 0: the farther the heavier), however strong, is safe over any length.
"""

from saccade.ops.wkv.attend import DISTANCES, wkv, wkv_reference

__all__ = ["DISTANCES", "wkv", "wkv_reference"]
