import numpy as np
import torch
from PIL import Image

from cae_mm.visualization.sheet import MARGIN, frame, outline, save_sheet


def test_rows_and_columns(tmp_path):
    dark, bright = torch.zeros(3, 8, 4), torch.ones(3, 8, 4)
    save_sheet([[dark, bright], [bright, dark]], tmp_path / 'new' / 'a.png', side=16)
    with Image.open(tmp_path / 'new' / 'a.png') as picture:
        image = np.asarray(picture.convert('L'))
    assert image.shape == (4 + 2 * 20 + 4, 4 + 2 * 12 + 4)
    want = np.full(image.shape, 255)
    want[4:20, 4:12] = want[24:40, 16:24] = 0
    np.testing.assert_array_equal(image, want)


def test_short_rows_end_in_white(tmp_path):
    dark = torch.zeros(3, 8, 8)
    save_sheet([[dark], [dark, dark]], tmp_path / 'a.png', side=16)
    with Image.open(tmp_path / 'a.png') as picture:
        image = np.asarray(picture.convert('L'))
    assert image.shape == (4 + 2 * 20 + 4, 4 + 2 * 20 + 4)
    assert (image[4:20, 24:40] == 255).all() and (image[24:40, 24:40] == 0).all()


def test_text_has_its_own_room(tmp_path):
    gray = torch.full((3, 8, 8), 0.5)
    options = dict(titles=['title'], labels=['label'], note='note', side=60)
    save_sheet([[gray]], tmp_path / 'a.png', **options)
    save_sheet([[gray]], tmp_path / 'same.png', **options)
    assert (tmp_path / 'a.png').read_bytes() == (tmp_path / 'same.png').read_bytes()
    with Image.open(tmp_path / 'a.png') as picture:
        assert not picture.info.get('Software')
        image = np.asarray(picture.convert('L'))
    assert (image[MARGIN : MARGIN + 60, MARGIN : MARGIN + 60] == 128).all()
    for margin in (image[:MARGIN], image[:, :MARGIN], image[-MARGIN:]):
        assert margin.min() < 100  # ink


def test_shrunk_pictures_are_averaged(tmp_path):
    stripes = torch.zeros(3, 64, 64)
    stripes[:, :, ::2] = 1
    save_sheet([[stripes]], tmp_path / 'a.png', side=16)
    with Image.open(tmp_path / 'a.png') as picture:
        inside = np.asarray(picture.convert('L'))[8:16, 8:16]
    assert abs(inside.astype(int) - 128).max() <= 2


def test_outline_changes_nothing_but_the_frame():
    picture = torch.rand(3, 8, 10)
    box = outline(picture, (2, 4, 5, 6), (1.0, 0.0, 0.5), width=1)
    changed = (box != picture).any(0)
    assert changed.sum() == 2 * 5 + 2 * 6 - 4
    assert changed[2, 4:10].all() and changed[6, 4:10].all() and changed[2:7, 4].all()
    assert box[:, 2, 4].tolist() == [1.0, 0.0, 0.5]
    black = (0.0, 0.0, 0.0)
    assert torch.equal(frame(picture, black), outline(picture, (0, 0, 8, 10), black, 1))
