"""A long run with an image in each epoch that has no finite loss."""

import math
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from two_processes import train_faulty

EPOCHS = 300


@HOOKS.register_module()
class NoteChanges(Hook):
    """Keep of each step whether its loss was finite, and whether it changed a parameter."""

    def __init__(self) -> None:
        self.steps: list[tuple[bool, bool]] = []

    def before_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        self.before = torch.nn.utils.parameters_to_vector(runner.model.parameters()).detach()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any, outputs: Any) -> None:
        after = torch.nn.utils.parameters_to_vector(runner.model.parameters()).detach()
        assert after.isfinite().all()
        same = torch.equal(after, self.before)
        self.steps.append((math.isfinite(outputs['loss'].item()), not same))


def test_broken_steps_change_nothing(tmp_path, capsys):
    checkpoint = dict(type='cae_mm.CheckpointHook', interval=100)
    runner = train_faulty(
        tmp_path / 'run',
        train_cfg=dict(by_epoch=True, max_epochs=EPOCHS),
        guard=dict(limit=EPOCHS),
        default_hooks=dict(checkpoint=checkpoint, notes=dict(type='NoteChanges')),
    )
    [steps] = [hook.steps for hook in runner.hooks if isinstance(hook, NoteChanges)]
    assert all(changed == finite for finite, changed in steps)
    broken = sum(not finite for finite, _ in steps)
    assert (len(steps), broken) == (2 * EPOCHS, EPOCHS)
    losses = [loss for loss in runner.losses if math.isfinite(loss)]
    assert losses[-1] < losses[0]  # the rest goes on learning
    assert len(list((tmp_path / 'run/faults').glob('*.json'))) == 3  # not one for each
    with capsys.disabled():
        print(f'\n{len(steps)} steps, {broken} broken: skipped, all weights as before the step')
