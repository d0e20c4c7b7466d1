"""Make of objects in COCO's format what other tasks take: semantic masks, or crops by class.

    A=data/coco/annotations/instances_train2017.json
    python tools/convert_coco.py masks $A data/coco_masks/train --classes person animal vehicle
    python tools/convert_coco.py crops $A data/coco_crops/train --images data/coco/train2017

A class is a category, or a super-category for all of its categories; by default, each category is
one. Classes with few objects are best left out: what there is of each is printed.

``masks`` writes an 8-bit PNG for each image, as mmsegmentation reads them: 0 is what no object
covers, i the i-th class; smaller objects lie over larger ones. Crowds and objects of other classes
are 255, which is ignored.

``crops`` writes a square around each box that is large enough, with some context, into a folder for
each class. Annotations of other images, as COCO's for validation, make the other split.

Needs pycocotools, which comes with mmdetection.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from pycocotools.coco import COCO

IGNORED = 255
CONTEXT = 1.25  # side of a crop over the longer side of its box


def classes_of_categories(coco: 'COCO', classes: Sequence[str] | None) -> dict[int, str]:
    """Class of each category that has one, by the category's id.

    Raises:
        ValueError: If a class is neither category nor super-category.
    """
    found, known = {}, set()
    for category in coco.loadCats(coco.getCatIds()):
        names = [category['name'], category.get('supercategory')]
        known.update(names)
        if mine := [name for name in names if classes is None or name in classes]:
            found[category['id']] = mine[0]
    if unknown := set(classes or ()) - known:
        raise ValueError(
            f'no category or super-category is called {", ".join(sorted(unknown))}; there are '
            f'{", ".join(sorted(known - {None}))}'
        )
    return found


def write_masks(coco: 'COCO', classes: Sequence[str] | None, out: Path) -> None:
    """Write the mask of each image as ``out/NAME.png`` and print the share of each class."""
    class_of = classes_of_categories(coco, classes)
    names = list(classes or class_of.values())
    if len(names) >= IGNORED:
        raise ValueError(f'{len(names)} classes: masks of 8 bits have room for {IGNORED - 1}')
    values = {category: 1 + names.index(name) for category, name in class_of.items()}
    pixels = np.zeros(256, dtype=np.int64)
    for image in coco.imgs.values():
        mask = paint(coco, image, values)
        pixels += np.bincount(mask.ravel(), minlength=256)
        Image.fromarray(mask).save(out / f'{Path(image["file_name"]).stem}.png')
    for value, name in [*enumerate(['no object', *names]), (IGNORED, 'ignored')]:
        print(f'{value:3} {name}: {pixels[value] / pixels.sum():.1%} of all pixels')


def paint(coco: 'COCO', image: dict[str, Any], values: dict[int, int]) -> np.ndarray:
    """Paint the objects of an image over each other, crowds first, then from large to small.

    Args:
        coco: Its annotations.
        image: As the file describes it.
        values: What each category is painted with.

    Returns:
        Array with shape (H, W), uint8.
    """
    mask = np.zeros((image['height'], image['width']), dtype=np.uint8)
    objects = coco.imgToAnns[image['id']]
    for each in sorted(objects, key=lambda each: (not each.get('iscrowd'), -each['area'])):
        value = IGNORED if each.get('iscrowd') else values.get(each['category_id'], IGNORED)
        mask[coco.annToMask(each) > 0] = value
    return mask


def write_crops(
    coco: 'COCO', classes: Sequence[str] | None, images: Path, out: Path, min_side: int
) -> None:
    """Write crops as ``out/CLASS/IMAGE_OBJECT.jpg`` and print how many there are of each class.

    Raises:
        ValueError: If an image has not the size that the annotations say.
    """
    class_of = classes_of_categories(coco, classes)
    counts: Counter[str] = Counter()
    for info in coco.imgs.values():
        path = images / info['file_name']
        with Image.open(path) as file:
            image = file.convert('RGB')
        if image.size != (info['width'], info['height']):
            size = (info['width'], info['height'])
            raise ValueError(f'{path} has {image.size} pixels, its annotations are of {size}')
        for each in coco.imgToAnns[info['id']]:
            name = class_of.get(each['category_id'])
            if name is None or each.get('iscrowd') or min(each['bbox'][2:]) < min_side:
                continue
            counts[name] += 1
            target = out / name / f'{path.stem}_{each["id"]}.jpg'
            target.parent.mkdir(exist_ok=True)
            image.crop(square_around(each['bbox'], *image.size)).save(target, quality=95)
    for name, count in counts.most_common():
        print(f'{count:5} {name}')


def square_around(box: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """Square around a box with context, moved into the image where it would leave it.

    Args:
        box: Left, top, width, height in pixels.
        width: Of the image.
        height: Of the image; the square is never larger than its shorter side.

    Returns:
        Left, top, right, bottom.
    """
    x, y, w, h = box
    side = min(round(CONTEXT * max(w, h)), width, height)
    left = min(max(round(x + w / 2 - side / 2), 0), width - side)
    top = min(max(round(y + h / 2 - side / 2), 0), height - side)
    return left, top, left + side, top + side


def main() -> None:
    """Write masks or crops."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True)
    masks = commands.add_parser('masks', help='a semantic mask of each image')
    crops = commands.add_parser('crops', help='a crop of each object, in a folder of its class')
    for part in (masks, crops):
        part.add_argument('annotations', type=Path, help="instances in COCO's format")
        part.add_argument('out', type=Path, help='new folder')
        part.add_argument('--classes', nargs='+', help='(super-)categories, in order of their ids')
    crops.add_argument('--images', type=Path, required=True, help='folder of the images')
    crops.add_argument('--min-side', type=int, default=32, help='pixels of a box at least')
    args = parser.parse_args()
    from pycocotools.coco import COCO  # not for --help, which needs no mmdetection

    coco = COCO(args.annotations)
    args.out.mkdir(parents=True)
    if args.command == 'masks':
        write_masks(coco, args.classes, args.out)
    else:
        write_crops(coco, args.classes, args.images, args.out, args.min_side)


if __name__ == '__main__':
    main()
