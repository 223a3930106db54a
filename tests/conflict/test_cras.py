"""CRAS by hand, its intervals, what is refused, interruptions, agreement of judges against other libraries, and the plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.conflict import cras_plots
from interp.conflict.adherence import SCORE_COLUMNS, cras, queries_from_follow
from interp.conflict.answers import FOLLOW_COLUMNS
from interp.conflict.cras_summaries import answers, check_weights, cras_summary
from interp.conflict.judge_agreement import (
    compare_judges,
    kendall_tau,
    resampled_kappas,
    resampled_taus,
    weighted_kappa,
)
from interp.conflict.judges import RoleQuery, RuleJudge, Score
from interp.conflict.pairs import make_pairs
from interp.conflict.rubrics import DIMENSIONS, TEMPLATE, Rubric
from interp.errors import InputError, ModelError, ResourceError, ResultError
from interp.provenance import Provenance
from interp.results import Result, load_result

GOAL, ROLE, KNOWLEDGE, CONSTRAINT = DIMENSIONS
NAN = math.nan


class Given:
    """A judge that gives the four scores that an answer's text lists."""

    writes_rubrics = False

    def __init__(self, name: str = "given", chunk: int = 3, down_after: int = 10**9) -> None:
        self.name, self.chunk, self.left, self.graded = name, chunk, down_after, 0

    def about(self) -> dict[str, Any]:
        return {"kind": "given"}

    def rubrics(self, asked: Any) -> list[Rubric]:
        return [TEMPLATE for _ in asked]

    def scores(self, graded: Any) -> list[dict[str, Score]]:
        if self.left < len(graded):
            raise ResourceError("the judge at http://nowhere cannot be reached: no connection in 5 tries")
        self.left -= len(graded)
        self.graded += len(graded)
        return [
            {name: Score(float(value), "said so") for name, value in zip(DIMENSIONS, query.answer.split(), strict=True)}
            for query, _ in graded
        ]


def query(id: str, answer: str, turn: int = 0, task: str = "Describe rain.", **facts: Any) -> RoleQuery:
    return RoleQuery(id, "Be brief.", task, answer, turn, **facts)


def graded(*queries: RoleQuery, name: str = "given", **options: Any) -> Result:
    return cras(Given(name), queries, progress=False, **options)


def means(result: Result, **options: Any) -> dict[str, float]:
    table = cras_summary(result, (), **options)
    return dict(zip(table["what"], table["mean"], strict=True))


def test_cras_by_hand() -> None:
    result = graded(query("a", "5 4 3 2"), query("b", "1 2 2 1"))
    assert means(result) == {"cras": (14 + 6) / 8, GOAL: 3, ROLE: 3, KNOWLEDGE: 2.5, CONSTRAINT: 1.5}
    weighted = means(result, weights={GOAL: 0.5, CONSTRAINT: 0.5})
    assert weighted["cras"] == pytest.approx((3.5 + 1) / 2)
    table = cras_summary(result, ())
    assert ((table["mean"] - 1) / 4).tolist() == table["mean01"].tolist()
    assert table["n"].tolist() == [2] * 5
    own = graded(query("a", "5 4 3 2"), weights={CONSTRAINT: 1.0})
    assert means(own)["cras"] == 2  # the weights of the run
    assert own.provenance.parameters["weights"] == {GOAL: 0, ROLE: 0, KNOWLEDGE: 0, CONSTRAINT: 1}


def test_turns_are_averaged_before_queries() -> None:
    result = graded(query("a", "1 1 1 1", 0), query("a", "5 5 5 5", 1), query("a", "5 5 5 5", 2), query("b", "1 1 1 1"))
    assert means(result)["cras"] == pytest.approx((11 / 3 + 1) / 2)  # and not 12 / 4
    assert cras_summary(result, ())["n"].tolist() == [2] * 5


