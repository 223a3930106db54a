"""Train adapters on different layers and measure each on held-out tasks, beside the model as it was.

1. Arms of equal size (`interp.conflict.layer_arms`): the focal layers with the released credit, with the abstract's credit
   and with none, all with two added terms; the published loss and plain DPO without them; layers by patching, random ones,
   the first, the last, and all layers with a smaller rank. Some of them again under another seed.
2. Each is measured on held-out pairs (`follow`), on prose (loss of every text, share of positions with the same top token),
   and by its size. Nothing is chosen on these.
3. Changes are paired: the same pair, or the same text, before and after; intervals are over tasks, or over texts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from interp.batching import Batch, for_each_batch, token_batches
from interp.capture import forward
from interp.conflict import adapted, align, follow
from interp.conflict.adapters import read_adapter
from interp.conflict.follow_summaries import change_interval, follow_summary, obedience_change, share_interval
from interp.conflict.layer_arms import LayerArm, arms
from interp.conflict.pairs import Pair
from interp.results import Column, Provenance, Result, load_result
from interp.reuse import reuse_or_make

PROMPTS = ("system", "agree", "conflict")
PROSE_COLUMNS = (
    Column("text", "int32", "index", "0-based index of the text"),
    Column("n_tokens", "int32", "tokens", "predictions of the text: its tokens but the first"),
    Column("nll", "float64", "nats", "mean loss of a prediction"),
    Column("same_top", "float64", "share", "predictions whose most likely token is the untrained model's"),
)


@dataclass(frozen=True)
class ArmKind:
    """What is trained in an arm.

    Attributes:
        layers: "focal", "patched", "random-0" …, see `chosen_layers`.
        credit: of `align`.
        bare: without the two terms that the others add to the published loss: the chosen answer's own loss, and anchors.
        seed: of the adapter's first values and of the order of pairs.
    """

    layers: str
    credit: str = "reward"
    bare: bool = False
    seed: int = 0


ARMS: dict[str, ArmKind] = {
    "focal": ArmKind("focal"),
    "focal, attention credit": ArmKind("focal", "attention"),
    "focal, no credit": ArmKind("focal", "none"),
    "focal, as published": ArmKind("focal", bare=True),
    "focal, plain DPO": ArmKind("focal", "none", bare=True),
    "random 0": ArmKind("random-0"),
    "random 1": ArmKind("random-1"),
    "random 2": ArmKind("random-2"),
    "patched": ArmKind("patched"),
    "first": ArmKind("first"),
    "last": ArmKind("last"),
    "all": ArmKind("all"),
}
ARMS |= {f"{name}, seed 1": replace(ARMS[name], seed=1) for name in ("focal", "random 0", "patched", "all")}
WITHOUT = {"likelihood": 0.0, "anchors": ()}  # a bare arm's
# What arms that are compared must have in common; the bare ones differ in the last three by design.
RECIPE = ("pairs", "validation", "settings", "n_steps", "beta", "likelihood", "anchors", "anchor_weight")


def chosen_layers(model: Any, layers: Sequence[int], patched: Sequence[int], n_random: int = 3) -> dict[str, LayerArm]:
    """Layers and ranks of every arm: focal by drift, as many by patching, and those to compare with."""
    return {**arms(model, layers, n_random=n_random), "patched": arms(model, patched, n_random=0)["focal"]}


def train_arm(
    model: Any,
    out: Path,
    name: str,
    preferences: Result,
    validation: Result,
    layers: Mapping[str, LayerArm],
    heads: Sequence[tuple[int, int]],
    **settings: Any,
) -> Path:
    """Train one arm, or find that it is trained; returns the adapter's folder."""
    kind = ARMS[name]
    if kind.bare:
        settings |= WITHOUT
    arm = layers[kind.layers]
    align(
        model,
        preferences,
        arm.layers,
        out=out / folder_name(name),
        validation=validation,
        heads=heads if kind.credit == "attention" else None,
        credit=kind.credit,
        rank=arm.rank,
        lora_alpha=arm.lora_alpha,
        measured=out / "measured",  # the reference model is the same in every arm
        seed=kind.seed,
        **settings,
    )
    return out / folder_name(name) / "adapter"


