"""Ablate the focal heads together: does the conflict depend on them more than on as many random heads?

1. The chosen heads are ablated in one run of the conflicting prompt; two answers are scored as in `interp.conflict.patching`:

       mode "zero"    z, the head's part of the input of the output projection, is 0
       mode "mean"    z is the head's mean over the pairs' consistent and conflicting prompts, at the same distance from the
                      prompt's end; with positions="all" over all of their tokens

2. Control: sets of as many heads, none of them chosen, from the same layers where enough are left and else from any.
3. Per pair: how far the preference for the system's answer moves. The chosen set's mean change has a rank among the random sets':
   p = (1 + random sets that change as much or more, either way) / (1 + random sets).

With positions="suffix" only the prompt's last tokens are ablated, and what lies before is computed once; "all" ablates every
position of prompt and answer. Runs begin at the lowest layer of their set. With `out`, each set is a shard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.architectures import Site
from interp.batching import Batch
from interp.capture import run_probes
from interp.conflict.contrasts import Contrast, check_context, with_answers
from interp.conflict.pair_columns import PAIR_COLUMNS, digest, pair_table
from interp.conflict.pairs import Pair, encode_pair
from interp.conflict.patched_runs import Prepared, Prompt, Rows, Visit, changed_scores, prepare
from interp.conflict.patching import ANSWER_TOKENS, Head, check_heads, logdiff, progress_bar
from interp.conflict.recoveries import ratio_interval
from interp.errors import InputError
from interp.intervals import paired_permutation_test
from interp.model import Model
from interp.provenance import Provenance
from interp.results import Column, Result
from interp.shards import ShardedRun

ABLATION_MODES = ("zero", "mean")
ABLATED_POSITIONS = ("suffix", "all")
ARMS = ("focal", "random")
HEAD_ABLATION_COLUMNS = (
    *PAIR_COLUMNS,
    Column("arm", "category", "", "focal: the chosen heads; random: a control"),
    Column("set", "int16", "index", "0: the chosen heads; 1 …: random sets, which attachments['sets'] lists"),
    Column("n_heads", "int16", "heads", "how many are ablated together"),
    Column(
        "logdiff_conflict", "float64", "nats per token", "answer under A against answer under A′, conflicting prompt"
    ),
    Column("logdiff_ablated", "float64", "nats per token", "the same with the set ablated"),
)


def ablate_heads(
    model: Model,
    pairs: Sequence[Pair],
    heads: Sequence[Head],
    *,
    n_random_sets: int = 20,
    mode: str = "zero",
    positions: str = "suffix",
    consistent: str = "agree",
    answer_tokens: int = ANSWER_TOKENS,
    contrasts: dict[str, Contrast] | None = None,
    template: str | None = None,
    max_tokens: int = 4096,
    out: str | Path | None = None,
    seed: int = 0,
    progress: bool | str = True,
) -> Result:
    """The preference for the system's answer in the conflicting prompt, with a set of heads ablated together.

    Args:
        model: a causal LM with a chat template.
        pairs: what `make_pairs` gave.
        heads: (layer, head) pairs, such as `focal_heads` gave; negative ones are counted from the end.
        n_random_sets: how many random sets.
        mode: "zero" or "mean", see the module's step 1.
        positions: "suffix" or "all".
        consistent: whose prompt shares in the mean of mode "mean".
        answer_tokens, contrasts, template, max_tokens: see `interp.conflict.patch`.
        out: a folder for shards.
        seed: of the random sets.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        A `Result` of kind "conflict.ablate_heads" with `HEAD_ABLATION_COLUMNS`: one row per pair and set. `ablation_summary`
        reduces it.

    Raises:
        InputError: an encoder, no head, a head out of range, an unknown mode or position, too few heads left for a random set, no
            pair with two answers.
        MemoryBudgetError: one row alone does not fit.

    Example:
        >>> result = ablate_heads(load_model(), pairs, focal_heads(drift))                   # doctest: +SKIP
        >>> ablation_summary(result)[["what", "mean", "low", "high", "p"]]                   # doctest: +SKIP
    """
    start = time.perf_counter()
    for name, value, known in (("mode", mode, ABLATION_MODES), ("positions", positions, ABLATED_POSITIONS)):
        if value not in known:
            raise InputError(f"{name}={value!r}; expected one of {', '.join(known)}")
    if n_random_sets < 0:
        raise InputError(f"n_random_sets={n_random_sets}; expected 0 or more")
    chosen = check_heads(model, heads)
    sets = [sorted(chosen), *random_sets(chosen, n_random_sets, (model.arch.n_layers, model.arch.n_heads), seed)]
    asked, answers, left_out = with_answers(
        model, pairs, contrasts, answer_tokens, template=template, max_tokens=max_tokens, progress=progress
    )
    encoded = [encode_pair(model, pair, (consistent, "conflict"), template=template) for pair in asked]
    prompts = []
    for one, answer in zip(encoded, answers, strict=True):
        check_context(model, len(one["conflict"].ids), answer)
        prompts.append(Prompt(one["conflict"].ids, one["conflict"].suffix, answer.ids, answer.shared))
    texts = [(one[name].ids, one[name].suffix) for one in encoded for name in (consistent, "conflict")]
    parameters = {
        "heads": [list(head) for head in sets[0]],
        "n_random_sets": n_random_sets,
        "mode": mode,
        "positions": positions,
        "consistent": consistent,
        "answer_tokens": answer_tokens,
        "template": template,
        "n_pairs": len(asked),
        "prompts": digest([*((pair.id, *vars(one).values()) for pair, one in zip(asked, prompts, strict=True)), texts]),
    }
    attachments = {"sets": [[list(head) for head in one] for one in sets], "left_out": left_out}
    provenance = Provenance.collect(model, seed=seed, parameters=parameters)
    units = [f"set-{at}" for at in range(len(sets))]
    run = (
        None
        if out is None
        else ShardedRun(Path(out), "conflict.ablate_heads", HEAD_ABLATION_COLUMNS, provenance, units, attachments)
    )
    waiting = [units.index(unit) for unit in (units if run is None else run.missing())]
    frames: list[pd.DataFrame] = []
    if waiting:
        lowest = sorted({sets[at][0][0] for at in waiting})
        whole = positions == "all"
        base = prepare(model, prompts, residuals=lowest, whole=whole, max_tokens=max_tokens)
        means = (
            _means(model, texts, sorted({layer for at in waiting for layer, _ in sets[at]}), whole, max_tokens)
            if mode == "mean"
            else {}
        )
        table = pair_table(asked).assign(logdiff_conflict=logdiff(base.scores))
        with progress_bar(2 * len(asked) * len(waiting), "ablate heads", progress) as bar:
            for at in waiting:
                changes = _ablation(model, base, sets[at], means, whole)
                scores = changed_scores(model, base, sets[at][0][0], 1, changes, max_tokens=max_tokens, done=bar.update)
                arm = ARMS[min(at, 1)]
                frame = table.assign(arm=arm, set=at, n_heads=len(sets[at]), logdiff_ablated=logdiff(scores[0]))
                frames.append(frame) if run is None else run.write(units[at], frame)
    if run is not None:
        return run.finish()
    provenance = Provenance.collect(model, seed=seed, parameters=parameters, wall_time=time.perf_counter() - start)
    frame = pd.concat(frames, ignore_index=True)
    return Result("conflict.ablate_heads", frame, HEAD_ABLATION_COLUMNS, provenance, attachments)


def random_sets(heads: Sequence[Head], n_sets: int, size: tuple[int, int], seed: int = 0) -> list[list[Head]]:
    """Sets of as many heads as given, none of them given: as many per layer while a layer has them, the rest from any layer.

    Args:
        heads: (layer, head) pairs, non-negative, each once.
        n_sets: how many sets; drawn one by one, so that two can be alike.
        size: layers of the model, and heads of a layer.
        seed: of the draws.

    Raises:
        InputError: fewer heads are left than given.

    Example:
        >>> random_sets([(1, 0)], 2, (3, 2))
        [[(1, 1)], [(1, 1)]]
    """
    taken = set(heads)
    free = [(layer, head) for layer in range(size[0]) for head in range(size[1])]
    free = [head for head in free if head not in taken]
    if n_sets and len(free) < len(taken):
        raise InputError(f"{len(free)} heads are left beside the {len(taken)} given; give fewer, or n_random_sets=0")
    generator = np.random.default_rng(seed)

    def draw(pool: list[Head], n: int) -> list[Head]:
        return [pool[int(at)] for at in generator.choice(len(pool), n, replace=False)] if n else []

    found = []
    for _ in range(n_sets):
        drawn: list[Head] = []
        for layer in sorted({layer for layer, _ in taken}):
            pool = [head for head in free if head[0] == layer]
            drawn += draw(pool, min(len(pool), sum(at == layer for at, _ in taken)))
        drawn += draw([head for head in free if head not in drawn], len(taken) - len(drawn))
        found.append(sorted(drawn))
    return found


def ablation_summary(result: Result, *, n_resamples: int = 2000, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """How far the chosen heads move the preference, beside random sets.

    Args:
        result: what `ablate_heads` gave.
        n_resamples, level, seed: of the bootstrap over tasks.

    Returns:
        Rows what="focal" and "|focal|", and with random sets "random", "|random|" (the mean of the sets), "focal − random" and
        "|focal| − |random|"; bars mean each pair's change without its sign, which sees heads that help in one pair and harm in
        the next. Columns mean, low, high (nats per token, change of the preference for the system's answer, over pairs; intervals
        over tasks), p (flipped signs of tasks, two-sided; focal and both differences), p_sets (share of sets that move it as far,
        the focal one among them; focal and |focal|), n_sets, n_heads, n (pairs), n_tasks.

    Raises:
        InputError: another kind of result.
    """
    changes = set_changes(result)
    tasks = result.frame.drop_duplicates("pair").set_index("pair")["task"]
    arms, ranks = {}, {}
    for name, some in (("{}", changes), ("|{}|", changes.abs())):
        focal, random = name.format("focal"), name.format("random")
        others = some.drop(columns=0)
        arms[focal], sizes = some[0], others.mean().abs()
        if others.shape[1]:
            arms[random] = others.mean(axis=1)
            arms[f"{focal} − {random}"] = some[0] - others.mean(axis=1)
            ranks[focal] = (1 + (sizes >= abs(some[0].mean()) - 1e-12).sum()) / (1 + len(sizes))
    signed = {"focal", "focal − random", "|focal| − |random|"}
    rows = []
    for what, values in arms.items():
        by_task = values.groupby(tasks)
        sums = by_task.sum().to_numpy()
        mean, low, high = ratio_interval(sums, by_task.size().to_numpy(), n_resamples, level, seed)
        row = {"what": what, "mean": mean, "low": low, "high": high}
        row |= {
            "p": float(paired_permutation_test(sums, seed=seed)) if what in signed else np.nan,
            "p_sets": ranks.get(what, np.nan),
        }
        rows.append(
            row
            | {"n_sets": len(sizes), "n_heads": int(result.frame["n_heads"].iloc[0]), "n": len(values)}
            | {"n_tasks": len(sums)}
        )
    return pd.DataFrame(rows)


def set_changes(result: Result) -> pd.DataFrame:
    """(pair, set) change of the preference for the system's answer in nats per token; set 0 are the chosen heads.

    Raises:
        InputError: another kind of result.
    """
    if result.kind != "conflict.ablate_heads":
        raise InputError(f"a result of kind {result.kind!r}; expected 'conflict.ablate_heads'")
    frame = result.frame.assign(change=result.frame["logdiff_ablated"] - result.frame["logdiff_conflict"])
    return frame.pivot(index="pair", columns="set", values="change")


def _ablation(
    model: Model, base: Prepared, heads: Sequence[Head], means: dict[int, Tensor], whole: bool
) -> Callable[[Rows], list[tuple[Site, Visit]]]:
    """Changes of one set: z of its heads at the last tokens, or everywhere."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    d_head = model.arch.d_head

    def change(layer: int, rows: Rows) -> Visit:
        at = torch.tensor(by_layer[layer])

        def visit(z: Tensor) -> Tensor:
            changed = z.clone()
            by_head = changed.unflatten(-1, (-1, d_head))  # a view: (row, position, head, d_head)
            given = means.get(layer)
            chosen = at.to(z.device)
            if whole:
                by_head[:, :, chosen] = 0 if given is None else given[0, at].to(z)
            else:
                row, position = rows.row.to(z.device), rows.position.to(z.device)
                value: Any = 0 if given is None else given[rows.back][:, at].to(z)  # (place, head, d_head)
                by_head[row[:, None], position[:, None], chosen] = value
            return changed

        return visit

    return lambda rows: [(model.arch.site("z", layer), change(layer, rows)) for layer in by_layer]