def test_missing_scores_scale_the_other_weights_up() -> None:
    result = graded(query("a", "5 nan 3 1"), query("b", "nan nan nan nan"), query("c", "2 2 2 2"))
    table = cras_summary(result, ()).set_index("what")
    assert table.loc["cras", "mean"] == pytest.approx((3 + 2) / 2)
    assert table["n"].to_dict() == {"cras": 2, GOAL: 2, ROLE: 1, KNOWLEDGE: 2, CONSTRAINT: 2}
    assert table["n_missing"].to_dict() == {"cras": 2, GOAL: 1, ROLE: 2, KNOWLEDGE: 1, CONSTRAINT: 1}
    # A dimension without weight is not missed.
    assert cras_summary(result, (), weights={GOAL: 1.0})["n_missing"].iloc[0] == 1
    heavy = means(result, weights={GOAL: 0.5, ROLE: 0.25, KNOWLEDGE: 0.25})
    assert heavy["cras"] == pytest.approx(((0.5 * 5 + 0.25 * 3) / 0.75 + 2) / 2)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(1, 5)] * 4), min_size=1, max_size=6),
    st.lists(st.floats(0.01, 1), min_size=4, max_size=4),
)
def test_cras_lies_between_its_dimensions(scores: list[tuple[float, ...]], raw: list[float]) -> None:
    weights = {name: value / sum(raw) for name, value in zip(DIMENSIONS, raw, strict=True)}
    result = graded(*(query(str(at), " ".join(map(repr, some))) for at, some in enumerate(scores)))
    table, dropped = answers(result, weights=weights)
    assert dropped.empty
    expected = [sum(weights[name] * value for name, value in zip(DIMENSIONS, some, strict=True)) for some in scores]
    assert table["cras"].to_numpy() == pytest.approx(np.array(expected))
    for some, one in zip(scores, table["cras"], strict=True):
        assert min(some) - 1e-9 <= one <= max(some) + 1e-9


def test_groups_and_intervals() -> None:
    random = np.random.default_rng(0)
    some = [
        query(f"{task}{kind}{at}", f"{3 + task % 2 + 0.1 * random.random()} 3 3 3", task=f"Task {task}.", prompt=kind)
        for task in range(8)
        for kind in ("system", "conflict")
        for at in range(5)
    ]
    result = graded(*some)
    table = cras_summary(result, ("prompt",))
    assert table["prompt"].tolist() == ["system"] * 5 + ["conflict"] * 5
    goal = table[table["what"] == GOAL].iloc[0]
    assert (goal["n"], goal["n_tasks"]) == (40, 8)
    assert goal["low"] < goal["mean"] < goal["high"]
    # Two kinds of tasks, 0.5 from the mean: the standard error of 8 tasks, and not of 40 answers (0.08).
    assert (goal["high"] - goal["low"]) / 2 == pytest.approx(1.96 * 0.5 / math.sqrt(8), rel=0.15)
    flat = table[table["what"] == ROLE].iloc[0]
    assert (flat["low"], flat["mean"], flat["high"]) == (3, 3, 3)
    alone = cras_summary(graded(some[0]), ())
    assert alone[["low", "high"]].isna().all(None)  # one task says nothing about others
    again = cras_summary(result, ("prompt",))
    pd.testing.assert_frame_equal(table, again)


@pytest.mark.parametrize("value", ["7", "0", "-3", "inf", "5.01"])
def test_out_of_range_is_kept_and_not_averaged(value: str) -> None:
    result = graded(query("a", f"5 {value} 3 1"), query("b", "2 2 2 2"))
    bad = result.frame[~result.frame["in_range"]]
    assert bad[["query", "dimension", "score"]].astype({"dimension": str}).to_numpy().tolist() == [
        ["a", ROLE, float(value)]
    ]
    with pytest.raises(
        InputError, match=r"judge 'given' answered out of range: 1 of 8 scores.*role_consistency of query 'a'"
    ):
        cras_summary(result)
    with pytest.raises(InputError, match="out of range"):
        compare_judges([result, graded(query("a", "1 1 1 1"), name="other")])
    with pytest.raises(InputError, match="out of range"):
        cras_plots.score(result)
    table = cras_summary(result, (), out_of_range="drop")
    assert table["mean"].tolist() == [2] * 5  # the whole answer is left out
    assert table["n_dropped"].tolist() == [1] * 5
    assert "1 out of range left out" in cras_plots.score(result, out_of_range="drop").layout.title.subtitle.text
    with pytest.raises(InputError, match="out_of_range='keep'"):
        cras_summary(result, out_of_range="keep")


