"""docs/first_encoder.md, cell by cell with few crops; `make notebook` runs it whole in Jupyter."""

import jupytext
import matplotlib.pyplot as plt
import numpy as np
import pytest
from builders import ROOT
from PIL import Image

from cae_mm.datasets.photographs import CROP, cut_crops

PAGE = ROOT / 'docs' / 'first_encoder.md'
PHOTOGRAPHS, TRAIN, VAL = 2, 40, 6
SHEETS = {'crops.png', 'reconstruction.png', 'components.png', 'attention.png'}


@pytest.mark.usefixtures('plain_config_text')
def test_the_notebook_runs(tmp_path, capsys):
    first, *cells = (c.source for c in jupytext.read(PAGE).cells if c.cell_type == 'code')
    values = {}
    exec(compile(first, f'{PAGE}: 1', 'exec'), values)
    assert len(values['photographs']) == 16
    photographs = values['photographs'][:PHOTOGRAPHS]
    values |= dict(work=tmp_path, photographs=photographs, train=TRAIN, val=VAL, epochs=2)
    for i, cell in enumerate(cells):
        exec(compile(cell, f'{PAGE}: {i + 2}', 'exec'), values)
    plt.close('all')

    assert values['checkpoint'] == tmp_path / 'run' / 'epoch_2.pth'
    assert [line['step'] for line in values['lines']] == [2, 4]
    assert {path.name for path in tmp_path.glob('*.png')} == SHEETS
    random, pretrained = (values['columns'][name][0] for name in ('random', 'pretrained'))
    assert not np.array_equal(random, pretrained)
    features, exported = values['features'], values['exported']
    assert features.shape == (6, 128) and features.dtype == np.float32
    # the encoder computes in bfloat16 where that is fast
    np.testing.assert_allclose(exported, features, rtol=0, atol=0.03 * abs(features).max())
    printed = capsys.readouterr().out
    assert '2 epochs' in printed and f'chance {1 / PHOTOGRAPHS:.1%}' in printed
    assert printed.count('error') == 0  # of the doctor


def read(folder):
    return {
        str(path.relative_to(folder)): np.asarray(Image.open(path))
        for path in sorted(folder.rglob('*.png'))
    }


def save_photograph(path):
    """Stripes that lie in the left part, and stripes that stand in the right."""
    stripes = np.arange(500) // 8 % 2 * 255
    pixels = np.where(np.arange(500) < 325, stripes[:400, None], stripes)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def test_held_out_crops_are_of_the_other_part_of_a_photograph(tmp_path):
    save_photograph(tmp_path / 'stripes.png')
    for out in ('one', 'two'):
        (tmp_path / out).mkdir()
        cut_crops([tmp_path / 'stripes.png'], tmp_path / out, train=9, val=4)
    crops = read(tmp_path / 'one')
    again = read(tmp_path / 'two')
    assert crops.keys() == again.keys() and len(crops) == 13
    for name, crop in crops.items():
        assert np.array_equal(crop, again[name])
        assert crop.shape == (CROP, CROP)
        assert abs(crop.mean() - 128) < 1 and abs(crop.std() - 50) < 1
        down, across = (np.abs(np.diff(crop.astype(float), axis=axis)).mean() for axis in (0, 1))
        lie, stand = (down, across) if name.startswith('train/stripes/') else (across, down)
        assert lie > 5 and stand < 1, name


def test_photographs_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match='several photographs are called sea: rename them'):
        cut_crops([tmp_path / 'a/sea.jpg', tmp_path / 'b/sea.png'], tmp_path / 'crops')
