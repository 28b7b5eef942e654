"""SimAM."""

from __future__ import annotations

from .. import functional, reference


class SimAM(reference.SimAM):
    """SimAM: x * sigmoid(d / (4 * (sum(d) / (n - 1) + e_lambda)) + 0.5) with d = (x - mean(x))^2.

    Sum and mean are over the n positions of each channel.

    Args:
        channels: C; None: any. The block has no parameters.
        e_lambda: the paper's lambda; where a channel is constant it keeps the quotient finite.

    `forward(x)`: x (B, C, *spatial), one to three spatial axes; a map of the same shape. On maps of one position the
    variance is 0 / 0 and the result NaN, as in the original: put no SimAM behind a global pool.

    Raises:
        ValueError: e_lambda is not a finite number of at least 0; in `forward`: x has not `channels` channels.

    Source: SimAM, ICML 2021, proceedings.mlr.press/v139/yang21o.html; equivalent to the authors' `simam_module`.
    """

    _simam = staticmethod(functional.simam)
