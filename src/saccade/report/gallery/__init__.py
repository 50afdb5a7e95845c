"""A page of pictures: where each gate of the catalogue looks, on the same photographs, after the same training.

An untrained gate shows noise. So the same small CNN is trained with each gate at the same place, from the same weights,
on the same crops in the same order: *which photograph is this crop from?* A square of each crop is covered with pixels
of another photograph in random order, whose grey values mislead; a gate that has learned something has less
there. Then the network sees whole photographs, some with such a square, and `attention_map` shows its gate:

- what it multiplies the map with: its mean over channels as a picture, and one channel where these have pictures of
  their own; its mean over positions as bars;
- where positions attend to one another: how much each is attended to (the mean of |A| over heads and queries,
  relative to an even share), and where the middle of the photograph looks (likewise, of its row of A).

Everything that the page says is computed: `saccade gallery` writes it, `make gallery` the one in docs/.
"""

from saccade.report.gallery.exhibits import (
    ATTENDED,
    FROM_MIDDLE,
    MULTIPLIED,
    NUMBERS,
    ONE_CHANNEL,
    PHOTOGRAPHS,
    Exhibit,
    Gallery,
    Picture,
    Settings,
)
from saccade.report.gallery.page import page, page_path, write_gallery
from saccade.report.gallery.training import PLACE, crops, make, network, photographs, views

__all__ = [
    "ATTENDED",
    "FROM_MIDDLE",
    "MULTIPLIED",
    "NUMBERS",
    "ONE_CHANNEL",
    "PHOTOGRAPHS",
    "PLACE",
    "Exhibit",
    "Gallery",
    "Picture",
    "Settings",
    "crops",
    "make",
    "network",
    "page",
    "page_path",
    "photographs",
    "views",
    "write_gallery",
]