def test_an_unreadable_reply_is_not_a_missing_score() -> None:
    class Unreadable(Given):
        def scores(self, graded: Any) -> list[dict[str, Score]]:
            return [dict.fromkeys(DIMENSIONS, Score(NAN, "?", readable=False)) for _ in graded]

    result = cras(Unreadable(), [query("a", "")], progress=False)
    with pytest.raises(InputError, match="first no readable score"):
        cras_summary(result)
    table = cras_summary(result, ("prompt",), out_of_range="drop")  # which says so, and does not leave the group out
    assert table["mean"].isna().all()
    assert (table["n"].tolist(), table["n_dropped"].tolist()) == ([0] * 5, [1] * 5)
    assert len(cras_plots.score(result, out_of_range="drop").layout.annotations) == 4


def test_judges_that_break_the_contract_are_refused() -> None:
    class Short(Given):
        def scores(self, graded: Any) -> list[dict[str, Score]]:
            return super().scores(graded)[:-1]

    class Three(Given):
        def scores(self, graded: Any) -> list[dict[str, Score]]:
            return [{name: one[name] for name in DIMENSIONS[:3]} for one in super().scores(graded)]

    with pytest.raises(ModelError, match="scores of 0 answers; expected 1"):
        cras(Short(), [query("a", "1 1 1 1")], progress=False)
    with pytest.raises(ModelError, match="no score of 'constraint_compliance' for query 'a'"):
        cras(Three(), [query("a", "1 1 1 1")], progress=False)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"charm": 1.0}, "weights have 'charm'"),
        ({GOAL: 0.5}, "sum 0.5"),
        ({GOAL: 1.5, ROLE: -0.5}, "not negative"),
        ({GOAL: NAN}, "not negative"),
    ],
)
def test_weights_are_checked(weights: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cras(Given(), [query("a", "1 1 1 1")], weights=weights, progress=False)
    assert sum(check_weights(None).values()) == 1


def test_queries_are_checked_before_the_judge() -> None:
    judge = Given()
    for wrong, message in (
        ([], "no answers"),
        ([query("a", "1 1 1 1")] * 2, "query 'a' has turn 0 twice"),
        (["a"], "is no RoleQuery"),
    ):
        with pytest.raises(InputError, match=message):
            cras(judge, wrong, progress=False)  # type: ignore[arg-type]
    assert judge.graded == 0
    with pytest.raises(InputError, match="by='colour'"):
        cras_summary(graded(query("a", "1 1 1 1")), ("colour",))
    with pytest.raises(InputError, match=r"kind 'sinks\.scan'"):
        cras_summary(Result("sinks.scan", graded(query("a", "1 1 1 1")).frame, SCORE_COLUMNS, Provenance()))


def test_a_judge_that_is_down_keeps_what_it_graded(tmp_path: Path) -> None:
    some = [query(str(at), f"{1 + at % 5} 2 3 4") for at in range(8)]
    whole = graded(*some)
    with pytest.raises(
        ResourceError, match=r"cannot be reached.*6 of 8 answers are graded and kept in run; run the same again"
    ):
        cras(Given(down_after=7), some, out=tmp_path / "run", progress=False)
    with pytest.raises(ResultError, match="unfinished"):
        load_result(tmp_path / "run")
    up = Given()
    found = cras(up, some, out=tmp_path / "run", progress=False)
    assert up.graded == 2
    assert found.equals(whole)
    assert load_result(tmp_path / "run").equals(whole)
    # Without a folder the same again begins anew.
    with pytest.raises(ResourceError, match=r"6 of 8 answers are graded and lost; give out= a folder to keep them$"):
        cras(Given(down_after=7), some, progress=False)
    with pytest.raises(ResourceError, match=r"0 of 8 answers are graded yet; give out= a folder to keep what will be$"):
        cras(Given(down_after=0), some, progress=False)
    with pytest.raises(ResourceError, match=r"0 of 8 answers are graded yet; run the same again to go on$"):
        cras(Given(down_after=0), some, out=tmp_path / "other", progress=False)
    other = [*some[:-1], query("7", "1 1 1 1")]
    with pytest.raises(ResultError, match="holds another run"):
        cras(Given(), other, out=tmp_path / "run", progress=False)


def test_rows_say_what_was_graded_by_what(tmp_path: Path) -> None:
    result = graded(query("a", "1 2 3 4", family="case", prompt="conflict", model="m"))
    assert result.frame["dimension"].astype(str).tolist() == list(DIMENSIONS)
    row = result.frame.iloc[1]
    assert row["rubric"] == TEMPLATE.text(ROLE)
    assert (row["role"], row["task"], row["answer"], row["family"], row["model"]) == (
        "Be brief.", "Describe rain.", "1 2 3 4", "case", "m",
    )  # fmt: skip
    assert row["justification"] == "said so"
    assert load_result(result.save(tmp_path / "scores.parquet")).equals(result, check_provenance=True)
    odd = RoleQuery("b", "Be brief.", "Ask \ud83d.", "rain \udc00")  # halves of surrogate pairs
    assert cras(RuleJudge(), [odd], progress=False).frame["answer"].iloc[0] == "rain ?"


def followed(pairs: Any, prompts: Any = ("none", "system", "conflict")) -> Result:
    same = ("family", "system_rule", "user_rule", "wording", "setting")
    verdict = {"part": "held-out", "n_tokens": 3, "obeys_system": False, "obeys_user": False, "reason": ""}
    verdict |= {"decided": True, "loops": False}
    rows = [
        {name: getattr(pair, name) for name in same}
        | {"pair": pair.id, "task": pair.task.id, "prompt": prompt, "answer": f"RAIN {prompt}"}
        | {"finished": prompt == "system", **verdict}
        for pair in pairs
        for prompt in prompts
    ]
    frame = pd.DataFrame(rows)
    extra = {column.name for column in FOLLOW_COLUMNS} - set(frame)
    assert not extra
    return Result("conflict.follow", frame, FOLLOW_COLUMNS, Provenance(model="answerer"))


def test_queries_of_a_table_of_answers() -> None:
    pairs = make_pairs("held-out", 4, families=["case"], setting="peer")
    found = queries_from_follow(followed(pairs), pairs)
    assert [(one.prompt, one.finished) for one in found[:2]] == [
        ("system", True),
        ("conflict", False),
    ]  # "none" has no role
    for one, pair in zip(found[1::2], pairs, strict=True):
        assert one.role == pair.prompts["conflict"][0].content
        assert (one.task, one.system_rule, one.user_rule, one.setting) == (
            pair.task.text, pair.system_rule, pair.user_rule, "peer",
        )  # fmt: skip
        assert one.answer == "RAIN conflict"
        assert one.model == "answerer"
    assert len({one.id for one in found}) == 8
    assert queries_from_follow(followed(pairs), pairs, prompts=["conflict"], model="tuned")[0].model == "tuned"
    result = cras(RuleJudge(), found, progress=False)
    assert means(result)[KNOWLEDGE] != means(result)[KNOWLEDGE]  # missing


def test_tables_that_hold_nothing_to_grade() -> None:
    pairs = make_pairs("held-out", 2, families=["case"])
    table = followed(pairs)
    for options, message in (
        ({"prompts": ["none"]}, "'none' has no system turn"),
        ({"prompts": ["noon"]}, "'noon' is unknown"),
        ({"prompts": ["agree"]}, "no answer to agree; it has answers to none, system, conflict"),
    ):
        with pytest.raises(InputError, match=message):
            queries_from_follow(table, pairs, **options)
    with pytest.raises(InputError, match="is not among the 1 pairs given"):
        queries_from_follow(table, pairs[:1])
    with pytest.raises(InputError, match=r"kind 'conflict\.score'"):
        queries_from_follow(graded(query("a", "1 1 1 1")), pairs)


SCORES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=2, max_size=14)


