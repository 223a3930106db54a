"""Arms of equal size, counted by peft itself."""

from __future__ import annotations

import copy

import pytest
from chat_models import chat_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_encoder, tiny_tokenizer

from interp.conflict.aligning import check_settings
from interp.conflict.layer_arms import _draws, _even_ranks, arms, attention_projections, layer_ranks, lora_parameters
from interp.errors import InputError
from interp.model import load_model

NAMES = {
    "gpt2": {"c_attn", "c_proj"},
    "gpt_neox": {"query_key_value", "dense"},
    "phi3": {"qkv_proj", "o_proj"},
}


def test_projections_are_the_attention_s_and_peft_counts_the_same(family: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = chat_tiny(family)
    found = attention_projections(model, [0, -1])
    assert {name.rsplit(".", 1)[1] for name in found} == NAMES.get(family, {"q_proj", "k_proj", "v_proj", "o_proj"})
    assert model.arch.o_proj(0) in found.values()
    assert model.arch.down_proj(0) not in found.values()
    assert len(found) == 2 * len(NAMES.get(family, "qkvo"))
    for name, module in found.items():
        assert model.hf.get_submodule(name) is module
    config = LoraConfig(r=3, target_modules=list(found), fan_in_fan_out=model.arch.family.transposed)
    trainable, _ = get_peft_model(copy.deepcopy(model.hf), config).get_nb_trainable_parameters()
    assert trainable == lora_parameters(model, [0, -1], 3)


def test_arms_have_equal_size() -> None:
    model = chat_tiny(num_hidden_layers=8)
    found = arms(model, [4, 3, -4], rank=8, n_random=3)
    assert list(found) == ["focal", "random-0", "random-1", "random-2", "first", "last", "all"]
    assert found["focal"].layers == (3, 4)
    assert found["first"].layers == (0, 1)
    assert found["last"].layers == (6, 7)
    assert found["all"].layers == tuple(range(8))
    sizes = {name: arm.n_parameters for name, arm in found.items()}
    assert len(set(sizes.values())) == 1  # rank 2 in 8 layers is rank 8 in 2
    assert found["all"].rank == 2
    assert {arm.lora_alpha / arm.rank for arm in found.values()} == {2.0}
    draws = [found[f"random-{number}"].layers for number in range(3)]
    assert len(set(draws)) == 3
    assert not any({3, 4} & set(drawn) for drawn in draws)
    assert arms(model, [3, 4], n_random=3) == found
    assert arms(model, [3, 4], seed=1, n_random=3) != found


def test_all_layers_have_as_many_where_ranks_do_not_divide() -> None:
    model = chat_tiny(num_hidden_layers=8)
    found = arms(model, [1, 2, 5], rank=4, n_random=0)
    assert found["all"].rank == (2, 1, 2, 1, 2, 1, 2, 1)  # 12 of 3 layers of rank 4
    assert found["all"].n_parameters == found["focal"].n_parameters
    assert found["all"].lora_alpha == 8.0
    tiny = arms(model, [1], rank=2, n_random=0)["all"]  # no rank below: the count says so
    assert tiny.rank == 1
    assert tiny.n_parameters == 4 * arms(model, [1], rank=2)["focal"].n_parameters


def test_a_layer_counts_once_and_ranks_go_by_ascending_layers() -> None:
    model = chat_tiny(num_hidden_layers=4)
    assert layer_ranks(model, [-1, 0, 3], (8, 4)) == {0: 8, 3: 4}
    assert lora_parameters(model, [2, 2, -2], 3) == lora_parameters(model, [2], 3)
    assert lora_parameters(model, [-1, 0], (8, 4)) == lora_parameters(model, [0, 3], (8, 4))
    for layers, ranks in (([0, 0], (1, 3)), ([], 8), ([1], 0), ([0, 1], (1,))):
        with pytest.raises(InputError, match="one for each layer"):
            layer_ranks(model, layers, ranks)
    check_settings(model, [0, 0], rank=(3,))
    check_settings(model, rank=(3, 1))
    with pytest.raises(InputError, match="rank="):
        check_settings(model, rank=(3, 0))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(0, 200))
def test_ranks_that_a_budget_allows(sizes: list[int], budget: int) -> None:
    ranks = _even_ranks(sizes, budget)
    used = sum(rank * size for rank, size in zip(ranks, sizes, strict=True))
    assert set(ranks) <= {min(ranks), min(ranks) + 1}
    assert min(ranks) >= 1
    assert used <= max(budget, sum(sizes))
    if len(set(sizes)) == 1 and budget >= sum(sizes):
        assert budget - used < sizes[0]  # not one more would do


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 9), min_size=1, max_size=10), st.integers(0, 4), st.integers(0, 99))
def test_draws(focal: set[int], n: int, seed: int) -> None:
    found = _draws(tuple(sorted(focal)), 10, n, seed)
    assert len(found) == n
    for drawn in found:
        assert len(set(drawn)) == len(focal)
        assert set(drawn) <= set(range(10))
        assert drawn == tuple(sorted(drawn))
        assert len(set(drawn) & focal) == max(0, 2 * len(focal) - 10)


def test_errors() -> None:
    model = chat_tiny()
    for given_, message in (
        ({"focal": []}, "no focal layer"),
        ({"focal": [3]}, "layer 3 is out of range"),
        ({"focal": [0], "rank": 0}, "rank=0"),
        ({"focal": [0], "n_random": -1}, "n_random=-1"),
    ):
        with pytest.raises(InputError, match=message):
            arms(model, **given_)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="is an encoder"):
        arms(load_model(tiny_encoder(), tiny_tokenizer()), [0])
