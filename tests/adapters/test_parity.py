"""The engine, TransformerLens and nnsight on the same weights: equal activations, equal logits, equal clamped text."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import GATED, tiny_hf, tiny_tokenizer

from interp.adapters import nnsight as nnsight_adapter
from interp.adapters import transformer_lens as lens_adapter
from interp.capture import Keep, run_probes
from interp.errors import InputError, ModelError
from interp.intervene import Clamp, intervene
from interp.model import Model, load_model

PROMPT = [5, 9, 14, 22, 31, 40, 17, 8, 50]
ATTENTION_SITES = ("resid_pre", "z", "attn_out", "pattern")
MLP_SITES = ("up", "hidden", "mlp_out", "resid_post")


@pytest.fixture
def model(family: str, tiny: Any) -> Model:
    return tiny(family)


def engine_tensors(model: Model, ids: list[int], sites: list[tuple[str, int]]) -> dict[tuple[str, int], torch.Tensor]:
    probe = Keep(sites)
    with model.attention_implementation("eager"):  # both tools run eager attention
        run_probes(model, [ids], [probe])
    return {site: texts[0] for site, texts in probe.tensors.items()}


def lens_tensors(
    bridge: Any, ids: list[int], sites: list[tuple[str, int]], gated: bool
) -> dict[tuple[str, int], torch.Tensor]:
    names = {site: lens_adapter.hook_name(*site, gated=gated) for site in sites}
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(
            torch.tensor([ids]), names_filter=list(names.values()), return_cache_object=False
        )
    tensors = {site: cache[name][0] for site, name in names.items()}
    if getattr(bridge.original_model.config, "final_logit_softcapping", None):
        tensors["logits", -1] = logits[0]  # the hook is before the soft cap
    return {(site, layer): t.flatten(1) if site == "z" else t for (site, layer), t in tensors.items()}


def engine_text(model: Model, ids: list[int], clamp: Clamp, new: int) -> list[int]:
    with intervene(model, clamp):
        return model.generate_ids([ids], max_new_tokens=new)[0]


def lens_text(bridge: Any, ids: list[int], clamp: Clamp, gated: bool, new: int) -> list[int]:
    with bridge.hooks(fwd_hooks=lens_adapter.clamp_hooks(clamp, gated=gated)), torch.no_grad():
        tokens = bridge.generate(
            torch.tensor([ids]), max_new_tokens=new, do_sample=False, return_type="tokens", verbose=False
        )
    return tokens[0, len(ids) :].tolist()


def sites_of(family: str, layer: int) -> list[tuple[str, int]]:
    gate = ("gate",) if family in GATED else ()
    return [*((site, layer) for site in (*ATTENTION_SITES, *gate, *MLP_SITES)), ("logits", -1)]


def assert_equal(ours: dict[Any, torch.Tensor], theirs: dict[Any, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for site, tensor in ours.items():
        torch.testing.assert_close(
            theirs[site], tensor, atol=1e-4, rtol=1e-4, msg=lambda text, site=site: f"{site}: {text}"
        )


def test_activations_and_logits(model: Model, family: str) -> None:
    sites = sites_of(family, 1)
    ours = engine_tensors(model, PROMPT, sites)
    bridge, nn_model = lens_adapter.to_transformer_lens(model), nnsight_adapter.to_nnsight(model)
    assert_equal(ours, lens_tensors(bridge, PROMPT, sites, family in GATED))
    assert_equal(ours, nnsight_adapter.capture(nn_model, PROMPT, sites))
    assert ours["logits", -1].std() > 0.01  # else equality would say little


def test_clamped_text(model: Model, family: str) -> None:
    gated = family in GATED
    bridge, nn_model = lens_adapter.to_transformer_lens(model), nnsight_adapter.to_nnsight(model)
    plain = model.generate_ids([PROMPT], max_new_tokens=8)[0]
    changed = 0
    with model.attention_implementation("eager"):
        for site in ("up", "gate", "hidden") if gated else ("up", "hidden"):
            clamp = Clamp(layer=1, neuron=[3, 20], value=30.0, site=site)
            ours = engine_text(model, PROMPT, clamp, 8)
            assert lens_text(bridge, PROMPT, clamp, gated, 8) == ours
            assert nnsight_adapter.generate_clamped(nn_model, PROMPT, clamp, max_new_tokens=8) == ours
            changed += ours != plain
    assert changed  # else a clamp that does nothing would pass


@pytest.mark.parametrize("mode", ["set", "add", "scale", "zero"])
def test_clamp_modes(tiny: Any, mode: str) -> None:
    model = tiny("qwen2")
    bridge, nn_model = lens_adapter.to_transformer_lens(model), nnsight_adapter.to_nnsight(model)
    clamp = Clamp(layer=0, neuron=list(range(24)), value=-8.0, site="up", mode=mode)
    ours = engine_text(model, PROMPT, clamp, 10)
    assert lens_text(bridge, PROMPT, clamp, True, 10) == ours
    assert nnsight_adapter.generate_clamped(nn_model, PROMPT, clamp, max_new_tokens=10) == ours
    assert ours != model.generate_ids([PROMPT], max_new_tokens=10)[0]


@pytest.mark.parametrize("positions", ["prompt", "generated", "last"])
def test_clamp_positions_in_nnsight(tiny: Any, positions: str) -> None:
    model = tiny("llama")
    nn_model = nnsight_adapter.to_nnsight(model)
    clamp = Clamp(layer=0, neuron=list(range(12)), value=9.0, site="hidden", positions=positions)
    ours = engine_text(model, PROMPT, clamp, 10)
    assert nnsight_adapter.generate_clamped(nn_model, PROMPT, clamp, max_new_tokens=10) == ours
    everywhere = Clamp(layer=0, neuron=list(range(12)), value=9.0, site="hidden")
    assert ours != nnsight_adapter.generate_clamped(nn_model, PROMPT, everywhere, max_new_tokens=10)


def test_one_value_per_text_in_transformer_lens(tiny: Any) -> None:
    model = tiny("llama")
    bridge = lens_adapter.to_transformer_lens(model)
    [(name, edit)] = lens_adapter.clamp_hooks(Clamp(layer=1, neuron=4, value=[-3.0, 0.5], mode="add"))
    ids = torch.tensor([PROMPT, PROMPT])
    with torch.no_grad():
        before = bridge.run_with_cache(ids, names_filter=name, return_cache_object=False)[1][name]
        after = edit(before.clone())
    difference = after - before
    torch.testing.assert_close(difference[:, :, 4], torch.tensor([[-3.0], [0.5]]).expand(2, len(PROMPT)))
    difference[:, :, 4] = 0
    assert not difference.any()
    one = lens_adapter.clamp_hooks(Clamp(layer=1, neuron=4, value=[7.0], rows=[1]))[0][1](before.clone())
    assert torch.equal(one[0], before[0])
    assert (one[1, :, 4] == 7).all()
    with pytest.raises(InputError, match="2 clamp values"):
        edit(before[:1])


def test_round_trip_through_a_bridge(model: Model, family: str) -> None:
    bridge = lens_adapter.to_transformer_lens(model)
    again = load_model(bridge)
    ids = torch.tensor([PROMPT])
    with torch.no_grad(), model.attention_implementation("eager"):
        torch.testing.assert_close(again.hf(ids).logits, model.hf(ids).logits)
        torch.testing.assert_close(again.hf(ids).logits, bridge(ids), atol=1e-5, rtol=1e-5)
    assert list(again.hf.state_dict()) == list(model.hf.state_dict())
    assert again.fingerprint == model.fingerprint
    assert type(again.hf) is type(model.hf)
    # The engine works on it: captures and clamps as on the original.
    assert_equal(engine_tensors(model, PROMPT, sites_of(family, 2)), engine_tensors(again, PROMPT, sites_of(family, 2)))
    clamp = Clamp(layer=1, neuron=3, value=30.0)
    with model.attention_implementation("eager"):
        assert engine_text(again, PROMPT, clamp, 6) == engine_text(model, PROMPT, clamp, 6)
    # The same memory, and the bridge still runs.
    weights = {tensor.data_ptr() for tensor in bridge.original_model.parameters()}
    assert all(tensor.data_ptr() in weights for tensor in again.hf.parameters())
    with torch.no_grad():
        bridge(ids)


def test_round_trip_through_nnsight(tiny: Any) -> None:
    model = tiny("llama")
    before = snapshot(model)
    nn_model = nnsight_adapter.to_nnsight(model)
    again = load_model(nn_model)
    assert again.hf is model.hf
    assert_untouched(model, before)
    nnsight_adapter.capture(nn_model, PROMPT, [("pattern", 0), ("hidden", 1)])
    assert_untouched(model, before)
    assert again.fingerprint == model.fingerprint
    # A module that nnsight has wrapped can still be copied into a bridge.
    bridge = lens_adapter.to_transformer_lens(again)
    with torch.no_grad(), model.attention_implementation("eager"):
        torch.testing.assert_close(bridge(torch.tensor([PROMPT])), model.hf(torch.tensor([PROMPT])).logits)
    assert_untouched(model, before)


def snapshot(model: Model) -> dict[str, Any]:
    with torch.no_grad():
        logits = model.hf(torch.tensor([PROMPT])).logits
    state = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    settings = (model.hf.config.to_dict(), model.hf.generation_config.to_dict(), model.attention)
    padding = (model.tokenizer.padding_side, model.tokenizer.pad_token, dict(model.tokenizer.init_kwargs))
    return {"logits": logits, "state": state, "settings": settings, "tokenizer": copy.deepcopy(padding)}


def assert_untouched(model: Model, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert torch.equal(after["logits"], before["logits"])
    assert list(after["state"]) == list(before["state"])
    assert all(torch.equal(after["state"][name], tensor) for name, tensor in before["state"].items())
    assert after["settings"] == before["settings"]
    assert after["tokenizer"] == before["tokenizer"]


def test_a_copy_leaves_the_engine_untouched(model: Model) -> None:
    before = snapshot(model)
    bridge = lens_adapter.to_transformer_lens(model)
    with torch.no_grad():
        for weight in bridge.original_model.parameters():
            weight.zero_()
    assert_untouched(model, before)


def test_without_a_copy_the_module_is_rewired(tiny: Any) -> None:
    model = tiny("llama")
    keys = list(model.hf.state_dict())
    with torch.no_grad(), model.attention_implementation("eager"):
        logits = model.hf(torch.tensor([PROMPT])).logits
    bridge = lens_adapter.to_transformer_lens(model, copy=False)
    assert bridge.original_model is model.hf
    assert list(model.hf.state_dict()) != keys
    again = load_model(bridge)
    with torch.no_grad():
        torch.testing.assert_close(again.hf(torch.tensor([PROMPT])).logits, logits)


def test_text_becomes_the_same_tokens(tiny: Any) -> None:
    model = tiny("llama")
    text = "dog is a dog animal"
    ids = model.encode(text)[0]
    assert lens_adapter.to_transformer_lens(model).to_tokens(text)[0].tolist() == ids
    found = nnsight_adapter.capture(nnsight_adapter.to_nnsight(model), text, [("logits", -1)])
    assert_equal(engine_tensors(model, ids, [("logits", -1)]), found)


def test_without_a_tokenizer() -> None:
    model = load_model(tiny_hf("gpt2"))
    bridge = lens_adapter.to_transformer_lens(model)
    with torch.no_grad(), model.attention_implementation("eager"):
        torch.testing.assert_close(bridge(torch.tensor([PROMPT])), model.hf(torch.tensor([PROMPT])).logits)
    assert load_model(bridge).tokenizer is None
    with pytest.raises(ModelError, match="no tokenizer"):
        nnsight_adapter.to_nnsight(model)


def test_bridges_that_are_refused(tiny: Any) -> None:
    processed = lens_adapter.to_transformer_lens(tiny("gpt2"))
    processed.enable_compatibility_mode()
    with pytest.raises(ModelError, match="were processed"):
        load_model(processed)
    # GPT-NeoX: the bridge holds copies of the fused query, key and value, so an edit never reaches the module.
    edited = lens_adapter.to_transformer_lens(tiny("gpt_neox"))
    with torch.no_grad():
        edited.blocks[0].attn.q.weight.mul_(5)
    with pytest.raises(ModelError, match="disagree"):
        load_model(edited)
    hooked = lens_adapter.to_transformer_lens(tiny("llama"))
    hooked.add_hook("blocks.0.hook_out", lambda tensor, hook: tensor * 0)
    with pytest.raises(ModelError, match="reset_hooks"):
        load_model(hooked)
    unprocessed = lens_adapter.to_transformer_lens(tiny("gpt2"))
    unprocessed.enable_compatibility_mode(no_processing=True)
    assert load_model(unprocessed).arch.n_layers == 3


def test_nnsight_models_that_are_refused(tiny: Any) -> None:
    nn_model = nnsight_adapter.to_nnsight(tiny("llama"))
    with nn_model.edit(inplace=True):
        nn_model.model.layers[0].output[:] = 0
    with pytest.raises(ModelError, match="clear_edits"):
        load_model(nn_model)
    nn_model.clear_edits()
    assert load_model(nn_model).arch.n_layers == 3


@pytest.mark.parametrize(
    ("clamp", "message"),
    [
        (Clamp(0, 1, site="z"), "cannot be clamped"),
        (Clamp(0, 1, mode="twice"), "mode='twice'"),
        (Clamp(0, 1, positions="somewhere"), "positions='somewhere'"),
        (Clamp(0, 1, float("nan")), "finite"),
        (Clamp(0, []), "one"),
    ],
)
def test_clamps_that_are_refused(tiny: Any, clamp: Clamp, message: str) -> None:
    with pytest.raises(InputError, match=message):
        lens_adapter.clamp_hooks(clamp)
    with pytest.raises(InputError, match=message):
        nnsight_adapter.generate_clamped(nnsight_adapter.to_nnsight(tiny("llama")), PROMPT, clamp)


def test_arguments_that_are_refused(tiny: Any) -> None:
    with pytest.raises(InputError, match="no gate"):
        lens_adapter.hook_name("gate", 0, gated=False)
    with pytest.raises(InputError, match="unknown site"):
        lens_adapter.hook_name("nowhere", 0)
    with pytest.raises(InputError, match="negative"):
        lens_adapter.hook_name("up", -1)
    with pytest.raises(InputError, match="counted from 0"):
        lens_adapter.clamp_hooks(Clamp(0, -1))
    nn_model = nnsight_adapter.to_nnsight(tiny("gpt2"))
    with pytest.raises(InputError, match="no gate"):
        nnsight_adapter.capture(nn_model, PROMPT, [("gate", 0)])
    with pytest.raises(InputError, match="at least one"):
        nnsight_adapter.capture(nn_model, PROMPT, [])
    with pytest.raises(InputError, match="empty"):
        nnsight_adapter.capture(nn_model, [], [("up", 0)])


@pytest.mark.slow
def test_embedded_model(embedded: Model) -> None:
    ids = embedded.encode("The capital of France is Paris, and the river that runs through it")[0]
    sites = [(site, layer) for layer in (0, 14, 29) for site in ("pattern", "gate", "up", "hidden")] + [("logits", -1)]
    ours = engine_tensors(embedded, ids, sites)
    bridge, nn_model = lens_adapter.to_transformer_lens(embedded), nnsight_adapter.to_nnsight(embedded)
    # Random tiny models have activations near 1; here single neurons reach hundreds, so the tolerance is relative too.
    assert_equal(ours, lens_tensors(bridge, ids, sites, True))
    assert_equal(ours, nnsight_adapter.capture(nn_model, ids, sites))
    with embedded.attention_implementation("eager"):
        plain = embedded.generate_ids([ids], max_new_tokens=12)[0]
        clamp = Clamp(layer=27, neuron=1510, value=-10.0)
        text = engine_text(embedded, ids, clamp, 12)
        assert lens_text(bridge, ids, clamp, True, 12) == text
        assert nnsight_adapter.generate_clamped(nn_model, ids, clamp, max_new_tokens=12) == text
        loud = Clamp(layer=20, neuron=list(range(300)), value=4.0, site="up")
        text = engine_text(embedded, ids, loud, 12)
        assert text != plain
        assert lens_text(bridge, ids, loud, True, 12) == text
        assert nnsight_adapter.generate_clamped(nn_model, ids, loud, max_new_tokens=12) == text
    again = load_model(bridge)
    assert again.fingerprint == embedded.fingerprint
    assert again.encode("Paris") == embedded.encode("Paris")


def test_tiny_tokenizer_is_not_shared(tiny: Any) -> None:
    model = load_model(tiny_hf("llama"), tiny_tokenizer())
    assert lens_adapter.to_transformer_lens(model).tokenizer is not model.tokenizer
    assert nnsight_adapter.to_nnsight(model).tokenizer is not model.tokenizer
