"""One table of key rules for each project whose weights come in or go out.

References:
    Official: https://github.com/Atten4Vis/CAE/tree/master/models and downstream_tasks
    mmpretrain: https://github.com/open-mmlab/mmpretrain/blob/main/mmpretrain/models
    (backbones/beit.py, selfsup/cae.py, necks/cae_neck.py there)
    PASSL: https://github.com/PaddlePaddle/PASSL/blob/main/passl/models/cae.py
    timm: https://github.com/huggingface/pytorch-image-models/blob/main/timm/models/beit.py
    Hugging Face: https://github.com/huggingface/transformers/tree/main/src/transformers/models/beit
"""

from collections.abc import Collection, Iterable, Mapping

from cae_mm.checkpoints.pretrained import guess_source
from cae_mm.conversion.rules import Check, LeaveOut, Move, Rule

TABLE = 'relative_position_bias_table'
INDEX = 'relative_position_index'
BLOCK = (
    'norm1.{p}',
    'attn.qkv.weight',
    'attn.q_bias',
    'attn.v_bias',
    'attn.proj.{p}',
    'norm2.{p}',
    'mlp.fc1.{p}',
    'mlp.fc2.{p}',
    'gamma_1',
    'gamma_2',
)
ENCODER = ('cls_token', 'patch_embed.proj.{p}', *(f'blocks.{{i}}.{name}' for name in BLOCK))
MMPRETRAIN_MLP = {'mlp.fc1.{p}': 'ffn.layers.0.0.{p}', 'mlp.fc2.{p}': 'ffn.layers.1.{p}'}
# a self-attention block in mmpretrain
MMPRETRAIN_BLOCK = {name: name for name in BLOCK} | MMPRETRAIN_MLP
MMPRETRAIN_BLOCK |= {'norm1.{p}': 'ln1.{p}', 'norm2.{p}': 'ln2.{p}'}
# a block of the regressor: ours -> in PASSL and mmpretrain; the official code differs in the norms
REGRESSOR_BLOCK = {
    **{f'norm_{x}.{{p}}': f'norm1_{x}_cross.{{p}}' for x in 'qkv'},
    **{f'attn.{x}.weight': f'cross_attn.{x}.weight' for x in 'qkv'},
    'attn.q.bias': 'cross_attn.q_bias',
    'attn.v.bias': 'cross_attn.v_bias',
    'attn.proj.{p}': 'cross_attn.proj.{p}',
    'norm2.{p}': 'norm2_cross.{p}',
    'mlp.fc1.{p}': 'mlp_cross.fc1.{p}',
    'mlp.fc2.{p}': 'mlp_cross.fc2.{p}',
    'gamma_1': 'gamma_1_cross',
    'gamma_2': 'gamma_2_cross',
}
OFFICIAL_REGRESSOR_BLOCK = REGRESSOR_BLOCK | {f'norm_{x}.{{p}}': f'norm1_{x}.{{p}}' for x in 'qkv'}


def _moves(names: Mapping[str, str] | Iterable[str], foreign: str, ours: str) -> list[Rule]:
    """Put prefixes before names, given as ours -> foreign or as the same in both."""
    pairs = names.items() if isinstance(names, Mapping) else ((name, name) for name in names)
    return [Move(foreign + new, ours + old) for old, new in pairs]


def _relative_positions(attention: str, shared: str) -> list[Rule]:
    ours = 'backbone.blocks.{i}.attn.'
    return [
        Move(f'{attention}{TABLE}', f'{ours}{TABLE}'),
        Check(f'{attention}{INDEX}', f'{ours}{INDEX}'),
        Move(f'{shared}{TABLE}', f'{ours}{TABLE}', 'one table for all blocks'),
        LeaveOut(f'{shared}{INDEX}', note='that of the shared table, computed'),
    ]


def _official_encoder(prefix: str) -> list[Rule]:
    return [
        *_moves(ENCODER, prefix, 'backbone.'),
        Check(f'{prefix}pos_embed', 'positions'),
        *_relative_positions(f'{prefix}blocks.{{i}}.attn.', f'{prefix}rel_pos_bias.'),
    ]


def _norms(token: str, pooled: str) -> list[Rule]:
    return [
        Move(token, 'backbone.norm.{p}', pooled=False),
        Move(pooled, 'backbone.norm.{p}', pooled=True),
    ]