@settings(max_examples=60, deadline=None)
@given(SCORES, st.integers(0, 1000))
def test_resampled_measures_are_those_of_the_drawn_answers(scores: list[tuple[int, int]], seed: int) -> None:
    a, b = (np.array(side, dtype=float) for side in zip(*scores, strict=True))
    drawn = np.random.default_rng(seed).integers(len(a), size=(3, len(a)))
    times = np.stack([np.bincount(row, minlength=len(a)) for row in drawn]).astype(float)
    kappas, taus = resampled_kappas(a, b, times), resampled_taus(a, b, times)
    for row, kappa, tau in zip(drawn, kappas, taus, strict=True):
        assert kappa == pytest.approx(weighted_kappa(a[row], b[row]), abs=1e-9, nan_ok=True)  # scikit-learn
        assert tau == pytest.approx(kendall_tau(a[row], b[row]), abs=1e-9, nan_ok=True)  # scipy


def test_kappa_by_hand() -> None:
    # Squares of the misses 0, 0, 4: 4 observed; every pair of (1, 3, 5) and (1, 3, 3): 4+4+0+0+16+4+4 … / 3.
    a, b = np.array([1.0, 3.0, 5.0]), np.array([1.0, 3.0, 3.0])
    expected = sum((one - other) ** 2 for one in a for other in b) / 3
    assert weighted_kappa(a, b) == pytest.approx(1 - 4 / expected)
    assert weighted_kappa(np.array([1.4, 3.2, 4.6]), b) == weighted_kappa(a, b)  # rounded
    assert math.isnan(weighted_kappa(np.full(4, 3.0), np.full(4, 3.0)))
    assert math.isnan(kendall_tau(np.full(4, 3.0), np.arange(4.0)))
    assert math.isnan(kendall_tau(np.array([1.0]), np.array([1.0])))