def folder_name(name: str) -> str:
    """An arm's folder."""
    return name.replace(", ", "-").replace(" ", "-")


def measure(
    model: Any,
    out: Path,
    name: str,
    pairs: Sequence[Pair],
    prose: Sequence[str],
    adapter: Path | None,
    template: str | None = None,
) -> tuple[Result, Result]:
    """An arm's answers to the held-out pairs and its losses on prose; the untrained model's where there is no adapter."""
    place = out / folder_name(name)
    reference = _top_tokens(model, prose)

    def both() -> tuple[Result, Result]:
        answers = follow(model, pairs, PROMPTS, template=template, out=place / "follow", progress=f"{name}: answers")
        losses = reuse_or_make(
            place / "prose.parquet",
            lambda: _prose(model, prose, reference),
            fingerprint=model.fingerprint,
            parameters={"texts": digest(prose)},
        )
        return answers, losses

    if adapter is None:
        return both()
    with adapted(model, adapter):
        return both()


def measured(out: Path, name: str) -> tuple[Result, Result] | None:
    """What `measure` left, if it ran to its end."""
    place = out / folder_name(name)
    if not (place / "prose.parquet").exists():
        return None
    return load_result(place / "follow"), load_result(place / "prose.parquet")


def trained(out: Path, name: str, fingerprint: str) -> dict[str, Any] | None:
    """What an arm's adapter says about itself (layers, trainable_share …); `None` without one, or with another model's."""
    adapter = out / folder_name(name) / "adapter"
    if not adapter.exists():
        return None
    record = read_adapter(adapter)
    return record["attachments"] if record.get("fingerprint") == fingerprint else None


def recipe(out: Path, name: str) -> dict[str, Any]:
    """How an arm was trained, of what arms must have in common to be compared."""
    parameters = read_adapter(out / folder_name(name) / "adapter")["parameters"]
    own = RECIPE[:-3] if ARMS[name].bare else RECIPE
    return {key: parameters.get(key) for key in own}


