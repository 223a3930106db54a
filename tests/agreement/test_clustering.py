"""Clusters of methods against average linkage written out, planted groups and pairs without a mean."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from interp import load_result
from interp.agreement import clusters
from interp.agreement.clustering import CLUSTER_COLUMNS
from interp.agreement.pairs import PAIR_COLUMNS
from interp.errors import InputError
from interp.results import Provenance, Result


def table(square: np.ndarray, names: list[str], measure: str = "kendall", k: int = 0) -> Result:
    """A symmetric matrix of mean agreements as what pairwise_agreement gives."""
    rows = [
        {"measure": measure, "k": k, "method_a": names[i], "method_b": names[j], "mean": square[i, j]}
        for i in range(len(names))
        for j in range(i, len(names))
    ]
    frame = pd.DataFrame(rows)
    for side in ("method_a", "method_b"):
        frame[side] = pd.Categorical(frame[side], names)
    for column in PAIR_COLUMNS:
        if column.name not in frame:
            frame[column.name] = 0
    return Result("agreement.pairwise_agreement", frame, PAIR_COLUMNS, Provenance(parameters={"level": 0.95}))


def random_square(seed: int, n: int) -> np.ndarray:
    random = np.random.default_rng(seed).uniform(-1, 1, size=(n, n))
    return (random + random.T) / 2


def upgma(distance: np.ndarray) -> list[tuple[frozenset[int], float]]:
    """Every merge: the members and the mean distance over all pairs across the two clusters."""
    groups = [frozenset([at]) for at in range(len(distance))]
    merges = []
    while len(groups) > 1:
        height, one, two = min(
            ((np.mean([distance[i, j] for i in a for j in b]), a, b) for a, b in combinations(groups, 2)),
            key=lambda entry: entry[0],
        )
        groups = [group for group in groups if group not in (one, two)] + [one | two]
        merges.append((one | two, float(height)))
    return merges


@pytest.mark.parametrize("seed", range(4))
def test_merges_are_average_linkage(seed: int) -> None:
    names = [f"m{at}" for at in range(7)]
    square = random_square(seed, 7)
    found = clusters(table(square, names))
    assert found.columns == CLUSTER_COLUMNS
    leaves = found.attachments["methods"]
    members = [{name} for name in leaves]
    merges = upgma(1 - square)
    assert len(found.frame) == len(merges) == 6
    for row, (by_hand, height) in zip(found.frame.itertuples(), merges, strict=True):
        together = members[row.left] | members[row.right]
        members.append(together)
        assert together == {names[at] for at in by_hand}
        assert row.height == pytest.approx(height)
        assert row.size == len(together)
        listed = row.methods.split(", ")
        start = leaves.index(listed[0])
        assert leaves[start : start + row.size] == listed  # neighbours along the leaves
        assert set(listed[: len(members[row.left])]) == members[row.left]  # the left one is drawn left
    assert names.index(leaves[0]) < names.index(leaves[-1])


def test_planted_groups_and_the_threshold() -> None:
    names = ["rollout", "ig", "shap", "raw", "lime", "random"]
    groups = [0, 1, 1, 0, 1, 2]
    square = np.array([[0.8 if one == two else 0.1 for two in groups] for one in groups])
    square[0, 0] = 0.2  # what another seed gives does not move a method from itself
    result = table(square, names)
    found = clusters(result, threshold=0.8)  # reached exactly
    labels = dict(zip(found.attachments["methods"], found.attachments["clusters"], strict=True))
    assert labels["ig"] == labels["shap"] == labels["lime"]
    assert labels["rollout"] == labels["raw"]
    assert len({labels["ig"], labels["rollout"], labels["random"]}) == 3
    assert list(dict.fromkeys(found.attachments["clusters"])) == [1, 2, 3]  # numbered along the leaves
    assert found.frame["height"].tolist() == pytest.approx([0.2, 0.2, 0.2, 0.9, 0.9])
    for threshold, n_clusters in ((0.81, 6), (0.11, 3), (0.09, 1), (-1, 1), (1.5, 6)):
        assert len(set(clusters(result, threshold=threshold).attachments["clusters"])) == n_clusters
    assert found.provenance.parameters["threshold"] == 0.8
    assert found.provenance.parameters["level"] == 0.95


def test_agreement_of_minus_one_is_at_distance_two() -> None:
    found = clusters(table(np.array([[1.0, -1.0], [-1.0, 1.0]]), ["a", "b"]))
    assert found.frame[["step", "left", "right", "height", "size"]].values.tolist() == [[0, 0, 1, 2, 2]]


def test_methods_without_numbers_are_left_out_and_named() -> None:
    names = ["a", "b", "constant", "c", "d"]
    square = random_square(1, 5)
    square[2, :] = square[:, 2] = np.nan
    square[1, 4] = square[4, 1] = np.nan  # one more pair: the later method goes
    square[0, 0] = np.nan  # no second seed: no reason to leave it out
    found = clusters(table(square, names))
    assert found.provenance.parameters["left_out"] == ["constant", "d"]
    assert sorted(found.attachments["methods"]) == ["a", "b", "c"]
    kept = [0, 1, 3]
    by_hand = [height for _, height in upgma(1 - square[np.ix_(kept, kept)])]
    assert found.frame["height"].tolist() == pytest.approx(by_hand)
    assert clusters(table(random_square(1, 5), names)).provenance.parameters["left_out"] == []


def test_a_measure_at_k_and_the_way_to_disk(tmp_path: Path) -> None:
    result = table(random_square(2, 4), list("abcd"), "feature", 3)
    found = clusters(result, "feature", 3)
    assert found.kind == "agreement.clusters"
    assert found.equals(clusters(result, "feature"))
    assert load_result(found.save(tmp_path / "clusters.parquet")).equals(found)
    with pytest.raises(InputError, match="holds k = 3"):
        clusters(result, "feature", 5)


def test_refusals() -> None:
    result = table(random_square(0, 3), list("abc"))
    with pytest.raises(InputError, match="pairwise_agreement gives"):
        clusters(clusters(result))
    with pytest.raises(InputError, match="the table holds kendall"):
        clusters(result, "spearman")
    with pytest.raises(InputError, match="threshold=nan"):
        clusters(result, threshold=float("nan"))
    empty = np.full((3, 3), np.nan)
    with pytest.raises(InputError, match="no two methods have a mean kendall; without one are b, c"):
        clusters(table(empty, list("abc")))
