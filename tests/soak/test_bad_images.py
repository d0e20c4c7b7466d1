"""10,000 small files, 500 of them bad in every way: a run and the tool name exactly these."""

import time

import pytest
from bad_files import LISTED, make_mixed_folder
from builders import run_tool
from data_runs import data_config

from cae_mm.engine import CAERunner

FILES, SHARE = 10_000, 0.05


def read_paths(path):
    """Paths of a list, each of which comes once."""
    paths = [line.split('\t')[0] for line in path.read_text().splitlines()]
    assert len(set(paths)) == len(paths)
    return set(paths)


def test_exact_list_of_many(tmp_path, capsys):
    folder = tmp_path / 'images'
    bad = make_mixed_folder(folder, FILES, SHARE)
    crop = dict(type='cae_mm.TwoViewResizedCrop', size=32, second_size=16, flip_prob=0.5)
    mask = dict(type='cae_mm.CAEMaskGenerator', patch_size=8, min_block=2)
    cfg = data_config(
        folder, tmp_path / 'run', crop, mask, on_error='skip', num_workers=2, batch_size=50
    )
    cfg.train_dataloader.collate_fn = dict(type='default_collate')
    cfg.custom_hooks = [dict(type='cae_mm.UnreadableImagesHook')]
    start = time.monotonic()
    CAERunner.from_cfg(cfg).train()
    seconds = time.monotonic() - start
    listed = read_paths(tmp_path / 'run/unreadable.txt')
    with pytest.raises(SystemExit) as status:
        run_tool('check_images.py', folder, '--out', tmp_path / 'bad.txt', '--workers', 2)
    found = read_paths(tmp_path / 'bad.txt')
    report = capsys.readouterr().out
    with capsys.disabled():
        print(f'\n{FILES} files, {len(bad)} of them bad, of {len(LISTED)} kinds; 2 workers')
        for name, paths in ((f'training, {seconds:.0f} s', listed), ('check_images.py', found)):
            missing, wrong = len(bad.keys() - paths), len(paths - bad.keys())
            print(f'{name}: {len(paths)} listed, {missing} missing, {wrong} wrong')
        print(report[report.index(f'{FILES} images in') :])
    assert listed == found == bad.keys() and status.value.code == 1
