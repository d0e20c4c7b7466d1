"""Files of weights and what they say of their encoder."""

import os

import torch
from safetensors import safe_open

from cae_mm.checkpoints import EncoderDescription, read_checkpoint
from cae_mm.checkpoints.description import KEY
from cae_mm.checkpoints.files import write_safetensors
from cae_mm.checkpoints.whole import list_checkpoints

ENCODER = EncoderDescription(
    embed_dims=8,
    depth=1,
    num_heads=2,
    mlp_ratio=4.0,
    patch_size=4,
    in_channels=3,
    img_size=(8, 12),
    pretrain_img_size=(8, 12),
    use_rel_pos_bias=False,
    final_norm=True,
    pooled_norm=False,
    mean=(1.0, 2.0, 3.0),
)


def test_safetensors_say_what_other_libraries_look_for(tmp_path):
    path = tmp_path / 'folder/a.safetensors'
    write_safetensors(path, {'a': torch.arange(6.0).view(2, 3).T}, {'encoder': ENCODER.to_dict()})
    with safe_open(path, 'pt') as file:
        assert file.metadata().keys() == {'format', KEY}
        assert file.metadata()['format'] == 'pt'  # without which transformers refuses it
    file = read_checkpoint(path)
    assert torch.equal(file.state['a'], torch.arange(6.0).view(2, 3).T)
    assert file.description == ENCODER


def test_descriptions_of_other_versions():
    """What a later one added is left out, what an earlier one did not know has its default."""
    content = ENCODER.to_dict()
    del content['to_rgb'], content['std']
    assert EncoderDescription.from_dict(content | {'later': 1}) == ENCODER
    assert ENCODER.to_rgb and ENCODER.std is None


def test_the_last_checkpoint_is_the_youngest(tmp_path):
    """Not the one that comes last by name; others' files do not count."""
    for age, name in enumerate(('epoch_10.pth', 'iter_700.pth', 'epoch_9.pth', 'best_11.pth')):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    names = ['epoch_10.pth', 'iter_700.pth', 'epoch_9.pth']
    assert [path.name for path in list_checkpoints(tmp_path)] == names
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_700.pth'))
    assert [path.name for path in list_checkpoints(tmp_path)] == [names[1], names[0], names[2]]