class _LastMeans:
    """A probe: the mean of z over texts at each distance from the end, or over all tokens."""

    def __init__(self, layers: Sequence[int], n_last: Sequence[int], whole: bool) -> None:
        self.sites = [("z", layer) for layer in layers]
        self.n_last, self.whole = list(n_last), whole  # of each text
        width = 1 if whole else max(n_last)
        self.counts = {layer: torch.zeros(width, dtype=torch.float64) for layer in layers}
        self.sums: dict[int, Tensor] = {}

    def update(self, site: str, layer: int, tensor: Tensor, batch: Batch) -> list[Tensor]:
        """Of each text (back, width), the last token first; of a whole text (1, width) sum."""
        found = []
        for row, text in enumerate(batch.rows):
            real = tensor[row][batch.mask[row]].float()
            found.append(real.sum(0, keepdim=True) if self.whole else real[-self.n_last[text] :].flip(0))
        return [one.cpu().double() for one in found]

    def merge(self, site: str, layer: int, partial: list[Tensor], batch: Batch) -> None:
        """Add a batch."""
        for one, length in zip(partial, batch.lengths.tolist(), strict=True):
            total = self.sums.setdefault(layer, torch.zeros(len(self.counts[layer]), one.shape[1], dtype=torch.float64))
            total[: len(one)] += one
            self.counts[layer][: len(one)] += length if self.whole else 1


def _means(
    model: Model, texts: Sequence[tuple[Sequence[int], int]], layers: Sequence[int], whole: bool, max_tokens: int
) -> dict[int, Tensor]:
    """{layer: (back, head, d_head)} means of z."""
    probe = _LastMeans(layers, [n_last for _, n_last in texts], whole)
    run_probes(model, [ids for ids, _ in texts], [probe], max_tokens=max_tokens)
    return {
        layer: (probe.sums[layer] / probe.counts[layer][:, None]).float().unflatten(-1, (-1, model.arch.d_head))
        for layer in layers
    }