OFFICIAL_ENCODER: list[Rule] = [
    *_official_encoder('encoder.'),
    Move('encoder.norm.{p}', 'backbone.norm.{p}', pooled=False),
]
OFFICIAL: list[Rule] = [
    *OFFICIAL_ENCODER,
    *(
        Check(f'alignment_encoder.{name}', f'backbone.{name}', 'shares the storage of the encoder')
        for name in (*ENCODER, f'blocks.{{i}}.attn.{TABLE}', 'norm.{p}')
    ),
    Check('alignment_encoder.pos_embed', 'positions'),
    Move('mask_token', 'neck.mask_token'),
    Move('encoder_to_regresser.{p}', 'neck.projection.0.{p}'),
    Move('encoder_to_regresser_norm.{p}', 'neck.projection.1.{p}'),
    Check('rd_pos_embed', 'neck_positions'),
    *_moves(OFFICIAL_REGRESSOR_BLOCK, 'regresser.regressor_blocks.{i}.', 'neck.regressor.{i}.'),
    Move('regresser.norm.{p}', 'neck.regressor_norm.{p}'),
    *_moves(BLOCK, 'decoder.decoder_blocks.{i}.', 'neck.decoder.{i}.'),
    Move('decoder.norm.{p}', 'neck.decoder_norm.{p}'),
    Move('decoder.head.{p}', 'neck.output.{p}'),
]


def _joined_neck(
    name: str, regressor_blocks: str, regressor_block: Mapping[str, str], decoder_blocks: str
) -> list[Rule]:
    """Regressor and decoder in one module, as in the authors' first code and in PASSL."""
    return [
        Move('mask_token', 'neck.mask_token'),
        Move('encoder_to_decoder.{p}', 'neck.projection.0.{p}'),
        Move('encoder_to_decoder_norm.{p}', 'neck.projection.1.{p}'),
        *_moves(regressor_block, f'{name}.{regressor_blocks}.{{i}}.', 'neck.regressor.{i}.'),
        Move(f'{name}.norm.{{p}}', 'neck.regressor_norm.{p}'),
        *_moves(BLOCK, f'{name}.{decoder_blocks}.{{i}}.', 'neck.decoder.{i}.'),
        Move(f'{name}.norm2.{{p}}', 'neck.decoder_norm.{p}'),
        Move(f'{name}.head.{{p}}', 'neck.output.{p}'),
    ]


# names of the authors' first code (June 2022), with which CAE-B and CAE-L were published
OFFICIAL_2022: list[Rule] = [
    *OFFICIAL_ENCODER,
    LeaveOut('teacher.{rest}', note='a copy of the encoder, one step late'),
    *_joined_neck('pretext_neck', 'regressor_blocks', OFFICIAL_REGRESSOR_BLOCK, 'decoder_blocks'),
]
OFFICIAL_FINETUNED: list[Rule] = [
    *_official_encoder(''),
    *_norms('norm.{p}', 'fc_norm.{p}'),
    Move('head.{p}', 'head.fc.{p}'),
]
OFFICIAL_DENSE: list[Rule] = [
    *_official_encoder('backbone.'),
    Move('backbone.norm.{p}', 'backbone.norm.{p}', pooled=False),
    LeaveOut(
        'backbone.fpn{rest}',
        note='pyramid: a neck here (ViTFeaturePyramid), trained with heads that are left out',
    ),
    *(
        LeaveOut(f'{head}.{{rest}}', note='heads: layers of another version of mmseg or mmdet')
        for head in ('decode_head', 'auxiliary_head', 'neck', 'rpn_head', 'roi_head')
    ),
]
PASSL: list[Rule] = [
    *OFFICIAL_ENCODER,
    LeaveOut(
        'teacher_network.{rest}', note='moving average of the encoder, not part of the network'
    ),
    *_joined_neck('regressor_and_decoder', 'blocks', REGRESSOR_BLOCK, 'self_att_blocks'),
]


def _mmpretrain_encoder(prefix: str) -> list[Rule]:
    return [
        Move(f'{prefix}cls_token', 'backbone.cls_token'),
        Move(f'{prefix}patch_embed.projection.{{p}}', 'backbone.patch_embed.proj.{p}'),
        *_moves(MMPRETRAIN_BLOCK, f'{prefix}layers.{{i}}.', 'backbone.blocks.{i}.'),
        Check(f'{prefix}pos_embed', 'positions'),
        *_relative_positions(f'{prefix}layers.{{i}}.attn.', f'{prefix}rel_pos_bias.'),
        *_norms(f'{prefix}ln1.{{p}}', f'{prefix}ln2.{{p}}'),
    ]


