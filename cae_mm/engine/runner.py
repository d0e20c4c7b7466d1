"""The Runner of this project: mmengine's, with the config fitted to the machine it starts on."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from cae_mm.checkpoints.whole import BACKEND
from cae_mm.datasets.resumable import start_worker
from cae_mm.engine.data import check_datasets, check_length, explained_worker_faults
from cae_mm.engine.fitting import count_cores, fit_config
from cae_mm.engine.loops import ResumableEpochLoop, ResumableIterLoop
from cae_mm.engine.message_hub import DeferredMessageHub
from cae_mm.engine.processes import on_main_process, rendezvous_after_restart, unwrap
from cae_mm.engine.recounting import count_steps, recount, repeat_schedules
from cae_mm.engine.sharding import (
    gathered_state,
    is_sharded,
    shard_model,
    shard_optimizer_state,
)
from cae_mm.engine.watch import RESERVE, TIMEOUT, Watch, watched
from cae_mm.models.cae import CAE
from cae_mm.models.sync_batch_norm import replace_sync_batch_norm
from cae_mm.registry import RUNNERS

# by what stands in train_cfg as `type` or `by_epoch`
RESUMABLE_LOOPS: dict[Any, Any] = {
    **dict.fromkeys((True, 'EpochBasedTrainLoop', EpochBasedTrainLoop), ResumableEpochLoop),
    **dict.fromkeys((False, 'IterBasedTrainLoop', IterBasedTrainLoop), ResumableIterLoop),
}


@RUNNERS.register_module()
class CAERunner(Runner):
    """mmengine's Runner; ``runner_type='cae_mm.CAERunner'`` makes every ``train.py`` use it.

    Before it is built it applies the config's ``settings`` and fits workers, batch, gathering of
    gradients and process group to the machine. It says in the log what it changed. Numbers of the
    log are read from the device when they are written, not in each step. Several processes watch
    over each other, ``env_cfg.dist_cfg.timeout`` seconds.
    """

    watch: Watch | None = None
    schedules_begin_anew = False

    @classmethod
    def from_cfg(cls, cfg: Config) -> 'CAERunner':
        """Build the runner of a config, which is left as it is."""
        cfg = deepcopy(cfg)
        remarks = fit_config(cfg)
        runner = super().from_cfg(cfg)
        for remark in remarks:
            runner.logger.info(remark)
        return runner

    def build_message_hub(self, message_hub: dict[str, Any] | None = None) -> MessageHub:
        """Build the one that does not wait for the device."""
        options = dict(name=self._experiment_name) | (message_hub or {})
        hub = DeferredMessageHub.get_instance(**options)
        MessageHub._instance_dict[hub.instance_name] = hub  # for get_current_instance()
        return hub

    @staticmethod
    def build_dataloader(dataloader: Any, *args: Any, **options: Any) -> DataLoader:
        """Build a loader, whose workers end with this process and not before it."""
        loader = Runner.build_dataloader(dataloader, *args, **options)
        if loader is not dataloader:
            loader.worker_init_fn = partial(start_worker, loader.worker_init_fn)
        return loader

    def build_train_loop(self, loop: Any) -> BaseLoop:
        """Build mmengine's loops such that they go on in an epoch; one has to have iterations."""
        options = dict(loop) if isinstance(loop, dict) else {}
        if len({'type', 'by_epoch'} & options.keys()) == 1:
            kind = options.pop('type', None) or bool(options.pop('by_epoch'))
            if kind in RESUMABLE_LOOPS:
                loop = RESUMABLE_LOOPS[kind](self, self._train_dataloader, **options)
        built = super().build_train_loop(loop)
        check_length(built.dataloader)
        return built

    def build_optim_wrapper(self, optim_wrapper: Any) -> OptimWrapper:
        """Build it, and let gathering end with an epoch, so that no checkpoint loses gradients."""
        wrapper = super().build_optim_wrapper(optim_wrapper)
        loop = self._train_loop
        if isinstance(loop, EpochBasedTrainLoop) and wrapper is not optim_wrapper:
            wrapper.epoch_length = length = len(loop.dataloader)
            steps = getattr(wrapper, '_accumulative_counts', 1)
            if length < steps:
                self.logger.warning(
                    f'an epoch has {length} steps, so that gradients are gathered over {length}, '
                    f'not over {steps} as the learning rate is for: lower it, or take more images'
                )
        return wrapper

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        """Set up processes; mmengine takes a GPU for granted, here they may be on CPUs."""
        dist_cfg = dict(env_cfg.get('dist_cfg') or {})
        self.timeout = dist_cfg.get('timeout') or TIMEOUT
        if not isinstance(self.timeout, int | float):
            raise ValueError(f'env_cfg.dist_cfg.timeout is a time in seconds, not {self.timeout!r}')
        dist_cfg['timeout'] = self.timeout + RESERVE
        starts = self.distributed and not torch.distributed.is_initialized()
        rendezvous = rendezvous_after_restart() if starts else {}
        if starts and not torch.cuda.is_available():
            if self._launcher == 'slurm':
                _name_processes_of_slurm()
            limit = timedelta(seconds=dist_cfg['timeout'])
            torch.distributed.init_process_group('gloo', timeout=limit, **rendezvous)
            torch.set_num_threads(count_cores(self._launcher))
        super().setup_env(dict(env_cfg, dist_cfg=dist_cfg | rendezvous))

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """Wrap a model for several processes, unless ``train`` is to shard it."""
        if self.distributed and not torch.cuda.is_available():
            replace_sync_batch_norm(model)
        if self.distributed and self.cfg.get('fsdp'):
            return model.to(get_device())
        return super().wrap_model(model_wrapper_cfg, model)

    def save_checkpoint(
        self, out_dir: str, filename: str, file_client_args: Any = None, **options: Any
    ) -> None:
        """Save a checkpoint as a file that is whole or not there, and wait until it is.

        That of a sharded model has whole tensors.

        Raises:
            OSError: On all processes, if the file cannot be written.
        """
        options['meta'] = dict(options.get('meta') or {}, **count_steps(self))
        if file_client_args is None and options.get('backend_args') is None:
            options['backend_args'] = dict(backend=BACKEND) if '://' not in out_dir else None
        save = super().save_checkpoint
        with ExitStack() as stack:
            if is_sharded(self.model):
                stack.enter_context(gathered_state(self.model, self.optim_wrapper.optimizer))
            on_main_process(save, out_dir, filename, file_client_args, **options)

    def load_checkpoint(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Load a checkpoint; what it counts is counted in steps of this run."""
        checkpoint = super().load_checkpoint(*args, **options)
        trains = self._resume and isinstance(self._train_loop, BaseLoop)
        if trains and recount(self, checkpoint['meta'], self.logger.warning):
            checkpoint.pop('param_schedulers', None)
            self.schedules_begin_anew = self.cfg.get('param_scheduler') is not None
        return checkpoint

    def resume(self, *args: Any, **options: Any) -> None:
        """Resume from a file of any run, sharded or not."""
        if is_sharded(self.model):
            shard_optimizer_state(self.optim_wrapper.optimizer)
        super().resume(*args, **options)
        if self.schedules_begin_anew:
            repeat_schedules(self)

    def _init_model_weights(self) -> None:
        if not is_sharded(self.model):  # else done: whole tensors are what can be initialised
            super()._init_model_weights()

    def _maybe_compile(self, target: str) -> None:
        """Compile what a CAE says of its step; of other models all of it, as mmengine does."""
        model: Any = unwrap(self.model)
        options = self.cfg.get('compile')
        if options and isinstance(model, CAE):
            model.compile(**({} if options is True else options))
            self.logger.info('the step is compiled: the first takes minutes')
        else:
            super()._maybe_compile(target)

    def train(self) -> nn.Module:
        """Train, if the data is there."""
        with self._guarded():
            for warning in check_datasets(self.cfg):
                self.logger.warning(warning)
            if self.distributed and self.cfg.get('fsdp'):
                self._init_model_weights()
                shard_model(self.model)
            return super().train()

    def test(self) -> dict[str, float]:
        """Test."""
        with self._guarded():
            return super().test()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Name what data workers and other processes die of; a failure leaves nothing behind."""
        try:
            with watched(self.timeout) as self.watch, explained_worker_faults():
                yield
        except SystemExit:  # told to end: should it be told once more, that is to change nothing
            raise
        except BaseException:
            for hook in self.hooks:
                if hasattr(hook, 'close'):
                    hook.close()
            raise

    def call_hook(self, fn_name: str, **options: Any) -> None:
        """Call the hooks at a point that all processes pass."""
        if self.watch:
            self.watch.pass_point(fn_name, self.iter)
        super().call_hook(fn_name, **options)


def _name_processes_of_slurm() -> None:
    """Tell torch what Slurm knows; mmengine does so on GPUs."""
    names = dict(RANK='SLURM_PROCID', WORLD_SIZE='SLURM_NTASKS', LOCAL_RANK='SLURM_LOCALID')
    os.environ.update({name: os.environ[source] for name, source in names.items()})
    if 'MASTER_ADDR' not in os.environ:
        command = ['scontrol', 'show', 'hostnames', os.environ['SLURM_NODELIST']]
        hosts = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        os.environ['MASTER_ADDR'] = hosts.split()[0]
    os.environ.setdefault('MASTER_PORT', '29500')
