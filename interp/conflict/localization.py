"""Localise a conflict: how far each head's attention at the last prompt token drifts when system and user disagree.

1. Each pair gives three prompts of one task (`interp.conflict.pairs`): the consistent one, the conflicting one, and a
   control: a paraphrase, which is as consistent as the first, for drift that rewording alone causes; or another demand that
   can be obeyed as well, for drift that any second demand causes.
2. The last token's attention row of every head is reduced to the spans' masses (`interp.conflict.last_rows`).
3. Two contrasts, consistent against conflict and consistent against control, are measured per pair and head
   (`interp.conflict.drift`). Spans are the same pieces in both prompts wherever their tokens are; the published form
   (`align="truncate"`) compares keys by their number, cut to the shortest prompt's length, also where they are of different
   pieces.
4. Scores, tests and focal heads are read off the table without the model: `interp.conflict.focal`.

With `consistent="system"`, as published, the consistent prompt has no user rule: its span is empty there, and drift
includes that a piece was added; the control's contrast, an added rule that agrees, shows how much that is.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from interp.conflict.dialogues import SPANS, Encoded
from interp.conflict.drift import ALIGNMENTS, EPSILON, drift
from interp.conflict.last_rows import LastRows, last_rows
from interp.conflict.pairs import Pair, encode_pair
from interp.errors import InputError
from interp.model import Model
from interp.provenance import Provenance
from interp.recorded_attention import check_causal
from interp.results import Column, Result
from interp.shards import ShardedRun

KIND = "conflict.localize"
CONFLICT, CONTROLS = "conflict", ("paraphrase", "other")
CONSISTENT = ("agree", "system")
_BATCHES = 4  # in a group of pairs: enough that sorting by length saves padding
_KEPT_BYTES = 2**27  # of truncated rows, on the CPU
_KEYS = {
    "pair": "the pair's id",
    "task": "its task's id; pairs of one task are not independent",
    "family": "of the rules",
    "system_rule": "the rule of the system turn",
    "user_rule": "what the conflicting prompt's user or peer asks for",
    "wording": "simple or rich",
    "setting": "user or peer: who contradicts",
}
DRIFT_COLUMNS = (
    *(Column(name, "category", "", meaning) for name, meaning in _KEYS.items()),
    Column("contrast", "category", "", "which prompt is compared with the consistent one"),
    Column("layer", "int16", "layer", "0-based"),
    Column("head", "int16", "head", "0-based"),
    Column("delta_mag", "float32", "attention", "L1 distance of the last token's attention in both prompts"),
    Column("delta_dir", "float32", "1 − cosine", "direction: 1 − cosine of both"),
    Column("delta_dist", "float32", "nats", "distribution: symmetric Kullback–Leibler divergence"),
    Column("consistent_norm", "float32", "attention", "Euclidean norm of what was compared, consistent prompt"),
    Column("compared_norm", "float32", "attention", "the same, compared prompt"),
    *(
        Column(f"{prompt}_{span}", "float32", "attention", f"of the last token on the {span} span, {prompt} prompt")
        for prompt in ("consistent", "compared")
        for span in SPANS
    ),
)


def localize(
    model: Model,
    pairs: Sequence[Pair],
    *,
    align: str = "spans",
    consistent: str = "agree",
    control: str = "paraphrase",
    template: str | None = None,
    max_tokens: int = 4096,
    out: str | Path | None = None,
    progress: bool | str = True,
) -> Result:
    """Attention drift of every head on every pair, with a control.

    Args:
        model: a causal LM with a tokenizer.
        pairs: what `make_pairs` gave, or your own; their ids differ.
        align: "spans" compares the masses of the same spans; "truncate" the first keys by their number, all rows cut to the
            shortest of all prompts (published).
        consistent: what the other prompts are compared with: "agree" (the user repeats the system's rule in other words) or
            "system" (no user rule; published).
        control: "paraphrase" (the user repeats the system's rule in other words still) or "other" (the user asks for something
            else that can be obeyed as well: drift beyond it is not that of any second demand).
        template: see `encode_dialogue`.
        max_tokens: budget of padded tokens in a batch.
        out: a folder; each group of pairs becomes a shard there, and a run that was interrupted goes on where it was.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        Kind "conflict.localize": one row per pair, contrast, layer and head with the three measures and the masses of all
        spans in both prompts. Summaries: `head_scores`, `layer_scores`, `stability`, `middle_layers`.

    Raises:
        InputError: no pair, ids that come twice, an unknown `align`, `consistent` or `control`, an encoder; a pair without
            one of the prompts, whose prompts ask different tasks, whose pieces are not found, or that is longer than the context
            (which pair is said).
        ModelError: attention that is not softmax attention (the layers are named).
        MemoryBudgetError: one prompt alone does not fit.
        ResultError: `out` holds another run.

    Example:
        >>> result = localize(load_model(), make_pairs(n=200))                             # doctest: +SKIP
        >>> focal_heads(result)[:3]                                                        # doctest: +SKIP
        [(14, 3), (17, 8), (12, 0)]
    """
    start = time.perf_counter()
    names, encoded = _encode(model, pairs, align, consistent, control, template)
    lengths = [len(prompt.ids) for trio in encoded for prompt in trio]
    n_keys = min(lengths) if align == "truncate" else 0
    groups = _groups(model, len(pairs), max_tokens, max(lengths), n_keys)
    parameters = {
        "align": align,
        "consistent": consistent,
        "control": control,
        "template": template,
        "n_pairs": len(pairs),
        "n_layers": model.arch.n_layers,
        "n_heads": model.arch.n_heads,
        "n_keys": n_keys or None,
        "tokens": [min(lengths), max(lengths)],
        "prompts": _digest(pairs, encoded),
    }
    provenance = Provenance.collect(model, parameters=parameters)
    run = None if out is None else ShardedRun(out, KIND, DRIFT_COLUMNS, provenance, units=list(groups))
    # One file or one frame per group of pairs: what a pass holds does not grow with their number.
    frames = []
    waiting = list(groups) if run is None else run.missing()
    description = progress if isinstance(progress, str) else "localize"
    bar = tqdm(
        total=sum(len(groups[unit]) for unit in waiting),
        desc=description,
        unit="pair",
        disable=not progress,
        leave=False,
    )
    with bar:
        for unit in waiting:
            some = [encoded[at] for at in groups[unit]]
            flat = [prompt for trio in some for prompt in trio]
            seen = last_rows(model, flat, n_keys=n_keys, max_tokens=max_tokens)
            frame = _frame([pairs[at] for at in groups[unit]], names, seen, align)
            if run is None:
                frames.append(frame)
            else:
                run.write(unit, frame)
            bar.update(len(some))
    if run is not None:
        return run.finish()
    made = Provenance.collect(model, parameters=parameters, wall_time=time.perf_counter() - start)
    return Result(KIND, _joined(frames), DRIFT_COLUMNS, made)


def control_of(result: Result) -> str:
    """Which control a localisation has: the contrast that is not the conflict."""
    names = [str(name) for name in result.frame["contrast"].unique() if name != CONFLICT]
    return names[0] if names else CONTROLS[0]


def _encode(
    model: Model, pairs: Sequence[Pair], align: str, consistent: str, control: str, template: str | None
) -> tuple[tuple[str, ...], list[tuple[Encoded, ...]]]:
    """Each pair's three prompts, so that whatever is wrong with one is said before the model runs."""
    if align not in ALIGNMENTS:
        raise InputError(f"align={align!r}; expected one of {', '.join(ALIGNMENTS)}")
    if consistent not in CONSISTENT:
        raise InputError(f"consistent={consistent!r}; expected one of {', '.join(CONSISTENT)}")
    if control not in CONTROLS:
        raise InputError(f"control={control!r}; expected one of {', '.join(CONTROLS)}")
    if not pairs:
        raise InputError("no pairs were given; expected at least one, such as interp.conflict.make_pairs() gives")
    check_causal(model)
    ids = [pair.id for pair in pairs]
    twice = next((name for name in ids if ids.count(name) > 1), None) if len(set(ids)) < len(ids) else None
    if twice is not None:
        raise InputError(f"pair {twice!r} comes twice; every pair needs an id of its own")
    names = (consistent, CONFLICT, control)
    encoded = []
    for pair in pairs:
        prompts = encode_pair(model, pair, names, template=template)
        encoded.append(tuple(prompts[name] for name in names))
    return names, encoded


def _groups(model: Model, n_pairs: int, max_tokens: int, longest: int, n_keys: int) -> dict[str, range]:
    """{name: indices of pairs} that are passed together."""
    step = _BATCHES * max_tokens // (3 * longest)
    if n_keys:
        step = min(step, _KEPT_BYTES // (3 * 4 * model.arch.n_layers * model.arch.n_heads * n_keys))
    step = max(1, step)
    return {f"pairs-{at}": range(at, min(at + step, n_pairs)) for at in range(0, n_pairs, step)}


def _frame(pairs: Sequence[Pair], names: Sequence[str], seen: LastRows, align: str) -> pd.DataFrame:
    """Rows of `DRIFT_COLUMNS`: by pair, contrast, layer and head."""
    masses = seen.masses.reshape(len(pairs), len(names), *seen.masses.shape[1:])  # (pair, prompt, layer, head, span)
    compared = masses if align == "spans" else seen.rows.reshape(len(pairs), len(names), *seen.rows.shape[1:])
    found = drift(compared[:, :1], compared[:, 1:], EPSILON[align])  # (pair, contrast, layer, head) each
    norms = np.sqrt((compared.astype(np.float64) ** 2).sum(-1))
    shape = found["mag"].shape
    place: list[np.ndarray] = list(np.ix_(*map(np.arange, shape)))

    def spread(values: Any) -> np.ndarray:
        return np.broadcast_to(values, shape).ravel()

    facts = [
        [pair.id, pair.task.id, pair.family, pair.system_rule, pair.user_rule, pair.wording, pair.setting]
        for pair in pairs
    ]
    columns: dict[str, Any] = {
        name: pd.Categorical(values, categories=list(dict.fromkeys(values)))[spread(place[0])]
        for name, values in zip(_KEYS, zip(*facts, strict=True), strict=True)
    }
    columns["contrast"] = pd.Categorical(list(names[1:]), categories=list(names[1:]))[spread(place[1])]
    columns |= {"layer": spread(place[2]), "head": spread(place[3])}
    columns |= {f"delta_{name}": values.ravel() for name, values in found.items()}
    columns |= {"consistent_norm": spread(norms[:, :1]), "compared_norm": spread(norms[:, 1:])}
    for index, span in enumerate(SPANS):
        columns[f"consistent_{span}"] = spread(masses[:, :1, ..., index])
        columns[f"compared_{span}"] = spread(masses[:, 1:, ..., index])
    return pd.DataFrame(columns)


def _joined(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """All rows; a category column has the categories of all frames, in order of first appearance."""
    for name in (*_KEYS, "contrast"):
        union = list(dict.fromkeys(value for frame in frames for value in frame[name].cat.categories))
        frames = [frame.assign(**{name: frame[name].cat.set_categories(union)}) for frame in frames]
    return pd.concat(frames, ignore_index=True)


def _digest(pairs: Sequence[Pair], encoded: Sequence[Sequence[Encoded]]) -> str:
    """16 hex digits of everything that the rows depend on but the model."""
    parts = [
        [[pair.id, pair.task.id, pair.family, pair.system_rule, pair.user_rule, pair.wording, pair.setting]]
        + [[prompt.ids, prompt.spans] for prompt in trio]
        for pair, trio in zip(pairs, encoded, strict=True)
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
