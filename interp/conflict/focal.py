"""Focal heads and layers: which of them drift under conflict, beyond what rewording does, and how sure that is.

1. Each measure's mean over pairs is scaled by its range over all heads in the conflict contrast; the weighted sum is the
   published score S (`interp.conflict.drift`). The score is linear in the pairs, so every pair has one in either contrast
   on this scale.
2. Excess = conflict − control, pair by pair: drift that the control (a paraphrase, or another demand) does not explain.
3. The unit is the task: pairs of one task are not independent. Intervals draw tasks with replacement; the permutation test
   exchanges the labels conflict and control of all pairs of a task at once; q is Benjamini & Hochberg's over all heads,
   or all layers. The scale is taken as it is in both.
4. Focal heads: the top share (10 %) by excess, or by the published score. A layer's score is the mean over its heads, D =
   mean_h S; focal layers are the smallest set that holds half of the focal heads ("half"), or those with D > μ + σ over
   layers ("sigma").

S, D, the top share and the two rules are FocalLoRA's (public code of the group of Wan et al., arXiv 2509.23188); control,
tests and intervals are ours. Whether the choice holds up: `interp.conflict.focal_checks`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from interp.conflict.drift import MEASURES, combine, pooled_direction, ranges
from interp.conflict.localization import CONFLICT, KIND
from interp.errors import InputError
from interp.intervals import bootstrap_mean_clustered, false_discovery, paired_permutation_test
from interp.results import Result

SCORES = ("excess", "score", "score_pooled")
RULES = ("half", "sigma")


@dataclass(frozen=True)
class Drifts:
    """A localisation's measures as arrays.

    Attributes:
        values: (pair, contrast, layer, head, measure), contrasts: the conflict and its control; measures: `MEASURES`.
        norms: (prompt, pair, layer, head) Euclidean norms of the consistent and the conflicting prompt's attention.
        tasks: (pair,) ids.
        families: (pair,) names.
        layers, heads: their numbers.
    """

    values: np.ndarray
    norms: np.ndarray
    tasks: np.ndarray
    families: np.ndarray
    layers: np.ndarray
    heads: np.ndarray


def drifts(result: Result) -> Drifts:
    """The measures of what `localize` gave, also after rows of some pairs were taken out.

    Raises:
        InputError: another kind of result, no row, or a pair without all contrasts, layers and heads.
    """
    if result.kind != KIND:
        raise InputError(f"a result of kind {result.kind!r}; expected {KIND!r}, what interp.conflict.localize gives")
    frame = result.frame
    if frame.empty:
        raise InputError("the result has no row; expected those of at least one pair")
    _, first, pair = np.unique(frame["pair"].cat.codes.to_numpy(), return_index=True, return_inverse=True)
    layers, layer = np.unique(frame["layer"].to_numpy(), return_inverse=True)
    heads, head = np.unique(frame["head"].to_numpy(), return_inverse=True)
    contrast = (frame["contrast"].astype(str) != CONFLICT).to_numpy().astype(int)
    at = (pair, contrast, layer, head)
    shape = (len(first), 2, len(layers), len(heads))
    values, norms = np.full((*shape, len(MEASURES)), np.nan), np.full((2, *shape), np.nan)
    for index, name in enumerate(MEASURES):
        values[(*at, index)] = frame[f"delta_{name}"].to_numpy()
    for index, name in enumerate(("consistent_norm", "compared_norm")):
        norms[(index, *at)] = frame[name].to_numpy()
    if np.isnan(values).any() or len(frame) != np.prod(shape):
        raise InputError(
            "a pair lacks some of the contrasts, layers or heads, or has them twice; keep or drop whole pairs"
        )
    texts = frame.iloc[first]
    tasks, families = (texts[name].astype(str).to_numpy() for name in ("task", "family"))
    return Drifts(values, norms[:, :, 0], tasks, families, layers, heads)


def head_scores(
    result: Result,
    *,
    score: str = "excess",
    share: float = 0.1,
    n_resamples: int = 2000,
    level: float = 0.95,
    n_permutations: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """Every head's drift, control and excess.

    Args:
        result: what `localize` gave.
        score: what makes a head focal: "excess", "score", or "score_pooled".
        share: of heads that are focal.
        n_resamples, level: of the bootstrap over tasks.
        n_permutations: of the permutation test.
        seed: of both.

    Returns:
        One row per layer and head: delta_mag, delta_dir, delta_dist (means over pairs, conflict contrast), score (S),
        score_pooled (S with the published pooled direction), control (the control's contrast on the same scale), excess (score
        − control), low, high (its interval), p, q, n_pairs, n_tasks, focal, focal_published (top share by score_pooled).
        Interval and p need two tasks.

    Raises:
        InputError: see `drifts`; an unknown score, or a share outside (0, 1].
    """
    check_choice(score, share)
    found = drifts(result)
    numbers, scored = _head_means(found)
    excess = scored[:, 0] - scored[:, 1]
    layer, head = np.indices(excess.shape[1:])
    columns = {**numbers, **_uncertainty(excess, found.tasks, n_resamples, level, n_permutations, seed)}
    return pd.DataFrame(
        {
            "layer": found.layers[layer].ravel(),
            "head": found.heads[head].ravel(),
            **{name: values.ravel() for name, values in columns.items()},
            "n_pairs": len(found.tasks),
            "n_tasks": len(set(found.tasks)),
            "focal": top_heads(numbers[score], share).ravel(),
            "focal_published": top_heads(numbers["score_pooled"], share).ravel(),
        }
    )


def layer_scores(
    result: Result,
    *,
    score: str = "excess",
    share: float = 0.1,
    n_resamples: int = 2000,
    level: float = 0.95,
    n_permutations: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """Every layer's drift, control and excess: means over its heads.

    Args: as `head_scores`.

    Returns:
        One row per layer: score (D, published), score_low, score_high, control, control_low, control_high, excess, low, high,
        p, q, n_heads, n_focal_heads, n_pairs, n_tasks, focal (rule "half"), focal_sigma (rule "sigma").

    Raises:
        InputError: see `head_scores`.
    """
    check_choice(score, share)
    found = drifts(result)
    numbers, of_heads = _head_means(found)
    scored = of_heads.mean(-1)  # (pair, contrast, layer)
    excess = scored[:, 0] - scored[:, 1]
    columns: dict[str, np.ndarray] = {"layer": found.layers}
    # The scale is the heads': D is the mean of its heads' scores.
    for index, name in enumerate(("score", "control")):
        ends = bootstrap_mean_clustered(scored[:, index], found.tasks, n_resamples, level, seed)
        columns |= {name: scored[:, index].mean(0), f"{name}_low": ends[0], f"{name}_high": ends[1]}
    columns |= {"excess": excess.mean(0), **_uncertainty(excess, found.tasks, n_resamples, level, n_permutations, seed)}
    focal, means = top_heads(numbers[score], share), numbers[score].mean(1)
    return pd.DataFrame(
        {
            **columns,
            "n_heads": focal.shape[1],
            "n_focal_heads": focal.sum(1),
            "n_pairs": len(found.tasks),
            "n_tasks": len(set(found.tasks)),
            "focal": half_layers(focal, means),
            "focal_sigma": sigma_layers(means),
        }
    )


def focal_heads(result: Result, *, score: str = "excess", share: float = 0.1) -> list[tuple[int, int]]:
    """(layer, head) of the focal heads, largest first.

    Args and Raises as `head_scores`.
    """
    check_choice(score, share)
    found = drifts(result)
    values = _head_means(found)[0][score]
    layers, heads = np.nonzero(top_heads(values, share))
    order = np.argsort(-values[layers, heads], kind="stable")
    return [(int(found.layers[layers[at]]), int(found.heads[heads[at]])) for at in order]


def focal_layers(result: Result, *, rule: str = "half", score: str = "excess", share: float = 0.1) -> list[int]:
    """The focal layers, in order: where attention drifts most, which need not be where the conflict is settled.

    On SmolLM2-135M another demand moves attention further than the conflict does (`localize`, `control="other"`);
    `interp.conflict.restoring_layers` chooses by patching, which changes the answer.

    Args:
        result: what `localize` gave.
        rule: "half" or "sigma"; no layer may pass "sigma".
        score, share: as `head_scores`.

    Raises:
        InputError: see `head_scores`; an unknown rule.
    """
    check_rule(rule)
    check_choice(score, share)
    found = drifts(result)
    values = _head_means(found)[0][score]
    chosen = choose_layers(top_heads(values, share), values.mean(1), rule)
    return [int(layer) for layer in found.layers[chosen]]


def top_heads(scores: np.ndarray, share: float) -> np.ndarray:
    """(layer, head) whether it is among the top share, at least one; of equal heads the first is taken."""
    n = max(1, round(share * scores.size))
    chosen = np.zeros(scores.size, dtype=bool)
    chosen[np.argsort(-scores.ravel(), kind="stable")[:n]] = True
    return chosen.reshape(scores.shape)


def half_layers(focal: np.ndarray, layer_means: np.ndarray) -> np.ndarray:
    """(layer,) the smallest set of layers that holds half of the focal heads; of equal ones, those with the higher mean.

    Args:
        focal: (layer, head) which heads are focal.
        layer_means: (layer,) D.
    """
    counts = focal.sum(1)
    order = np.lexsort((-layer_means, -counts))
    held = np.cumsum(counts[order])
    n = int(np.searchsorted(held, counts.sum() / 2)) + 1
    return np.isin(np.arange(len(counts)), order[:n])


def sigma_layers(layer_means: np.ndarray) -> np.ndarray:
    """(layer,) whether D > μ + σ, over all layers."""
    return layer_means > layer_means.mean() + layer_means.std()


def choose_layers(focal: np.ndarray, layer_means: np.ndarray, rule: str) -> np.ndarray:
    """(layer,) the focal layers by one of `RULES`."""
    return half_layers(focal, layer_means) if rule == "half" else sigma_layers(layer_means)


def check_choice(score: str, share: float, scores: tuple[str, ...] = SCORES) -> None:
    """Refuses an unknown score or an impossible share."""
    if score not in scores:
        raise InputError(f"score={score!r}; expected one of {', '.join(scores)}")
    if not 0 < share <= 1:
        raise InputError(f"share={share}; expected a share of the heads above 0 and at most 1, such as 0.1")


def check_rule(rule: str) -> None:
    """Refuses an unknown rule."""
    if rule not in RULES:
        raise InputError(f"rule={rule!r}; expected one of {', '.join(RULES)}")


def _head_means(found: Drifts) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(layer, head) means over pairs by name, and the (pair, contrast, layer, head) scores."""
    means, direction = found.values.mean(0), MEASURES.index("dir")  # (contrast, layer, head, measure)
    scored = combine(found.values, *ranges(means[0]))
    pooled = means[0].copy()
    pooled[..., direction] = pooled_direction(found.values[:, 0, ..., direction], found.norms[0], found.norms[1])
    score, control = scored.mean(0)
    numbers = {f"delta_{name}": means[0, ..., index] for index, name in enumerate(MEASURES)}
    numbers |= {
        "score": score,
        "score_pooled": combine(pooled, *ranges(pooled)),
        "control": control,
        "excess": score - control,
    }
    return numbers, scored


def _uncertainty(
    excess: np.ndarray, tasks: np.ndarray, n_resamples: int, level: float, n_permutations: int, seed: int
) -> dict[str, np.ndarray]:
    """low, high, p and q of the mean over pairs of (pair, …) excesses."""
    low, high = bootstrap_mean_clustered(excess, tasks, n_resamples, level, seed)
    names, at = np.unique(tasks, return_inverse=True)
    sums = np.zeros((len(names), *excess.shape[1:]))
    np.add.at(sums, at, excess)
    p = paired_permutation_test(sums, n_permutations, seed)
    return {"low": low, "high": high, "p": p, "q": false_discovery(p)[0]}
