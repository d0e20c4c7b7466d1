"""The Runner loads, tests and resumes from plain data that fits, and from nothing else."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseModel, BaseTTAModel, ImgDataPreprocessor
from mmengine.runner import Runner
from pickles import Call
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from cae_mm.checkpoints import read_checkpoint
from cae_mm.hooks import SafeLoadHook
from cae_mm.models import CAEViT


class Toy(BaseModel):
    """An encoder and a head."""

    def __init__(self, classes=2, depth=1, use_rel_pos_bias=False, heads=2):
        super().__init__()
        self.backbone = CAEViT(
            arch=dict(embed_dims=8, depth=depth, num_heads=heads, layer_scale=0.1),
            img_size=8,
            patch_size=4,
            out_type='avg_featmap',
            use_rel_pos_bias=use_rel_pos_bias,
        )
        self.head = nn.Linear(8, classes)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        y = self.head(self.backbone(torch.stack(list(inputs)))[0])
        return dict(loss=y.square().mean()) if mode == 'loss' else [y]


class Tta(BaseTTAModel):
    def merge_preds(self, data_samples_list):
        return data_samples_list


class Count(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        return {'count': len(results)}


def loader():
    data = [dict(inputs=torch.ones(3, 8, 8)) for _ in range(2)]
    return DataLoader(
        data, batch_size=2, collate_fn=lambda items: {'inputs': [i['inputs'] for i in items]}
    )


@pytest.fixture
def make_runner(tmp_path, request):
    numbers = iter(range(100))

    def make(model, epochs=1, **options):
        torch.manual_seed(0)
        return Runner(
            model=model,
            work_dir=str(options.pop('work_dir', tmp_path / 'work')),
            train_dataloader=loader(),
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.0)),
            test_dataloader=loader(),
            test_cfg=dict(),
            test_evaluator=Count(),
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
            custom_hooks=[dict(type='cae_mm.SafeLoadHook')],
            experiment_name=f'{request.node.name}_{next(numbers)}',
            cfg=Config(),
            **options,
        )

    return make


def trained(**options):
    torch.manual_seed(1)
    model = Toy(**options)
    for param in model.parameters():
        nn.init.normal_(param)
    return model


def save(model, path, **more):
    torch.save({'state_dict': model.state_dict()} | more, path)
    return str(path)


def same(a, b):
    return all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize('kind', ['mmengine', 'bare', 'safetensors'])
def test_training_starts_from_the_weights(tmp_path, make_runner, kind):
    source, path = trained(), tmp_path / 'a.pth'
    if kind == 'safetensors':
        path = tmp_path / 'a.safetensors'
        save_file(source.state_dict(), path)
    elif kind == 'bare':
        torch.save(source.state_dict(), path)
    else:
        save(source, path)
    runner = make_runner(Toy(), load_from=str(path))
    runner.train()
    assert same(runner.model.state_dict(), source.state_dict())
    assert runner.iter == 1


def test_training_with_a_new_head_and_relative_tables(tmp_path, make_runner):
    source = trained(classes=5)
    runner = make_runner(Toy(use_rel_pos_bias=True), load_from=save(source, tmp_path / 'a.pth'))
    runner.train()
    got = runner.model.state_dict()
    assert same(source.backbone.state_dict(), runner.model.backbone.state_dict())
    assert not got['backbone.blocks.0.attn.relative_position_bias_table'].any()
    assert got['head.weight'].shape == (2, 8)


def test_training_from_a_wrong_file_stops(tmp_path, make_runner):
    path = save(trained(depth=3), tmp_path / 'a.pth')
    runner = make_runner(Toy(depth=9), load_from=path)
    with pytest.raises(ValueError, match='does not fit Toy.backbone: only .* at least 90% must'):
        runner.train()


def test_a_test_needs_every_tensor(tmp_path, make_runner):
    source = trained()
    runner = make_runner(Toy(), load_from=save(source, tmp_path / 'a.pth'))
    assert runner.test() == {'count': 1}
    assert same(runner.model.state_dict(), source.state_dict())

    path = save(trained(classes=5), tmp_path / 'b.pth')
    message = r'Toy cannot be tested with .*b.pth: 2 keys of another shape: head.weight is \(5, 8\)'
    with pytest.raises(ValueError, match=message):
        make_runner(Toy(), load_from=path).test()
    message = '1 keys missing: backbone.blocks.0.attn.relative_position_bias_table$'
    with pytest.raises(ValueError, match=message):
        make_runner(Toy(use_rel_pos_bias=True), load_from=save(source, path)).test()


def test_a_test_may_leave_tensors_of_the_file_unused(tmp_path, make_runner):
    state = trained().state_dict() | {'auxiliary.weight': torch.ones(1)}
    torch.save({'state_dict': state}, tmp_path / 'a.pth')
    assert make_runner(Toy(), load_from=str(tmp_path / 'a.pth')).test() == {'count': 1}


def test_a_wrapped_model_is_looked_into(tmp_path, make_runner):
    path = save(trained(), tmp_path / 'a.pth')
    runner = make_runner(Tta(module=Toy()), load_from=path)
    runner.call_hook('before_run')  # what runner.test() begins with
    runner.load_or_resume()
    assert same(trained().state_dict(), runner.model.module.state_dict())


@pytest.mark.parametrize('explicit', [True, False])
def test_resuming_goes_on(tmp_path, make_runner, explicit):
    first = make_runner(trained())
    first.train()
    path = str(tmp_path / 'work' / 'epoch_1.pth')
    runner = make_runner(Toy(), epochs=2, resume=True, load_from=path if explicit else None)
    runner.train()
    assert (runner.epoch, runner.iter) == (2, 2)
    assert same(first.model.state_dict(), runner.model.state_dict())


def test_the_encoder_is_described_in_every_checkpoint(tmp_path, make_runner):
    """So that another number of heads is refused however the file is used."""
    model = trained()
    model.data_preprocessor = ImgDataPreprocessor(
        mean=[123.675, 2, 3], std=[1, 2, 3], bgr_to_rgb=True
    )
    make_runner(model).train()
    path = tmp_path / 'work' / 'epoch_1.pth'
    assert read_checkpoint(path).description == replace(
        Toy().backbone.describe(), mean=(123.675, 2.0, 3.0), std=(1.0, 2.0, 3.0), to_rgb=True
    )
    message = 'epoch_1.pth was made with 2 heads, but the model has 4'
    for options in (dict(load_from=str(path)), dict(resume=True)):
        with pytest.raises(ValueError, match=message):
            make_runner(Toy(heads=4), epochs=2, **options).train()
    with pytest.raises(ValueError, match=message):
        make_runner(Toy(heads=4), load_from=str(path)).test()


def test_resuming_without_a_checkpoint_starts_anew(make_runner):
    runner = make_runner(Toy(), resume=True)
    runner.train()
    assert runner.iter == 1


def test_resume_auto_begins_with_load_from_and_then_goes_on(tmp_path, make_runner):
    """``--resume`` from the start, of a run that begins with given weights, does not drop them."""
    given = trained(classes=3)
    options = dict(resume='auto', load_from=save(given, tmp_path / 'given.pth'))
    begun = make_runner(Toy(), **options)  # with a new head, as a beginning may have
    begun.train()
    assert same(given.backbone.state_dict(), begun.model.backbone.state_dict())
    assert begun.iter == 1
    written = tmp_path / 'work' / 'epoch_1.pth'
    content = torch.load(written, weights_only=False)
    content['state_dict']['backbone.cls_token'].zero_()
    torch.save(content, written)
    resumed = make_runner(Toy(), epochs=2, **options)
    resumed.train()
    assert (resumed.epoch, resumed.iter) == (2, 2)
    assert not resumed.model.backbone.cls_token.any()

    os.remove(options['load_from'])  # it is needed at the beginning only
    assert make_runner(Toy(), epochs=3, **options).train() is not None


def test_resume_auto_of_a_dumped_config_is_for_training_only(tmp_path, make_runner):
    make_runner(Toy()).train()
    asked = trained()
    runner = make_runner(Toy(), resume='auto', load_from=save(asked, tmp_path / 'asked.pth'))
    runner.test()
    assert same(asked.state_dict(), runner.model.state_dict())


def test_resuming_needs_all_keys_both_ways(tmp_path, make_runner):
    make_runner(trained()).train()
    runner = make_runner(Toy(depth=2), epochs=2, resume=True)
    with pytest.raises(
        ValueError, match='Toy cannot be resumed from .*epoch_1.pth: .* keys missing'
    ):
        runner.train()
    make_runner(trained(depth=2), work_dir=tmp_path / 'deep').train()
    runner = make_runner(Toy(), epochs=2, resume=True, work_dir=tmp_path / 'deep')
    with pytest.raises(ValueError, match='keys unexpected: backbone.blocks.1'):
        runner.train()


@pytest.mark.parametrize('how', ['load_from', 'resume', 'test'])
def test_pickles_that_execute_are_refused(tmp_path, make_runner, how):
    path = save(trained(), tmp_path / 'a.pth', meta=Call(os.mkdir, str(tmp_path / 'executed')))
    runner = make_runner(Toy(), load_from=path, resume=how == 'resume')
    with pytest.raises(ValueError, match='a.pth was refused, nothing in it was executed: .*mkdir'):
        runner.test() if how == 'test' else runner.train()
    assert not (tmp_path / 'executed').exists()


def test_a_config_in_the_checkpoint_is_not_run(tmp_path, make_runner):
    make_runner(trained()).train()
    path = tmp_path / 'work' / 'epoch_1.pth'
    content = torch.load(path, weights_only=False)
    content['meta']['config'] = f'__import__("os").mkdir({str(tmp_path / "executed")!r})'
    torch.save(content, path)
    make_runner(Toy(), epochs=2, resume=True).train()
    assert not (tmp_path / 'executed').exists()


@pytest.mark.parametrize(
    ('name', 'kept'),
    [
        ('work/best_acc_epoch_1.pth', True),
        ('work/epoch_1.pth', False),
        ('work', False),
        ('../best_photos', False),
        ('work/../best_x.pth', False),
    ],
)
def test_a_checkpoint_cannot_name_files_that_mmengine_would_remove(
    tmp_path, make_runner, name, kept
):
    """As the best one so far, which a better one replaces, or as the oldest of those kept."""
    make_runner(trained()).train()
    path = tmp_path / 'work' / 'epoch_1.pth'
    content = torch.load(path, weights_only=False)
    info = content['message_hub']['runtime_info']
    info |= {'best_ckpt': str(tmp_path / name), 'keep_ckpt_ids': ['/../../x']}
    content['message_hub']['resumed_keys'] |= dict(best_ckpt=True, keep_ckpt_ids=True)
    torch.save(content, path)
    runner = make_runner(Toy(), epochs=2, resume=True)
    runner.train()
    info = runner.message_hub.runtime_info
    assert info.get('best_ckpt') == (str(tmp_path / name) if kept else None)
    assert 'keep_ckpt_ids' not in info


def test_urls_and_missing_files_stop_before_long_work(tmp_path, make_runner):
    with pytest.raises(ValueError, match='Toy loads files only: download https://a/b.pth first'):
        make_runner(Toy(), load_from='https://a/b.pth').train()
    with pytest.raises(FileNotFoundError, match='no weights for Toy at .*none.pth'):
        make_runner(Toy(), load_from=str(tmp_path / 'none.pth')).train()


def test_it_comes_before_hooks_that_copy_weights_and_writes_nothing():
    assert SafeLoadHook.priority == 'VERY_HIGH' != CheckpointHook.priority


def test_every_run_has_it():
    runtime = Path(__file__).parents[2] / 'configs/_base_/runtime.py'
    assert dict(type='cae_mm.SafeLoadHook') in Config.fromfile(runtime).custom_hooks
