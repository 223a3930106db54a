"""Clusters of methods that agree: average linkage on 1 − agreement.

1. The distance of two methods is 1 − their mean agreement by one measure, between 0 and 2. A method is at distance 0 from
   itself, whatever another seed gives.
2. A pair without a mean (NaN) has no distance. Methods are left out until no such pair is left: first the one with the most
   of them, of equals the last. The parameter "left_out" names them.
3. Average linkage (UPGMA; Sokal & Michener 1958) by scipy: the two clusters with the smallest mean distance over all pairs of
   their members are merged, until one is left.
4. The leaves are ordered so that neighbours are as close as the tree allows (Bar-Joseph et al. 2001); of its two directions
   the one in which the method that comes first in the explanations is nearer to the left.
5. Clusters are those that have been merged at a mean agreement of `threshold` or more, that is at a height up to
   1 − threshold. A measure's chance level is a natural lower bound for a threshold, its ceiling an upper one.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pandas as pd

from interp.agreement.pairs import matrix, used_k
from interp.errors import InputError
from interp.results import Column, Result

CLUSTER_COLUMNS = (
    Column("step", "int32", "index", "0-based order of the merges"),
    Column("left", "int32", "index", "below the number of methods: a method, by leaf order; above: that plus a step"),
    Column("right", "int32", "index", "the cluster that is merged with it, drawn to its right"),
    Column("height", "float64", "1 − agreement", "mean distance of the two clusters' members"),
    Column("size", "int32", "methods", "in the merged cluster"),
    Column("methods", "str", "", "the merged cluster's methods in leaf order, separated by commas"),
)


def clusters(result: Result, measure: str = "kendall", k: int = 0, threshold: float = 0.5) -> Result:
    """Which methods say the same: a tree of the methods, and its clusters at one agreement.

    Args:
        result: of kind "agreement.pairwise_agreement".
        measure: one that it holds.
        k: of a measure at k: one that it holds; 0 where it holds only one.
        threshold: mean agreement, in the measure's own unit, from which on two clusters count as one.

    Returns:
        A `Result` of kind "agreement.clusters" with `CLUSTER_COLUMNS`: one row per merge, one less than methods. Attachments:
        "methods", the methods in leaf order, and "clusters", the cluster of each, numbered from 1 along the leaves.

    Raises:
        InputError: another kind of result, it does not hold the measure or the k, a threshold that is no finite number, or
            fewer than two methods with numbers.

    Example:
        >>> from interp.agreement.pairs import PAIR_COLUMNS
        >>> from interp.results import Provenance
        >>> table = pd.DataFrame({column.name: 0 for column in PAIR_COLUMNS}, index=range(6))
        >>> table = table.assign(measure="kendall", mean=[1, 0.1, 0.8, 1, 0.3, 1])
        >>> table = table.assign(method_a=[*"aaabbc"], method_b=[*"abcbcc"])
        >>> found = clusters(Result("agreement.pairwise_agreement", table, PAIR_COLUMNS, Provenance()))
        >>> found.frame[["methods", "height"]].round(2).values.tolist(), found.attachments["clusters"]
        ([['a, c', 0.2], ['a, c, b', 0.8]], [1, 1, 2])
    """
    from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
    from scipy.spatial.distance import squareform

    start = time.perf_counter()
    if not np.isfinite(threshold):
        raise InputError(f"threshold={threshold}; expected a mean agreement, such as 0.5")
    agreement = matrix(result, measure, k)
    kept, left_out = _with_numbers(agreement)
    if len(kept) < 2:
        held = ", ".join(left_out)
        raise InputError(
            f"no two methods have a mean {measure}; without one are {held}: see n_nan in the table of pairs"
        )
    distance = np.clip(1 - agreement.loc[kept, kept].to_numpy(), 0, 2)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    leaves = leaves_list(tree)
    if leaves[0] > leaves[-1]:  # of the two directions, the one that starts with the earlier method
        leaves, tree[:, :2] = leaves[::-1], tree[:, 1::-1]
    names = [kept[leaf] for leaf in leaves]
    place = {int(leaf): at for at, leaf in enumerate(leaves)}  # a leaf's number along the leaves; merges keep theirs
    found = fcluster(tree, 1 - threshold, "distance")[leaves] if threshold <= 1 else np.arange(len(names))
    labels = {label: at for at, label in enumerate(dict.fromkeys(found.tolist()), start=1)}
    members: list[list[str]] = [[name] for name in names]
    rows = []
    for step, (left, right, height, size) in enumerate(tree):
        one, two = (place.get(int(node), int(node)) for node in (left, right))
        members.append(members[one] + members[two])
        rows.append((step, one, two, height, int(size), ", ".join(members[-1])))
    frame = pd.DataFrame(rows, columns=[column.name for column in CLUSTER_COLUMNS])
    parameters = {
        **result.provenance.parameters,
        "measure": measure,
        "clustered_k": used_k(result, measure, k),
        "linkage": "average",
        "threshold": float(threshold),
        "left_out": left_out,
    }
    provenance = dataclasses.replace(result.provenance, parameters=parameters, wall_time=time.perf_counter() - start)
    attachments = {"methods": names, "clusters": [labels[label] for label in found.tolist()]}
    return Result("agreement.clusters", frame, CLUSTER_COLUMNS, provenance, attachments)


def _with_numbers(agreement: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Step 2: the methods of which every pair has a mean, and those left out, in the table's order."""
    missing = ~np.isfinite(agreement.to_numpy())
    np.fill_diagonal(missing, False)
    kept = list(range(len(missing)))
    while missing[np.ix_(kept, kept)].any():
        counts = missing[np.ix_(kept, kept)].sum(1)
        del kept[len(counts) - 1 - int(np.argmax(counts[::-1]))]
    names = list(agreement.columns)
    return [names[at] for at in kept], [name for at, name in enumerate(names) if at not in kept]
