"""What weights of an encoder do not tell by their names and shapes, kept beside them in each file.

The Runner writes it into every checkpoint (``meta['cae_mm']``), conversion into the header of
safetensors files; loading, export and the doctor read it back.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

KEY = 'cae_mm'  # in the meta of a checkpoint and in the header of a safetensors file
MAX_SIZE = 2**13  # of each number in a file: more would only take memory
MAX_PATCHES = 2**16  # of an image


@dataclass(frozen=True)
class EncoderDescription:
    """Sizes of a ``CAEViT``, and how the images that it was trained on were made."""

    embed_dims: int  # width D
    depth: int  # number of blocks
    num_heads: int
    mlp_ratio: float  # hidden width of the MLPs over the width
    patch_size: int  # side of a patch in pixels
    in_channels: int  # of the images
    img_size: tuple[int, int]  # height and width in pixels for relative position tables
    pretrain_img_size: tuple[int, int]  # for which the fixed positions are exact
    use_rel_pos_bias: bool  # whether blocks have relative position tables
    final_norm: bool  # whether there is one
    # whether it is applied to the mean of the patch tokens (fine-tuning) rather than to each token
    pooled_norm: bool
    window_size: int | None = None  # side in patches of the windows of attention; None: global
    global_blocks: tuple[int, ...] = ()  # that attend globally where the others have windows
    # of the images per channel, in [0, 255], in the order that the encoder sees; None: not known
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    to_rgb: bool = True  # whether the encoder sees RGB (else BGR)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> 'EncoderDescription':
        """Read what ``to_dict`` made, lists for tuples as in JSON; unknown keys are left out."""
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in content.items() if k in known
        }
        description = cls(**values)
        description._check_sizes()
        return description

    def _check_sizes(self) -> None:
        numbers = [self.embed_dims, self.depth, self.num_heads, self.patch_size, self.in_channels]
        if self.window_size is not None:
            numbers.append(self.window_size)
        for height, width in (self.img_size, self.pretrain_img_size):
            numbers += [height, width]
            if height * width > MAX_PATCHES * self.patch_size**2:
                raise ValueError(f'{height}x{width} pixels are more than {MAX_PATCHES} patches')
        if not all(type(number) is int and 0 < number <= MAX_SIZE for number in numbers):
            raise ValueError(f'its sizes {numbers} are not whole numbers from 1 to {MAX_SIZE}')

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON or a checkpoint."""
        return asdict(self)
