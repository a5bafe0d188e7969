"""Labels that cost less than full maps, made of full maps: `python -m bench.cheap_labels data/camvid --ignore 11`.

Beside `annotations/SPLIT` come `coarse/SPLIT`, label maps of the interiors alone, and `boxes_SPLIT.json`, COCO's file of one
box a connected region. As Cityscapes' coarse maps do, these leave a rim of every region open: `--rim` px of it, or half of its
greatest depth where that is less, so that thin things keep their middle line.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from rich.progress import track
from scipy import ndimage

from maskfirst.data.vocabulary import load
from maskfirst.files import write_aside, write_json


def interior(region: Bool[np.ndarray, "H W"], rim: float) -> Bool[np.ndarray, "H W"]:
    """What of a region lies deeper in it than the rim."""
    depth = np.asarray(ndimage.distance_transform_edt(np.pad(region, 1)))[1:-1, 1:-1]
    return depth > min(rim, depth.max() / 2)


def regions(
    labels: UInt8[np.ndarray, "H W"], ignore: int, smallest: int
) -> list[tuple[int, tuple[slice, slice], Bool[np.ndarray, "h w"]]]:
    """(class, window, its pixels in there) of every connected region of `smallest` px or more."""
    found = []
    for number in sorted(set(np.unique(labels).tolist()) - {ignore}):
        parts, _ = ndimage.label(labels == number, np.ones((3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
        for index, window in enumerate(ndimage.find_objects(parts), 1):
            inside = parts[window] == index
            if inside.sum() >= smallest:
                found.append((number, window, inside))
    return found


def main() -> None:
    """Reads the command line and writes the labels of all splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="images/SPLIT and annotations/SPLIT")
    parser.add_argument("--ignore", type=int, default=255, help="the value of no class")
    parser.add_argument("--vocabulary", default="camvid")
    parser.add_argument("--rim", type=float, default=4.0, help="px")
    parser.add_argument("--smallest", type=int, default=25, help="px of a region that is labelled")
    given = parser.parse_args()
    words = load(given.vocabulary)
    for folder in sorted((given.root / "annotations").iterdir()):
        content: dict[str, list[Any]] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": number, "name": name} for number, name in zip(words.ids, words.names, strict=True)],
        }
        left = total = 0
        for path in track(sorted(folder.glob("*.png")), folder.name):
            labels = np.array(Image.open(path))
            image = next((given.root / "images" / folder.name).glob(f"{path.stem}.*")).name
            coarse = np.full_like(labels, given.ignore)
            key = len(content["images"]) + 1
            content["images"].append(
                {"id": key, "file_name": image, "height": labels.shape[0], "width": labels.shape[1]}
            )
            for number, (rows, columns), inside in regions(labels, given.ignore, given.smallest):
                coarse[rows, columns][interior(inside, given.rim)] = number
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": key,
                        "category_id": words.ids[number],
                        "bbox": [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
                        "iscrowd": 0,
                    }
                )
            total += (labels != given.ignore).sum()
            left += (coarse != given.ignore).sum()
            with write_aside(given.root / "coarse" / folder.name / path.name) as aside:
                Image.fromarray(coarse).save(aside, "PNG")
        write_json(given.root / f"boxes_{folder.name}.json", content)
        print(
            json.dumps(
                {
                    "split": folder.name,
                    "pictures": len(content["images"]),
                    "coarse share of labelled px": round(left / total, 3),
                    "boxes": len(content["annotations"]),
                }
            )
        )


if __name__ == "__main__":
    main()
