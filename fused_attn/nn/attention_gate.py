"""The attention gate of Attention U-Net."""

from __future__ import annotations

from .. import functional, reference
from .normalised import normalised


class AttentionGate(reference.AttentionGate):
    """Attention gate: x * sigmoid(psi(relu(W_g g + W_x x))), one number a position, from x and a second map g.

    BatchNorm, sum and ReLU of large maps are one fused op, and so is the product with the gate.

    Args:
        channels: C, of the map that is gated.
        gating: channels of the gating signal g; None: C.
        hidden: channels of the sum; None: C // 2.
        stride: W_x is a convolution with this kernel and stride; where it is more than 1 without a bias.
        batch_norm: behind W_g, W_x and psi.
        project: a 1x1 convolution and a BatchNorm follow, `W`.
        rank: number of spatial axes, 1 to 3.

    `forward(g, x)`: g (B, gating, *spatial) and x (B, C, *spatial); a map of x's shape. Where their sizes differ, W_g g
    is interpolated linearly to the size of W_x x, and the gate to that of x (align_corners=False).

    Keys: those of the common code in two dimensions, `W_g.0.weight` (hidden, gating, 1, 1), `W_g.0.bias`, `W_g.1.*`,
    `W_x.0.*`, `W_x.1.*`, `psi.0.weight` (1, hidden, 1, 1), `psi.0.bias`, `psi.1.*`. `load_state_dict` also takes
    MONAI's (`W_g.0.conv.weight`) and the authors' (`theta`, `phi`, `psi`, `W.0`, `W.1`).

    Raises:
        ValueError: an option is out of range; in `forward`: x or g of another rank, g of another batch.

    Source: Attention U-Net, arXiv:1804.03999; equivalent to the common `Attention_block` (the defaults), to MONAI's
    `AttentionBlock`, and to the authors' `GridAttentionBlock3D` in mode "concatenation" (stride=2, batch_norm=False,
    project=True, rank=3), whose gate is not returned.
    """

    _normalised = staticmethod(normalised)
    _scale = staticmethod(functional.scale)
