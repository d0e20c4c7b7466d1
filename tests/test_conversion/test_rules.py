"""Every table of rules, in both directions, on networks of any size."""

import re
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cae_mm.checkpoints import EncoderDescription
from cae_mm.conversion import sources
from cae_mm.conversion.convert import translate
from cae_mm.conversion.rules import Move, to_foreign
from cae_mm.conversion.sizes import fixed_tensors
from cae_mm.models import CAENeck, build_encoder

# name of a table -> source, what it knows beside the encoder, whether of both final norms
TABLES = dict(
    HUGGINGFACE=('huggingface', (), True),
    HUGGINGFACE_TASK=('huggingface', ('head',), True),
    MMPRETRAIN=('mmpretrain', ('neck', 'head'), True),
    MMPRETRAIN_BACKBONE=('mmpretrain', (), True),
    PASSL=('passl', ('neck',), False),
    OFFICIAL=('official', ('neck',), False),
    OFFICIAL_2022=('official', ('neck',), False),
    OFFICIAL_FINETUNED=('official', ('head',), True),
    OFFICIAL_DENSE=('official', (), False),
)
tables = pytest.mark.parametrize('table', TABLES)


@dataclass
class Weights:
    """Under our names, with what no name tells."""

    state: dict
    description: EncoderDescription
    neck: dict | None


@st.composite
def sizes(draw, least=1):
    """Options that ``make`` takes."""
    integers, width = st.integers(least, 3), draw(st.sampled_from([4, 12, 44]))
    grid, patch = draw(st.tuples(st.integers(1, 4), st.integers(1, 5))), draw(st.integers(1, 3))
    base = draw(st.sampled_from([grid, (14, 14)]))  # resized from the size of pretraining
    return dict(
        embed_dims=width,
        depth=draw(integers),
        num_heads=draw(st.sampled_from([1, 2, 4])),
        mlp_ratio=draw(st.integers(1, 60)) / width,
        patch_size=patch,
        in_channels=draw(st.sampled_from([1, 3])),
        img_size=(grid[0] * patch, grid[1] * patch),
        pretrain_img_size=(base[0] * patch, base[1] * patch),
        use_rel_pos_bias=draw(st.booleans()),
        final_norm=draw(st.booleans()),
        pooled_norm=draw(st.booleans()),
    ), dict(
        in_dims=width,
        embed_dims=draw(st.sampled_from([8, 12])),
        num_heads=draw(st.sampled_from([2, 4])),
        regressor_depth=draw(integers),
        decoder_depth=draw(integers),
        out_dims=draw(st.integers(1, 9)),
        mlp_ratio=4.0,
    )


def make(table, encoder, neck):
    """Weights as far as the table knows them: no two numbers are alike."""
    _, parts, any_norm = TABLES[table]
    pooled = encoder['pooled_norm'] and encoder['final_norm'] and any_norm
    description = EncoderDescription(**encoder | dict(pooled_norm=pooled))
    if table == 'MMPRETRAIN':  # is as wide there as the encoder
        neck = neck | dict(embed_dims=encoder['embed_dims'])
    with torch.device('meta'):
        modules = {'backbone': build_encoder(description)}
        if 'neck' in parts:
            modules['neck'] = CAENeck(**neck)
        if 'head' in parts:
            modules['head.fc'] = torch.nn.Linear(description.embed_dims, 3)
    shapes = {
        f'{prefix}.{key}': tensor.shape
        for prefix, module in modules.items()
        for key, tensor in module.state_dict().items()
    }
    numbers = torch.arange(float(sum(shape.numel() for shape in shapes.values())))
    tensors = numbers.split([shape.numel() for shape in shapes.values()])
    state = {key: tensor.view(shapes[key]) for key, tensor in zip(shapes, tensors)}
    return Weights(state, description, neck if 'neck' in parts else None)


def carry_out(table, ours):
    computed = fixed_tensors(ours.description, ours.state)
    pooled = ours.description.pooled_norm
    foreign, _ = to_foreign(ours.state, computed, getattr(sources, table), pooled)
    return foreign


def bring_in(table, foreign, ours):
    return translate(
        foreign,
        TABLES[table][0],
        num_heads=ours.description.num_heads,
        decoder_heads=ours.neck and ours.neck['num_heads'],
    )


@tables
@settings(max_examples=20)
@given(sizes=sizes())
def test_way_there_and_back_loses_nothing(table, sizes):
    ours = make(table, *sizes)
    foreign = carry_out(table, ours)
    back = bring_in(table, foreign, ours)
    assert back.state.keys() == ours.state.keys()
    assert all(torch.equal(back.state[key], tensor) for key, tensor in ours.state.items())
    assert back.description == ours.description and back.neck == ours.neck
    assert sum(back.counts.values()) == len(foreign)  # each key of theirs is in the report


def names(key):
    """What a message may call a key: weight and bias of a layer need each other."""
    return re.escape(re.sub(r'\.(weight|bias)$', '', key))


@tables
@settings(max_examples=20)
@given(sizes=sizes(least=2), data=st.data())
def test_a_key_too_few_or_too_many_is_named(table, sizes, data):
    """What all blocks may lack, such as layer scale, none may lack alone."""
    ours = make(table, *sizes)
    foreign = carry_out(table, ours)
    rules = [rule for rule in getattr(sources, table) if isinstance(rule, Move)]
    key = data.draw(st.sampled_from(sorted(ours.state)))
    [theirs] = [keys for rule in rules if (keys := set(rule.foreign_keys(key)) & foreign.keys())]
    gone = data.draw(st.sampled_from(sorted(theirs)))
    less = {key: tensor for key, tensor in foreign.items() if key != gone}
    with pytest.raises(ValueError, match=f'{names(gone)}|{names(key)}'):
        bring_in(table, less, ours)
    with pytest.raises(ValueError, match=f'no rule knows {re.escape(gone)}.more$'):
        bring_in(table, foreign | {f'{gone}.more': torch.ones(1)}, ours)