def test_agreement_of_judges() -> None:
    random = np.random.default_rng(1)
    truth = random.integers(1, 6, size=(40, 4))
    noise = np.clip(truth + random.integers(-1, 2, size=truth.shape), 1, 5)
    coin = random.integers(1, 6, size=truth.shape)
    names = {"exact": truth, "copy": truth, "noisy": noise, "coin": coin}
    results = [
        graded(*(judged(at, row) for at, row in enumerate(rows)), name=name)
        for name, rows in names.items()
        for judged in [lambda at, row: query(f"q{at}", "{} {} {} {}".format(*row), task=f"Task {at % 20}.")]
    ]
    # The answers differ, since these judges read their scores from them: give all the same digest.
    results = [Result(one.kind, one.frame.assign(digest="x"), one.columns, one.provenance) for one in results]
    table = compare_judges(results, n_resamples=300).set_index(["first", "second", "what"])
    same = table.sort_index().loc[("exact", "copy")]
    assert same[["kappa", "kappa_low", "kappa_high", "tau"]].to_numpy() == pytest.approx(1.0)
    noisy, coins = table.loc[("exact", "noisy", GOAL)], table.loc[("exact", "coin", GOAL)]
    assert noisy["kappa"] == pytest.approx(weighted_kappa(truth[:, 0], noise[:, 0]))
    assert noisy["tau"] == pytest.approx(kendall_tau(truth[:, 0], noise[:, 0]))
    assert 0.6 < noisy["kappa_low"] < noisy["kappa"] < noisy["kappa_high"] < 1
    assert coins["kappa_low"] < 0.1 < 0.6 < noisy["kappa_low"]
    assert coins["tau_low"] < coins["tau"] < coins["tau_high"]
    cras = table.loc[("exact", "noisy", "cras")]
    assert cras["tau"] == pytest.approx(kendall_tau(truth.mean(1), noise.mean(1)))
    assert (table["undefined"] == 0).all()
    assert len(table) == 6 * 5
    weighted = compare_judges([results[0], results[2]], weights={GOAL: 1.0}, n_resamples=50).set_index("what")
    assert weighted.loc["cras", "tau"] == weighted.loc[GOAL, "tau"] == noisy["tau"]


