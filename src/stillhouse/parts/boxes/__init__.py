"""Boxes: rectangles in images (`image`), and boxes on the ground with a heading (`ground`)."""

from stillhouse.parts.boxes.ground import (
    corners,
    ground_corners,
    into_box,
    moved,
    nine_points,
    out_of_box,
    points_in_boxes,
    points_per_box,
    turned,
    wrapped,
)
from stillhouse.parts.boxes.image import (
    areas,
    clipped,
    covered,
    decode,
    encode,
    flipped,
    intersections,
    iou,
    resized,
)

__all__ = [
    "areas",
    "clipped",
    "corners",
    "covered",
    "decode",
    "encode",
    "flipped",
    "ground_corners",
    "intersections",
    "into_box",
    "iou",
    "moved",
    "nine_points",
    "out_of_box",
    "points_in_boxes",
    "points_per_box",
    "resized",
    "turned",
    "wrapped",
]
