"""Selective scan, the recurrence of Mamba: a state that decays, takes in and is read as each token says.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t      y_t = C_t . h_t + D u_t

In O(T C N), forward and backward, by segments of tokens: what a segment makes of nothing, then what it starts with,
then what it gives. Only the states at the starts of segments are kept for backward, which makes the rest again; there
is no tensor of all states. No quotient of cumulated decays occurs, so that any step sizes are safe over any length.
"""

from saccade.ops.selective_scan.attend import selective_scan, selective_scan_reference

__all__ = ["selective_scan", "selective_scan_reference"]
