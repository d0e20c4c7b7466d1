"""Loads a hostile file through each function of the frameworks; no line here imports cae_mm.

python tests/hostile_loads.py FOLDER prints, as JSON, what each of them raised. FOLDER has the
configs mmpretrain.py, mmseg.py and mmdet.py, hostile.pth, and config.pth with the text of a config.
"""

import json
import sys
import warnings

warnings.simplefilter('ignore')

import mmdet.apis  # noqa: E402
import mmengine.runner  # noqa: E402
import mmpretrain  # noqa: E402
import mmseg.apis  # noqa: E402
from mmengine.model import BaseModule  # noqa: E402


def make_calls(folder):
    """What to call, by name."""
    mmpretrain_config, mmseg_config, mmdet_config = (
        f'{folder}/{scope}.py' for scope in ('mmpretrain', 'mmseg', 'mmdet')
    )
    file = f'{folder}/hostile.pth'
    init_cfg = dict(type='Pretrained', checkpoint=file)
    runner = object.__new__(mmengine.runner.Runner)
    return {
        # these two read the weights before they build a model
        'MMSegInferencer': lambda: mmseg.apis.MMSegInferencer(mmseg_config, file),
        'DetInferencer': lambda: mmdet.apis.DetInferencer(mmdet_config, file),
        'get_model': lambda: mmpretrain.get_model(mmpretrain_config, pretrained=file),
        'ImageClassificationInferencer': lambda: mmpretrain.ImageClassificationInferencer(
            mmpretrain_config, pretrained=file
        ),
        'init_model': lambda: mmseg.apis.init_model(mmseg_config, file, device='cpu'),
        'init_detector': lambda: mmdet.apis.init_detector(mmdet_config, file, device='cpu'),
        'load_checkpoint': lambda: mmengine.runner.load_checkpoint(BaseModule(), file),
        'init_cfg': lambda: BaseModule(init_cfg).init_weights(),
        'init_cfg with a prefix': lambda: BaseModule(init_cfg | {'prefix': 'a'}).init_weights(),
        'Runner.load_checkpoint': lambda: runner.load_checkpoint(file),
        'a config in a file': lambda: mmdet.apis.DetInferencer(weights=f'{folder}/config.pth'),
    }


def main():
    """Call them all."""
    errors = {}
    for name, call in make_calls(sys.argv[1]).items():
        try:
            call()
        except Exception as error:
            errors[name] = f'{type(error).__name__}: {error}'
    print('\n' + json.dumps(errors))


if __name__ == '__main__':
    main()
