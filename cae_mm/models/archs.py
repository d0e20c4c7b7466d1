"""Sizes of the encoder."""

from typing import Any

# Sizes: paper, "Training Details" (S, B, L) and "Downstream Tasks" (H); tiny: standard ViT-Ti.
# Layer scale: official scripts, --layer_scale_init_value (S, B: 0.1, L: 1e-5).
ARCHS: dict[str, dict[str, Any]] = {
    'mini': dict(embed_dims=192, depth=6, num_heads=3, layer_scale=0.1),  # trains on a CPU
    'tiny': dict(embed_dims=192, depth=12, num_heads=3, layer_scale=0.1),  # official: 12 heads
    # the paper says "standard ViT-S", that is 6 heads; the official cae_small has 12
    'small': dict(embed_dims=384, depth=12, num_heads=6, layer_scale=0.1),
    'base': dict(embed_dims=768, depth=12, num_heads=12, layer_scale=0.1),
    'large': dict(embed_dims=1024, depth=24, num_heads=16, layer_scale=1e-5),
    'huge': dict(embed_dims=1280, depth=32, num_heads=16, layer_scale=1e-5),
}


def resolve_arch(arch: str | dict[str, Any]) -> dict[str, Any]:
    """Return the sizes that a name stands for; sizes are returned as they are."""
    if isinstance(arch, str):
        if arch in ARCHS:
            return ARCHS[arch]
        raise ValueError(f"Unknown arch '{arch}': choose one of {tuple(ARCHS)} or give a dict")
    if set(arch) != set(ARCHS['base']):
        raise ValueError(f'arch needs exactly the keys {sorted(ARCHS["base"])}, not {sorted(arch)}')
    return arch
