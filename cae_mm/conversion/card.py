"""A model card beside each exported file: what it is, what it wants, how it is loaded.

Form: Markdown with a YAML header, as https://huggingface.co/docs/hub/model-cards has it. What no
file tells is said to be unknown, never guessed.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from cae_mm.checkpoints import Checkpoint, EncoderDescription
from cae_mm.checkpoints.config_text import read_values
from cae_mm.engine.settings import find_datasets
from cae_mm.version import __version__

PAPER = 'https://arxiv.org/abs/2202.03026'
UNKNOWN = 'not known: the file does not tell'
DATA = ('type', 'data_root', 'data_prefix', 'ann_file')  # of a dataset in a config
CARD = """---
library_name: {library}
pipeline_tag: image-feature-extraction
tags: [masked-image-modeling, context-autoencoder, vit]
license: other
---

# {name}

A vision transformer of the Context Autoencoder ([CAE]({paper})), written for {library} by
cae-mm {version}.

| | |
| --- | --- |
{table}

## Loading

In the folder that holds `{name}`:

```{language}
{code}
```

## Before you pass it on

Say what it was trained on, what it is for and under which licence: this card was made by a program
that knows no more than the file it read. cae-mm's own licence, Apache-2.0, is that of the software.
If DALL-E's tokens were the targets, OpenAI asks that it be said.
"""


def write_card(
    path: Path,
    description: EncoderDescription,
    source: Checkpoint | None,
    *,
    library: str,
    code: str,
    checked: str,
    takes_pixels: bool = False,
    language: str = 'python',
) -> Path:
    """Write the card of an exported file or folder.

    Args:
        path: What was exported; a folder gets README.md, a file NAME.md beside it.
        description: Of its encoder.
        source: The checkpoint that it was made of, None for random weights.
        library: Who loads it.
        code: How, for ``images`` of shape (1, C, H, W) that are prepared here.
        checked: How it was compared with our model.
        takes_pixels: Whether the normalisation is in the file.
        language: Of the code: 'python', or 'text' where nothing can be run.

    Returns:
        The card.
    """
    rows = _describe(description, takes_pixels) | _tell_origin(source) | {'checked': checked}
    if language == 'python':
        code = f'{_prepare_images(description, takes_pixels)}\n{code}'
    text = CARD.format(
        library=library,
        name=path.name,
        paper=PAPER,
        version=__version__,
        table='\n'.join(f'| {key} | {value} |' for key, value in rows.items()),
        language=language,
        code=code,
    )
    card = path / 'README.md' if path.is_dir() else path.with_name(f'{path.name}.md')
    card.write_text(text, encoding='utf-8')
    return card


def _describe(d: EncoderDescription, takes_pixels: bool) -> dict[str, str]:
    normalised = f'minus {d.mean}, divided by {d.std}' if d.mean else f'normalisation {UNKNOWN}'
    norm = 'the mean of the patch tokens' if d.pooled_norm else 'each token'
    return {
        'network': f'{d.depth} blocks of width {d.embed_dims}, {d.num_heads} heads, '
        f'patches of {d.patch_size} px',
        'images': f'{d.img_size[0]} x {d.img_size[1]} px, {"RGB" if d.to_rgb else "BGR"} in '
        f'[0, 255], {"normalised by the file itself" if takes_pixels else normalised}',
        'final norm': f'of {norm}' if d.final_norm else 'none, it is of dense prediction',
    }


def _tell_config(text: Any) -> tuple[str, str]:
    """Tell the data and the epochs of a run by the text of its config, '' where it says nothing."""
    try:
        config = read_values(text)
        datasets = [*find_datasets(dict(train_dataloader=config['train_dataloader']))]
        found = [[dataset.get(key) for key in DATA] for dataset in datasets]
        epochs = config['train_cfg'].get('max_epochs')
    except (AttributeError, KeyError, TypeError, ValueError):  # whoever wrote it
        return '', ''
    data = [', '.join(map(_quote, filter(None, values))) for values in found]
    return '; '.join(data), f'{epochs} epochs planned' if isinstance(epochs, int) else ''


def _quote(value: Any) -> str:
    """Quote what a file says, so that it stays text in a cell of a table."""
    text = re.sub(r'[`|\s]+', ' ', str(value))
    return f'`{text}`'


def _tell_origin(source: Checkpoint | None) -> dict[str, str]:
    """Tell what the file says of the run that made it."""
    if source is None:
        return {'weights': 'random'}
    digest = hashlib.sha256()
    with source.path.open('rb') as file:
        while block := file.read(2**20):
            digest.update(block)
    meta: dict[str, Any] = source.content.get('meta') or {}
    known = [
        f'{key} {meta[key]}' for key in ('experiment_name', 'epoch', 'iter', 'seed') if key in meta
    ]
    data, epochs = _tell_config(meta.get('cfg'))
    known += [epochs] if epochs else []
    hub = source.content.get('message_hub') or {}
    score = hub.get('runtime_info', {}).get('best_score')
    converted = source.metadata.get('source')
    return {
        'weights': f'`{source.path.name}`, SHA-256 `{digest.hexdigest()}`',
        'trained': ', '.join(known) or (f'converted from {converted}' if converted else UNKNOWN),
        'data': data or UNKNOWN,
        'metrics': f'best score {score:.4g}' if isinstance(score, (int, float)) else UNKNOWN,
    }


def _prepare_images(d: EncoderDescription, takes_pixels: bool) -> str:
    shape = ', '.join(map(str, (1, d.in_channels, *d.img_size)))
    lines = ['import torch', '', f'images = 255 * torch.rand({shape})  # yours, in [0, 255]']
    if d.mean and d.std and not takes_pixels:
        mean, std = (f'torch.tensor({list(v)}).view(-1, 1, 1)' for v in (d.mean, d.std))
        lines.append(f'images = (images - {mean}) / {std}')
    return '\n'.join(lines) + '\n'
