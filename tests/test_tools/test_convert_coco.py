"""tools/convert_coco.py: masks and crops of a file in COCO's format, by hand."""

import json

import numpy as np
import pytest
from builders import run_tool
from PIL import Image

pytest.importorskip('pycocotools')

CATEGORIES = [(3, 'cat', 'animal'), (7, 'dog', 'animal'), (9, 'cup', 'kitchen')]
SIZE = (8, 6)


def rectangle(category, x, y, w, h, image=1):
    outline = [x, y, x + w, y, x + w, y + h, x, y + h]
    return dict(
        image_id=image,
        category_id=category,
        bbox=[x, y, w, h],
        area=w * h,
        iscrowd=0,
        segmentation=[outline],
    )


def crowd(category, x, y, w, h):
    """The same area as a run-length code, which goes down the columns."""
    inside = np.zeros(SIZE, dtype=bool)  # transposed
    inside[x : x + w, y : y + h] = True
    ends = np.flatnonzero(np.diff(inside.ravel(), prepend=False, append=False))
    counts = np.diff(ends, prepend=0, append=inside.size).tolist()
    code = dict(size=list(SIZE[::-1]), counts=counts)
    return rectangle(category, x, y, w, h) | dict(iscrowd=1, segmentation=code)


@pytest.fixture
def write(tmp_path):
    def write(*objects, size=SIZE):
        content = dict(
            images=[
                dict(id=i, file_name=f'{name}.png', width=size[0], height=size[1])
                for i, name in ((1, 'a'), (2, 'b'))
            ],
            categories=[dict(id=i, name=n, supercategory=s) for i, n, s in CATEGORIES],
            annotations=[dict(each, id=i) for i, each in enumerate(objects, start=1)],
        )
        (tmp_path / 'coco.json').write_text(json.dumps(content))
        return tmp_path / 'coco.json', tmp_path / 'out'

    return write


def test_small_objects_lie_over_large_ones_and_crowds_under_all(write, capsys):
    cat, dog, cup = rectangle(3, 1, 1, 2, 2), rectangle(7, 0, 0, 5, 4), rectangle(9, 4, 3, 2, 2)
    file, out = write(cat, dog, cup, crowd(7, 3, 2, 5, 4))
    run_tool('convert_coco.py', 'masks', file, out, '--classes', 'dog', 'cat')
    assert np.array(Image.open(out / 'a.png')).tolist() == [
        [1, 1, 1, 1, 1, 0, 0, 0],
        [1, 2, 2, 1, 1, 0, 0, 0],
        [1, 2, 2, 1, 1, 255, 255, 255],
        [1, 1, 1, 1, 255, 255, 255, 255],
        [0, 0, 0, 255, 255, 255, 255, 255],
        [0, 0, 0, 255, 255, 255, 255, 255],
    ]
    assert not np.array(Image.open(out / 'b.png')).any()
    assert 'cat: 4.2% of all pixels' in capsys.readouterr().out  # 4 of 96


@pytest.mark.parametrize(
    ('classes', 'values'), [([], [1, 2, 3]), (['kitchen', 'animal'], [2, 2, 1])]
)
def test_classes_are_categories_or_super_categories(write, classes, values):
    file, out = write(*(rectangle(i, 2 * n, 0, 1, 1) for n, (i, *_) in enumerate(CATEGORIES)))
    options = ['--classes', *classes] if classes else []
    run_tool('convert_coco.py', 'masks', file, out, *options)
    assert np.array(Image.open(out / 'a.png'))[0, [0, 2, 4]].tolist() == values


def test_crops_are_squares_around_large_boxes_within_the_image(write, tmp_path, capsys):
    W, H = size = (100, 80)
    y, x = np.mgrid[:H, :W]
    pixels = np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)  # colours say where
    for name in 'ab':
        Image.fromarray(pixels).save(tmp_path / f'{name}.png')
    file, out = write(
        rectangle(3, 40, 30, 20, 16),  # 25 wide, around (50, 38)
        rectangle(7, 80, 60, 20, 20, image=2),  # in the corner
        rectangle(7, 0, 10, 100, 40),  # wider than the image is high
        rectangle(9, 40, 30, 20, 15),  # too small
        rectangle(9, 40, 30, 20, 20) | dict(iscrowd=1),
        size=size,
    )
    run_tool('convert_coco.py', 'crops', file, out, '--images', tmp_path, '--min-side', 16)
    places = {}
    for path in out.rglob('*.jpg'):
        crop = np.array(Image.open(path)).astype(int)
        places[str(path.relative_to(out))] = (*crop[0, 0, :2], *crop.shape[:2])
    expected = {
        'cat/a_1.jpg': (38, 26, 25, 25),
        'dog/b_2.jpg': (75, 55, 25, 25),
        'dog/a_3.jpg': (10, 0, 80, 80),
    }
    assert places.keys() == expected.keys()
    for name, place in expected.items():
        assert places[name] == pytest.approx(place, abs=2), name  # colours of a JPEG
    assert '2 dog\n    1 cat' in capsys.readouterr().out


def test_bad_input_is_named(write, tmp_path):
    file, out = write(rectangle(3, 0, 0, 2, 2))
    with pytest.raises(ValueError, match='no category or super-category is called hat; .* cup, do'):
        run_tool('convert_coco.py', 'masks', file, out, '--classes', 'hat', 'cat')
    with pytest.raises(FileExistsError, match='out'):
        run_tool('convert_coco.py', 'masks', file, out)
    Image.new('RGB', SIZE[::-1]).save(tmp_path / 'a.png')
    with pytest.raises(ValueError, match=r'a.png has \(6, 8\) pixels, .* are of \(8, 6\)'):
        run_tool('convert_coco.py', 'crops', file, tmp_path / 'crops', '--images', tmp_path)
    content = json.loads(file.read_text())
    content['categories'] = [dict(id=i, name=str(i)) for i in range(255)]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match='255 classes: masks of 8 bits have room for 254'):
        run_tool('convert_coco.py', 'masks', file, tmp_path / 'many')
