"""Clamps and head ablations against an oracle: plain hooks on one text at a time, without padding or cache."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as drawn_from
from hypothesis import settings
from hypothesis import strategies as st
from tiny_models import GATED, tiny_encoder, tiny_hf, tiny_tokenizer

from interp.batching import Batch, for_each_batch, token_batches
from interp.capture import Keep, run_probes
from interp.errors import InputError
from interp.intervene import MODES, POSITIONS, Clamp, HeadAblation, _active, clamp, intervene
from interp.model import load_model

PROMPTS = ["the dog", "a king is in the sea ?", "water music tea code"]
FUSED = {"phi3": ("mlp.gate_up_proj", "mlp.down_proj", "self_attn.o_proj")}
PATHS = {
    "gpt2": ("mlp.c_fc", "mlp.c_proj", "attn.c_proj"),
    "gpt_neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "attention.dense"),
}
LLAMA = ("mlp.up_proj", "mlp.down_proj", "self_attn.o_proj")


@pytest.fixture(scope="module")
def models() -> Callable[[str], Any]:
    """One model per family for this file; endless, so that continuations have one length."""
    built: dict[str, Any] = {}

    def get(family: str = "llama") -> Any:
        if family not in built:
            hf = tiny_hf(family)
            hf.generation_config.eos_token_id = None
            built[family] = load_model(hf, tiny_tokenizer())
        return built[family]

    return get


def hook_count(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())


@pytest.fixture(autouse=True)
def _nothing_left(models: Callable[[str], Any]) -> Iterator[None]:
    yield
    assert _active.get() == frozenset()
    for family in ("llama", "gpt2", "phi3", "gemma2", "gpt_neox", "mistral", "olmo2", "qwen2", "qwen3", "gemma3"):
        with contextlib.suppress(KeyError):
            model = models.__closure__[0].cell_contents[family]  # type: ignore[index]
            assert hook_count(model) == 0


def spot(model: Any, family: str, given: Any) -> tuple[Any, str, slice]:
    """Module, side and columns of an intervention, from paths written here."""
    up, down, out = PATHS.get(family) or FUSED.get(family) or LLAMA
    layer = model.arch._layers[given.layer]
    if isinstance(given, HeadAblation):
        return layer.get_submodule(out), "input", slice(given.head * 4, given.head * 4 + 4)
    at = given.neuron
    if given.site == "hidden":
        return layer.get_submodule(down), "input", slice(at, at + 1)
    if family in FUSED:
        at += 24 if given.site == "up" else 0
    elif given.site == "gate":
        up = "mlp.gate_proj"
    return layer.get_submodule(up), "output", slice(at, at + 1)


@contextlib.contextmanager
def oracle(model: Any, family: str, prompt: int, edits: Sequence[tuple[Any, Any]]) -> Iterator[None]:
    """Plain hooks on uncached passes of one unpadded text; edits are (intervention, its value for this text)."""
    handles = []
    for given, value in edits:
        module, side, columns = spot(model, family, given)
        mode = getattr(given, "mode", "set")

        def change(
            tensor: Any, given: Any = given, value: Any = value, columns: slice = columns, mode: str = mode
        ) -> Any:
            positions = torch.arange(tensor.shape[1])
            chosen = {
                "all": positions >= 0,
                "prompt": positions < prompt,
                "generated": positions >= prompt,
                "last": positions == prompt - 1,
            }[given.positions]
            old = tensor[..., columns]
            value = torch.as_tensor(0.0 if value is None else value)
            new = {"set": old * 0 + value, "add": old + value, "scale": old * value, "zero": old * 0}[mode]
            result = tensor.clone()
            result[..., columns] = torch.where(chosen[None, :, None], new, old)
            return result

        if side == "input":
            handles.append(
                module.register_forward_pre_hook(lambda m, args, change=change: (change(args[0]), *args[1:]))
            )
        else:
            handles.append(module.register_forward_hook(lambda m, args, output, change=change: change(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def oracle_tokens(
    model: Any, family: str, prompt: list[int], edits: Sequence[tuple[Any, Any]], new: int = 4
) -> list[int]:
    ids = list(prompt)
    with oracle(model, family, len(prompt), edits):
        for _ in range(new):
            logits = model.hf(torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def oracle_logits(
    model: Any, family: str, ids: list[int], edits: Sequence[tuple[Any, Any]], prompt: int | None = None
) -> Any:
    with oracle(model, family, len(ids) if prompt is None else prompt, edits):
        return model.hf(torch.tensor([ids]), use_cache=False).logits[0]


def sites(family: str) -> list[str]:
    return ["up", "gate", "hidden"] if family in GATED else ["up", "hidden"]


VALUES = {"set": 12.0, "add": -3.0, "scale": -2.5, "zero": 0.0}


@pytest.mark.parametrize("positions", POSITIONS)
def test_every_family_site_and_mode_in_forward_and_generate(models: Any, family: str, positions: str) -> None:
    model = models(family)
    encoded = model.encode(PROMPTS[:2])
    changed = 0
    modes = MODES if family in ("llama", "gpt2", "phi3") else ("set", "scale")
    plain = [oracle_tokens(model, family, ids, [], new=3) for ids in encoded]
    logits = oracle_logits(model, family, encoded[0], [])
    for site in sites(family):
        for mode in modes:
            given = Clamp(1, 3, VALUES[mode], site, mode, positions)
            probe = Keep([("logits", -1)])
            with intervene(model, given):
                run_probes(model, encoded, [probe], side="left" if mode == "set" else "right")
                tokens = model.generate_ids(encoded, max_new_tokens=3)
            for row, ids in enumerate(encoded):
                expected = oracle_logits(model, family, ids, [(given, given.value)])
                torch.testing.assert_close(probe.tensors["logits", -1][row], expected, rtol=1e-3, atol=1e-3)
                assert tokens[row] == oracle_tokens(model, family, ids, [(given, given.value)], new=3), (site, mode)
            changed += tokens != plain or not torch.allclose(probe.tensors["logits", -1][0], logits, atol=1e-2)
    assert changed, "no clamp changed anything: the test would see nothing"


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi3"])
def test_generate_without_cache_gives_the_same_tokens(models: Any, family: str, positions: str) -> None:
    model = models(family)
    batch = next(iter(token_batches(model.encode(PROMPTS), side="left")))
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.mask.long(),
        "do_sample": False,
        "max_new_tokens": 5,
    }
    for site in sites(family):
        given = Clamp(1, 3, 6.0, site, "set", positions)
        for _ in range(2):  # a second call begins a new prompt
            with intervene(model, given):
                cached = model.hf.generate(**inputs, use_cache=True)
                uncached = model.hf.generate(**inputs, use_cache=False)
                again = model.hf.generate(**inputs, use_cache=True)
            assert torch.equal(cached, uncached)
            assert torch.equal(cached, again)
        for at, row in enumerate(batch.rows):
            expected = oracle_tokens(model, family, model.encode(PROMPTS)[row], [(given, 6.0)], new=5)
            assert cached[at, -5:].tolist() == expected


@pytest.mark.parametrize("positions", ["prompt", "generated", "last"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_that_grow_by_one_token_are_prompts(models: Any, positions: str, use_cache: bool) -> None:
    """Several passes in one block: a longer text with the same beginning is not the shorter one's continuation."""
    model = models("llama")
    texts = [[5, 6, 7], [5, 6, 7, 8], [5, 6, 7, 8, 9]]
    given = Clamp(1, 3, 7.0, "hidden", "set", positions)
    with intervene(model, given):
        generated = [model.generate_ids([ids], max_new_tokens=3)[0] for ids in texts]
        probes = [Keep([("logits", -1)]) for _ in texts]
        for ids, probe in zip(texts, probes, strict=True):
            run_probes(model, [ids], [probe])
        with torch.no_grad():
            plain = [model.hf(torch.tensor([ids]), use_cache=use_cache).logits[0] for ids in texts]
    for ids, tokens, probe, logits in zip(texts, generated, probes, plain, strict=True):
        expected = oracle_logits(model, "llama", ids, [(given, 7.0)])
        assert tokens == oracle_tokens(model, "llama", ids, [(given, 7.0)], new=3)
        torch.testing.assert_close(probe.tensors["logits", -1][0], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_a_cache_filled_before_the_block(models: Any, positions: str) -> None:
    """What follows an old cache is the rest of the prompt; what follows that is generated. Twice in one block."""
    model = models("llama")
    given = Clamp(1, 3, 7.0, "hidden", "set", positions)
    results = []
    caches = [model.hf(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values for _ in range(2)]
    with intervene(model, given):
        for cache in caches:
            model.hf(torch.tensor([[8, 9]]), past_key_values=cache)
            results.append(model.hf(torch.tensor([[10]]), past_key_values=cache).logits[0, -1])
    torch.testing.assert_close(results[0], results[1])
    old = [model.hf(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values][0]
    hidden: list[Any] = []
    handle = model.arch.site("hidden", 1).attach(lambda tensor: hidden.append(tensor.clone()))
    with intervene(model, given):
        model.hf(torch.tensor([[8, 9]]), past_key_values=old)
        model.hf(torch.tensor([[10]]), past_key_values=old)
    handle.remove()
    is_set = [[True, True], [True]]
    is_set = {
        "all": is_set,
        "prompt": [[True, True], [False]],
        "generated": [[False, False], [True]],
        "last": [[False, True], [False]],
    }[positions]
    # That hook came first, so it saw what the model computed; the clamp shows in the next layer's input alone.
    assert [tensor.shape[1] for tensor in hidden] == [2, 1]
    old = model.hf(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    after: list[Any] = []
    with intervene(model, given):
        handle = model.arch.site("hidden", 1).attach(lambda tensor: after.append(tensor[0, :, 3].clone()))
        model.hf(torch.tensor([[8, 9]]), past_key_values=old)
        model.hf(torch.tensor([[10]]), past_key_values=old)
        handle.remove()
    assert [(column == 7).tolist() for column in after] == is_set


def test_a_users_own_loop_with_a_cache(models: Any) -> None:
    model = models("llama")
    given = Clamp(1, 3, 7.0, "hidden", "set", "generated")
    ids, tokens, past = torch.tensor([[5, 6, 7]]), [], None
    with torch.no_grad(), intervene(model, given):
        for _ in range(4):
            output = model.hf(ids, past_key_values=past, use_cache=True)
            past, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            tokens.append(int(ids))
    assert tokens == oracle_tokens(model, "llama", [5, 6, 7], [(given, 7.0)])


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_beam_search(models: Any, positions: str, use_cache: bool) -> None:
    """Beams of one text share its prompt, so a clamp for every text needs nothing else."""
    model = models("llama")
    given = Clamp(1, 3, 5.0, "hidden", "set", positions)
    options = {"num_beams": 2, "do_sample": False, "max_new_tokens": 4}
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    mask = torch.ones_like(ids)
    with intervene(model, given):
        together = model.hf.generate(ids, attention_mask=mask, use_cache=use_cache, **options)
        alone = [model.hf.generate(ids[row : row + 1], attention_mask=mask[:1], **options)[0] for row in (0, 1)]
    assert torch.equal(together, torch.stack(alone))
    with (
        pytest.raises(InputError, match="2 clamp values were given for 4 texts"),
        intervene(model, Clamp(1, 3, [1.0, 2.0])),
    ):
        model.hf.generate(ids, attention_mask=mask, **options)


def test_a_checkpoints_generation_config_does_not_make_greedy_something_else() -> None:
    hf = tiny_hf("llama")
    hf.generation_config.eos_token_id = None
    expected = load_model(hf, tiny_tokenizer()).generate_ids([[5, 6, 7], [8, 9]], max_new_tokens=8)
    for name, value in {
        "num_beams": 2,
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "return_dict_in_generate": True,
        "do_sample": True,
        "temperature": 5.0,
        "use_cache": False,
    }.items():
        setattr(hf.generation_config, name, value)
    model = load_model(hf, tiny_tokenizer())
    assert model.generate_ids([[5, 6, 7], [8, 9]], max_new_tokens=8) == expected


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("max_tokens", [4096, 8])
def test_one_value_per_text(models: Any, positions: str, max_tokens: int) -> None:
    """Sorted by length, halved, or in one batch: a text keeps its value."""
    model = models("llama")
    encoded = model.encode(PROMPTS)
    values = [6.0, -6.0, 2.0]
    given = Clamp(1, 3, values, "hidden", "set", positions)
    probe = Keep([("logits", -1)])
    with intervene(model, given):
        tokens = model.generate_ids(encoded, max_new_tokens=4, max_tokens=max_tokens)
        run_probes(model, PROMPTS, [probe], max_tokens=max_tokens)
    for row, ids in enumerate(encoded):
        assert tokens[row] == oracle_tokens(model, "llama", ids, [(given, values[row])])
        expected = oracle_logits(model, "llama", ids, [(given, values[row])])
        torch.testing.assert_close(probe.tensors["logits", -1][row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", POSITIONS)
def test_rows_and_memory_errors(models: Any, positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models("llama")
    encoded = model.encode([*PROMPTS, "old new keys", "the the the"])
    given = Clamp(1, 3, [6.0, -6.0, 2.0], "hidden", "set", positions, rows=[4, 0, 2])
    value = {4: 6.0, 0: -6.0, 2: 2.0}
    same = Clamp(2, 5, 3.0, "hidden", "add", positions, rows=[1])
    real, sizes = model.hf.generate, []

    def generate(**kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        result = real(**kwargs)
        if len(kwargs["input_ids"]) > 2:  # after the pass, when the scope already knows the prompt
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(model.hf, "generate", generate)
    with intervene(model, given, same):
        tokens = model.generate_ids(encoded, max_new_tokens=4)
    assert sizes[0] == 5
    assert max(sizes[1:]) <= 3
    for row, ids in enumerate(encoded):
        edits = [(given, value[row])] if row in value else []
        edits += [(same, 3.0)] if row == 1 else []
        assert tokens[row] == oracle_tokens(model, "llama", ids, edits)


def test_a_wrong_number_of_values_is_an_error_everywhere(models: Any) -> None:
    model = models("llama")
    for values in ([1.0, 2.0], [1.0, 2.0, 3.0, 4.0], []):
        for positions in POSITIONS:
            run = Clamp(1, 3, values, positions=positions)
            with (
                intervene(model, run),
                pytest.raises(InputError, match=f"{len(values)} clamp values were given for 3 texts"),
            ):
                model.generate(PROMPTS, max_new_tokens=3)
        with intervene(model, Clamp(1, 3, values)):
            with pytest.raises(InputError, match="for 3 texts"):
                run_probes(model, PROMPTS, [Keep([("logits", -1)])], max_tokens=8)
            with pytest.raises(InputError, match="for 3 texts"):
                model.hf(torch.ones(3, 4, dtype=torch.long))
    for row in (3, -1):
        with (
            intervene(model, Clamp(1, 3, 1.0, rows=[row])),
            pytest.raises(InputError, match=rf"row {row} is out of range.*3 texts"),
        ):
            model.generate(PROMPTS, max_new_tokens=1)
    with (
        pytest.raises(InputError, match="2 clamp values were given for 1 rows"),
        intervene(model, Clamp(1, 3, [1, 2], rows=[1])),
    ):
        pass


def test_several_clamps_act_in_order_and_blocks_nest(models: Any) -> None:
    model = models("llama")
    ids = [5, 6, 7, 8]
    first, second = Clamp(1, 3, 2.0), Clamp(1, 3, 10.0, mode="add")
    elsewhere = Clamp(0, 7, -4.0, "up", "add", "prompt")
    edits = [(first, 2.0), (second, 10.0), (elsewhere, -4.0)]

    def hidden() -> float:
        probe = Keep([("hidden", 1)])
        run_probes(model, [ids], [probe])
        return float(probe.tensors["hidden", 1][0][2, 3])

    with intervene(model, first, second, elsewhere):
        assert hidden() == 12
        assert model.generate_ids([ids], max_new_tokens=4)[0] == oracle_tokens(model, "llama", ids, edits)
    with intervene(model, second, first):
        assert hidden() == 2
    with intervene(model, first):
        with intervene(model, second):
            assert hidden() == 12
        assert hidden() == 2
        with pytest.raises(InputError), intervene(model, Clamp(99, 0)):
            pass
        assert hidden() == 2
    with intervene(model, second), intervene(model, first):
        assert hidden() == 2
    several = Clamp(1, [3, 5, -1], 9.0)
    probe = Keep([("hidden", 1)])
    with intervene(model, several):
        run_probes(model, [ids], [probe])
    columns = (probe.tensors["hidden", 1][0] == 9).all(0).nonzero()[:, 0]
    assert columns.tolist() == [3, 5, 23]
    with intervene(model):
        pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_hooks_are_removed_after_an_exception(models: Any, error: type[BaseException]) -> None:
    model = models("llama")
    ids = torch.tensor([[5, 6, 7]])
    before = model.hf(ids).logits
    with pytest.raises(error), clamp(model, layer=1, neuron=3, value=9, positions="last"):
        raise error("stop")

    def interrupt(module: Any, args: Any) -> None:
        raise error("inside the forward pass")

    handle = model.arch.down_proj(2).register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(error), clamp(model, layer=1, neuron=3, value=9, positions="last"):
            model.hf.generate(ids, max_new_tokens=2)
    finally:
        handle.remove()
    assert hook_count(model) == 0
    torch.testing.assert_close(model.hf(ids).logits, before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Clamp(3, 0), "layer 3 is out of range"),
        (Clamp(0, 24), "neuron 24 is out of range"),
        (Clamp(0, [1, -25]), "neuron -25 is out of range"),
        (Clamp(0, []), "no neuron"),
        (Clamp(0, 1, site="pattern"), "site 'pattern' cannot be clamped"),
        (Clamp(0, 1, mode="flip"), "mode='flip'"),
        (Clamp(0, 1, positions="first"), "positions='first'"),
        (Clamp(0, 1, float("nan")), "not a finite"),
        (Clamp(0, 1, [1.0, float("inf")]), "not a finite"),
        (Clamp(0, 1, 1e39), "not a finite torch.float32"),
        (HeadAblation(0, 4), "head 4 is out of range"),
        (HeadAblation(0, 1, [1.0, 2.0]), "has 2 numbers; expected d_head=4"),
        (HeadAblation(0, 1, [float("nan")] * 4), "not a finite"),
    ],
    ids=str,
)
def test_wrong_interventions_are_refused_on_entering(models: Any, wrong: Any, message: str) -> None:
    model = models("llama")
    good = Clamp(0, 0, 1.0, positions="last")
    with pytest.raises(InputError, match=message), intervene(model, good, wrong):
        pytest.fail("the block was entered")
    assert hook_count(model) == 0


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_gate_of_a_family_without_one(models: Any, family: str) -> None:
    with pytest.raises(InputError, match="not gated"), clamp(models(family), layer=0, neuron=0, site="gate"):
        pass


def test_half_precision_limits_the_value() -> None:
    model = load_model(tiny_hf("llama").to(torch.float16), tiny_tokenizer(), check=False)
    with pytest.raises(InputError, match=r"not a finite torch.float16"), clamp(model, layer=0, neuron=0, value=1e5):
        pass


def test_numbers_from_numpy_pandas_and_torch(models: Any) -> None:
    model = models("llama")
    ids = [5, 6, 7]
    expected = oracle_logits(model, "llama", ids, [(Clamp(1, 3), 2.5)])
    for given in (
        Clamp(np.int64(1), np.int64(3), np.float32(2.5)),  # type: ignore[arg-type]
        Clamp(1, np.array([3]), np.array([2.5])),  # type: ignore[arg-type]
        Clamp(1, torch.tensor(3), torch.tensor(2.5)),  # type: ignore[arg-type]
        Clamp(1, (3,), torch.tensor([2.5]), rows=np.array([0])),  # type: ignore[arg-type]
    ):
        with torch.no_grad(), intervene(model, given):
            torch.testing.assert_close(model.hf(torch.tensor([ids])).logits[0], expected, rtol=1e-4, atol=1e-4)


def test_threads_have_their_own_clamps(models: Any) -> None:
    model = models("llama")
    ids = [5, 6, 7]
    values = {"main": 6.0, "other": -6.0, "none": None}
    expected = {
        name: oracle_tokens(
            model, "llama", ids, [] if value is None else [(Clamp(1, 3, positions="generated"), value)], new=8
        )
        for name, value in values.items()
    }
    assert len({tuple(tokens) for tokens in expected.values()}) == 3
    got: dict[str, list[list[int]]] = {name: [] for name in values}
    barrier = threading.Barrier(3, timeout=60)

    def work(name: str) -> None:
        value = values[name]
        block = (
            contextlib.nullcontext()
            if value is None
            else clamp(model, layer=1, neuron=3, value=value, positions="generated")
        )
        with block:
            barrier.wait()
            for _ in range(4):
                got[name].append(model.generate_ids([ids], max_new_tokens=8)[0])
            barrier.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("other", "none")]
    for thread in threads:
        thread.start()
    work("main")
    for thread in threads:
        thread.join()
    for name in values:
        assert got[name] == [expected[name]] * 4, name


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_gradients_flow_through_a_clamp(models: Any, family: str) -> None:
    model = models(family)
    for site in sites(family):
        for mode in MODES:
            given = Clamp(1, 3, VALUES[mode], site, mode, "last")
            gradients = []
            for block in (intervene(model, given), oracle(model, family, 3, [(given, given.value)])):
                embedded = model.arch.embedding()(torch.tensor([[5, 6, 7]])).detach().requires_grad_()
                with block:
                    model.hf(inputs_embeds=embedded).logits[0, -1, 9].backward()
                gradients.append(embedded.grad)
            torch.testing.assert_close(gradients[0], gradients[1])
    model.hf.zero_grad()


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2", "gpt_neox"])
def test_head_ablation(models: Any, family: str) -> None:
    model = models(family)
    encoded = model.encode(PROMPTS)
    z = Keep([("z", 1)])
    run_probes(model, PROMPTS, [z])
    mean = torch.cat(list(z.tensors["z", 1].values()))[:, 8:12].mean(0)
    for value in (None, mean.tolist(), mean):
        for positions in POSITIONS:
            given = HeadAblation(1, 2, value, positions)  # type: ignore[arg-type]
            probe = Keep([("attn_out", 1), ("logits", -1)])
            with intervene(model, given):
                run_probes(model, PROMPTS, [probe], side="left")
                tokens = model.generate_ids(encoded, max_new_tokens=3)
            for row, ids in enumerate(encoded):
                edits = [(given, value)]
                expected = oracle_logits(model, family, ids, edits)
                torch.testing.assert_close(probe.tensors["logits", -1][row], expected, rtol=1e-3, atol=1e-3)
                assert tokens[row] == oracle_tokens(model, family, ids, edits, new=3)
    # Zeroed: what o_proj makes of the other heads' columns.
    with intervene(model, HeadAblation(1, -2)):
        run_probes(model, PROMPTS, [probe])
    for row in range(len(PROMPTS)):
        kept = z.tensors["z", 1][row].clone()
        kept[:, 8:12] = 0
        with torch.no_grad():
            torch.testing.assert_close(
                probe.tensors["attn_out", 1][row], model.arch.o_proj(1)(kept), rtol=1e-4, atol=1e-5
            )


def test_head_ablation_of_some_rows(models: Any) -> None:
    model = models("llama")
    probe, plain = Keep([("logits", -1)]), Keep([("logits", -1)])
    run_probes(model, PROMPTS, [plain])
    with intervene(model, HeadAblation(1, 2, [1.0, 2.0, 3.0, 4.0], rows=[2])):
        run_probes(model, PROMPTS, [probe])
    for row, ids in enumerate(model.encode(PROMPTS)):
        edits = [(HeadAblation(1, 2), [1.0, 2.0, 3.0, 4.0])] if row == 2 else []
        expected = oracle_logits(model, "llama", ids, edits)
        torch.testing.assert_close(probe.tensors["logits", -1][row], expected, rtol=1e-4, atol=1e-4)


def test_encoder() -> None:
    model = load_model(tiny_encoder(), tiny_tokenizer())
    probe = Keep([("hidden", 1), ("z", 1)])
    with intervene(model, Clamp(1, 3, 9.0, positions="last"), HeadAblation(1, 0)):
        run_probes(model, PROMPTS, [probe])
    for row, ids in enumerate(model.encode(PROMPTS)):
        assert (probe.tensors["hidden", 1][row][:, 3] == 9).tolist() == [False] * (len(ids) - 1) + [True]
        assert (probe.tensors["z", 1][row][:, :4] == 0).all()


CLAMPS = st.builds(
    Clamp,
    layer=st.integers(0, 2),
    neuron=st.integers(0, 23),
    value=st.floats(-5, 5, width=32),
    site=st.sampled_from(["up", "gate", "hidden"]),
    mode=st.sampled_from(MODES),
    positions=st.sampled_from(POSITIONS),
)


@drawn_from(
    st.sampled_from(["llama", "phi3", "gemma2", "gpt2"]),
    st.lists(st.lists(st.integers(4, 63), min_size=1, max_size=7), min_size=1, max_size=4),
    st.lists(CLAMPS, min_size=1, max_size=3),
    st.integers(4, 60),
    st.sampled_from(["left", "right"]),
    st.data(),
)
@settings(deadline=None, max_examples=60)
def test_any_clamps_equal_the_oracle(
    models: Any, family: str, texts: list[list[int]], clamps: list[Clamp], max_tokens: int, side: str, data: Any
) -> None:
    model = models(family)
    given_clamps, values = [], []
    for one in clamps:
        site = "up" if family == "gpt2" and one.site == "gate" else one.site
        per_row = data.draw(st.booleans())
        value: Any = data.draw(st.lists(st.floats(-5, 5, width=32), min_size=len(texts), max_size=len(texts)))
        value = value if per_row else one.value
        given_clamps.append(Clamp(one.layer, one.neuron, value, site, one.mode, one.positions))
        values.append([value[row] if per_row else value for row in range(len(texts))])
    probe = Keep([("resid_post", 2)])

    def passes(batch: Batch) -> None:
        run_probes(model, texts, [probe], max_tokens=max_tokens, side=side)

    with intervene(model, *given_clamps):
        for_each_batch(token_batches([[1]]), passes)  # also inside another run
    for row, ids in enumerate(texts):
        edits = [(one, value[row]) for one, value in zip(given_clamps, values, strict=True)]
        outputs: list[Any] = []
        with torch.no_grad(), oracle(model, family, len(ids), edits):
            handle = model.arch.layer(2).register_forward_hook(
                lambda module, args, output, outputs=outputs: outputs.append(
                    output[0] if isinstance(output, tuple) else output
                )
            )
            model.hf(torch.tensor([ids]), use_cache=False)
            handle.remove()
        scale = max(1.0, float(outputs[0].abs().max()))
        torch.testing.assert_close(probe.tensors["resid_post", 2][row], outputs[0][0], rtol=1e-4, atol=1e-4 * scale)
