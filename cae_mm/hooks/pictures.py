"""Pictures during pretraining: what the model makes of the same images every few epochs."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmengine.visualization import MLflowVisBackend

from cae_mm.engine.processes import unwrap
from cae_mm.engine.sharding import gathered_weights, is_sharded
from cae_mm.models import CAE
from cae_mm.registry import HOOKS
from cae_mm.visualization.attention import (
    attention_scale,
    attention_titles,
    class_attention,
    paint_attention,
    with_mean,
)
from cae_mm.visualization.images import find_images, to_picture
from cae_mm.visualization.pretraining import load_views
from cae_mm.visualization.reconstruction import DALLE_DECODER, find_painter, paint_reconstruction
from cae_mm.visualization.sheet import draw_sheet, to_pixels


@HOOKS.register_module()
class PictureHook(Hook):
    """Every few epochs paint sheets of a fixed set of images: reconstructions, attention.

    They go to the visualizer's backends with the epoch as step; the local one, which every config
    has, writes ``WORK_DIR/TIME/vis_data/vis_image/SHEET_EPOCH.png``. Images, crops and masks are
    the same each time. Nothing of the training changes: the model gets its mode back, and the
    global random generators their states.

    Args:
        images: Files, or folders of which ``count`` images are drawn.
        sheets: Which to paint: 'reconstruction' as in ``tools/picture.py reconstruct``, 'attention'
            of the class token in the last block.
        interval: Epochs between two sheets; the last epoch is painted always.
        count: Images of a folder.
        decoder: Converted weights of DALL-E's decoder, needed for its tokens only.
        seed: Of the masks, and of what is drawn from folders.
    """

    priority = 'LOW'

    def __init__(
        self,
        *,
        images: Sequence[str],
        sheets: Sequence[str] = ('reconstruction', 'attention'),
        interval: int = 10,
        count: int = 6,
        decoder: str = DALLE_DECODER,
        seed: int = 0,
    ) -> None:
        known: dict[str, Callable[[CAE], dict[str, Any]]] = {
            'reconstruction': self._paint_reconstruction,
            'attention': self._paint_attention,
        }
        for name in sheets:
            if name not in known:
                raise ValueError(f"Unknown sheet '{name}': choose of {', '.join(known)}")
        self.sheets = {name: known[name] for name in sheets}
        self.images, self.count, self.seed = images, count, seed
        self.interval, self.decoder = interval, decoder

    def before_train(self, runner: Runner) -> None:
        """Read the images, and check everything that can be wrong."""
        model: Any = unwrap(runner.model)
        if not isinstance(model, CAE):
            raise ValueError(f'PictureHook paints a pretraining of cae_mm.CAE, not {type(model)}')
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            raise ValueError('PictureHook counts epochs: set train_cfg.type to EpochBasedTrainLoop')
        with untouched_generators():
            self.painter: Any = None
            if 'reconstruction' in self.sheets:
                self.painter = find_painter(model, self.decoder)
            files = find_images(self.images, self.count, self.seed)
            self.views, self.masks = load_views(runner.cfg, files, self.seed)
        if self.painter is not None:
            self.painter.to(next(model.parameters()).device).eval()

    def after_train_epoch(self, runner: Runner) -> None:
        """Paint in the main process; the others help to compute where the model is sharded."""
        if not (self.every_n_epochs(runner, self.interval) or self.is_last_train_epoch(runner)):
            return
        model: Any = unwrap(runner.model)
        if not (is_main_process() or is_sharded(model)):
            return
        was_training = model.training
        model.eval()
        with gathered_weights(model), untouched_generators():
            sheets = {name: paint(model) for name, paint in self.sheets.items()}
        model.train(was_training)
        if is_main_process():
            for name, sheet in sheets.items():
                self._show(runner, name, to_pixels(draw_sheet(**sheet)))

    def _show(self, runner: Runner, name: str, pixels: np.ndarray) -> None:
        epoch = runner.epoch + 1
        for backend in runner.visualizer._vis_backends.values():
            # MLflow has no steps of pictures, but files, of a kind that their name tells
            is_file = isinstance(backend, MLflowVisBackend)
            backend.add_image(f'{name}_{epoch}.png' if is_file else name, pixels, step=epoch)

    def _paint_reconstruction(self, model: CAE) -> dict[str, Any]:
        """What ``draw_sheet`` takes: a row for each image, as ``paint_reconstruction`` has them."""
        pictures = paint_reconstruction(model, self.views, self.masks, self.painter)
        return dict(rows=[*zip(*pictures.values(), strict=True)], titles=[*pictures])

    def _paint_attention(self, model: CAE) -> dict[str, Any]:
        """A row for each image: itself, the mean over heads, each head."""
        images = model.data_preprocessor({'inputs': self.views})['inputs'][0]
        maps = with_mean(class_attention(model.backbone, images)).cpu()  # [B, 1 + heads, N]
        top, note = attention_scale([maps])
        rows = paint_attention(to_picture(self.views[0]), maps, model.backbone.grid, top)
        return dict(rows=rows, titles=attention_titles(maps.shape[1] - 1), note=note)


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Give Python's, numpy's and torch's generators their states back."""
    states = random.getstate(), np.random.get_state()
    try:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
