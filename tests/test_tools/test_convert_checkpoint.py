"""The two commands, as a user runs them."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import official_reference as official
import torch

from cae_mm.checkpoints import read_checkpoint


def load_main(name):
    path = Path(__file__).parents[2] / 'tools' / f'{name}.py'
    spec = spec_from_file_location(name, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


convert, export = load_main('convert_checkpoint'), load_main('export_checkpoint')


def test_convert_and_export_print_what_they_did(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '200')
    torch.save({'model': official.pretraining_state(24, 12)}, tmp_path / 'a.pth')
    arguments = ['--source', 'official', '--num-heads', '3', '--decoder-heads', '3']
    assert convert([str(tmp_path / 'a.pth'), str(tmp_path / 'cae'), *arguments]) == 0
    out = capsys.readouterr().out
    path = tmp_path / 'cae_full.safetensors'
    assert read_checkpoint(path).metadata['neck']['num_heads'] == 3
    assert 'regresser.regressor_blocks.{i}.norm1_q.{p}' in out
    assert 'shares the storage of the encoder' in out
    assert 'num_heads 3' in out and 'tensors written to' in out

    assert export([str(path), str(tmp_path / 'back'), '--target', 'official']) == 0
    out = capsys.readouterr().out
    assert (tmp_path / 'back_full.pth').is_file()
    assert 'converted back, all weights are bit for bit the same' in out

    arguments = ['--target', 'mmpretrain', '--part', 'encoder']
    assert export([str(path), str(tmp_path / 'mm'), *arguments]) == 0
    out = capsys.readouterr().out
    assert (tmp_path / 'mm_encoder.pth').is_file()
    assert 'features in torch.float64 differ by' in out and "'mmpretrain.BEiTViT'" in out
    assert 'neck.{rest}' in out and 'not exported' in out


def test_errors_are_one_line_and_status_1(tmp_path, capsys):
    assert convert([str(tmp_path / 'none.pth'), str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith('error: no checkpoint at ')
    torch.save({'a': torch.zeros(1)}, tmp_path / 'a.pth')
    assert export([str(tmp_path / 'a.pth'), str(tmp_path), '--target', 'timm']) == 1
    err = capsys.readouterr().err
    assert err.startswith('error: ') and 'tools/convert_checkpoint.py' in err


def test_options_reach_the_export(tmp_path, capsys):
    state = {k: v for k, v in official.pretraining_state().items() if k.startswith('encoder.')}
    ours = {k.replace('encoder.', 'backbone.'): v for k, v in state.items() if 'pos_embed' not in k}
    torch.save({'state_dict': ours}, tmp_path / 'own.pth')
    arguments = ['--num-heads', '3', '--img-size', '12', '12', '--pool', 'avg']
    out = str(tmp_path / 'mm')
    assert export([str(tmp_path / 'own.pth'), out, '--target', 'mmpretrain', *arguments]) == 0
    text = ' '.join(capsys.readouterr().out.split())
    assert "'num_heads': 3" in text and "'img_size': (12, 12)" in text
    assert "'out_type': 'avg_featmap'" in text and 'note:' not in text
