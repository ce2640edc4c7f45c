"""The partition of parameters into kinds: exact, by name and shape, with the text that is printed."""

import pytest
import torch
from torch import nn

from optim.groups import KINDS, attention_splits, describe, full_shape, partition
from training.model.llama import Llama
from training.model.shapes import SHAPES, LlamaShape


def parameter(*shape: int, trained: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=trained)


def kinds(**shapes: tuple[int, ...]) -> dict[str, str]:
    """Kinds of parameters named with '__' for '.'."""
    named = [(name.replace("__", "."), parameter(*shape)) for name, shape in shapes.items()]
    return {member.name: member.kind for member in partition(named)}


def test_kinds_follow_name_and_shape():
    assert kinds(
        model__embed_tokens__weight=(50, 8),
        model__layers__0__q_proj__weight=(8, 8),
        model__layers__0__q_proj__bias=(8,),
        model__norm__weight=(8,),
        lm_head__weight=(50, 8),
        lm_head__bias=(50,),
        temperature=(),
    ) == {
        "model.embed_tokens.weight": "table",
        "model.layers.0.q_proj.weight": "matrix",
        "model.layers.0.q_proj.bias": "vector",
        "model.norm.weight": "vector",
        "lm_head.weight": "table",
        "lm_head.bias": "vector",
        "temperature": "vector",
    }


def test_a_table_is_known_by_a_whole_part_of_its_name():
    assert kinds(not_lm_head__weight=(4, 4), lm_head_extra__weight=(4, 4)) == {
        "not_lm_head.weight": "matrix",
        "lm_head_extra.weight": "matrix",
    }


# --- matrices that are several linear maps, one above the other -------------------------------------------

HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}