def test_agreement_on_what_both_know() -> None:
    first = graded(query("a", "5 1 nan 5"), query("b", "1 1 nan 1"), query("c", "3 3 nan 3"), query("only", "1 1 1 1"))
    second = graded(query("a", "5 1 2 5"), query("b", "1 1 2 1"), query("c", "3 3 2 3"), name="other")
    second = Result(
        second.kind, second.frame.assign(digest=first.frame["digest"][:12]), second.columns, second.provenance
    )
    table = compare_judges([first, second], n_resamples=50).set_index("what")
    assert table["n"].to_dict() == {"cras": 3, GOAL: 3, ROLE: 3, KNOWLEDGE: 0, CONSTRAINT: 3}
    assert table.loc["cras", "tau"] == 1  # over the three dimensions that both know; with the fourth it would differ
    assert math.isnan(table.loc[KNOWLEDGE, "kappa"])
    assert table.loc[GOAL, ["kappa_low", "kappa_high"]].isna().all()  # one task
    assert table.loc[GOAL, "kappa"] == 1


def test_agreement_refuses() -> None:
    one = graded(query("a", "1 1 1 1"))
    with pytest.raises(InputError, match="1 judges; expected at least two"):
        compare_judges([one])
    with pytest.raises(InputError, match="two results of judge 'given'"):
        compare_judges([one, one])
    with pytest.raises(InputError, match="no answer in common"):
        compare_judges([one, graded(query("b", "1 1 1 1"), name="other")])
    with pytest.raises(InputError, match="different answers under the same id 'a'"):
        compare_judges([one, graded(query("a", "1 1 1 2"), name="other")])
    with pytest.raises(InputError, match="level=2"):
        compare_judges([one, graded(query("a", "1 1 1 1"), name="other")], level=2)


def test_the_plot_draws_the_summary() -> None:
    some = [
        query(f"{kind}{at}", f"{1 + at} 2 nan 4", task=f"Task {at}.", prompt=kind, family="<b>")
        for kind in ("system", "conflict")
        for at in range(4)
    ]
    result = graded(*some)
    drawn = cras_plots.score(result)
    table = cras_summary(result)
    assert [trace.name for trace in drawn.data] == ["system", "conflict"]
    for trace in drawn.data:
        rows = table[(table["prompt"] == trace.name) & (table["n"] > 0)]
        assert list(trace.x) == pytest.approx(rows["mean"].tolist())
        assert trace.x.dtype == np.float32
        assert list(trace.x - trace.error_x.arrayminus) == pytest.approx(rows["low"].tolist(), abs=1e-5)
    assert len({trace.marker.symbol for trace in drawn.data}) == 2
    assert [note.text for note in drawn.layout.annotations] == ["the judge cannot tell"]
    assert "8 of them on fewer dimensions" in drawn.layout.title.subtitle.text
    assert cras_plots.score(result, "family").data[0].name == "&lt;b&gt;"
    with pytest.raises(InputError, match="by='query'"):
        cras_plots.score(result, "query")
