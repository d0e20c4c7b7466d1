"""The official network's definition, written anew as functions of a state dict of its names.

Facts from https://github.com/Atten4Vis/CAE/blob/master/models: names, shapes and what is computed.
Loops stand where the package has formulas.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def positions(grid: tuple[int, int], width: int) -> Tensor:
    """Sin-cos table with the class token's zeros first, shape (1, 1 + N, D)."""
    quarter = width // 4
    table = [[0.0] * width]
    for row in range(grid[0]):
        for column in range(grid[1]):
            angles = [[x / 10000 ** (j / quarter) for j in range(quarter)] for x in (row, column)]
            table.append([f(a) for x in angles for f in (math.sin, math.cos) for a in x])
    return torch.tensor(table)[None]


def relative_index(grid: tuple[int, int]) -> Tensor:
    """BEiT's index of relative positions, pair by pair."""
    h, w = grid
    last = (2 * h - 1) * (2 * w - 1) + 2
    index = torch.zeros(1 + h * w, 1 + h * w, dtype=torch.long)
    for q in range(h * w):
        for k in range(h * w):
            down, right = q // w - k // w + h - 1, q % w - k % w + w - 1
            index[1 + q, 1 + k] = down * (2 * w - 1) + right
    index[0, :], index[:, 0], index[0, 0] = last - 2, last - 1, last
    return index


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    """Random weights, norms' weights around one."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        one = name.endswith('weight') and len(shape) == 1 or 'gamma' in name
        state[name] = torch.randn(shape, generator=generator) * 0.3 + one
    return state


def block_shapes(prefix: str, D: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a self-attention block."""
    shapes = {f'{prefix}{n}.{p}': (D,) for n in ('norm1', 'norm2') for p in ('weight', 'bias')}
    shapes |= {f'{prefix}{n}': (D,) for n in ('gamma_1', 'gamma_2', 'attn.q_bias', 'attn.v_bias')}
    shapes |= {f'{prefix}attn.qkv.weight': (3 * D, D)}
    shapes |= linear_shapes(f'{prefix}attn.proj.', D, D)
    return shapes | mlp_shapes(f'{prefix}mlp.', D)


