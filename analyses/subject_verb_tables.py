"""Tables and figures of `analyses.subject_verb_flow`: pairs of sentences compared, with intervals over pairs.

1. `paired`: whether the subject is ahead in each of a pair's two sentences, and by how much each noun scores more as
   the subject than at the same position as the attractor.
2. `summary`: means with bootstrap intervals. *Balanced accuracy* is the mean over both sentences of a pair.
3. `halves`: what is chosen on one half of the pairs is measured on the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analyses.subject_verb_sentences import ROLES, Sentence
from interp.errors import InputError
from interp.intervals import bootstrap_mean
from interp.neurons.atlas import wilson
from interp.plotting import PALETTE, REFERENCE, band, figure

KEYS = ["graph", "side", "n_layers", "method", "correction"]
# What the figures show: {name: (graph, method)}, without correction.
LINES = {
    "rollout, contributions": ("contribution", "rollout"),
    "rollout, norm-weighted": ("norm", "rollout"),
    "rollout": ("mean", "rollout"),
    "widest": ("mean", "widest"),
    "raw attention": ("mean", "raw"),
    "exact flow": ("mean", "exact"),
}
# Further columns of the table by kind of sentence.
MORE = {
    "soft": ("mean", "soft"),
    "exact, contributions": ("contribution", "exact"),
    "bound": ("mean", "bound"),
    "blank-out": ("blank-out", "number"),
}


def blank_effects(odds: pd.DataFrame) -> list[np.ndarray]:
    """Per sentence |change of the log-odds| when each token is blanked out, in order.

    Args:
        odds: what `analyses.subject_verb_measures.log_odds` gave.
    """
    rows = odds[odds["replacement"] == "blank"].sort_values(["sentence", "position"])
    return [group["change"].abs().to_numpy() for _, group in rows.groupby("sentence", sort=True)]


def reference(odds: pd.DataFrame, n_layers: int) -> pd.DataFrame:
    """Blank-out as a score: |change of the log-odds| when a noun is replaced, in the columns of `scores`."""
    rows = odds[odds["replacement"].isin(["number", "neutral"])].astype({"replacement": str, "role": str})
    about = ["sentence", "pair", "frame", "order", "congruent", "adjective"]
    rows = rows.assign(change=rows["change"].abs()).rename(columns={"replacement": "method"})
    table = rows.pivot(index=[*about, "method"], columns="role", values="change").reset_index()
    return table.assign(graph="blank-out", side="below", n_layers=n_layers, correction="none", spearman=np.nan)


def paired(frame: pd.DataFrame, keys: Sequence[str] = KEYS) -> pd.DataFrame:
    """One row per score and pair.

    Args:
        frame: rows with the keys, pair, order, frame, congruent, subject and attractor, and maybe spearman.
        keys: what tells scores apart.

    Returns:
        The keys, pair, frame, congruent; first and second: whether the subject is ahead where it is the first or the
        second noun (1, 0, a half for a tie); accuracy, their mean; contrast: mean over the nouns of (subject −
        attractor) / (subject + attractor) at the same position; controlled: whether that is above 0; spearman, mean of
        both sentences.

    Raises:
        InputError: a pair lacks one of its sentences.
    """
    index = [*keys, "pair"]
    columns = ["subject", "attractor", *(["spearman"] if "spearman" in frame else [])]
    first, second = (frame[frame["order"] == order].set_index(index) for order in ("first", "second"))
    if len(first) != len(second) or not first.index.sort_values().equals(second.index.sort_values()):
        raise InputError("some pairs lack the sentence in which the first or the second noun is the subject")
    both = first[["frame", "congruent", *columns]].join(second[columns].add_suffix(" of second"))
    table = both[["frame", "congruent"]].astype({"frame": str})
    table["first"] = ahead(both["subject"], both["attractor"])
    table["second"] = ahead(both["subject of second"], both["attractor of second"])
    table["accuracy"] = (table["first"] + table["second"]) / 2
    rises = (
        relative(both["subject"], both["attractor of second"]),
        relative(both["subject of second"], both["attractor"]),
    )
    table["contrast"] = (rises[0] + rises[1]) / 2
    table["controlled"] = np.where(table["contrast"].abs() < 1e-6, 0.5, table["contrast"] > 0)
    if "spearman" in frame:
        table["spearman"] = both[["spearman", "spearman of second"]].mean(axis=1)
    return table.reset_index()


def ahead(subject: Any, attractor: Any) -> np.ndarray:
    """1 where the subject scores more, 0 where the attractor does, a half where they tie within rounding.

    Example:
        >>> ahead([2.0, 1.0, 1.0], [1.0, 2.0, 1.0 + 1e-9]).tolist()
        [1.0, 0.0, 0.5]
    """
    subject, attractor = np.asarray(subject, float), np.asarray(attractor, float)
    tie = np.isclose(subject, attractor, rtol=1e-6, atol=1e-12)
    return np.where(tie, 0.5, (subject > attractor).astype(float))


def relative(more: Any, less: Any) -> np.ndarray:
    """(more − less) / (more + less); 0 where both are 0.

    Example:
        >>> relative([3.0, 0.0], [1.0, 0.0]).tolist()
        [0.5, 0.0]
    """
    more, less = np.asarray(more, float), np.asarray(less, float)
    total = more + less
    return np.where(total > 0, (more - less) / np.where(total > 0, total, 1.0), 0.0)


def summary(pairs: pd.DataFrame, keys: Sequence[str] = KEYS) -> pd.DataFrame:
    """Means over pairs with bootstrap intervals.

    Args:
        pairs: what `paired` gave.
        keys: what tells scores apart.

    Returns:
        The keys; accuracy, controlled, contrast and spearman, each with its low and high; first, second, n (pairs).
    """
    names = [name for name in ("accuracy", "controlled", "contrast", "spearman") if name in pairs]
    rows = []
    for key, group in pairs.groupby(list(keys), sort=False, observed=True):
        lows, highs = bootstrap_mean(group[names].to_numpy(float))  # the same draws for all of them
        row: dict[str, Any] = dict(zip(keys, key, strict=True))
        for name, low, high in zip(names, lows, highs, strict=True):
            known = group[name].dropna()
            whole = {name: known.mean(), f"{name} low": float(low), f"{name} high": float(high)}
            row |= whole if len(known) == len(group) else with_interval(name, known)
        rows.append(row | {"first": group["first"].mean(), "second": group["second"].mean(), "n": len(group)})
    return pd.DataFrame(rows)


def with_interval(name: str, values: Any) -> dict[str, float]:
    """{name: mean, "name low": …, "name high": …}."""
    values = np.asarray(values, float)
    low, high = bootstrap_mean(values) if len(values) > 1 else (np.nan, np.nan)
    return {name: values.mean() if len(values) else np.nan, f"{name} low": float(low), f"{name} high": float(high)}


def overview(pairs: pd.DataFrame, n_layers: int) -> pd.DataFrame:
    """The scores on the whole depth, each figure with its interval as text."""
    table = summary(pairs[(pairs["n_layers"] == n_layers) & (pairs["side"] == "below")])
    shown = table[["graph", "method", "correction"]].copy()
    shown["balanced accuracy"] = cells(table, "accuracy")
    shown[["subject first", "subject second"]] = table[["first", "second"]]
    shown["controlled"] = cells(table, "controlled")
    ends = ["contrast", "contrast low", "contrast high"]
    shown["contrast, %"] = cells(table[ends] * 100, "contrast", 1)
    shown["spearman"] = cells(table, "spearman")
    return shown


def in_short(pairs: pd.DataFrame, best: pd.DataFrame, n_layers: int) -> pd.DataFrame:
    """The balanced accuracies that answer the question.

    Args:
        pairs: what `paired` gave.
        best: what `analyses.subject_verb_heads.best_heads` gave.
        n_layers: the whole depth.
    """
    whole = summary(
        pairs[(pairs["n_layers"] == n_layers) & (pairs["side"] == "below") & (pairs["correction"] == "none")]
    )
    whole = whole.set_index(["graph", "method"])
    named = {
        "position alone": ("uniform", "exact"),
        "exact flow": ("mean", "exact"),
        "rollout": ("mean", "rollout"),
        "widest path": ("mean", "widest"),
        "raw attention of the top layer": ("mean", "raw"),
        "exact flow on contributions": ("contribution", "exact"),
        "rollout on contributions": ("contribution", "rollout"),
    }
    rows = [whole.loc[[at]].assign(score=name, layers=f"all {n_layers}") for name, at in named.items()]
    rows.append(best.iloc[[0]].assign(score=f"one head: {best['head'][0]}, chosen on other pairs", layers="its own"))
    for name, method in (("a noun without number", "neutral"), ("its other number", "number")):
        rows.append(whole.loc[[("blank-out", method)]].assign(score=f"blank-out by {name}", layers="the model"))
    table = pd.concat(rows, ignore_index=True)
    shown = table[["score", "layers"]].assign(**{"balanced accuracy": cells(table, "accuracy")})
    shown[["subject first", "subject second"]] = table[["first", "second"]]
    return shown.assign(n=table["n"])


def cells(table: pd.DataFrame, name: str, digits: int = 2) -> list[str]:
    """ "mean [low, high]" of each row; – where there is none."""
    found = []
    for middle, low, high in table[[name, f"{name} low", f"{name} high"]].itertuples(index=False):
        ends = "" if np.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]"
        found.append("–" if np.isnan(middle) else f"{middle:.{digits}f}{ends}")
    return found


def accuracies(pairs: pd.DataFrame, n_layers: int, graph: str = "mean", method: str = "exact") -> pd.Series:
    """{pair: balanced accuracy} of one score on the whole depth, without correction."""
    rows = pairs[(pairs["side"] == "below") & (pairs["n_layers"] == n_layers) & (pairs["correction"] == "none")]
    return rows[(rows["graph"] == graph) & (rows["method"] == method)].set_index("pair")["accuracy"]


def halves(pairs: pd.DataFrame, seed: int = 0) -> pd.Series:
    """{pair: whether it is of the half that chooses}: a random half of each frame's pairs."""
    frames = pairs.drop_duplicates("pair").set_index("pair")["frame"].sort_index()
    rng = np.random.default_rng(seed)
    chosen = pd.Series(False, index=frames.index)
    for _, group in frames.groupby(frames):
        chosen[rng.permutation(group.index.to_numpy())[: (len(group) + 1) // 2]] = True
    return chosen


def by_kind(pairs: pd.DataFrame, untouched: pd.DataFrame, n_layers: int) -> pd.DataFrame:
    """Balanced accuracy on the whole depth by frame, and where nouns differ in number or the model is right.

    Args:
        pairs: what `paired` gave.
        untouched: rows of `log_odds` without a replacement.
        n_layers: the whole depth.

    Returns:
        A row per score and a column per kind of pairs, as text with intervals; the last row counts the pairs.
    """
    right = untouched.groupby("pair")["log_odds"].min() > 0
    rows = pairs[(pairs["n_layers"] == n_layers) & (pairs["side"] == "below") & (pairs["correction"] == "none")]
    known = rows["pair"].map(right).astype(bool)
    kinds = {
        "all": rows["pair"] >= 0,
        **{frame: rows["frame"] == frame for frame in rows["frame"].unique()},
        "numbers differ": ~rows["congruent"],
        "model right": known,
        "differ, right": ~rows["congruent"] & known,
    }
    table = []
    for name, (graph, method) in (LINES | MORE).items():
        row: dict[str, Any] = {"score": name}
        for kind, chosen in kinds.items():
            here = rows[chosen & (rows["graph"] == graph) & (rows["method"] == method)]
            row[kind] = cells(pd.DataFrame([with_interval("accuracy", here["accuracy"])]), "accuracy")[0]
        table.append(row)
    counts = {kind: str(rows[chosen]["pair"].nunique()) for kind, chosen in kinds.items()}
    return pd.DataFrame([*table, {"score": "number of pairs", **counts}])


def agreement_table(odds: pd.DataFrame) -> pd.DataFrame:
    """How often the right verb is likelier, and by how many nats each noun's replacement changes its lead."""
    rows = []
    for (order, congruent), group in odds.groupby(["order", "congruent"], observed=True):
        untouched = group[group["replacement"] == "none"]["log_odds"]
        right = int((untouched > 0).sum())
        low, high = wilson(right, len(untouched))
        row = {
            "subject": f"{order} noun",
            "attractor": "same number" if congruent else "other number",
            "model right": f"{right / len(untouched):.3f} [{low:.3f}, {high:.3f}]",
            "lead": untouched.mean(),
        }
        for replacement, name in (("number", "'s number"), ("neutral", " neutral")):
            for role in ROLES:
                chosen = (group["replacement"] == replacement) & (group["role"] == role)
                row[f"Δ {role}{name}"] = -group[chosen]["change"].mean()
        rows.append(row | {"n": len(untouched)})
    return pd.DataFrame(rows)


def examples(sentences: Sequence[Sentence], odds: pd.DataFrame, n: int = 8) -> pd.DataFrame:
    """The first pairs whose nouns differ in number."""
    known = odds[odds["replacement"] == "none"].set_index("sentence")["log_odds"]
    rows = [
        {
            "frame": one.frame,
            "sentence": one.text + " …",
            "subject": one.words[one.noun("subject")],
            "attractor": one.words[one.noun("attractor")],
            "log p(right) − log p(wrong)": known[index],
        }
        for index, one in enumerate(sentences)
        if not one.congruent
    ]
    return pd.DataFrame(rows[:n])


def depth_figure(pairs: pd.DataFrame, side: str, name: str) -> Any:
    """Balanced accuracy against the number of layers, with intervals, beside position alone and blank-out."""
    here = pairs[(pairs["side"] == side) & (pairs["correction"] == "none")]
    where = (
        "in the first layers, from the input" if side == "below" else "in the last layers, from what stands below them"
    )
    drawn = figure(
        f"Does the score find the subject? Routes {where}",
        f"layers from the {'bottom' if side == 'below' else 'top'}",
        "balanced accuracy",
        subtitle=f"{name}, {here['pair'].nunique()} pairs of sentences; ribbons: 95 % over pairs",
    )
    for (label, (graph, method)), color in zip(LINES.items(), reversed(PALETTE[: len(LINES)]), strict=True):
        table = summary(here[(here["graph"] == graph) & (here["method"] == method)]).sort_values("n_layers")
        ends = (table["accuracy low"], table["accuracy high"])
        band(drawn, table["n_layers"], table["accuracy"], *ends, name=label, color=color)
    blank = pairs[(pairs["graph"] == "blank-out") & (pairs["method"] == "number")]["accuracy"].mean()
    references(drawn, {"position alone": 0.5, "blank-out": blank}, lowest=0.3)
    drawn.update_xaxes(range=[0, here["n_layers"].max() * 1.03])
    return drawn


def references(drawn: Any, lines: dict[str, float], lowest: float) -> None:
    """Named horizontal lines, and a common height and range."""
    for (label, height), dash in zip(lines.items(), ("dash", "dot"), strict=False):
        line = {"color": REFERENCE, "dash": dash}
        drawn.add_hline(y=height, line=line, annotation_text=label, annotation_position="bottom left")
    drawn.update_yaxes(range=[lowest, 1.04])
    drawn.update_layout(height=480)
