"""The analysis of attention flow: measurements against plain computations, claims that can go either way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kendalltau, rankdata, spearmanr

from analyses import attention_flow, flow_claims, flow_faithfulness, flow_figures, flow_lengths
from interp.errors import InputError
from interp.flow import attention_graph, influence, maximum_flow
from interp.flow.influences import CORRECTIONS, METHODS
from interp.provenance import Provenance
from interp.results import Result, load_result

TEXTS = [[1, 8, 9, 10, 11, 12, 13], [1, 20, 21, 22, 23, 24, 25, 26, 27], [1, 30, 9, 31, 8, 32]]


def log_p(model: Any, ids: list[int]) -> float:
    """log p of the last id after the others, one forward pass."""
    with torch.no_grad():
        return float(model.hf(torch.tensor([ids[:-1]])).logits[0, -1].log_softmax(-1)[ids[-1]])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_blank_out_replaces_one_token_at_a_time(tiny: Any, family: str) -> None:
    model = tiny(family)
    neutral = model.tokenizer(" the")["input_ids"][0]
    found = flow_faithfulness.blank_out(model, TEXTS, " the")
    for ids, changes in zip(TEXTS, found, strict=True):
        whole = log_p(model, ids)
        expected = [abs(log_p(model, [*ids[:at], neutral, *ids[at + 1 :]]) - whole) for at in range(1, len(ids) - 1)]
        assert changes == pytest.approx(expected, abs=2e-5)
    with pytest.raises(InputError, match="2 tokens"):
        flow_faithfulness.blank_out(model, TEXTS, " the sea")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_norms_are_those_of_one_text_at_a_time(tiny: Any, family: str) -> None:
    model = tiny(family)
    found = flow_faithfulness.gradient_norms(model, TEXTS, max_tokens=16)
    for ids, norms in zip(TEXTS, found, strict=True):
        embedded = model.arch.embedding()(torch.tensor([ids[:-1]])).detach().requires_grad_(True)
        wanted = model.hf(inputs_embeds=embedded).logits[0, -1].log_softmax(-1)[ids[-1]]
        (gradient,) = torch.autograd.grad(wanted, embedded)
        assert norms == pytest.approx(gradient[0, 1:].norm(dim=-1).numpy(), rel=1e-3)
    assert not any(parameter.grad is not None for parameter in model.hf.parameters())


def test_faithfulness_correlates_each_score_with_each_reference(tiny: Any) -> None:
    model = tiny()
    result = flow_faithfulness.faithfulness(model, TEXTS, [1, 3], n_ceiling=2, progress=False)
    frame = result.frame
    changes = flow_faithfulness.blank_out(model, TEXTS, " the")
    for text, ids in enumerate(TEXTS):
        graph = attention_graph(model, ids[:-1])
        expected = {
            "exact": maximum_flow(graph.capacity[:1], [-1])[0, 1:].numpy(),
            "raw": graph.attention[0, -1, 1:].numpy(),
        }
        for method, score in expected.items():  # noqa: B007  read by the query
            rows = frame.query(
                "text == @text and method == @method and n_layers == 1 and correction == 'none' and reference == 'blank-out'"
            )
            assert len(rows) == 1
            assert rows["spearman"].item() == pytest.approx(spearmanr(score, changes[text])[0])
            assert rows["kendall"].item() == pytest.approx(kendalltau(score, changes[text])[0])
            assert rows["n_tokens"].item() == len(ids) - 2
    assert set(frame.query("method == 'ceiling'")["text"]) == {0, 1}
    some = frame.query(
        "text == 1 and method == 'raw' and n_layers == 3 and correction == 'none' and graph == 'mean'"
    ).iloc[0]
    ranks = [
        rankdata(values)
        for values in (attention_graph(model, TEXTS[1][:-1]).attention[2, -1, 1:], changes[1], range(7))
    ]
    left = [values - np.polyval(np.polyfit(ranks[2], values, 1), ranks[2]) for values in ranks[:2]]
    assert some["partial"] == pytest.approx(np.corrcoef(*left)[0, 1])
    assert some["with_position"] == pytest.approx(np.corrcoef(ranks[0], ranks[2])[0, 1])
    position = frame.query("method == 'position' and text == 1 and reference == 'blank-out'")["spearman"].item()
    assert position == pytest.approx(spearmanr(range(7), changes[1])[0])
    # Norms and contributions are looked at on all layers alone.
    assert set(frame.query("graph == 'norm'")["n_layers"]) == {3}
    assert set(frame["graph"]) == {"", "mean", "norm", "contribution"}


def test_rank_correlations_are_scipys() -> None:
    rng = np.random.default_rng(0)
    for length in (2, 3, 9, 27):
        scores = np.round(rng.normal(size=(6, length)), 1 if length > 3 else 6)  # with ties
        references = np.round(rng.normal(size=(2, length)), 1 if length > 3 else 6)
        spearman, kendall = flow_faithfulness.rank_correlations(scores, references)
        for at, column in np.ndindex(6, 2):
            assert spearman[at, column] == pytest.approx(spearmanr(scores[at], references[column])[0])
            assert kendall[at, column] == pytest.approx(kendalltau(scores[at], references[column])[0])
    scores[0], scores[1, 0] = 1.0, np.nan
    spearman, kendall = flow_faithfulness.rank_correlations(scores, references)
    assert np.isnan(spearman[:2]).all()
    assert np.isnan(kendall[:2]).all()
    assert np.isfinite(spearman[2:]).all()


def test_scores_against_uniform_attention_are_those_of_influence(tiny: Any) -> None:
    graph = attention_graph(tiny(), TEXTS[1])
    for correction in CORRECTIONS:
        found = flow_faithfulness.scores(graph, correction)
        for method in METHODS:
            expected = influence(graph, [-1], method=method, correction=correction)[0].numpy()
            assert found[method] == pytest.approx(expected, rel=1e-4, nan_ok=True)


@pytest.mark.slow
def test_sentences_are_cut_before_a_word(embedded: Any) -> None:
    texts = flow_faithfulness.sentences(embedded, 12, start="<|endoftext|>", shortest=8, longest=14)
    assert len({tuple(text) for text in texts}) == 12
    for text in texts:
        assert text[0] == 0
        assert 8 <= len(text) - 2 <= 14
        piece = embedded.tokenizer.decode([text[-1]])
        assert piece[0] == " "
        assert piece[1].isalpha()
    again = flow_faithfulness.sentences(embedded, 12, start="<|endoftext|>", shortest=8, longest=14)
    assert texts == again
    with pytest.raises(InputError, match="were asked for"):
        flow_faithfulness.sentences(embedded, 10, start="<|endoftext|>", shortest=120, longest=130)


def made_up(
    values: dict[tuple[str, str, str], float], n: int = 12, seed: int = 0, position: float = 0.1, graph: str = "mean"
) -> Result:
    """Correlations with given means for (method, correction, reference), a little noise beside them."""
    rng = np.random.default_rng(seed)
    rows = []
    for (method, correction, reference), mean in values.items():
        alone = method in ("position", "ceiling")
        for text in range(n):
            rows.append(
                {
                    "text": text,
                    "n_tokens": 9,
                    "graph": "" if alone else graph,
                    "n_layers": 0 if alone else 6,
                    "method": method,
                    "correction": correction,
                    "reference": reference,
                    "spearman": mean + 0.05 * rng.normal(),
                    "kendall": mean / 2,
                    "partial": mean + 0.05 * rng.normal(),
                    "with_position": position + 0.05 * rng.normal(),
                }
            )
    frame = pd.DataFrame(rows)
    return Result("flow.faithfulness", frame, flow_faithfulness.FAITHFULNESS_COLUMNS, Provenance(parameters={}))


def flow_values(**changes: float) -> dict[tuple[str, str, str], float]:
    values = {}
    for reference in ("blank-out", "gradient"):
        for method in ("raw", "exact", "rollout", "bound", "layer_bound", "widest", "soft"):
            for correction in ("none", "uniform", "drop_sink"):
                values[method, correction, reference] = changes.get(f"{method}_{correction}", changes.get(method, 0.3))
        values["position", "none", reference] = changes.get("position", 0.3)
        values["ceiling", "none", reference] = 0.8
    return values


def test_claims_on_faithfulness_hold_where_they_do() -> None:
    good = flow_values(
        exact=0.7,
        exact_uniform=0.9,
        rollout_uniform=0.4,
        bound_uniform=0.2,
        rollout=0.5,
        raw=0.1,
        bound=0.2,
        layer_bound=0.3,
        position=0.3,
    )
    claims = flow_claims.faithfulness_claims(made_up(good), 6)
    assert all(claim.holds for claim in claims)
    assert len(claims) == 13  # without contributions
    assert claims[1].interval is not None
    assert 0.5 < claims[1].interval[0] < claims[1].interval[1] < 0.7
    bad = flow_values(exact=-0.4, exact_uniform=-0.5, rollout=-0.2, raw=-0.05, bound=0.3, position=0.6)
    assert not any(claim.holds for claim in flow_claims.faithfulness_claims(made_up(bad, position=-0.9), 6))
    # A difference that is there, and too small to pay for.
    small = flow_claims.faithfulness_claims(made_up(flow_values(exact=0.33, rollout=0.30), n=400), 6)
    (worth,) = [
        claim for claim in small if claim.claim.startswith("exact flow is worth its cost over rollout (blank-out, as")
    ]
    assert worth.interval is not None
    assert worth.interval[0] > 0
    assert worth.holds is False
    # Contributions have claims of their own, and sentences whose ranking is position's are counted.
    result = made_up(good)
    more = made_up(good, graph="contribution").frame.query("graph == 'contribution'")
    frame = pd.concat([result.frame.astype({"graph": str}), more.astype({"graph": str})])
    frame.loc[(frame["graph"] == "contribution") & (frame["text"] < 5), "partial"] = np.nan
    both = flow_claims.faithfulness_claims(Result(result.kind, frame, result.columns, result.provenance), 6)
    assert len(both) == 15
    assert "in 5 of 12 sentences" in str(both[-1].ours)
    assert both[-1].n == 7
    one = flow_claims.faithfulness_claims(made_up(good, n=1), 6)
    assert all(claim.holds is None for claim in one)


def lengths_made_up(
    widest: float, rollout: float, equal: float, ratios: tuple[float, ...], seconds: float = 0.01
) -> Result:
    rng = np.random.default_rng(0)
    rows = []
    for attention in ("model", "random"):
        for length, ratio in zip((8, 16, 32), ratios, strict=True):
            for method, kendall in (
                ("widest", widest),
                ("rollout", rollout),
                ("bound", 0.8),
                ("layer_bound", 1.0),
                ("exact", 1.0),
                ("soft τ=0.01 entropy", 0.5),
            ):
                for text in range(8):
                    rows.append(
                        {
                            "attention": attention,
                            "text": text,
                            "n_tokens": length,
                            "method": method,
                            "ratio": ratio + 0.01 * rng.normal(),
                            "kendall": kendall + 0.01 * rng.normal(),
                            "equal": equal,
                            "seconds": seconds,
                        }
                    )
    return Result("flow.against_exact", pd.DataFrame(rows), flow_lengths.LENGTH_COLUMNS, Provenance(parameters={}))


def test_claims_on_stand_ins_go_either_way() -> None:
    yes = flow_claims.length_claims(lengths_made_up(0.95, 0.9, 1.0, (0.6, 0.4, 0.2), seconds=2.0))
    assert [claim.holds for claim in yes] == [True, True, True, True, None, True]
    no = flow_claims.length_claims(lengths_made_up(-0.2, 0.7, 0.9, (0.2, 0.2, 0.2)))
    assert [claim.holds for claim in no] == [False, False, False, False, None, False]
    values = flow_values(exact=0.9)
    made = [made_up(values), made_up(values, graph="contribution")]
    frame = pd.concat([one.frame.astype({"graph": str}) for one in made]).drop_duplicates(
        ["text", "graph", "method", "correction", "reference"]
    )
    result = Result(made[0].kind, frame, made[0].columns, made[0].provenance)
    answered = attention_flow.answers([*yes, *flow_claims.faithfulness_claims(result, 6)])
    assert list(answered["answer"]) == ["yes"] * 6 + ["no", "yes", "yes"]
    assert len(answered) == answered["question"].nunique()


def test_paired_differences_use_the_sentences_that_both_have() -> None:
    result = made_up({("exact", "none", "blank-out"): 0.5, ("raw", "none", "blank-out"): 0.2})
    frame = result.frame.copy()
    frame.loc[(frame["method"] == "raw") & (frame["text"] == 3), "spearman"] = np.nan
    result = Result(result.kind, frame, result.columns, result.provenance)
    shared = {"graph": "mean", "n_layers": 6, "correction": "none", "reference": "blank-out"}
    found = flow_faithfulness.paired(result, {**shared, "method": "exact"}, {**shared, "method": "raw"})
    wide = frame.pivot(index="text", columns="method", values="spearman").dropna()
    assert found["n"] == 11
    assert found["difference"] == pytest.approx((wide["exact"] - wide["raw"]).mean())
    assert found["low"] < found["difference"] < found["high"]


def test_stand_ins_are_compared_with_the_exact_flow(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(
        flow_lengths,
        "domain_sequences",
        lambda model, names, length, n, **_: {"editorials": [[1, *range(8 + at, 7 + at + length)] for at in range(n)]},
    )
    result = flow_lengths.against_exact(model, [4, 9], 3, start=True)
    frame = result.frame
    assert set(frame.query("method == 'exact'")["equal"]) == {1.0}
    for attention in ("model", "random"):  # noqa: B007  read by the query
        wide = frame.query("attention == @attention").pivot(
            index=["n_tokens", "text"], columns="method", values="ratio"
        )
        assert (wide["widest"] <= 1 + 1e-6).all()
        assert (wide["rollout"] <= 1 + 1e-6).all()
        assert (wide["layer_bound"] >= 1 - 1e-6).all()
        assert (wide["bound"] >= wide["layer_bound"] - 1e-6).all()
    graph = attention_graph(model, [1, *range(9, 16)])
    assert len(graph) == 8
    table = flow_lengths.length_means(result)
    some = table.query("attention == 'model' and n_tokens == 9 and method == 'widest'").iloc[0]
    assert some["ratio"] == pytest.approx(
        frame.query("attention == 'model' and n_tokens == 9 and method == 'widest'")["ratio"].mean()
    )


def test_random_attention_is_uniform_over_rows_that_sum_to_one() -> None:
    graph = flow_lengths.random_graph(400, 3, torch.Generator().manual_seed(0))
    assert graph.causal
    last = graph.attention[:, 2]
    assert torch.allclose(last.sum(-1), torch.ones(400, dtype=last.dtype))
    # A flat Dirichlet of three has means 1/3 and variances 1/18.
    assert last.mean(0).numpy() == pytest.approx([1 / 3] * 3, abs=0.05)
    assert last.var(0).numpy() == pytest.approx([1 / 18] * 3, abs=0.015)


def test_figures_show_what_the_tables_say() -> None:
    result = made_up(flow_values(exact=0.7))
    table = flow_faithfulness.means(result)
    drawn = flow_figures.by_depth(table, "none", "blank-out")
    lines = {trace.name: trace for trace in drawn.data if trace.mode == "lines+markers"}
    row = table.query("method == 'exact' and correction == 'none' and reference == 'blank-out'").iloc[0]
    assert lines["exact flow"].y[0] == pytest.approx(row["mean"], rel=1e-5)
    assert flow_figures.by_graph(table, "gradient").data
    lengths = flow_lengths.length_means(lengths_made_up(0.5, 0.9, 1.0, (0.6, 0.4, 0.2)))
    drawn = flow_figures.against_length(lengths, "ratio", ["widest"])
    assert [len(trace.x) for trace in drawn.data if trace.mode == "lines+markers"] == [3, 3]
    times = flow_figures.time_against_length(lengths)
    assert list(times.data[0].y) == [10.0, 10.0, 10.0]
    cells = attention_flow.score_table(table, 6, "blank-out")
    assert cells.iloc[0, 0] == "blank-out by a comma"
    assert cells.set_index(cells.columns[0]).loc["exact", "no correction"].startswith(f"{row['mean']:.2f} [")


@pytest.mark.slow
def test_the_analysis_runs_and_reuses(embedded: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"n_texts": 4, "n_lengths": 2, "n_ceiling": 2, "lengths": (8, 12, 16)}
    section = attention_flow.run(embedded, tmp_path, **settings)
    assert len(section.claims) == 21
    made = load_result(tmp_path / "faithfulness.parquet")
    attention_flow.run(embedded, tmp_path, **settings)
    assert load_result(tmp_path / "faithfulness.parquet").equals(made, check_provenance=True)
    assert SimpleNamespace(**settings).n_texts == made.frame["text"].nunique()
