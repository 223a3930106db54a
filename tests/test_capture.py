"""One pass, many probes: counts, padding, order, memory errors, and nothing left behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_models import GATED, tiny_encoder, tiny_hf, tiny_tokenizer

from interp import batching, capture
from interp.batching import token_batches
from interp.capture import Keep, estimate_bytes, forward, run_probes
from interp.errors import InputError, MemoryBudgetError, ModelError
from interp.model import load_model

TEXTS = ["the dog", "a king is in the sea ?", "water music tea code", "the", "old new keys sun red king cat ."]
EVERY = ["resid_pre", "resid_post", "attn_out", "pattern", "z", "up", "hidden", "mlp_out"]


class Total:
    """Sums over real positions, and counts how often it was asked."""

    def __init__(self, sites: Sequence[tuple[str, int]]) -> None:
        self.sites = list(sites)
        self.updates = self.merges = 0
        self.rows: list[int] = []
        self.sums: dict[tuple[str, int], torch.Tensor] = {}
        self.fail: list[BaseException] = []

    def update(self, site: str, layer: int, tensor: torch.Tensor, batch: Any) -> torch.Tensor:
        self.updates += 1
        if self.fail and batch.size > 1 and (site, layer) == self.sites[-1]:
            raise self.fail.pop()
        return tensor[batch.mask].double().sum(0)

    def merge(self, site: str, layer: int, partial: torch.Tensor, batch: Any) -> None:
        self.merges += 1
        self.sums[site, layer] = self.sums.get((site, layer), 0) + partial
        if (site, layer) == self.sites[0]:
            self.rows += batch.rows


def calls(model: Any) -> tuple[list[str], list[Any]]:
    """Counts runs of the base model, the layers and the head."""
    seen: list[str] = []
    parts = {"base": model.hf.base_model, "head": model.arch.lm_head()}
    parts |= {f"layer{at}": model.arch.layer(at) for at in range(3)}
    handles = [m.register_forward_pre_hook(lambda *_, name=name: seen.append(name)) for name, m in parts.items()]
    return seen, handles


def hook_count(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())


def kept(model: Any, sites: Any, **options: Any) -> Keep:
    probe = Keep(sites)
    run_probes(model, options.pop("texts", TEXTS), [probe], **options)
    return probe


def test_several_probes_share_one_pass(tiny: Any) -> None:
    model = tiny()
    seen, handles = calls(model)
    probes = [Keep([("hidden", 1)]), Total([("hidden", 1), ("up", 2)]), Total([("pattern", 0)]), Keep([("logits", -1)])]
    probes[2].update = lambda site, layer, tensor, batch: tensor.sum()  # type: ignore[method-assign]
    run_probes(model, TEXTS, probes)
    assert seen == ["base", "layer0", "layer1", "layer2", "head"]
    for handle in handles:
        handle.remove()
    assert hook_count(model) == 0


def test_layers_above_and_the_head_do_not_run(tiny: Any) -> None:
    model = tiny()
    for sites, expected in (
        ([("hidden", 0)], ["base", "layer0"]),
        ([("resid_pre", 1), ("up", 0)], ["base", "layer0", "layer1"]),
        ([("attn_out", 1), ("pattern", 1)], ["base", "layer0", "layer1"]),
        ([("resid_post", 2)], ["base", "layer0", "layer1", "layer2"]),
        ([("logits", -1)], ["base", "layer0", "layer1", "layer2", "head"]),
    ):
        seen, handles = calls(model)
        probe = kept(model, sites)
        assert seen == expected, sites
        assert all(len(probe.tensors[site]) == len(TEXTS) for site in sites)
        for handle in handles:
            handle.remove()


def test_independent_of_batch_size_order_and_side(family: str, tiny: Any) -> None:
    model = tiny(family)
    sites = [(name, layer) for name in [*EVERY, *(["gate"] * (family in GATED))] for layer in (0, 2)] + [("logits", -1)]
    alone = {row: kept(model, sites, texts=[text]) for row, text in enumerate(TEXTS)}
    for order, options in (
        ([0, 1, 2, 3, 4], {"max_tokens": 4096}),
        ([3, 1, 4, 0, 2], {"max_tokens": 4096, "side": "left"}),
        ([4, 3, 2, 1, 0], {"max_tokens": 16, "side": "left"}),
        ([2, 0, 4, 1, 3], {"max_tokens": 16}),
    ):
        probe = kept(model, sites, texts=[TEXTS[row] for row in order], **options)
        for site in sites:
            got = torch.cat([probe.tensors[site][at].flatten() for at in range(5)])
            expected = torch.cat([alone[row].tensors[site][0].flatten() for row in order])
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_against_the_models_own_outputs(family: str, tiny: Any) -> None:
    model = tiny(family)
    probe = kept(model, [("pattern", 1), ("resid_pre", 1), ("logits", -1)], side="left")
    model.hf.set_attn_implementation("eager")
    for row, text in enumerate(TEXTS):
        with torch.no_grad():
            output = model.hf(torch.tensor(model.encode(text)), output_attentions=True, output_hidden_states=True)
        for site, expected in (
            (("pattern", 1), output.attentions[1]),
            (("resid_pre", 1), output.hidden_states[1]),
            (("logits", -1), output.logits),
        ):
            torch.testing.assert_close(probe.tensors[site][row], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_patterns_sum_to_one_without_padding(family: str, tiny: Any, side: str) -> None:
    class Padding:
        sites = (("pattern", 0), ("pattern", 1))

        def update(self, site: str, layer: int, tensor: torch.Tensor, batch: Any) -> None:
            real = batch.mask[:, None, :, None] & ~batch.mask[:, None, None, :]
            assert tensor.masked_select(real.expand_as(tensor)).abs().sum() == 0

        def merge(self, *_: Any) -> None: ...

    model = tiny(family)
    probe = Keep([("pattern", 0), ("pattern", 1)])
    run_probes(model, TEXTS, [probe, Padding()], side=side)
    for by_text in probe.tensors.values():
        for pattern in by_text.values():
            torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:2]))
            assert pattern.triu(1).abs().sum() == 0


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_the_attention_implementation_comes_back(tiny: Any, before: str) -> None:
    model = tiny()
    model.hf.set_attn_implementation(before)
    kept(model, [("pattern", 0)])
    assert model.attention == before

    class Broken(Total):
        def update(self, *_: Any) -> Any:
            assert model.attention == "eager"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_probes(model, TEXTS, [Broken([("pattern", 0), ("hidden", 1)])])
    assert model.attention == before
    assert hook_count(model) == 0


@pytest.mark.parametrize("site", ["hidden", "logits"])
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory")],
    ids=repr,
)
def test_memory_error_in_the_middle_of_a_pass_counts_nothing_twice(tiny: Any, error: BaseException, site: str) -> None:
    model = tiny()
    last = (site, -1 if site == "logits" else 2)
    expected, probe, other = (Total([("up", 0), ("up", 1), last]) for _ in range(3))
    run_probes(model, TEXTS, [expected])
    probe.fail = [error, error]
    run_probes(model, TEXTS, [other, probe])
    assert probe.updates > probe.merges
    for one in (probe, other):
        assert sorted(one.rows) == list(range(len(TEXTS)))
        for key, total in expected.sums.items():
            torch.testing.assert_close(one.sums[key], total, rtol=1e-5, atol=1e-4)
    assert hook_count(model) == 0


def test_memory_error_while_merging_is_not_run_again(tiny: Any) -> None:
    class Full(Total):
        def merge(self, *_: Any) -> None:
            raise MemoryError

    first = Total([("up", 0)])
    with pytest.raises(MemoryBudgetError, match="while Full took in a batch of 5 texts"):
        run_probes(tiny(), TEXTS, [first, Full([("up", 0)])])
    assert first.merges == 1


def test_other_errors_pass_through_and_leave_no_hooks(tiny: Any) -> None:
    model = tiny()
    probe = Total([("hidden", 0), ("hidden", 1)])
    probe.fail = [ValueError("mine")]
    with pytest.raises(ValueError, match="mine"):
        run_probes(model, TEXTS, [probe])
    assert probe.merges == 0
    assert hook_count(model) == 0


def test_the_memory_estimate_refuses_with_both_figures(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    one = estimate_bytes(model, {"pattern"}, 1, 8)
    for module in (batching, capture):
        monkeypatch.setattr(module, "available_memory", lambda device: one // 2)
    with pytest.raises(
        MemoryBudgetError, match=r"one text of 8 tokens needs about 0.0 GiB on cpu, where 0.0 GiB are free"
    ):
        run_probes(model, TEXTS, [Total([("pattern", 0)])])
    sizes: list[int] = []

    class Sizes(Total):
        def update(self, site: str, layer: int, tensor: torch.Tensor, batch: Any) -> Any:
            sizes.append(batch.size)
            return tensor.sum()

    for module in (batching, capture):
        monkeypatch.setattr(module, "available_memory", lambda device: 2 * one)
    run_probes(model, TEXTS, [Sizes([("pattern", 0)])])
    assert sum(sizes) == 5
    assert max(sizes) < 5


def test_keeping_more_than_there_is_memory_for_is_refused(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    probe = Keep([("pattern", 0), ("hidden", 1), ("logits", -1), ("resid_post", 0), ("z", 1)])
    expected = sum(4 * n * n * 4 + n * 4 * (24 + 64 + 16 + 16) for n in (7, 2))
    assert probe.kept_bytes(model, [7, 2]) == expected
    run_probes(model, [[5] * 7, [6, 7]], [probe])
    assert sum(t.numel() * t.element_size() for by in probe.tensors.values() for t in by.values()) == expected
    texts = [[5] * 60] * 1000
    monkeypatch.setattr(batching, "available_memory", lambda device: 20 * 2**20)
    with pytest.raises(MemoryBudgetError, match=r"keeping whole tensors of 1000 texts needs about 0.1 GiB on cpu"):
        run_probes(model, texts, [Keep([("pattern", 0)])])


def test_estimate_grows_with_what_is_wanted(tiny: Any) -> None:
    model = tiny()
    plain = estimate_bytes(model, {"hidden"}, 2, 10)
    assert estimate_bytes(model, {"pattern"}, 2, 10) > plain
    assert estimate_bytes(model, {"logits"}, 2, 10) >= plain + 20 * 64 * 4
    assert estimate_bytes(model, {"hidden"}, 4, 10) == 2 * plain


def test_token_ids_and_one_string(tiny: Any) -> None:
    model = tiny()
    by_text = kept(model, [("hidden", 1)], texts="the dog")
    ids = model.encode("the dog")
    by_ids = kept(model, [("hidden", 1)], texts=ids)
    torch.testing.assert_close(by_text.tensors["hidden", 1][0], by_ids.tensors["hidden", 1][0])


def test_bad_input(tiny: Any) -> None:
    model = tiny()
    probe = Total([("hidden", 0)])
    for texts, message in (
        ([], "no texts"),
        ([""], "text 0 is empty"),
        (["the", ""], "text 1 is empty"),
        ([[1], []], "text 1 is empty"),
        (["the " * 70], "71 tokens|70 tokens"),
        ([[64]], "token id 64"),
        ([[-1]], "token id -1"),
    ):
        with pytest.raises(InputError, match=message):
            run_probes(model, texts, [probe])  # type: ignore[arg-type]
    for sites, message in (
        ([("hidden", 3)], "layer 3 is out of range"),
        ([("nothing", 0)], "unknown site"),
        ([], "no probe asks"),
    ):
        with pytest.raises(InputError, match=message):
            run_probes(model, TEXTS, [Total(sites)])
    with pytest.raises(InputError, match="no probe"):
        run_probes(model, TEXTS, [])
    with pytest.raises(InputError, match="unknown site 'nothing'"):
        Keep([("nothing", 0)])
    with pytest.raises(InputError, match="side 'top'"):
        run_probes(model, TEXTS, [probe], side="top")
    assert probe.updates == 0
    assert hook_count(model) == 0


def test_a_probe_is_told_the_layer_as_it_asked_and_once(tiny: Any) -> None:
    model = tiny()
    probe = kept(model, [("hidden", -1), ("hidden", 2)])
    assert len(probe.tensors["hidden", -1]) == len(TEXTS)
    torch.testing.assert_close(probe.tensors["hidden", 2][0], probe.tensors["hidden", -1][0])
    total = Total([("hidden", 1), ("hidden", 1)])
    run_probes(model, TEXTS, [total])
    assert total.merges == 1


def test_logits_need_a_head() -> None:
    model = load_model(tiny_hf().base_model, tiny_tokenizer())
    with pytest.raises(ModelError, match="no LM head"):
        run_probes(model, TEXTS, [Keep([("logits", -1)])])
    assert len(kept(model, [("hidden", 1)]).tensors["hidden", 1]) == len(TEXTS)


def test_an_encoders_batches_are_padded_right() -> None:
    model = load_model(tiny_encoder(), tiny_tokenizer())
    batch = token_batches(model.encode(TEXTS), side="left")[0]
    with pytest.raises(InputError, match="pad its batches on the right"):
        forward(model, batch)


def test_bfloat16_patterns_sum_to_one_within_rounding() -> None:
    model = load_model(tiny_hf().to(torch.bfloat16), tiny_tokenizer())
    probe = kept(model, [("pattern", 1), ("hidden", 1)])
    for pattern in probe.tensors["pattern", 1].values():
        assert pattern.dtype == torch.bfloat16
        assert (pattern.float().sum(-1) - 1).abs().max() < 1e-2


def test_the_tensor_a_probe_sees_does_not_carry_gradients(tiny: Any) -> None:
    class NoGrad(Total):
        def update(self, site: str, layer: int, tensor: torch.Tensor, batch: Any) -> Any:
            assert not tensor.requires_grad
            return tensor.sum()

    with torch.enable_grad():
        run_probes(tiny(), TEXTS, [NoGrad([("hidden", 0)])])