MMPRETRAIN_BACKBONE: list[Rule] = _mmpretrain_encoder('')
MMPRETRAIN: list[Rule] = [
    *_mmpretrain_encoder('backbone.'),
    Move('head.fc.{p}', 'head.fc.{p}'),
    Move('neck.mask_token', 'neck.mask_token'),
    *_moves(REGRESSOR_BLOCK | MMPRETRAIN_MLP, 'neck.regressors.{i}.', 'neck.regressor.{i}.'),
    Move('neck.norm_regressor.{p}', 'neck.regressor_norm.{p}'),
    *_moves(MMPRETRAIN_BLOCK, 'neck.decoders.{i}.', 'neck.decoder.{i}.'),
    Move('neck.norm_decoder.{p}', 'neck.decoder_norm.{p}'),
    Move('neck.head.{p}', 'neck.output.{p}'),
    LeaveOut('teacher.{rest}', note="a copy of the encoder, one step late in mmpretrain's code"),
    LeaveOut('target_generator.{rest}', note='the tokenizer: tools/convert_dalle.py converts it'),
    LeaveOut('data_preprocessor.{rest}', note='mean and standard deviation stand in configs'),
]


def _huggingface(prefix: str) -> list[Rule]:
    layer, block = f'{prefix}encoder.layer.{{i}}.', 'backbone.blocks.{i}.'
    attention, embeddings = f'{layer}attention.attention.', f'{prefix}embeddings.'
    return [
        Move(f'{embeddings}cls_token', 'backbone.cls_token'),
        Move(f'{embeddings}patch_embeddings.projection.{{p}}', 'backbone.patch_embed.proj.{p}'),
        Check(f'{embeddings}position_embeddings', 'positions'),
        LeaveOut(f'{embeddings}mask_token', note="BEiT's; CAE masks in the regressor"),
        Move(
            ' + '.join(f'{attention}{name}.weight' for name in ('query', 'key', 'value')),
            f'{block}attn.qkv.weight',
        ),
        Move(f'{attention}query.bias', f'{block}attn.q_bias'),
        Move(f'{attention}value.bias', f'{block}attn.v_bias'),
        *_relative_positions(
            f'{attention}relative_position_bias.', f'{prefix}encoder.relative_position_bias.'
        ),
        *_moves(
            {
                'norm1.{p}': 'layernorm_before.{p}',
                'attn.proj.{p}': 'attention.output.dense.{p}',
                'norm2.{p}': 'layernorm_after.{p}',
                'mlp.fc1.{p}': 'intermediate.dense.{p}',
                'mlp.fc2.{p}': 'output.dense.{p}',
                'gamma_1': 'lambda_1',
                'gamma_2': 'lambda_2',
            },
            layer,
            block,
        ),
        *_norms(f'{prefix}layernorm.{{p}}', f'{prefix}pooler.layernorm.{{p}}'),
    ]


HUGGINGFACE: list[Rule] = _huggingface('')
HUGGINGFACE_TASK: list[Rule] = [
    *_huggingface('beit.'),
    Move('classifier.{p}', 'head.fc.{p}'),
    LeaveOut('lm_head.{rest}', note="BEiT's prediction of tokens, which CAE does in its decoder"),
    LeaveOut('layernorm.{rest}', note="BEiT's norm before the prediction of tokens"),
]

# The tables of each source, and a key by which it is known; the first that fits is taken.
# Official, PASSL and timm share names where a file is of the encoder alone.
TABLES: dict[str, dict[str, list[Rule]]] = {
    'huggingface': {
        'embeddings.cls_token': HUGGINGFACE,
        'beit.embeddings.cls_token': HUGGINGFACE_TASK,
    },
    'mmpretrain': {
        'backbone.patch_embed.projection.weight': MMPRETRAIN,
        'patch_embed.projection.weight': MMPRETRAIN_BACKBONE,
    },
    'passl': {
        'regressor_and_decoder.norm.weight': PASSL,
        'encoder.cls_token': PASSL,
        'cls_token': OFFICIAL_FINETUNED,
    },
    'official': {
        'pretext_neck.norm.weight': OFFICIAL_2022,
        'encoder.cls_token': OFFICIAL,
        'backbone.pos_embed': OFFICIAL_DENSE,
        'cls_token': OFFICIAL_FINETUNED,
    },
    'timm': {'cls_token': OFFICIAL_FINETUNED},
}
SOURCES = tuple(TABLES)


def table_for(source: str, keys: Collection[str]) -> list[Rule]:
    """Return the rules for these keys of this source."""
    if source not in SOURCES:
        raise ValueError(f"Unknown source '{source}': choose one of {SOURCES}")
    for hallmark, rules in TABLES[source].items():
        if hallmark in keys:
            return rules
    like = guess_source(keys)
    raise ValueError(
        f'these are no {source} weights: none of the keys {list(TABLES[source])} is there'
        + (f', they look like {like} ones' if like else '')
    )
