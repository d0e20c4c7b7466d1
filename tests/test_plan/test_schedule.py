"""Steps, updates and warm-up of a whole training, counted by hand."""

from pathlib import Path

import pytest
from mmengine.config import ConfigDict

from cae_mm.doctor.case import Case, Machine
from cae_mm.plan.schedule import count_images, make_schedule

CONFIGS = Path(__file__).parents[2] / 'configs'
PAPER = CONFIGS / 'pretrain/cae_vit-base-p16_32xb64-amp-coslr-300e_in1k.py'
IMAGENET = 1_281_167


def schedule(path: Path, processes: int, options: dict | None = None, images: int | None = None):
    case = Case.read(path, Machine(processes, 'cuda'), options or {}, None)
    return make_schedule(case, images)


def test_recipe_of_the_paper():
    found = schedule(PAPER, 32, images=IMAGENET)
    length = IMAGENET // 32 // 64
    assert (found.steps, found.updates, found.gathered) == (300 * length, 300 * length, 1)
    assert found.batch == 2048 and found.images == 300 * length * 2048
    assert found.warm_up == pytest.approx(10 / 300)


@pytest.mark.parametrize('processes', [1, 8, 32, 64])
def test_images_and_updates_stay_on_any_number_of_processes(processes):
    one, other = schedule(PAPER, 32, images=IMAGENET), schedule(PAPER, processes, images=IMAGENET)
    assert other.images == pytest.approx(one.images, rel=2e-3)  # the last batch is dropped
    assert other.updates * other.batch == pytest.approx(one.images, rel=2e-3)


def test_gathering_ends_with_the_epoch():
    found = schedule(PAPER, 8, {'settings.epochs': 3}, images=8 * 64 * 10)
    assert found.gathered == 4 and found.steps == 3 * 10 and found.updates == 3 * 3


def test_last_batch_is_kept_or_dropped():
    options = {'settings.epochs': 1}
    assert schedule(PAPER, 1, options, images=130).steps == 2
    options['train_dataloader.drop_last'] = False
    assert schedule(PAPER, 1, options, images=130).steps == 3
    assert schedule(PAPER, 3, options, images=130).steps == 1  # 44 images a process


def test_too_few_images():
    with pytest.raises(ValueError, match='100 images are 50 a process.*settings.batch_size=50'):
        schedule(PAPER, 2, images=100)


def test_iterations_need_no_images():
    path = CONFIGS / 'upernet/cae_vit-base_upernet_8xb2-amp-160k_ade20k-512x512.py'
    for processes, gathered in ((8, 1), (1, 8)):
        found = schedule(path, processes)
        assert found.epochs is None and found.gathered == gathered
        assert found.updates == 160_000 and found.images == 160_000 * 16
        assert found.warm_up == pytest.approx(1500 / 160_000, rel=2e-3)


def test_unknown_number_of_images():
    assert schedule(PAPER, 1) is None
    assert count_images(PAPER, None) == IMAGENET
    assert count_images(Path('cae_vit-base_upernet_8xb2_ade20k-512x512.py'), None) == 20_210
    assert count_images(Path('cae_custom.py'), None) is None
    assert count_images(PAPER, ['a', 'b']) == 2


def test_schedule_without_warm_up():
    case = Case.read(PAPER, Machine(1, 'cuda'), {}, None)
    for schedulers in (None, dict(type='CosineAnnealingLR'), [dict(type='LinearLR', begin=5)]):
        case.cfg['param_scheduler'] = schedulers and ConfigDict(x=schedulers).x
        assert make_schedule(case, IMAGENET).warm_up == 0