def blocks(splits, **shapes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Blocks of parameters named with '__' for '.'."""
    named = [(name.replace("__", "."), parameter(*shape)) for name, shape in shapes.items()]
    return {member.name: member.blocks for member in partition(named, splits=splits)}


def test_a_matrix_is_one_block_and_nothing_else_has_any():
    assert blocks(None, up_proj__weight=(8, 4), lm_head__weight=(8, 4), up_proj__bias=(8,)) == {
        "up_proj.weight": (8,),
        "lm_head.weight": (),
        "up_proj.bias": (),
    }


def test_a_fused_projection_is_always_three_maps_and_heads_are_split_on_demand():
    assert attention_splits(**HEADS, per_head=False) == {"qkv_proj": (24, 12, 12)}
    assert attention_splits(**HEADS, per_head=True) == {
        "q_proj": (6, 6, 6, 6),
        "k_proj": (6, 6),
        "v_proj": (6, 6),
        "qkv_proj": (6,) * 8,
    }


def test_splits_go_by_a_whole_part_of_the_name_and_to_matrices_only():
    splits = attention_splits(**HEADS, per_head=True)
    shapes = {
        "layers__0__q_proj__weight": (24, 9),
        "layers__0__v_proj__weight": (12, 9),
        "layers__0__qkv_proj__weight": (48, 9),
        "layers__0__qkv_proj__bias": (48,),
        "layers__0__o_proj__weight": (9, 24),
        "layers__0__my_q_proj__weight": (5, 9),
    }
    assert list(blocks(splits, **shapes).values()) == [(6,) * 4, (6,) * 2, (6,) * 8, (), (9,), (5,)]


@pytest.mark.parametrize("rows", [47, 49, 24])
def test_a_split_that_does_not_add_up_names_the_parameter_and_both_numbers(rows):
    splits = attention_splits(**HEADS, per_head=False)
    message = rf"^layers\.0\.qkv_proj\.weight: a split into 24\+12\+12 rows, but it has {rows}$"
    with pytest.raises(ValueError, match=message):
        blocks(splits, layers__0__qkv_proj__weight=(rows, 9))


@pytest.mark.parametrize("name", ["llama-5m", "llama-1b4"])
def test_every_projection_of_our_model_splits_into_its_heads(name):
    shape = SHAPES[name]
    with torch.device("meta"):
        model = Llama(shape)
    sizes = {"num_heads": shape.num_heads, "num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
    members = partition(model.named_parameters(), splits=attention_splits(**sizes, per_head=True))
    for member in members:
        if member.kind != "matrix":
            assert member.blocks == ()
            continue
        assert sum(member.blocks) == member.shape[0]
        projection = member.name.split(".")[-2]
        heads = {"q_proj": shape.num_heads, "k_proj": shape.num_kv_heads, "v_proj": shape.num_kv_heads}
        assert len(member.blocks) == heads.get(projection, 1)
    assert sum(len(member.blocks) for member in members) == shape.num_layers * (
        shape.num_heads + 2 * shape.num_kv_heads + 4
    )


@pytest.mark.parametrize("name", ["llama-5m", "llama-1b4"])
def test_the_partition_of_our_model_is_exact(name):
    shape: LlamaShape = SHAPES[name]
    with torch.device("meta"):
        model = Llama(shape)
    members = partition(model.named_parameters())
    assert sorted(member.name for member in members) == sorted(shape.parameters())
    assert {member.kind for member in members} == set(KINDS)
    matrices = [member.shape for member in members if member.kind == "matrix"]
    assert {size: matrices.count(size) for size in matrices} == shape.matrices()
    tables = [member.name for member in members if member.kind == "table"]
    assert tables == ["model.embed_tokens.weight"] + ["lm_head.weight"] * (not shape.tied)
    elements = sum(torch.Size(member.shape).numel() for member in members)
    assert elements == shape.num_parameters


def test_a_tied_head_is_one_table_and_naming_it_twice_is_an_error():
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(10, 4), "lm_head": nn.Linear(4, 10, bias=False)})
    model["lm_head"].weight = model["embed_tokens"].weight
    [member] = partition(model.named_parameters())
    assert (member.name, member.kind) == ("embed_tokens.weight", "table")
    assert member.parameter is model["lm_head"].weight
    twice = model.named_parameters(remove_duplicate=False)
    with pytest.raises(ValueError, match=r"lm_head\.weight and embed_tokens\.weight are one parameter"):
        partition(twice)


def test_more_than_two_dimensions_name_the_parameter():
    with pytest.raises(ValueError, match=r"conv\.weight: 4 dimensions"):
        partition([("conv.weight", parameter(2, 3, 3, 3))])


def test_frozen_parameters_are_left_out_whatever_their_shape():
    named = [("a", parameter(4, 4, trained=False)), ("b", parameter(2, 2, 2, trained=False))]
    assert partition([*named, ("c", parameter(4))])[0].name == "c"
    assert partition(named) == []


def test_order_and_objects_are_kept():
    named = [(name, parameter(3, 3)) for name in ("z", "a", "m")]
    members = partition(iter(named))
    assert [(member.name, member.parameter) for member in members] == named


def test_a_parameter_partitioned_by_zero_3_keeps_its_full_shape():
    hollow = parameter(0)
    hollow.ds_shape = torch.Size([16, 8])
    assert full_shape(hollow) == (16, 8)
    [member] = partition([("layers.0.up_proj.weight", hollow)])
    assert (member.kind, member.shape) == ("matrix", (16, 8))


def test_the_description_counts_by_kind_and_shape_and_folds_layers():
    named = [
        ("embed_tokens.weight", parameter(1000, 8)),
        *((f"layers.{i}.q_proj.weight", parameter(8, 8)) for i in range(12)),
        *((f"layers.{i}.k_proj.weight", parameter(8, 8)) for i in range(12)),
        *((f"layers.{i}.down_proj.weight", parameter(8, 24)) for i in range(12)),
        ("norm.weight", parameter(8)),
    ]
    assert describe(partition(named)).splitlines() == [
        "  matrix   24 x 8x8                  1,536  layers.*.k_proj.weight, layers.*.q_proj.weight",
        "  matrix   12 x 8x24                 2,304  layers.*.down_proj.weight",
        "  table     1 x 1000x8               8,000  embed_tokens.weight",
        "  vector    1 x 8                        8  norm.weight",
    ]
