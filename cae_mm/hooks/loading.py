"""Keep the Runner's own loading (``load_from``, ``resume``, ``tools/test.py``) safe and strict.

mmengine reads these files with a function that falls back to executing pickles, and loads what
happens to fit.
"""

from pathlib import Path
from typing import Any

from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop, Runner
from mmengine.runner.checkpoint import CheckpointLoader

from cae_mm.checkpoints.description import KEY
from cae_mm.checkpoints.files import Checkpoint, read_checkpoint
from cae_mm.checkpoints.pretrained import check_share, find_file, log_match, match_weights
from cae_mm.checkpoints.whole import check_whole, find_last_whole, list_checkpoints
from cae_mm.engine.processes import count_restarts, on_main_process, unwrap
from cae_mm.models.description import describe_model
from cae_mm.registry import HOOKS

SCHEME = 'plain:'  # stands before a path so that mmengine reads it through load_onto_cpu


@CheckpointLoader.register_scheme(prefixes=SCHEME)
def load_onto_cpu(filename: str, *_: Any) -> dict[str, Any]:
    """Read a checkpoint for the Runner, whatever place it asks for: who loads moves what has to."""
    file = read_checkpoint(filename.removeprefix(SCHEME))
    whole = isinstance(file.content, dict) and 'state_dict' in file.content
    return file.content if whole else {'state_dict': file.state}


@HOOKS.register_module()
class SafeLoadHook(Hook):
    """Read the Runner's checkpoints as plain data, and say what of them does not fit.

    - Training from ``load_from``: the backbone's tensors and elements (the model's, if it has no
      backbone) must match to a share of ``min_matched``; a new head may be missing.
    - Testing and validating: every tensor of the model must be in the file, so that no head is
      evaluated with random weights.
    - Always: the numbers of heads must agree, as far as the file tells.
    - Saving: the encoder is described beside the weights.
    - Resuming: damaged files are passed over, all keys must fit. The config in the file is not read
      (mmengine would run it). ``resume='auto'``, which is ``--resume`` where the config has a
      ``load_from``, begins with that if there is nothing to resume.

    Args:
        min_matched: The share, from 0 to 1.
    """

    priority = 'VERY_HIGH'  # before hooks that copy what is loaded, as EMAHook does

    def __init__(self, min_matched: float = 0.9) -> None:
        self.min_matched = min_matched

    def before_run(self, runner: Runner) -> None:
        """Make the Runner read its checkpoint, a whole one, through ``load_onto_cpu``."""
        if runner._has_loaded or str(runner._load_from).startswith(SCHEME):
            return
        name = type(runner.model).__name__
        trains = isinstance(runner._train_loop, BaseLoop)
        if trains and any(all_gather_object(count_restarts())):
            self._keep_files(runner)
        if runner._resume == 'auto' and not trains:
            runner._resume = False  # the config is that of a run, the checkpoint another one
        if runner._resume:
            found = on_main_process(self._find, runner, name)
            runner._resume = found is not None
            if found is not None:
                runner._load_from = found
                return
        if runner._load_from is not None:
            runner._load_from = f'{SCHEME}{find_file(runner._load_from, name)}'

    def _keep_files(self, runner: Runner) -> None:
        """Go on from what a run that torchrun started again has written, not from its beginning."""
        if not on_main_process(list_checkpoints, Path(runner.work_dir)):
            return
        if not runner._resume:
            raise ValueError(
                f'torchrun has started this run again, and {runner.work_dir} has checkpoints: add '
                '--resume to the command, so that it goes on from the last'
            )
        runner._load_from = None  # with which the first run began

    def _find(self, runner: Runner, name: str) -> str | None:
        """Name the checkpoint to resume from."""
        given = runner._load_from
        if given is not None and runner._resume != 'auto':
            path = find_file(given, name)
            check_whole(path)
            return f'{SCHEME}{path}'
        last = find_last_whole(Path(runner.work_dir), runner.logger.warning)
        if last is None:
            text = f'nothing to resume in {runner.work_dir}: the run starts from '
            runner.logger.warning(text + (given or 'the beginning'))
            return None
        if given is not None:
            runner.logger.warning(f'the run goes on from {last}: it had begun with {given}')
        return f'{SCHEME}{last.absolute()}'

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Describe the encoder in the file, so that nothing has to be guessed of it later."""
        description = describe_model(unwrap(runner.model))
        if description is not None:
            checkpoint['meta'][KEY] = {'encoder': description.to_dict()}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare keys and shapes, and leave only what fits for the Runner to load."""
        if runner._has_loaded or not str(runner._load_from).startswith(SCHEME):
            return  # a call of Runner.load_checkpoint by somebody else
        path = Path(runner._load_from.removeprefix(SCHEME))
        model = unwrap(runner.model)
        starts = isinstance(runner._train_loop, BaseLoop) and not runner._resume
        match = match_weights(model, Checkpoint(path, checkpoint), adapt=starts)
        if starts:
            check_share(model, match, self.min_matched, path)
        elif match.missing or match.reshaped or (match.unexpected and runner._resume):
            purpose = 'resumed from' if runner._resume else 'tested with'
            name = type(model).__name__
            raise ValueError(f'{name} cannot be {purpose} {path}: {match.explanation}')
        if runner._resume:
            checkpoint.get('meta', {}).pop('config', None)
            forget_files_elsewhere(checkpoint, Path(runner.work_dir))
        checkpoint['state_dict'] = match.matched
        log_match(model, match, path)


def forget_files_elsewhere(checkpoint: dict[str, Any], work_dir: Path) -> None:
    """Keep mmengine from removing, as older than those of this run, whatever files are named."""
    info = checkpoint.get('message_hub', {}).get('runtime_info', {})
    for key in [key for key in info if key.startswith('best_ckpt')]:
        path = Path(str(info[key])).absolute()
        if path.parent != work_dir.absolute() or not path.name.startswith('best_'):
            del info[key]
    if not all(type(number) is int for number in info.get('keep_ckpt_ids', [])):
        del info['keep_ckpt_ids']
