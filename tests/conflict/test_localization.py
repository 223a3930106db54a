"""Drift against each model's own eager attention, prompt by prompt; interruptions, batches, dtypes; what cannot be measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from chat_models import chat_tiny, chat_tokenizer
from tiny_models import tiny_encoder, tiny_hf

from interp.conflict import last_rows as last_rows_module
from interp.conflict import localization
from interp.conflict.dialogues import SPANS, Encoded, encode_dialogue
from interp.conflict.drift import EPSILON, drift
from interp.conflict.focal import head_scores
from interp.conflict.last_rows import last_row, last_rows
from interp.conflict.localization import control_of, localize
from interp.conflict.pairs import Pair, encode_pair, make_pairs
from interp.errors import InputError, MemoryBudgetError, ModelError, ResultError
from interp.model import load_model
from interp.recorded_attention import attention_with_lse
from interp.results import load_result

# Long enough to see a rule from the last token, short enough to hide the first.
WINDOWS = {"mistral": 60, "gemma2": 60, "gemma3": 60}
PAIRS = make_pairs(n=5, families=["case", "list"])
# Below 1e-5 in the rows; a divergence divides by them.
NEAR = {"mag": 1e-4, "dir": 1e-4, "dist": 5e-3}


@torch.no_grad()
def eager_rows(model: Any, ids: Any) -> np.ndarray:
    """(layer, head, key): the last query's row of transformers' own eager attention, one prompt, no padding."""
    with model.attention_implementation("eager"):
        output = model.hf(torch.tensor([list(ids)], device=model.device), output_attentions=True, use_cache=False)
    return torch.stack([pattern[0, :, -1].float().cpu() for pattern in output.attentions]).numpy()


def by_span(rows: np.ndarray, prompt: Encoded) -> np.ndarray:
    return np.stack([rows[..., list(prompt.spans[span])].sum(-1) for span in SPANS], -1)


CONTRASTS = ("conflict", "paraphrase")


def prompts_of(model: Any, pairs: Any = PAIRS, names: Any = ("agree", *CONTRASTS)) -> list[Encoded]:
    return [encode_pair(model, pair, names)[name] for pair in pairs for name in names]


def test_rows_and_masses_are_the_models_own(family: str) -> None:
    model = chat_tiny(family, **({"sliding_window": WINDOWS[family]} if family in WINDOWS else {}))
    prompts = prompts_of(model, PAIRS[:2])
    n_keys = min(len(prompt.ids) for prompt in prompts)
    found = last_rows(model, prompts, n_keys=n_keys, max_tokens=700)
    assert found.masses.shape == (6, 3, 4, 5)
    for at, prompt in enumerate(prompts):
        rows = eager_rows(model, prompt.ids)
        assert np.abs(found.rows[at] - rows[..., :n_keys]).max() < 2e-5
        assert np.abs(found.masses[at] - by_span(rows, prompt)).max() < 2e-5
    assert found.masses.sum(-1) == pytest.approx(1, abs=1e-4)
    assert found.masses.std(0).max() > 1e-3


def test_sliding_window_hides_what_is_behind_it() -> None:
    model = chat_tiny("mistral", sliding_window=40)
    prompts = prompts_of(model, PAIRS[:1])
    found = last_rows(model, prompts, n_keys=60)
    for at, prompt in enumerate(prompts):
        seen = len(prompt.ids) - 40
        assert seen < 60 or (found.rows[at] == 0).all()
        assert (found.masses[at, ..., SPANS.index("sink")] == 0).all()
        rows = eager_rows(model, prompt.ids)
        assert np.abs(found.masses[at] - by_span(rows, prompt)).max() < 2e-5


@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 1.5), (5, 2.0)])
def test_one_layer_written_out(sinks: bool, window: Any, softcap: Any) -> None:
    """Head by head in float64; with attention-sink logits a row sums to less than 1."""
    random = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 9, 8, generator=random)
    key, value = (torch.randn(2, 2, 9, 8, generator=random) for _ in range(2))
    logits = torch.linspace(-1, 2, 6) if sinks else None
    _, lse = attention_with_lse(query, key, value, 0.4, window=window, softcap=softcap, sink_logits=logits)
    seen: Any = SimpleNamespace(query=query, key=key, lse=lse, scaling=0.4, window=window, softcap=softcap)
    last = torch.tensor([8, 5])
    found = last_row(seen, last)
    for text in range(2):
        for head in range(6):
            at = int(last[text])
            first = 0 if window is None else max(0, at - window + 1)
            scores = key[text, head // 3, first : at + 1].double() @ query[text, head, at].double() * 0.4
            scores = scores if softcap is None else softcap * (scores / softcap).tanh()
            total = scores.exp().sum() + (logits[head].double().exp() if logits is not None else 0)
            expected = torch.zeros(9, dtype=torch.float64)
            expected[first : at + 1] = scores.exp() / total
            assert (found[text, head] - expected).abs().max() < 1e-6
    assert bool((found.sum(-1) < 0.99).any()) == sinks


@pytest.mark.parametrize("consistent", ["agree", "system"])
@pytest.mark.parametrize("align", ["spans", "truncate"])
@pytest.mark.parametrize("control", ["paraphrase", "other"])
def test_table_written_as_loops(align: str, consistent: str, control: str) -> None:
    model = chat_tiny("llama")
    result = localize(model, PAIRS, align=align, consistent=consistent, control=control, progress=False)
    assert result.kind == "conflict.localize"
    assert len(result.frame) == 5 * 2 * 3 * 4
    contrasts = ("conflict", control)
    names = (consistent, *contrasts)
    assert control_of(result) == control
    encoded = {(pair.id, name): encode_pair(model, pair, names)[name] for pair in PAIRS for name in names}
    shortest = min(len(prompt.ids) for prompt in encoded.values())
    eager = {key: eager_rows(model, prompt.ids) for key, prompt in encoded.items()}
    rows = result.frame.set_index(["pair", "contrast", "layer", "head"])
    for pair in PAIRS:
        for contrast in contrasts:
            sides = [(eager[pair.id, name], encoded[pair.id, name]) for name in (consistent, contrast)]
            spans = [by_span(*side) for side in sides]
            n, c = spans if align == "spans" else [row[..., :shortest] for row, _ in sides]
            for name, values in drift(n, c, EPSILON[align]).items():
                found = rows.loc[(pair.id, contrast), f"delta_{name}"].unstack().to_numpy()
                assert np.abs(found - values).max() < NEAR[name]
            for side, expected in (("consistent", spans[0]), ("compared", spans[1])):
                for at, span in enumerate(SPANS):
                    found = rows.loc[(pair.id, contrast), f"{side}_{span}"].unstack().to_numpy()
                    assert np.abs(found - expected[..., at]).max() < 2e-5
            norms = rows.loc[(pair.id, contrast), "compared_norm"].unstack().to_numpy()
            assert np.abs(norms - np.linalg.norm(c, axis=-1)).max() < 2e-5
    row = result.frame.iloc[0]
    assert (row["pair"], row["task"], row["family"]) == (PAIRS[0].id, PAIRS[0].task.id, "case")
    assert (row["system_rule"], row["user_rule"]) == ("capitals", "small")
    assert result.provenance.parameters["n_keys"] == (shortest if align == "truncate" else None)
    if consistent == "system":
        assert (result.frame["consistent_user_rule"] == 0).all()
        assert (result.frame["compared_user_rule"] > 0).all()


def test_published_score_of_a_model_written_as_loops() -> None:
    """Rows cut to the shortest of all prompts, one cosine over all pairs: S from the model's own eager patterns."""
    model = chat_tiny("qwen2")
    names = ("system", "conflict")
    prompts = prompts_of(model, PAIRS, names)
    rows = [eager_rows(model, prompt.ids) for prompt in prompts]
    keys = min(row.shape[-1] for row in rows)
    n, c = (np.stack([row[..., :keys] for row in rows[first::2]]).astype(np.float64) for first in (0, 1))
    raw = []
    for layer in range(3):
        for head in range(4):
            a, b = n[:, layer, head], c[:, layer, head]
            p, q = a / a.sum(-1, keepdims=True), b / b.sum(-1, keepdims=True)
            logs = np.log(p + 1e-12) - np.log(q + 1e-12)
            cosine = (a.ravel() @ b.ravel()) / (np.linalg.norm(a) * np.linalg.norm(b))
            raw.append([np.abs(a - b).sum(-1).mean(), 1 - cosine, ((p * logs).sum(-1) - (q * logs).sum(-1)).mean()])
    scaled = (np.array(raw) - np.min(raw, 0)) / np.ptp(raw, 0)
    found = head_scores(localize(model, PAIRS, align="truncate", consistent="system", progress=False))
    assert found["score_pooled"].to_numpy() == pytest.approx(scaled @ [0.4, 0.3, 0.3], abs=2e-3)
    assert found["score_pooled"].max() > 0.5


