"""What weights of an encoder do not tell by their names and shapes, kept beside them in each file.

The Runner writes it into every checkpoint (``meta['cae_mm']``), conversion into the header of
safetensors files; loading, export and the doctor read it back.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

KEY = 'cae_mm'  # in the meta of a checkpoint and in the header of a safetensors file


@dataclass(frozen=True)
class EncoderDescription:
    """Sizes of a ``CAEViT``, and how the images that it was trained on were made.

    Attributes:
        embed_dims: Width D.
        depth: Number of blocks.
        num_heads: Number of attention heads.
        mlp_ratio: Hidden width of the MLPs over the width.
        patch_size: Side of a patch in pixels.
        in_channels: Channels of the images.
        img_size: Height and width in pixels that relative position tables are made for.
        pretrain_img_size: Height and width in pixels for which the fixed positions are exact.
        use_rel_pos_bias: Whether blocks have relative position tables.
        final_norm: Whether there is a final norm.
        pooled_norm: Whether it is applied to the mean of the patch tokens (fine-tuning) rather than
            to each token (pretraining).
        mean: Per channel, in [0, 255], in the order that the encoder sees; None: not known.
        std: Likewise.
        to_rgb: Whether the encoder sees RGB (else BGR).
    """

    embed_dims: int
    depth: int
    num_heads: int
    mlp_ratio: float
    patch_size: int
    in_channels: int
    img_size: tuple[int, int]
    pretrain_img_size: tuple[int, int]
    use_rel_pos_bias: bool
    final_norm: bool
    pooled_norm: bool
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    to_rgb: bool = True

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> 'EncoderDescription':
        """Read what ``to_dict`` made, lists for tuples as in JSON; unknown keys are left out."""
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in content.items()
            if key in known
        }
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON or a checkpoint."""
        return asdict(self)
