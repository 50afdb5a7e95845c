"""Values as small PNG pictures and bars.

Shape letters: C channels, H and W height and width.
"""

from __future__ import annotations

import base64
import io
from html import escape

import torch
from torch import Tensor

from saccade.extras import need


def stretched(map_HW: Tensor) -> Tensor:
    """To [0, 1] from the first to the 99th percentile of all but its rim; 0 where it is flat."""
    rim = min(map_HW.shape) // 12  # the gates' convolutions see zeros there
    inner_HW = map_HW[rim : map_HW.shape[0] - rim, rim : map_HW.shape[1] - rim]
    low, high = torch.quantile(inner_HW.flatten(), torch.tensor([0.01, 0.99])).tolist()
    return ((map_HW - low) / max(high - low, 1e-12)).clamp(0, 1)


def _greys() -> list[tuple[int, int, int]]:
    return [(level, level, level) for level in (round(255 * i / 63) for i in range(64))]


def colours_of_maps() -> list[tuple[int, int, int]]:
    """64 colours from low to high."""
    scale = need("matplotlib", "drawing").colormaps["inferno"]
    return [tuple(round(255 * part) for part in scale(i / 63)[:3]) for i in range(64)]  # type: ignore[misc]


def png_of(values_HW: Tensor, palette: list[tuple[int, int, int]]) -> bytes:
    """Values in [0, 1] as a PNG of few colours."""
    from PIL import Image  # comes with matplotlib

    indices = (values_HW * (len(palette) - 1)).round().to(torch.uint8).contiguous().numpy()
    image = Image.fromarray(indices, mode="P")
    image.putpalette([part for colour in palette for part in colour])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def bars_of(values_C: Tensor, top: float, alt: str) -> str:
    """A bar a channel, from 0 to `top`."""
    C = len(values_C)
    bars = "".join(
        f'<rect x="{i}" width=".8" y="{1 - h:.3f}" height="{h:.3f}"/>'
        for i, h in enumerate((values_C.clamp(min=0) / max(top, 1e-12)).tolist())
    )
    return (
        f'<svg viewBox="0 0 {C} 1" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(alt, quote=True)}">{bars}</svg>'
    )
