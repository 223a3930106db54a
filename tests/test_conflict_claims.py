"""Claims on instruction conflicts hold where the numbers support them, do not where they contradict, and are open between."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from analyses import conflict_arms, conflict_claims, conflict_figures
from interp.conflict.answers import FOLLOW_COLUMNS
from interp.provenance import Provenance
from interp.results import Result

N = 40


def answers(conflict: Any, agree: Any = None, setting: str = "user", family: str = "list") -> Result:
    """N tasks with one pair each; `conflict` and `agree`: who obeys the system, by task."""
    rows = []
    for prompt, obeys in (("agree", np.ones(N) if agree is None else agree), ("conflict", conflict)):
        for at, passed in enumerate(np.broadcast_to(obeys, N)):
            rows.append(
                {
                    **{"pair": f"p{at}", "part": "held-out", "task": f"t{at}", "family": family, "system_rule": "list"},
                    **{
                        "user_rule": "paragraph",
                        "wording": "simple",
                        "setting": setting,
                        "prompt": prompt,
                        "answer": "a",
                    },
                    **{"n_tokens": 1, "finished": True, "obeys_system": bool(passed), "obeys_user": not passed},
                    "reason": "",
                    **{"decided": True, "loops": False},
                }
            )
    return Result("conflict.follow", pd.DataFrame(rows), FOLLOW_COLUMNS, Provenance())


HALF = np.arange(N) < N // 2


@pytest.mark.parametrize(
    ("conflict", "agree", "holds"),
    [(HALF, True, True), (True, HALF, False), (np.arange(N) != 1, np.arange(N) != 2, None)],
)
def test_misprioritised_rules(conflict: Any, agree: Any, holds: bool | None) -> None:
    claim = conflict_claims.loses(answers(conflict, agree), ["list"])
    assert claim.holds is holds
    assert claim.n == N
    assert "the user contradicts" in claim.claim
    assert "other agent" in conflict_claims.loses(answers(conflict, agree, "peer"), ["list"]).claim


def heads(excess: float, q: float) -> pd.DataFrame:
    row = {
        "layer": 3,
        "head": 1,
        "score": 0.5,
        "control": 0.5 - excess,
        "excess": excess,
        "low": 0.1,
        "high": 0.3,
        "q": q,
    }
    return pd.DataFrame([row | {"n_pairs": 9}, row | {"n_pairs": 9, "head": 2, "excess": -1.0, "q": 0.001}])


def test_drift() -> None:
    assert conflict_claims.drifts(heads(0.2, 0.01)).holds is True
    assert conflict_claims.drifts(heads(0.2, 0.06)).holds is False
    assert conflict_claims.drifts(heads(-0.2, 0.01)).holds is False
    assert "1 of 2 heads do (q ≤ .05), 1 drift less" in str(conflict_claims.drifts(heads(0.2, 0.01)).ours)


@pytest.mark.parametrize(("low", "high", "holds"), [(0.4, 0.9, True), (0.0, 0.2, False), (0.2, 0.5, None)])
def test_middle_layers(low: float, high: float, holds: bool | None) -> None:
    rows = [
        {"third": name, "n_focal_heads": 9, "share": 1 / 3, "low": low, "high": high, "expected": 1 / 3, "p": 0.5}
        for name in ("first", "middle", "last")
    ]
    claim = conflict_claims.middle(pd.DataFrame(rows), "spans")
    assert claim.holds is holds
    assert claim.n == 27


SIDES = [(0.1, 0.2, True), (-0.2, -0.1, False), (-0.1, 0.1, None), (np.nan, np.nan, None)]


@pytest.mark.parametrize(("low", "high", "holds"), SIDES)
def test_what_is_decided_by_an_interval_around_zero(low: float, high: float, holds: bool | None) -> None:
    ends = {"low": low, "high": high}
    thirds = pd.DataFrame(
        [{"what": name, "mean": 0.1, **ends, "n_tasks": 5} for name in ("first", "middle", "last", "middle − others")]
    )
    agreement = pd.DataFrame(
        [
            {"what": "rank correlation", "value": 0.2, "n": 30, "p": 0.01, "top": 7, "expected": 0.0, **ends},
            {
                "what": "shared top",
                "value": 2,
                "n": 30,
                "p": 0.1,
                "top": 7,
                "expected": 1.6,
                "low": np.nan,
                "high": np.nan,
            },
        ]
    )
    row = arm_row(**ends)
    assert [
        conflict_claims.middle_patched(thirds).holds,
        conflict_claims.same_layers(agreement, "layers").holds,
        conflict_claims.obeys_more(row, "here").holds,
        conflict_claims.generalises(row, "here", "never trained").holds,
        conflict_claims.beats("a above b", (0.1, low, high), 3).holds,
    ] == [holds] * 5


@pytest.mark.parametrize(
    ("difference", "p_sets", "n_sets", "holds"),
    [
        ((0.1, 0.3), 0.02, 40, True),
        ((0.1, 0.3), 0.2, 40, None),
        ((-0.1, 0.3), 0.02, 40, None),
        ((0.1, 0.3), 0.11, 8, None),
        ((-0.3, -0.1), 0.02, 40, False),
    ],
)
def test_heads_matter(difference: tuple[float, float], p_sets: float, n_sets: int, holds: bool | None) -> None:
    common = {"p": 0.1, "n_sets": n_sets, "n": 20, "p_sets": p_sets}
    rows = [
        {"what": "focal", "mean": -0.4, "low": -0.5, "high": -0.3, **common},
        {"what": "random", "mean": -0.1, "low": -0.2, "high": 0.0, **common},
        {"what": "|focal|", "mean": 0.5, "low": 0.4, "high": 0.6, **common},
        {"what": "|random|", "mean": 0.3, "low": 0.2, "high": 0.4, **common},
        {"what": "|focal| − |random|", "mean": 0.2, "low": difference[0], "high": difference[1], **common},
    ]
    assert conflict_claims.heads_matter(pd.DataFrame(rows), "drift").holds is holds


def arm_row(**changes: Any) -> pd.Series:
    row = {"conflict": 0.7, "change": 0.4, "low": 0.35, "high": 0.45, "n": 96, "share": 0.002, "perplexity": 1.01}
    row |= {"perplexity_low": 1.0, "perplexity_high": 1.02, "agree_change": 0.0, "agree_low": -0.02, "agree_high": 0.02}
    return pd.Series(row | {"system_change": 0.3, "system_low": 0.2, "system_high": 0.4} | changes)


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, True),
        ({"low": 0.2, "high": 0.28}, False),
        ({"low": 0.2}, None),
        ({"share": 0.02}, False),
        ({"perplexity_high": 1.04}, None),
        ({"perplexity_low": 1.04, "perplexity_high": 1.05}, False),
    ],
)
def test_the_aim_needs_gain_size_and_perplexity(changes: dict[str, float], holds: bool | None) -> None:
    assert conflict_claims.reaches(arm_row(**changes), "here").holds is holds


@pytest.mark.parametrize(("low", "high", "holds"), [(-0.04, 0.02, True), (-0.3, -0.06, False), (-0.1, 0.0, None)])
def test_compliance_without_conflict(low: float, high: float, holds: bool | None) -> None:
    assert conflict_claims.keeps(arm_row(agree_low=low, agree_high=high), "here").holds is holds


@pytest.mark.parametrize(
    ("drift", "holds"), [(range(7), True), (range(7, 0, -1), False), ((1, 5, 2, 6, 3, 0, 4), None), ([2] * 7, None)]
)
def test_localisation_that_foretells_gains(drift: Any, holds: bool | None) -> None:
    table = pd.DataFrame({"drift": [float(value) for value in drift], "change": np.linspace(-0.1, 0.5, 7)})
    claim = conflict_claims.foretells(table, "drift")
    assert claim.holds is holds
    assert claim.n == 7


def test_arms_beside_what_localisation_says_of_their_layers() -> None:
    arms = ("untrained", "focal", "last", "focal, no credit", "focal, as published")
    table = pd.DataFrame({"arm": arms, "layers": list("abcde"), "change": [0.0, 0.2, 0.4, 0.9, 0.9]})
    about = {name: {"layers": [0, 2] if name != "last" else [1]} for name in arms[1:]}
    by_layer = pd.DataFrame({"drift": [1.0, 2.0, 5.0], "patching": [0.0, -1.0, 0.5]})
    told = conflict_arms.foretold(table, about, by_layer).set_index("arm")
    assert list(told.index) == ["last", "focal"]  # those that differ in their layers alone
    assert told.loc["focal", ["change", "drift", "patching"]].tolist() == [0.2, 3.0, 0.25]
    assert told.loc["last", ["change", "drift", "patching"]].tolist() == [0.4, 2.0, -1.0]
    # Another seed of the same layers is no arm of its own.
    again = pd.DataFrame({"arm": ["focal, seed 1"], "layers": ["b"], "change": [0.6]})
    about["focal, seed 1"] = about["focal"]
    told = conflict_arms.foretold(pd.concat([table, again]), about, by_layer).set_index("layers")
    assert told["change"].to_dict() == pytest.approx({"b": 0.4, "c": 0.4})


def test_neurons_that_stay_by_construction_claim_nothing() -> None:
    assert conflict_claims.neurons_stay(1.0, 46080, 0.95, "here").holds is None
    assert conflict_claims.neurons_stay(0.75, 46080, 0.95, "here").holds is False


def test_scores_of_the_dimensions_that_both_answers_have() -> None:
    tasks = pd.Series(list("abcdef"))
    low = pd.DataFrame({"constraint_compliance": [1.0, 2, 1, 1, 2, 1], "goal_alignment": [5.0] * 6})
    high = pd.DataFrame({"constraint_compliance": [5.0] * 6, "goal_alignment": [np.nan] * 3 + [5.0] * 3})
    claim = conflict_claims.scores(low, high, tasks, "here")
    # Without a goal score after, the one before does not count either: (1 + 2 + 1 + 3 + 3.5 + 3) / 6 and 5.
    assert claim.holds is True
    assert "2.25 → 5.00 of 5, change +2.75" in str(claim.ours)
    assert "goal alignment alone 5.00 → 5.00 (n = 3)" in str(claim.ours)
    assert conflict_claims.scores(high, low, tasks, "here").holds is False
    assert conflict_claims.scores(low, low, tasks, "here").holds is None


# The arms' measures


def prose(nll: float, same: float = 1.0) -> Result:
    rows = [{"text": at, "n_tokens": 10 + at, "nll": nll, "same_top": same} for at in range(8)]
    return Result("conflict.prose", pd.DataFrame(rows), conflict_arms.PROSE_COLUMNS, Provenance())


def test_changes_are_paired_and_the_perplexity_is_a_ratio() -> None:
    base, after = answers(HALF), answers(np.arange(N) < 30)
    assert conflict_arms.change(after, base, ["list"])[0] == pytest.approx(0.25)
    none, low, high = conflict_arms.change(base, base, ["list"])
    assert -0.3 < low < none == 0.0 < high < 0.3  # that no task changed does not make it certain
    # The same share on other pairs is a change of none on the mean and of much in the pairs.
    low, high = conflict_arms.change(answers(~HALF), base, ["list"])[1:]
    assert low < -0.2 < 0.2 < high
    assert conflict_arms.against(after, [base, base], ["list"])[0] == pytest.approx(0.25)
    assert conflict_arms.perplexity_ratio(prose(2.1), prose(2.0)) == pytest.approx((np.exp(0.1),) * 3)


def test_the_table_has_a_row_per_arm_and_group() -> None:
    base, after = answers(HALF), answers(True)
    about = {"focal": {"layers": [3, 4, 7], "trainable_share": 0.01}}
    table = conflict_arms.table(
        {"focal": (after, prose(2.1, 0.9))}, (base, prose(2.0)), {"followed": ["list"], "none": ["json"]}, about
    )
    assert table["arm"].tolist() == ["untrained", "focal"]
    assert table.loc[0, ["change", "low", "high"]].tolist() == [0.0, 0.0, 0.0]
    row = table.iloc[1]
    assert (row["layers"], row["share"], row["conflict"], row["change"]) == ("3–4, 7", 0.01, 1.0, 0.5)
    assert row["same_top"] == pytest.approx(0.9)
    assert row["perplexity"] == pytest.approx(np.exp(0.1))
    assert table.iloc[0]["perplexity"] == 1.0


def test_the_figure_of_arms_has_every_arm_in_order_of_its_gain() -> None:
    rows = [
        {"arm": arm, "layers": layers, "families": group, "conflict": change + 0.3, "change": change}
        | {"low": change - 0.1, "high": change + 0.2, "perplexity": 1.01, "n": n}
        for arm, layers, gains in (
            ("untrained", "–", (0.0, 0.0)),
            ("focal", "3–4", (0.3, 0.1)),
            ("last", "7", (-0.1, 0.0)),
        )
        for group, change, n in zip(("trained", "never trained, followed"), gains, (96, 40), strict=True)
    ]
    drawn = conflict_figures.arms(pd.DataFrame(rows), "tiny")
    trained, never = drawn.data
    assert [name.split(":")[0] for name in drawn.layout.yaxis.ticktext] == ["last", "focal"]
    assert dict(zip(np.round(trained.y), trained.x, strict=True)) == {1: 0.3, 0: -0.1}
    assert list(trained.error_x.array) == pytest.approx([0.2, 0.2])
    assert list(trained.error_x.arrayminus) == pytest.approx([0.1, 0.1])
    assert not set(trained.y) & set(never.y)
    assert [trained.name, never.name] == ["trained (n = 96)", "never trained, followed (n = 40)"]


def test_pairs_that_differ_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="different pairs"):
        conflict_arms.change(answers(True), _fewer(answers(True)), ["list"])


def _fewer(result: Result) -> Result:
    return Result(result.kind, result.frame[result.frame["pair"] != "p3"], result.columns, result.provenance)


def test_an_interval_and_a_test_that_disagree_leave_it_open() -> None:
    rows = [
        {
            "what": "rank correlation",
            "value": 0.1,
            "n": 30,
            "p": 0.6,
            "top": 7,
            "expected": 0.0,
            "low": 0.05,
            "high": 0.2,
        },
        {"what": "shared top", "value": 2, "n": 30, "p": 0.1, "top": 7, "expected": 1.6, "low": np.nan, "high": np.nan},
    ]
    assert conflict_claims.same_layers(pd.DataFrame(rows), "layers").holds is None