def comparable(out: Path, names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(arms trained by one recipe, {other arm: in what it differs}); the recipe is that of the first that is not bare."""
    found: list[str] = []
    others: dict[str, str] = {}
    first = next((name for name in names if not ARMS[name].bare), names[0] if names else "")
    for name in names:
        ours, theirs = recipe(out, first), recipe(out, name)
        differ = [key for key in theirs if key in ours and ours[key] != theirs[key]]
        if differ:
            others[name] = ", ".join(differ)
        else:
            found.append(name)
    return found, others


def of_other_prose(found: Mapping[str, tuple[Result, Result]], base: tuple[Result, Result]) -> list[str]:
    """Arms whose losses are of other texts than the untrained model's."""
    texts = [result.provenance.parameters.get("texts") for _, result in (base, *found.values())]
    return [name for name, own in zip(found, texts[1:], strict=True) if own != texts[0]]


def digest(texts: Sequence[str]) -> str:
    """16 hex digits that change with any text."""
    return hashlib.sha256(repr(list(texts)).encode()).hexdigest()[:16]


@torch.no_grad()
def _top_tokens(model: Any, texts: Sequence[str]) -> list[np.ndarray]:
    tops: list[np.ndarray] = [np.empty(0)] * len(texts)

    def step(batch: Batch) -> None:
        logits = forward(model, batch.to(model.device)).logits
        for row, text in enumerate(batch.rows):
            tops[text] = logits[row, : int(batch.lengths[row]) - 1].argmax(-1).cpu().numpy()

    for_each_batch(token_batches(model.encode(list(texts)), max_tokens=1024, pad_id=model.pad_id), step)
    return tops


@torch.no_grad()
def _prose(model: Any, texts: Sequence[str], reference: Sequence[np.ndarray]) -> Result:
    encoded = model.encode(list(texts))
    rows: dict[int, dict[str, Any]] = {}

    def step(batch: Batch) -> None:
        logits = forward(model, batch.to(model.device)).logits.float()
        for row, text in enumerate(batch.rows):
            n = int(batch.lengths[row]) - 1
            scores = logits[row, :n].log_softmax(-1).cpu()
            taken = scores.gather(1, torch.tensor(encoded[text][1:])[:, None])[:, 0]
            same = (scores.argmax(-1).numpy() == reference[text]).mean()
            rows[text] = {"text": text, "n_tokens": n, "nll": -float(taken.mean()), "same_top": float(same)}

    for_each_batch(token_batches(encoded, max_tokens=1024, pad_id=model.pad_id), step)
    provenance = Provenance.collect(model, parameters={"texts": digest(texts)})
    return Result("conflict.prose", pd.DataFrame([rows[at] for at in sorted(rows)]), PROSE_COLUMNS, provenance)


def table(
    found: Mapping[str, tuple[Result, Result]],
    base: tuple[Result, Result],
    groups: Mapping[str, Sequence[str]],
    about: Mapping[str, Mapping[str, Any]],
) -> pd.DataFrame:
    """One row per arm and group of families.

    Args:
        found: {arm: (answers, prose)}.
        base: of the untrained model.
        groups: {name: families}.
        about: {arm: what `trained` says}.

    Returns:
        arm, layers, share (of the parameters that are trained), families, conflict, conflict_low, conflict_high (share of
        answers under conflict that obey the system's rule), change, low, high (against the untrained model, pair by pair),
        agree_change, agree_low, agree_high (without conflict), system_change, system_low, system_high (rule in the system turn
        alone), user_wins, undecided, loops (of the answers under conflict, see `follow_summary`), perplexity, perplexity_low,
        perplexity_high (ratio to the untrained model's), same_top, n (pairs).
    """
    rows = []
    for name, (answers, prose) in {"untrained": base, **found}.items():
        facts = about.get(name, {})
        ratio = perplexity_ratio(prose, base[1])
        for group, families in groups.items():
            some = of_families(answers, families)
            under = some[some["prompt"] == "conflict"]
            if under.empty:
                continue
            low, high = share_interval(under["obeys_system"].astype(float), under["task"])
            row = {"arm": name, "layers": spans(facts["layers"]) if facts else "–"}
            row |= {"share": facts.get("trainable_share", 0.0), "families": group}
            row |= {"conflict": under["obeys_system"].mean(), "conflict_low": low, "conflict_high": high}
            for prompt, prefix in (("conflict", ""), ("agree", "agree_"), ("system", "system_")):
                # The untrained model's row is beside itself.
                same = (0.0, 0.0, 0.0)
                mean, low, high = same if answers is base[0] else change(answers, base[0], families, prompt)
                row |= {f"{prefix}change": mean, f"{prefix}low": low, f"{prefix}high": high}
            row |= {"user_wins": under["obeys_user"].mean(), "undecided": 1 - under["decided"].mean()}
            row |= {"loops": under["loops"].mean()}
            row |= dict(zip(("perplexity", "perplexity_low", "perplexity_high"), ratio, strict=True))
            rows.append(row | {"same_top": _weighted(prose, "same_top"), "n": len(under)})
    return pd.DataFrame(rows)


def by_rule(after: Result, before: Result) -> pd.DataFrame:
    """Each rule under conflict before and after training.

    Returns:
        family, rule, before, after (shares of answers that obey it as the system's rule), change, low, high, user_wins,
        undecided, loops (of the answers after), n (pairs).
    """
    rule = ["family", "system_rule"]
    table = obedience_change(before, after, rule).query("prompt == 'conflict'")
    shares = follow_summary(after, rule).query("prompt == 'conflict'").rename(columns={"obeys_user": "user_wins"})
    table = table.merge(shares[[*rule, "user_wins", "undecided", "loops"]], on=rule)
    table = table.rename(columns={"system_rule": "rule"}).drop(columns=["prompt", "n_tasks"])
    return table[[*(name for name in table if name != "n"), "n"]]


def foretold(table: pd.DataFrame, about: Mapping[str, Mapping[str, Any]], by_layer: pd.DataFrame) -> pd.DataFrame:
    """What localisation says of the layers of every arm, beside what it gained; of arms that differ in their layers alone.

    All layers have smaller ranks; arms that differ in their seed are one row, their mean.

    Args:
        table: of `table`, one group of families.
        about: {arm: what `trained` says}.
        by_layer: by layer, columns drift and patching.

    Returns:
        arm, layers, change (under conflict), drift, patching (mean over its layers), in the order of change.
    """
    rows = []
    for row in table.to_dict("records"):
        kind = ARMS.get(row["arm"])
        if kind is None or replace(kind, seed=0) != ArmKind(kind.layers):
            continue
        means = by_layer.loc[list(about[row["arm"]]["layers"])].mean()
        rows.append({name: row[name] for name in ("arm", "layers", "change")} | means[["drift", "patching"]].to_dict())
    found = pd.DataFrame(rows, columns=["arm", "layers", "change", "drift", "patching"])
    found = found.groupby("layers", sort=False, as_index=False).agg(
        {"arm": "first", "layers": "first", "change": "mean", "drift": "first", "patching": "first"}
    )
    return found.sort_values("change", ascending=False, ignore_index=True)


def seeds(
    found: Mapping[str, tuple[Result, Result]], about: Mapping[str, Mapping[str, Any]], families: Sequence[str]
) -> pd.DataFrame:
    """How far an arm's answers under conflict depend on its seed.

    Args:
        found: {arm: (answers, prose)}.
        about: {arm: what `trained` says}; an arm on other layers is not the same arm.
        families: whose answers.

    Returns:
        arm, seed, difference, low, high (share of answers that obey the system's rule, this seed − seed 0, pair by pair, with
        an interval over tasks).
    """
    rows = []
    for name in found:
        first = next((other for other in found if name != other and ARMS[other] == replace(ARMS[name], seed=0)), None)
        if first is not None and about[name]["layers"] == about[first]["layers"]:
            ends = against(found[name][0], [found[first][0]], families)
            row = {"arm": first, "seed": ARMS[name].seed}
            rows.append(row | dict(zip(("difference", "low", "high"), ends, strict=True)))
    return pd.DataFrame(rows)


def of_families(answers: Result, families: Sequence[str]) -> pd.DataFrame:
    """The rows of some families."""
    return answers.frame[answers.frame["family"].astype(str).isin(list(families))]


def change(
    after: Result, before: Result, families: Sequence[str], prompt: str = "conflict"
) -> tuple[float, float, float]:
    """How many more answers obey the system's rule than before, pair by pair: mean, low, high over tasks."""
    return against(after, [before], families, prompt)


def against(
    ours: Result, others: Sequence[Result], families: Sequence[str], prompt: str = "conflict"
) -> tuple[float, float, float]:
    """How many more answers obey than in the mean of other arms, pair by pair: mean, low, high over tasks.

    The arms are taken as they are: another seed, or other random layers, would give other arms.
    """
    first, *rest = [
        frame[frame["prompt"] == prompt].set_index("pair")
        for frame in (of_families(result, families) for result in (ours, *others))
    ]
    if any(set(frame.index) != set(first.index) for frame in rest):
        raise ValueError("the arms were measured on different pairs")
    if first.empty:
        return math.nan, math.nan, math.nan
    mean = np.mean([frame["obeys_system"].reindex(first.index).to_numpy(float) for frame in rest], axis=0)
    difference = first["obeys_system"].astype(float) - mean
    return float(difference.mean()), *change_interval(difference, first["task"])


def perplexity_ratio(after: Result, before: Result, seed: int = 0) -> tuple[float, float, float]:
    """Perplexity after by perplexity before: ratio, low, high, bootstrap over texts.

    Raises:
        ValueError: they were measured on different texts.
    """
    if after.provenance.parameters.get("texts") != before.provenance.parameters.get("texts"):
        raise ValueError("the two were measured on different texts")
    tokens = after.frame["n_tokens"].to_numpy(float)
    change_ = (after.frame["nll"] - before.frame["nll"]).to_numpy() * tokens
    n = len(tokens)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=2000)
    low, high = np.quantile(np.exp((counts @ change_) / (counts @ tokens)), [0.025, 0.975])
    return math.exp(change_.sum() / tokens.sum()), float(low), float(high)


def spans(numbers: Sequence[int]) -> str:
    """Numbers as ranges.

    Example:
        >>> spans([3, 4, 5, 9])
        '3–5, 9'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _weighted(prose: Result, column: str) -> float:
    return float(np.average(prose.frame[column], weights=prose.frame["n_tokens"]))
