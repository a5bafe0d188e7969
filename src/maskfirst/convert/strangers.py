"""Strangers: networks that none of ours is, though their names look like it, and what is said of them."""

from collections.abc import Collection

_DETECTION = ("neck", "rpn_head", "roi_head", "bbox_head", "panoptic_head")


def told(keys: Collection[str]) -> str | None:
    """What a checkpoint of no known origin is, and what to take instead; None where no one knows."""
    tops = {key.split(".")[0] for key in keys}
    found = [top for top in _DETECTION if top in tops]
    if "backbone" not in tops or not found:
        return None
    return (
        f"a detector of mmdet's (it has {', '.join(found)}); detection's copies of ViT-Adapter and of its trunks are other "
        "networks than those of segmentation, whatever their names; take a checkpoint of segmentation (decode_head)"
    )
