"""Comparing domains and naming heads: a head made dormant by hand is found, with the right sign, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import tiny_hf, tiny_tokenizer

from interp import load_model, load_result
from interp.errors import InputError
from interp.sinks import Scan, classify, compare, scan

BOS, PROSE, CODE = 1, range(10, 20), range(30, 40)
LAYER, HEAD = 1, 2


@pytest.fixture(scope="module")
def planted() -> Any:
    """GPT-2 in which every head attends evenly, but one: where it reads a word of CODE, it looks at the BOS token alone."""
    hf = tiny_hf("gpt2")
    with torch.no_grad():
        hf.transformer.wpe.weight.zero_()
        embedding = hf.transformer.wte.weight
        embedding.copy_(0.1 * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0)))
        embedding[:, :2] = embedding[:, 2:].mean(
            1, keepdim=True
        )  # after the norm: zero in the two dimensions that are read
        embedding[BOS, 0], embedding[CODE.start : CODE.stop, 1] = 8.0, 8.0
        for block in hf.transformer.h:
            block.ln_1.weight.fill_(1.0)
            block.ln_1.bias.zero_()
            block.attn.c_attn.weight[:, :32].zero_()  # queries and keys: scores of 0
            block.attn.c_attn.bias.zero_()
            for written in (
                block.attn.c_proj,
                block.mlp.c_proj,
            ):  # what blocks write leaves the two dimensions as they are
                written.weight.mul_(0.001)
                written.bias.zero_()
        weight = hf.transformer.h[LAYER].attn.c_attn.weight  # (d_model, query | key | value)
        weight[1, 4 * HEAD], weight[0, 16 + 4 * HEAD] = 4.0, 4.0
    return load_model(hf, tiny_tokenizer())


@pytest.fixture(scope="module")
def texts() -> dict[str, list[list[int]]]:
    random = np.random.default_rng(0)
    return {
        name: [[BOS, *random.choice(np.array(words), 31).tolist()] for _ in range(8)]
        for name, words in (("prose", PROSE), ("code", CODE), ("more prose", PROSE))
    }


@pytest.fixture(scope="module")
def scanned(planted: Any, texts: Any) -> Scan:
    return scan(planted, texts, progress=False)


def test_the_planted_head_is_found_and_nothing_else(scanned: Scan) -> None:
    result = classify(scanned)
    found = result.frame[result.frame["label"] == "active-dormant"]
    assert found[["layer", "head"]].values.tolist() == [[LAYER, HEAD]]
    row = found.iloc[0]
    assert row["domain_high"] == "code"
    assert row["domain_low"] in ("prose", "more prose")
    assert row["mean_high"] > 0.9
    # Every other head attends evenly: Σ_q 1/(q + 1) / T.
    even = np.mean(1 / np.arange(1, 33))
    assert row["mean_low"] == pytest.approx(even, abs=0.02)
    assert 0 < row["low"] <= row["difference"] <= row["high"]
    assert row["q"] <= 0.05
    assert result.frame["label"].value_counts().to_dict() == {
        "active-dormant": 1,
        "active": 11,
        "dormant": 0,
        "mixed": 0,
    }
    assert result.frame["domain_dependent"].sum() == 1
    assert "code 1.00 [" in row["evidence"]


def test_it_is_found_in_any_order_of_domains(planted: Any, texts: Any) -> None:
    turned = scan(planted, dict(reversed(texts.items())), progress=False)
    row = classify(turned).frame.iloc[0]
    assert (row["label"], row["layer"], row["head"], row["domain_high"]) == ("active-dormant", LAYER, HEAD, "code")
    assert row["low"] > 0


def test_comparison_has_the_right_sign_and_pairs(scanned: Scan) -> None:
    result = compare(scanned, n_permutations=500)
    frame = result.frame
    assert len(frame) == 3 * 12
    rows = frame[(frame["layer"] == LAYER) & (frame["head"] == HEAD)].set_index(["domain_a", "domain_b"])
    assert rows.loc[("prose", "code"), "difference"] < -0.7
    assert rows.loc[("prose", "code"), "high_fcr"] < 0
    assert rows.loc[("code", "more prose"), "low_fcr"] > 0.7
    assert rows.loc[("prose", "more prose"), "q"] > 0.05
    # The widened interval holds the plain one.
    assert (frame["low_fcr"] <= frame["low"] + 1e-9).all()
    assert (frame["high_fcr"] >= frame["high"] - 1e-9).all()
    assert (frame["q"] >= frame["p"] - 1e-12).all()


def test_thresholds_move_names(scanned: Scan) -> None:
    strict = classify(scanned, active=0.1)
    assert (strict.frame["label"] == "active-dormant").sum() == 0
    assert strict.frame.query(f"layer == {LAYER} and head == {HEAD}")["label"].tolist() == ["mixed"]
    assert strict.frame["domain_dependent"].sum() == 1
    all_dormant = classify(scanned, dormant=0.0, active=0.0)
    assert (all_dormant.frame["label"] == "dormant").all()


def test_shuffled_labels_find_nothing(planted: Any, texts: Any) -> None:
    mixed = {"a": texts["prose"][:4] + texts["code"][:4], "b": texts["code"][4:] + texts["more prose"][:4]}
    result = classify(scan(planted, mixed, progress=False), dormant=0.5, active=0.5)
    assert result.frame["domain_dependent"].sum() == 0


def test_one_domain(scanned: Scan, planted: Any, texts: Any) -> None:
    alone = scan(planted, {"code": texts["code"]}, progress=False)
    with pytest.raises(InputError, match="has one domain, 'code'"):
        compare(alone)
    result = classify(alone)
    assert result.frame["label"].value_counts().to_dict() == {
        "dormant": 1,
        "active": 11,
        "active-dormant": 0,
        "mixed": 0,
    }
    assert result.frame["domain_dependent"].isna().all()


def test_a_domain_of_one_text_is_never_significant(planted: Any, texts: Any) -> None:
    result = compare(scan(planted, {"prose": texts["prose"], "code": texts["code"][:1]}, progress=False))
    assert result.frame[["low", "high", "low_fcr", "high_fcr"]].isna().all(axis=None)
    assert (result.frame["p"] >= 1 / 9 - 1e-9).all()
    single = scan(planted, {"prose": texts["prose"][:1], "code": texts["code"][:1]}, progress=False)
    assert compare(single).frame["p"].isna().all()
    assert (classify(single).frame["label"] != "active-dormant").all()


def test_a_mass_that_is_missing_is_no_mass(scanned: Scan) -> None:
    """No token of the planted model has a residual peak on every domain, so mass_sinks is missing somewhere or everywhere."""
    result = classify(scanned, measure="mass_sinks")
    assert result.frame["mean_high"].notna().all()
    frame = scanned.frame.copy()
    frame.loc[frame["head"] >= 0, "mass_sinks"] = np.nan
    nothing = replace(scanned, frame=frame)
    assert (classify(nothing, measure="mass_sinks").frame["label"] == "active").all()
    # Some texts without a sink take no head out of the test.
    frame["mass_sinks"] = np.where((frame["text"] % 2 == 0) & (frame["domain"] == "code"), np.nan, frame["mass_first"])
    some = compare(replace(scanned, frame=frame), "mass_sinks").frame
    assert some["p"].notna().all()
    halved = scanned.frame.query("head >= 0 and domain == 'code' and text % 2 == 1")
    expected = halved.groupby(["layer", "head"])["mass_first"].sum() / 8
    found = some.query("domain_a == 'code'").set_index(["layer", "head"])["mean_a"]
    assert np.allclose(found, expected)


def test_saved(scanned: Scan, tmp_path: Path) -> None:
    for result in (compare(scanned, n_permutations=99), classify(scanned)):
        assert load_result(result.save(tmp_path / "r.parquet")).equals(result)
        assert result.provenance.model == scanned.provenance.model
        assert result.provenance.parameters["n_texts"] == {"prose": 8, "code": 8, "more prose": 8}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: classify(s, dormant=0.4), "0 ≤ active ≤ dormant ≤ 1"),
        (lambda s: classify(s, measure="output_norm"), "is not a mass"),
        (lambda s: compare(s, "mass"), "expected one of mass_first"),
        (lambda s: compare(s, alpha=0), "alpha=0"),
        (lambda s: compare(s.frame), "got DataFrame"),
        (
            lambda s: classify(s, comparison=compare(s, "mass_first", alpha=0.1, n_permutations=9)),
            "alpha 0.1; expected",
        ),
        (lambda s: classify(s, comparison=compare(s, "value_first", n_permutations=9)), "measure 'value_first'"),
        (lambda s: s.heads(["resid_first"]), "per 'head'"),
        (lambda s: s.layers(["mass_first"]), "per 'layer'"),
    ],
)
def test_bad_input(scanned: Scan, call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(scanned)


def test_pandas_agrees_on_the_means(scanned: Scan) -> None:
    frame = classify(scanned).frame.set_index(["layer", "head"])
    means = (
        scanned.frame.query("head >= 0")
        .groupby(["layer", "head", "domain"], observed=True)["mass_first"]
        .mean()
        .unstack()
    )
    assert np.allclose(frame["mean_high"].sort_index(), means.max(axis=1), atol=1e-6)
    assert np.allclose(frame["mean_low"].sort_index(), means.min(axis=1), atol=1e-6)
    assert isinstance(frame["domain_high"].dtype, pd.CategoricalDtype)


def test_texts_of_different_lengths_are_refused(planted: Any, texts: Any) -> None:
    """Even attention alone has another mass on another length: such a comparison would find every head."""
    uneven = scan(planted, {"prose": texts["prose"], "short": [ids[:9] for ids in texts["more prose"]]}, progress=False)
    with pytest.raises(InputError, match=r"different lengths .prose: 32–32, short: 9–9 tokens"):
        compare(uneven)
    with pytest.raises(InputError, match="scan with length="):
        classify(uneven)
    assert compare(uneven, unequal_lengths=True).frame["q"].max() < 0.05
    again = scan(planted, {"prose": texts["prose"], "short": texts["more prose"]}, length=9, progress=False)
    assert compare(again).frame["q"].min() > 0.05


def test_one_head_among_very_many_can_pass(scanned: Scan) -> None:
    """With 9,999 permutations the smallest p is 1e-4, too large for the best of thousands of tests: those heads get more."""
    random = np.random.default_rng(0)
    rows = []
    for name, shift in (("a", 0.0), ("b", 0.5)):
        for text in range(16):
            mass = 0.3 + 0.01 * random.standard_normal(2000)
            mass[7] += shift
            rows.append(pd.DataFrame({"domain": name, "text": text, "head": np.arange(2000), "mass_first": mass}))
    frame = pd.concat(rows, ignore_index=True).assign(layer=0, n_tokens=32)
    template = scanned.frame.iloc[:1].drop(columns=frame.columns)
    frame = frame.merge(template, how="cross").astype({"domain": "category"})
    wide = replace(scanned, frame=frame[[column.name for column in scanned.columns]])
    result = compare(wide).frame
    assert result.loc[result["q"] <= 0.05, "head"].tolist() == [7]
    row = result.set_index("head").loc[7]
    assert row["p"] < 5e-5
    # The widened interval is wider than the plain one, and still has the difference.
    assert row["low_fcr"] < row["low"] < -0.5 < row["high"] < row["high_fcr"] or row["high_fcr"] < -0.45


def test_a_comparison_of_another_scan_is_refused(planted: Any, scanned: Scan, texts: Any) -> None:
    turned = scan(planted, {name: rows[::-1] for name, rows in texts.items()}, progress=False)
    with pytest.raises(InputError, match="of another scan"):
        classify(scanned, comparison=compare(turned, n_permutations=99))
