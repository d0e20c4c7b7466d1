"""Real collapse is told in plain words, once; healthy training is not disturbed."""

import math
import re
from types import SimpleNamespace

import pytest
from builders import cae_config
from mmengine.hooks import LoggerHook
from mmengine.registry import MODELS
from two_processes import train

from cae_mm.hooks import CollapseHook
from cae_mm.models import CAENeck


@MODELS.register_module()
class ConstantLatents(CAENeck):
    """A regressor that has collapsed: the same for all images."""

    def regress(self, *args):
        z_m = super().regress(*args)
        return self.regressor_norm.bias + 0 * z_m


def warnings_of(tmp_path, **model):
    """Train six steps with a line for each, and return what of the log speaks of signs."""
    config = cae_config(data_preprocessor=dict(type='StackSamples'), **model)
    hooks = [dict(type='cae_mm.SafeLoadHook'), dict(type='RecordLosses')]
    train(
        'cae',
        tmp_path,
        model=config,
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1), checkpoint=None),
        custom_hooks=[*hooks, dict(type='cae_mm.CollapseHook', begin=0.1, lines=2)],
        log_level='INFO',
    )
    log = next(tmp_path.glob('*/*.log')).read_text()
    signs = 'latent_std|align_cos|target_codes|perplexity'
    return re.findall(rf'WARNING - ((?:{signs}) is .*)', log)


def test_latents_that_are_alike_are_told_once(tmp_path):
    neck = dict(cae_config()['neck'], type='ConstantLatents')
    told = warnings_of(tmp_path, neck=neck)
    assert told[0].startswith('latent_std is ') and 'below 0.02: the latents of masked' in told[0]
    assert 'hardly differ between images' in told[0] and 'What to do: resume from' in told[0]
    assert told[1].startswith('target_codes is 2, below 16')  # of a tokenizer that is random
    assert len(told) == 2


def test_a_healthy_run_is_not_disturbed(tmp_path):
    rgb = dict(target_generator=dict(type='cae_mm.RGBTarget'), neck=dict(out_dims=48))
    assert not warnings_of(tmp_path, **rgb)


class FakeRunner:
    """What the hook reads of a run of 100 steps that logs each second one."""

    max_iters, hooks = 100, [LoggerHook(interval=2)]

    def __init__(self, values):
        self.said, self.values, self.reads = [], values, 0
        self.logger = SimpleNamespace(warning=self.say, info=self.say)
        self.message_hub = SimpleNamespace(get_scalar=self.get)

    def say(self, text):
        self.said.append((self.iter + 1, text.partition(':')[0]))

    def get(self, key):
        assert key == f'train/{self.name}'
        self.reads += 1
        return SimpleNamespace(mean=lambda _: self.values[self.iter])

    def run(self, hook, name, images=2):
        self.name = name
        for iteration in range(len(self.values)):
            self.iter = iteration
            hook.after_train_iter(self, iteration, dict(data_samples=[None] * images), {name: 0})


@pytest.mark.parametrize('name', ['latent_std', 'align_cos', 'target_codes', 'perplexity'])
def test_each_state_is_told_once(name):
    low, high = 0.01, 20.0
    values = [low] * 20 + [high] * 4 + [low] * 4 + [math.nan] * 4 + [low] * 8 + [high] * 2
    runner = FakeRunner(values)
    runner.run(CollapseHook(begin=0.1, lines=3), name)
    times = [iteration for iteration, _ in runner.said]
    # from iteration 11 on; 3 lines; recovered; 3 lines of which NaN says nothing; recovered
    assert times == [16, 22, 34, 42]
    assert runner.said[0][1].startswith(f'{name} is 0.01, below')
    assert runner.said[1][1].startswith(f'{name} is 20, above')
    assert runner.reads == 16  # with lines only


def test_single_images_have_no_spread():
    runner = FakeRunner([0.0] * 30)
    runner.run(CollapseHook(begin=0), 'latent_std', images=1)
    assert not runner.said