def test_batches_and_order_do_not_matter() -> None:
    model = chat_tiny("gemma3", sliding_window=60)
    one = localize(model, PAIRS, max_tokens=1, progress=False).frame
    keys = ["pair", "contrast", "layer", "head"]
    for other in (
        localize(model, PAIRS, max_tokens=100_000, progress=False).frame,
        localize(model, PAIRS[::-1], max_tokens=900, progress=False).frame,
    ):
        first, second = (frame.astype({"pair": str, "contrast": str}).sort_values(keys) for frame in (one, other))
        assert (first[keys].to_numpy() == second[keys].to_numpy()).all()
        for name in ("delta_mag", "delta_dir", "delta_dist", "consistent_sink", "compared_user_rule"):
            assert np.abs(first[name].to_numpy() - second[name].to_numpy()).max() < 1e-4
    assert one["pair"].tolist() == [pair.id for pair in PAIRS for _ in range(24)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = load_model(tiny_hf("llama", vocab_size=260, max_position_embeddings=1024).to(dtype), chat_tokenizer())
    prompts = prompts_of(model, PAIRS[:2])
    found = last_rows(model, prompts)
    assert found.masses.dtype == np.float32
    assert found.masses.sum(-1) == pytest.approx(1, abs=1e-2)
    for at, prompt in enumerate(prompts):
        assert np.abs(found.masses[at] - by_span(eager_rows(model, prompt.ids), prompt)).max() < 0.05
    assert np.isfinite(localize(model, PAIRS[:2], progress=False).frame["delta_dist"]).all()


def test_attention_that_is_not_finite_is_said() -> None:
    model = chat_tiny("llama")
    with torch.no_grad():
        model.arch.attention(1).q_proj.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"layer 1 is not finite in torch\.float32"):
        localize(model, PAIRS[:1], progress=False)


