"""Claims on sinks hold where the numbers support them and not otherwise: each on constructed tables, both ways."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from analyses import sink_claims
from interp.results import Provenance, Result
from interp.sinks import eviction, residual_peaks

# What the paper reports, as if we had measured it.
ROW: dict[str, Any] = {
    "head": "L16H25",
    "active on": "code",
    "dormant on": "prose",
    "fresh mass": 0.949,
    "fresh mass ": 0.251,
    "fresh difference": 0.698,
    "low": 0.68,
    "high": 0.71,
    "fresh q": 0.001,
    "Δloss": 0.027,
    "Δloss low": 0.02,
    "Δloss high": 0.03,
    "hurt": 0.62,
    "Δloss ": -0.0001,
    "Δloss  low": -0.001,
    "Δloss  high": 0.001,
    "hurt ": 0.001,
    "Δloss difference": 0.027,
    "Δloss difference low": 0.02,
    "Δloss difference high": 0.03,
    "loss q": 0.001,
    "above random heads": 0.02,
    "above random heads low": 0.01,
    "above random heads high": 0.03,
    "random heads": 2,
    "n": 40,
}
NAMES = ["exists", "costs", "control", "texts", "together"]


def holds(**changes: Any) -> dict[str, bool | None]:
    claims = sink_claims.heads(pd.DataFrame([ROW | changes]))
    return {name: claim.holds for name, claim in zip(NAMES, claims, strict=True)}


def test_the_papers_own_numbers_hold() -> None:
    assert holds() == dict.fromkeys(NAMES, True)


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"fresh mass": 0.89}, {"exists"}),
        ({"fresh mass ": 0.51}, {"exists"}),
        ({"low": -0.01}, {"exists"}),
        ({"fresh q": 0.06}, {"exists"}),
        # Less harmful than elsewhere, but no cost where it is active.
        ({"Δloss": -0.01, "Δloss low": -0.02, "Δloss ": -0.2, "Δloss  low": -0.3, "Δloss  high": -0.1}, {"costs"}),
        ({"Δloss ": 0.02, "Δloss  low": 0.015}, {"costs"}),
        ({"loss q": 0.2}, {"costs", "together"}),
        ({"Δloss difference low": -0.01}, {"costs", "together"}),
        ({"above random heads low": -0.01}, {"control"}),
        ({"hurt": 0.4}, {"texts"}),
        ({"hurt ": 0.3}, {"texts"}),
    ],
)
def test_each_loses_by_its_own_numbers(changes: dict[str, Any], lost: set[str]) -> None:
    assert {name for name, value in holds(**changes).items() if not value} == lost


def test_without_random_heads_the_control_is_not_testable() -> None:
    nan = float("nan")
    found = holds(**{"above random heads": nan, "above random heads low": nan, "above random heads high": nan})
    assert found["control"] is None


def test_one_text_has_no_interval_and_no_crash() -> None:
    nan = float("nan")
    claims = sink_claims.heads(pd.DataFrame([ROW | {"low": nan, "high": nan, "fresh q": nan, "n": 1}]))
    assert claims[0].interval is None
    assert claims[0].holds is False


def evicted(**losses: float) -> Result:
    rows = [
        {"domain": "a", "text": text, "arm": arm, "n_tokens": 99, "n_predictions": 50, "loss": loss + 0.01 * text}
        for text in range(6)
        for arm, loss in ({"full": 3.0, "window": 9.0, "sinks": 3.1, "control": 8.0} | losses).items()
    ]
    frame = pd.DataFrame(rows).assign(delta_loss=0.0).astype({"domain": "category", "arm": "category"})
    return Result("sinks.evict", frame, eviction.EVICTION_COLUMNS, Provenance(parameters={"window": 64, "n_sinks": 4}))


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({}, True),
        ({"sinks": 7.0}, False),  # better, and far from restored
        ({"window": 3.3, "sinks": 3.01, "control": 3.2}, False),  # nothing explodes
        ({"control": 3.05}, False),  # any early keys do
    ],
)
def test_eviction(losses: dict[str, float], expected: bool) -> None:
    assert sink_claims.evict(evicted(**losses)).holds is expected


def origins(remaining: dict[tuple[str, str, int], float]) -> Result:
    """Peaks of 1,000 against 10 from depth 2 on; what is left of them without each block."""
    rows = []
    arms = {("none", "", -1): 1.0, **remaining}
    for (arm, block, layer), share in arms.items():
        for text in range(3):
            for depth in range(6):
                norm = 1000.0 * share if 2 <= depth < 5 else 10.0
                rows.append(
                    {
                        "domain": "a",
                        "text": text,
                        "arm": arm,
                        "block": block,
                        "block_layer": layer,
                        "depth": depth,
                        "position": 0,
                        "norm_sink": norm,
                        "norm_first": norm,
                        "norm_others": 10.0,
                    }
                )
    frame = pd.DataFrame(rows).astype(dict.fromkeys(("domain", "arm", "block"), "category"))
    return Result("sinks.residual_peak_origin", frame, residual_peaks.PEAK_COLUMNS, Provenance())


BLOCKS = {
    ("early", "mlp", 0): 0.1,
    ("early", "attention", 0): 1.0,
    ("early", "mlp", 1): 0.05,
    ("early", "attention", 1): 0.9,
    ("control", "mlp", 3): 1.0,
    ("control", "attention", 3): 1.0,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({("early", "attention", 0): 0.2}, False),
        ({("control", "mlp", 3): 0.2}, False),
        ({("early", "mlp", 0): 0.9, ("early", "mlp", 1): 0.8}, False),
    ],
)
def test_origin(changes: dict[Any, float], expected: bool) -> None:
    claim = sink_claims.origin(origins(BLOCKS | changes))
    assert claim.holds is expected
    if expected:
        assert "made by mlp 0, mlp 1" in str(claim.ours)
        assert "90% is left without an early attention block, 100% without a later block" in str(claim.ours)
        assert claim.interval == pytest.approx((0.05, 0.05))


@pytest.mark.parametrize(("share", "expected"), [(1.0, True), (0.2, False)])
def test_first_token(share: float, expected: bool) -> None:
    table = pd.DataFrame(
        [
            {"variant": variant, "domain": domain, "key 0 is a sink": at, "mass on key 0": 0.4, "n": 20}
            for variant, at in (("no BOS", share), ("with BOS", 1 - share))
            for domain in ("a", "b")
        ]
    )
    claim = sink_claims.first_token(table)
    assert claim.holds is expected
    assert claim.n == 40


@pytest.fixture(scope="module")
def scanned(tiny: Any) -> Any:
    """A scan whose numbers are then replaced: layers 1 and 2 read a sink."""
    from dataclasses import replace

    from interp.sinks import scan

    result = scan(tiny(), {"prose": [[5 + at, 6, 7, 8, 9] for at in range(6)]}, progress=False)

    def build(ratio: float, value: float, first_layer: float = 1.0) -> Any:
        frame = result.frame.copy()
        layers, heads = frame["head"] < 0, frame["head"] >= 0
        frame.loc[layers, "n_sinks"] = 1
        frame.loc[layers, "resid_others"] = 10.0
        frame.loc[layers, "resid_first"] = np.float32(10 * ratio)
        frame.loc[heads, "value_others"] = 2.0
        frame.loc[heads, "value_first"] = np.float32(2 * value)
        frame.loc[heads & (frame["layer"] == 0), "value_first"] = np.float32(2 * first_layer)
        return replace(result, frame=frame)

    return build


@pytest.mark.parametrize(("ratio", "expected"), [(13.4, True), (9.0, False)])
def test_peak(scanned: Any, ratio: float, expected: bool) -> None:
    claim = sink_claims.peak(scanned(ratio, 0.1), "prose")
    assert claim.holds is expected
    assert claim.interval == pytest.approx((ratio, ratio), rel=1e-5)


@pytest.mark.parametrize(("value", "expected"), [(0.1, True), (0.9, False)])
def test_drain_is_of_the_layers_that_read_a_sink(scanned: Any, value: float, expected: bool) -> None:
    """Layer 0 reads the embedding, where there is no sink yet: its heads do not count."""
    claim = sink_claims.drain(scanned(13, value, first_layer=5.0), "prose")
    assert claim.holds is expected
    assert claim.interval == pytest.approx((value, value), rel=1e-5)
    assert f"{value:.2f} of the others' norm" in str(claim.ours)
    assert "the 8 heads" in str(claim.ours)
