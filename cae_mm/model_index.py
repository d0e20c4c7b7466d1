"""Makes the models of this project known to ``mmpretrain.get_model`` and ``list_models``."""

from pathlib import Path

from cae_mm.dependencies import check_dependencies

check_dependencies()  # mmpretrain comes in here: explains what fails, and silences its warnings

from mmpretrain.apis import ModelHub  # noqa: E402


def find_model_index() -> Path | None:
    """Returns model-index.yml: in ``.mim`` of a wheel, else in the root of the checkout."""
    package = Path(__file__).parent
    candidates = (package / '.mim' / 'model-index.yml', package.parent / 'model-index.yml')
    return next((path for path in candidates if path.is_file()), None)


def register_model_index() -> None:
    """Registers all models; a bare copy of the package, which has no index, works without."""
    if index := find_model_index():
        ModelHub.register_model_index(index, config_prefix=index.parent)