def test_out_of_memory_halves_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chat_tiny("llama")
    expected = localize(model, PAIRS, progress=False)
    plain, sizes = last_rows_module.forward, []

    def limited(model: Any, batch: Any, **options: Any) -> Any:
        sizes.append(batch.size)
        output = plain(model, batch, **options)  # fails at the end: what was recorded must not stay
        if batch.size > limit:
            raise torch.OutOfMemoryError("out of memory")
        return output

    monkeypatch.setattr(last_rows_module, "forward", limited)
    limit = 2
    found = localize(model, PAIRS, progress=False)
    assert max(sizes) > 2
    assert found.frame["delta_mag"].to_numpy() == pytest.approx(expected.frame["delta_mag"].to_numpy(), abs=1e-4)
    limit = 0
    with pytest.raises(MemoryBudgetError, match="single text"):
        localize(model, PAIRS, progress=False)
    assert model.attention == "sdpa"


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = chat_tiny("llama")
    options: Any = {"max_tokens": 300, "align": "truncate", "progress": False}
    whole = localize(model, PAIRS, **options)
    plain, calls = localization.last_rows, []

    def dies(model: Any, prompts: Any, **given: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(model, prompts, **given)

    monkeypatch.setattr(localization, "last_rows", dies)
    with pytest.raises(KeyboardInterrupt):
        localize(model, PAIRS, out=tmp_path / "run", **options)
    with pytest.raises(ResultError):
        load_result(tmp_path / "run")
    resumed = localize(model, PAIRS, out=tmp_path / "run", **options)
    assert len(calls) == 5 + 1  # the third group alone was run twice
    assert resumed.equals(whole)
    assert load_result(tmp_path / "run").equals(whole)
    assert localize(model, PAIRS, out=tmp_path / "run", **options).equals(whole)
    assert len(calls) == 6
    for other in ({"align": "spans"}, {"consistent": "system"}, {"template": "plain"}):
        with pytest.raises(ResultError, match="holds another run"):
            localize(model, PAIRS, out=tmp_path / "run", **{**options, **other})
    changed = [*PAIRS[:-1], replace(PAIRS[-1], task=replace(PAIRS[-1].task, id="another"))]
    with pytest.raises(ResultError, match="prompts is"):
        localize(model, changed, out=tmp_path / "run", **options)


def test_a_pass_holds_few_pairs_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chat_tiny("llama")
    plain, held = localization.last_rows, []

    def noted(model: Any, prompts: Any, **given: Any) -> Any:
        held.append(len(prompts))
        return plain(model, prompts, **given)

    monkeypatch.setattr(localization, "last_rows", noted)
    many = make_pairs(n=24, wordings=["simple"])
    most = []
    for n in (8, 24):
        held.clear()
        localize(model, many[:n], max_tokens=600, progress=False)
        assert sum(held) == 3 * n
        most.append(max(held))
    assert most == [12, 12]
    held.clear()
    monkeypatch.setattr(localization, "_KEPT_BYTES", 80_000)
    n_keys = localize(model, many, align="truncate", progress=False).provenance.parameters["n_keys"]
    assert 0.5 * 80_000 < max(held) * n_keys * 12 * 4 <= 80_000


def test_saved_and_loaded(tmp_path: Path) -> None:
    result = localize(chat_tiny("llama"), PAIRS[:2], progress=False)
    assert load_result(result.save(tmp_path / "drift.parquet")).equals(result)
    assert result.provenance.parameters["align"] == "spans"


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    localize(chat_tiny("llama"), PAIRS[:1], progress=True)
    shown = capsys.readouterr()
    assert "localize" in shown.err
    assert shown.out == ""


def asking(pair: Pair, name: str, old: str, new: str) -> Pair:
    """The pair with other text in one of its prompts."""
    turns = tuple(
        replace(turn, pieces=tuple((kind, text.replace(old, new)) for kind, text in turn.pieces))
        for turn in pair.prompts[name]
    )
    return replace(pair, prompts={**pair.prompts, name: turns})


def test_pairs_that_cannot_be_measured() -> None:
    model = chat_tiny("llama")
    pair = PAIRS[0]
    task = pair.task.text
    with pytest.raises(InputError, match="expected at least one"):
        localize(model, [], progress=False)
    with pytest.raises(InputError, match=f"'{pair.id}' comes twice"):
        localize(model, [pair, PAIRS[1], pair], progress=False)
    with pytest.raises(InputError, match=f"pair '{pair.id}' asks different tasks"):
        localize(model, [PAIRS[1], asking(pair, "conflict", task, "Describe a rainy day.")], progress=False)
    lacking = replace(pair, prompts={name: turns for name, turns in pair.prompts.items() if name != "paraphrase"})
    with pytest.raises(InputError, match="has no prompt 'paraphrase'"):
        localize(model, [lacking], progress=False)
    long = pair
    for name in ("agree", *CONTRASTS):
        long = asking(long, name, task, task + " word" * 300)
    with pytest.raises(InputError, match=rf"pair '{pair.id}'.*the model's context is 1024"):
        localize(model, [long], progress=False)
    for option in ({"align": "keys"}, {"consistent": "none"}):
        with pytest.raises(InputError, match="expected one of"):
            localize(model, PAIRS, progress=False, **option)


def test_spans_that_cannot_be_located() -> None:
    silent = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}\n{% endfor %}"
    model = chat_tiny("llama", template=silent)
    with pytest.raises(InputError, match=rf"pair '{PAIRS[0].id}': the system rule .* is not in the prompt"):
        localize(model, PAIRS, progress=False)
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    with pytest.raises(InputError, match=r"refuses turns.*template='chatml'"):
        localize(model, PAIRS, template=refusing, progress=False)
    assert len(localize(model, PAIRS[:1], template="chatml", progress=False).frame) == 24
    prompt = encode_dialogue(model, PAIRS[0].prompts["agree"], template="plain")
    holed = replace(prompt, spans={**prompt.spans, "task": prompt.spans["task"][1:]})
    with pytest.raises(InputError, match=f"position {prompt.spans['task'][0]} of a prompt belongs to no span"):
        last_rows(model, [holed])


