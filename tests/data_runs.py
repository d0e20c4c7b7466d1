"""Runs whose model does nothing, so that all that happens is in the data."""

from pathlib import Path
from typing import Any

import mmpretrain.datasets  # noqa: F401  registers CustomDataset
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS


@MODELS.register_module()
class DataToy(BaseModel):
    """Has one parameter, which no image changes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, inputs: Any, data_samples: Any, mode: str = 'tensor') -> dict[str, Any]:
        """The number of images times the parameter."""
        return dict(loss=self.weight * len(inputs))


def data_config(
    root: Path, work_dir: Path, *steps: dict[str, Any], on_error: str = 'raise', **options: Any
) -> Config:
    """An epoch on a folder of images.

    Args:
        root: The folder.
        work_dir: Where the log goes.
        steps: Of the pipeline, after loading.
        on_error: Of loading.
        options: ``dataset`` and those of the loader.
    """
    load = dict(type='cae_mm.LoadImage', on_error=on_error)
    dataset = dict(
        type='mmpretrain.CustomDataset',
        data_root=str(root),
        with_label=False,
        pipeline=[load, *steps, dict(type='mmpretrain.PackInputs')],
    ) | options.pop('dataset', {})
    loader = dict(
        batch_size=2,
        num_workers=0,
        drop_last=True,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dataset,
    )
    return Config(
        dict(
            model=dict(type='DataToy'),
            train_dataloader=loader | options,
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            param_scheduler=[dict(type='LinearLR', end=1, convert_to_iter_based=True)],
            train_cfg=dict(by_epoch=True, max_epochs=1),
            default_scope='mmpretrain',
            work_dir=str(work_dir),
            experiment_name=work_dir.name,
            log_level='ERROR',
            randomness=dict(seed=0),
        )
    )