def linear_shapes(prefix: str, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a linear layer."""
    return {f'{prefix}weight': (n_out, n_in), f'{prefix}bias': (n_out,)}


def mlp_shapes(prefix: str, D: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an MLP."""
    return linear_shapes(f'{prefix}fc1.', D, 4 * D) | linear_shapes(f'{prefix}fc2.', 4 * D, D)


def norm_shapes(prefix: str, D: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a LayerNorm."""
    return {f'{prefix}.weight': (D,), f'{prefix}.bias': (D,)}


def encoder_shapes(prefix: str, D: int, depth: int, patch: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an encoder without its final norm."""
    shapes: dict[str, tuple[int, ...]] = {
        f'{prefix}cls_token': (1, 1, D),
        f'{prefix}patch_embed.proj.weight': (D, 3, patch, patch),
        f'{prefix}patch_embed.proj.bias': (D,),
    }
    for i in range(depth):
        shapes |= block_shapes(f'{prefix}blocks.{i}.', D)
    return shapes


def pretraining_state(
    D: int = 24,
    D_neck: int = 24,
    *,
    depth: int = 2,
    vocab: int = 11,
    grid: tuple[int, int] = (3, 3),
    patch: int = 4,
    seed: int = 0,
) -> State:
    """All keys of an official pretraining checkpoint."""
    shapes = encoder_shapes('encoder.', D, depth, patch) | norm_shapes('encoder.norm', D)
    shapes |= {'mask_token': (1, 1, D_neck)}
    if D != D_neck:
        shapes |= linear_shapes('encoder_to_regresser.', D, D_neck)
        shapes |= norm_shapes('encoder_to_regresser_norm', D_neck)
    for i in range(2):
        block = f'regresser.regressor_blocks.{i}.'
        for norm in ('norm1_q', 'norm1_k', 'norm1_v', 'norm2_cross'):
            shapes |= norm_shapes(block + norm, D_neck)
        shapes |= {f'{block}cross_attn.{n}.weight': (D_neck, D_neck) for n in 'qkv'}
        shapes |= {f'{block}cross_attn.{n}_bias': (D_neck,) for n in 'qv'}
        shapes |= linear_shapes(f'{block}cross_attn.proj.', D_neck, D_neck)
        shapes |= mlp_shapes(f'{block}mlp_cross.', D_neck)
        shapes |= {f'{block}gamma_{n}_cross': (D_neck,) for n in (1, 2)}
    shapes |= norm_shapes('regresser.norm', D_neck)
    shapes |= block_shapes('decoder.decoder_blocks.0.', D_neck)
    shapes |= norm_shapes('decoder.norm', D_neck) | linear_shapes('decoder.head.', D_neck, vocab)
    state = random_state(shapes, seed)
    state['encoder.pos_embed'] = positions(grid, D)
    for key in [key for key in state if key.startswith('encoder.')]:
        state[f'alignment_{key}'] = state[key].clone()
    return state | {'rd_pos_embed': positions(grid, D_neck)}


def finetuned_state(
    D: int = 24,
    *,
    depth: int = 2,
    heads: int = 3,
    classes: int = 7,
    grid: tuple[int, int] = (3, 3),
    patch: int = 4,
    prefix: str = '',
) -> State:
    """All keys of an official fine-tuning checkpoint, with relative position bias."""
    shapes = encoder_shapes(prefix, D, depth, patch) | norm_shapes('fc_norm', D)
    shapes |= linear_shapes('head.', D, classes)
    entries = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    table = f'{prefix}blocks.{{}}.attn.relative_position_bias_table'
    shapes |= {table.format(i): (entries, heads) for i in range(depth)}
    state = random_state(shapes)
    for i in range(depth):
        state[f'{prefix}blocks.{i}.attn.relative_position_index'] = relative_index(grid)
    return state | {f'{prefix}pos_embed': positions(grid, D)}


def layer_norm(x: Tensor, state: State, name: str) -> Tensor:
    """LayerNorm with the official eps."""
    return F.layer_norm(x, x.shape[-1:], state[f'{name}.weight'], state[f'{name}.bias'], 1e-6)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | float = 0.0) -> Tensor:
    """Multi-head attention of projected q, k, v, each (B, N, D), head by head."""
    outputs = []
    size = q.shape[-1] // heads
    for i in range(heads):
        part = slice(i * size, (i + 1) * size)
        logits = q[..., part] @ k[..., part].transpose(1, 2) / size**0.5
        logits = logits + (bias[i] if isinstance(bias, Tensor) else bias)
        outputs.append(logits.softmax(-1) @ v[..., part])
    return torch.cat(outputs, -1)


def mlp(x: Tensor, state: State, name: str) -> Tensor:
    """Linear, GELU, linear."""
    x = F.gelu(F.linear(x, state[f'{name}fc1.weight'], state[f'{name}fc1.bias']))
    return F.linear(x, state[f'{name}fc2.weight'], state[f'{name}fc2.bias'])


def block(x: Tensor, state: State, name: str, heads: int) -> Tensor:
    """Self-attention block, with relative position bias if there is a table."""
    y = layer_norm(x, state, f'{name}norm1')
    wq, wk, wv = state[f'{name}attn.qkv.weight'].chunk(3)
    bias: Tensor | float = 0.0
    if f'{name}attn.relative_position_bias_table' in state:
        index = state[f'{name}attn.relative_position_index']
        bias = state[f'{name}attn.relative_position_bias_table'][index].permute(2, 0, 1)
    q = y @ wq.T + state[f'{name}attn.q_bias']
    v = y @ wv.T + state[f'{name}attn.v_bias']
    y = attend(q, y @ wk.T, v, heads, bias)
    y = F.linear(y, state[f'{name}attn.proj.weight'], state[f'{name}attn.proj.bias'])
    x = x + state[f'{name}gamma_1'] * y
    y = mlp(layer_norm(x, state, f'{name}norm2'), state, f'{name}mlp.')
    return x + state[f'{name}gamma_2'] * y


def blocks(x: Tensor, state: State, prefix: str, heads: int) -> Tensor:
    """All self-attention blocks under a prefix."""
    depth = len({k[len(prefix) :].split('.')[0] for k in state if k.startswith(prefix)})
    for i in range(depth):
        x = block(x, state, f'{prefix}{i}.', heads)
    return x


def tokens(
    images: Tensor, state: State, heads: int, prefix: str = '', mask: Tensor | None = None
) -> Tensor:
    """Output of the last block, class token first; ``mask`` hides patches where True."""
    weight = state[f'{prefix}patch_embed.proj.weight']
    x = F.conv2d(images, weight, state[f'{prefix}patch_embed.proj.bias'], stride=weight.shape[-1])
    x = x.flatten(2).transpose(1, 2) + state[f'{prefix}pos_embed'][:, 1:]
    if mask is not None:
        x = x[~mask].reshape(len(x), -1, x.shape[-1])
    cls_token = (state[f'{prefix}cls_token'] + state[f'{prefix}pos_embed'][:, :1]).expand(
        len(x), -1, -1
    )
    return blocks(torch.cat([cls_token, x], 1), state, f'{prefix}blocks.', heads)


def regressor_block(
    x_m: Tensor, z_v: Tensor, pos_m: Tensor, pos: Tensor, state: State, name: str, heads: int
) -> Tensor:
    """Cross-attention block of the regressor."""
    x = torch.cat([z_v, x_m], 1)
    attn = f'{name}cross_attn.'
    q = layer_norm(x_m + pos_m, state, f'{name}norm1_q') @ state[f'{attn}q.weight'].T
    k = layer_norm(x + pos, state, f'{name}norm1_k') @ state[f'{attn}k.weight'].T
    v = layer_norm(x, state, f'{name}norm1_v') @ state[f'{attn}v.weight'].T
    y = attend(q + state[f'{attn}q_bias'], k, v + state[f'{attn}v_bias'], heads)
    y = F.linear(y, state[f'{attn}proj.weight'], state[f'{attn}proj.bias'])
    x = layer_norm(x_m + state[f'{name}gamma_1_cross'] * y, state, f'{name}norm2_cross')
    return x + state[f'{name}gamma_2_cross'] * mlp(x, state, f'{name}mlp_cross.')


def pretraining(
    images: Tensor, mask: Tensor, state: State, heads: int, neck_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, regressed latents and their targets, each of the masked patches."""

    def project(x: Tensor) -> Tensor:
        x = layer_norm(x, state, 'encoder.norm')[:, 1:]
        if 'encoder_to_regresser.weight' in state:
            name = 'encoder_to_regresser'
            x = F.linear(x, state[f'{name}.weight'], state[f'{name}.bias'])
            x = layer_norm(x, state, f'{name}_norm')
        return x

    z_v = project(tokens(images, state, heads, 'encoder.', mask))
    target = project(tokens(images, state, heads, 'alignment_encoder.', ~mask))
    pos = state['rd_pos_embed'][:, 1:].expand(len(images), -1, -1)
    pos_m = pos[mask].reshape(*target.shape)
    pos = torch.cat([pos[~mask].reshape(*z_v.shape), pos_m], 1)
    x_m = state['mask_token'].expand(*target.shape)
    for i in range(2):
        name = f'regresser.regressor_blocks.{i}.'
        x_m = regressor_block(x_m, z_v, pos_m, pos, state, name, neck_heads)
    z_m = layer_norm(x_m, state, 'regresser.norm')
    y = layer_norm(
        blocks(z_m + pos_m, state, 'decoder.decoder_blocks.', neck_heads), state, 'decoder.norm'
    )
    return F.linear(y, state['decoder.head.weight'], state['decoder.head.bias']), z_m, target