def test_models_that_cannot_be_measured() -> None:
    with pytest.raises(InputError, match="encoder"):
        localize(load_model(tiny_encoder()), PAIRS[:1], progress=False)
    model = chat_tiny("llama")
    prompts = prompts_of(model, PAIRS[:1])
    with pytest.raises(InputError, match="no prompts"):
        last_rows(model, [])
    with pytest.raises(InputError, match="the shortest prompt"):
        last_rows(model, prompts, n_keys=2000)
    layers = model.arch.config.num_hidden_layers
    model.arch.config.layer_types = ["full_attention"] * (layers - 1) + ["chunked_attention"]
    with pytest.raises(ModelError, match="layer 2: chunked_attention"):
        localize(model, PAIRS[:1], progress=False)


def test_a_layer_without_attention_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chat_tiny("llama")
    skipped = model.arch.attention(1)

    def silent(hidden_states: Any, **_: Any) -> Any:
        return torch.zeros_like(hidden_states), None

    monkeypatch.setattr(skipped, "forward", silent)
    with pytest.raises(ModelError, match="layers 1 did not call softmax attention"):
        last_rows(model, prompts_of(model, PAIRS[:1]))


@pytest.mark.slow
def test_embedded_model(embedded: Any) -> None:
    pairs = make_pairs(n=2)
    prompts = prompts_of(embedded, pairs)
    found = last_rows(embedded, prompts, n_keys=30)
    for at, prompt in enumerate(prompts):
        rows = eager_rows(embedded, prompt.ids)
        assert np.abs(found.masses[at] - by_span(rows, prompt)).max() < 1e-4
        assert np.abs(found.rows[at] - rows[..., :30]).max() < 1e-4
    table = localize(embedded, pairs, progress=False).frame
    assert len(table) == 2 * 2 * 30 * 9
    assert table["delta_mag"].between(0, 2).all()
