"""k nearest neighbours during pretraining: a sign early on that the encoder learns."""

from typing import Any

import torch
from mmengine.dist import all_gather, get_dist_info
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor
from torchvision.datasets import ImageFolder

from cae_mm.engine.processes import unwrap
from cae_mm.engine.sharding import gathered_weights
from cae_mm.evaluation.encoder import Encoder, read_size
from cae_mm.evaluation.features import (
    check_same_classes,
    extract_features,
    labelled_images,
    subset_rows,
)
from cae_mm.evaluation.knn import check_neighbors, knn_accuracies
from cae_mm.registry import HOOKS


@HOOKS.register_module()
class KNNHook(Hook):
    """Every few epochs log ``knn_top1``, what nearest neighbours make of the encoder's features.

    All processes share the extraction. Nothing of the training changes: the backbone gets its mode
    back, and no random number is drawn from the global generators.

    Args:
        train: Labelled folder with the neighbours, one sub-folder per class.
        val: Labelled folder with the images to classify, the same sub-folders.
        interval: Epochs between two measurements; the last epoch is measured always.
        k: Number of neighbours.
        max_images: Take at most so many images of each folder, drawn at random once and for all.
        feature: 'mean' of the patch tokens, or 'cls', the class token.
        precision: Of matrix products and convolutions, see ``choose_precision``.
        batch_size, num_workers: Images in a batch and their readers, for each process; None: four
            readers beside a GPU, else as many as there are cores.
    """

    priority = 'LOW'

    def __init__(
        self,
        *,
        train: str,
        val: str,
        interval: int = 1,
        k: int = 20,
        max_images: int | None = None,
        feature: str = 'mean',
        precision: str = 'auto',
        batch_size: int = 64,
        num_workers: int | None = None,
    ) -> None:
        self.folders = (train, val)
        self.interval = interval
        self.k = k
        self.max_images = max_images
        self.feature = feature
        self.precision = precision
        self.loading: dict[str, Any] = dict(batch_size=batch_size, num_workers=num_workers)

    def before_train(self, runner: Runner) -> None:
        """List the images and check everything that can be wrong."""
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            raise ValueError('KNNHook counts epochs: set train_cfg.type to EpochBasedTrainLoop')
        if not runner.cfg.get('model'):
            raise ValueError('KNNHook reads the config: make the Runner by Runner.from_cfg')
        train, val = (labelled_images(folder, read_size(runner.cfg)) for folder in self.folders)
        check_same_classes(train, val)
        self.subsets = [(images, subset_rows(images, self.max_images)) for images in (train, val)]
        check_neighbors([self.k], len(self.subsets[0][1]))
        backbone: Any = unwrap(runner.model).backbone
        self.encoder = Encoder(backbone, runner.cfg, [self.feature], self.precision)
        runner.logger.info(f'features for kNN in {self.encoder.precision}')

    def after_train_epoch(self, runner: Runner) -> None:
        """Measure and log."""
        if not (self.every_n_epochs(runner, self.interval) or self.is_last_train_epoch(runner)):
            return
        backbone = self.encoder.backbone
        was_training = backbone.training
        backbone.eval()
        data: list[Tensor] = []
        with gathered_weights(unwrap(runner.model)):
            for images, rows in self.subsets:
                data += self._extract(images, rows), torch.tensor(images.targets)[rows]
        backbone.train(was_training)
        accuracy = knn_accuracies(*(x.to(self.encoder.device) for x in data), ks=[self.k])[self.k]
        epoch = runner.epoch + 1
        runner.logger.info(f'Epoch(knn) [{epoch}]  knn_top1: {accuracy:.4f}  k: {self.k}')
        runner.visualizer.add_scalars({'knn_top1': accuracy}, step=epoch)

    def _extract(self, images: ImageFolder, rows: list[int]) -> Tensor:
        """Features of all rows on every process, shape (N, D); each computes its share."""
        rank, world_size = get_dist_info()
        padded = rows + rows[:1] * (-len(rows) % world_size)
        title = f'kNN, {images.root}' if rank == 0 else None
        batches = extract_features(
            self.encoder, images, padded[rank::world_size], title=title, **self.loading
        )
        share = torch.cat([batch[:, 0] for batch in batches])
        return torch.stack(all_gather(share), dim=1).flatten(0, 1)[: len(rows)]  # in order again
