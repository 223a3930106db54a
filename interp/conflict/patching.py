"""Patch the consistent run into the conflicting one: which layers and heads bring the system's rule back?

1. A pair's two answers, one that obeys the system's rule A and one that obeys the user's A′ (`interp.conflict.contrasts`), are
   scored behind a prompt:

       logdiff = mean log p per token of A's answer − the same of A′'s answer        [nats per token]

   over the first `answer_tokens` tokens from where the two differ.
2. At the prompt's last tokens, those of the template behind the last piece, both prompts have the same tokens. There one site of
   one layer in the conflicting run gets the values of the consistent run:

       site "attn_out"      what a layer's attention writes
       site "resid_post"    the whole residual stream after a layer
       site "head"          z of one head, its part of the input of the output projection

3. What of the gap comes back is read off by `interp.conflict.recoveries`. Patching is the method of causal tracing and of
   interchange interventions (Meng et al., arXiv 2202.05262; Geiger et al., arXiv 2106.02997); the difference is the conflict.

Patches reach the prompt's last tokens alone. Answer tokens go on reading the conflicting prompt's rules from the keys and values
before them, and what layers below the patch wrote at the last tokens. So "resid_post" has its ceiling below 1, and in the upper
layers little more than the first answer token's prediction is left to restore: its curve rises where the decision is written and
may fall again. `donor="other"` is the control: the patch comes from another task under the same rules.

Cost: prompts pass twice; a patched run is the last tokens and the answers through the layers from the patched one on
(`interp.conflict.patched_runs`). With `out`, each layer of each group of pairs is a shard, and an interrupted run goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.architectures import Site
from interp.conflict.contrasts import Contrast, check_context, with_answers
from interp.conflict.dialogues import Encoded
from interp.conflict.pair_columns import PAIR_COLUMNS, digest, pair_table
from interp.conflict.pairs import PROMPTS, Pair, encode_pair
from interp.conflict.patched_runs import Prepared, Prompt, Rows, Visit, changed_scores, prepare, replace_last
from interp.errors import InputError
from interp.model import Model
from interp.provenance import Provenance
from interp.results import Column, Result
from interp.shards import ShardedRun

KIND = "conflict.patch"
PATCH_SITES = ("attn_out", "resid_post", "head")
POSITIONS = ("suffix", "last")
DONORS = ("same", "other")
ANSWER_TOKENS = 12
PATCH_COLUMNS = (
    *PAIR_COLUMNS,
    Column("site", "category", "", "attn_out, resid_post or head: what was patched"),
    Column("layer", "int16", "layer", "0-based"),
    Column("head", "int16", "head", "0-based; -1 where no single head was patched"),
    Column("donor", "category", "", "same: the pair's own consistent run; other: that of another task, same rules"),
    Column("n_patched", "int16", "tokens", "how many of the prompt's last tokens were patched"),
    Column(
        "logdiff_consistent", "float64", "nats per token", "answer under A against answer under A′, consistent prompt"
    ),
    Column("logdiff_conflict", "float64", "nats per token", "the same in the conflicting prompt"),
    Column("logdiff_patched", "float64", "nats per token", "the same in the conflicting prompt with the patch"),
)
Head = tuple[int, int]
# Pairs whose keys and values are kept at a time: about 1 GiB for an 8 B model and prompts of 128 tokens.
_GROUP = 64


def patch(
    model: Model,
    pairs: Sequence[Pair],
    *,
    site: str | Sequence[str] = "attn_out",
    layers: Sequence[int] | None = None,
    heads: Sequence[Head] | None = None,
    consistent: str = "agree",
    positions: str = "suffix",
    donor: str = "same",
    answer_tokens: int = ANSWER_TOKENS,
    contrasts: Mapping[str, Contrast] | None = None,
    template: str | None = None,
    max_tokens: int = 4096,
    out: str | Path | None = None,
    seed: int = 0,
    progress: bool | str = True,
) -> Result:
    """The preference for the system's answer in the conflicting prompt, with one site at a time taken from the consistent prompt.

    Args:
        model: a causal LM with a chat template.
        pairs: what `make_pairs` gave.
        site: one or more of `PATCH_SITES`.
        layers: by default all; negative ones are counted from the end.
        heads: for site "head", (layer, head) pairs; by default all heads of `layers`.
        consistent: which prompt gives the patch.
        positions: "suffix" patches all tokens behind the last piece, "last" the last token alone.
        donor: "same" takes the patch from the pair itself, "other" from the next task with the same rules, wording and setting.
        answer_tokens: how many tokens of an answer count, from where the two differ.
        contrasts: {pair id: contrast}; by default `make_contrasts` makes them. Pairs without one are left out, and named in
            `attachments["left_out"]` with the reason.
        template: see `encode_dialogue`.
        max_tokens: budget of padded tokens in a batch.
        out: a folder for shards.
        seed: kept in the provenance; nothing is drawn.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        A `Result` of kind "conflict.patch" with `PATCH_COLUMNS`: one row per pair, site, layer and head. `recovery` reduces it.

    Raises:
        InputError: an encoder, an unknown site, layer, head or option, no pair with two answers, a prompt and answer beyond the
            context, no other task for `donor="other"`.
        MemoryBudgetError: one row alone does not fit.

    Example:
        >>> result = patch(load_model(), make_pairs(n=16, families=["case"]))                # doctest: +SKIP
        >>> recovery(result)[["layer", "recovery", "low", "high", "q"]]                      # doctest: +SKIP
    """
    start = time.perf_counter()
    targets = _targets(model, site, layers, heads)
    for name, value, known in (
        ("consistent", consistent, tuple(name for name in PROMPTS if name != "conflict")),
        ("positions", positions, POSITIONS),
        ("donor", donor, DONORS),
    ):
        if value not in known:
            raise InputError(f"{name}={value!r}; expected one of {', '.join(known)}")
    chosen, answers, left_out = with_answers(
        model, pairs, contrasts, answer_tokens, template=template, max_tokens=max_tokens, progress=progress
    )
    givers = _givers(chosen, donor)
    without = [pair.id for at, pair in enumerate(chosen) if at not in givers]
    left_out |= dict.fromkeys(without, "no other task with the same rules, wording and setting gives a patch")
    ours = list(givers)
    if not ours:
        raise InputError("no pair has another task with the same rules; give more pairs, or donor='same'")
    encoded = [encode_pair(model, pair, (consistent, "conflict"), template=template) for pair in chosen]
    calm, torn = ([one[name] for one in encoded] for name in (consistent, "conflict"))
    calm_prompts = [
        Prompt(one.ids, _n_last(one, positions), answer.ids, answer.shared)
        for one, answer in zip(calm, answers, strict=True)
    ]
    prompts = _prompts(model, calm, torn, givers, answers, positions)
    parameters = {
        "sites": list(dict.fromkeys(name for one in targets.values() for name, _ in one)),
        "targets": {str(layer): [list(target) for target in one] for layer, one in targets.items()},
        "consistent": consistent,
        "positions": positions,
        "donor": donor,
        "answer_tokens": answer_tokens,
        "template": template,
        "n_pairs": len(ours),
        "prompts": digest([(pair.id, *vars(prompts[at]).values(), calm[at].ids) for at, pair in enumerate(chosen)]),
    }
    texts = {chosen[at].id: [answers[at].system, answers[at].user] for at in ours}
    attachments = {"answers": texts, "left_out": left_out}
    provenance = Provenance.collect(model, seed=seed, parameters=parameters)
    groups = [ours[at : at + _GROUP] for at in range(0, len(ours), _GROUP)]
    units = {f"pairs-{at * _GROUP}-layer-{layer}": (at, layer) for at in range(len(groups)) for layer in targets}
    run = None if out is None else ShardedRun(Path(out), KIND, PATCH_COLUMNS, provenance, [*units], attachments)
    waiting = list(units) if run is None else run.missing()
    frames: list[pd.DataFrame] = []
    n_runs = sum(2 * len(groups[at]) * len(targets[layer]) for at, layer in map(units.__getitem__, waiting))
    with progress_bar(n_runs, "patch", progress) as bar:
        for number, group in enumerate(groups):
            missing = [units[unit][1] for unit in waiting if units[unit][0] == number]
            if not missing:
                continue
            sites = [("z" if name == "head" else name, layer) for layer in missing for name, _ in targets[layer]]
            calm_scores, given = _given(model, group, givers, calm_prompts, list(dict.fromkeys(sites)), max_tokens)
            base = prepare(model, [prompts[at] for at in group], residuals=missing, max_tokens=max_tokens)
            table = pair_table([chosen[at] for at in group]).assign(
                donor=donor,
                n_patched=[prompts[at].n_last for at in group],
                logdiff_consistent=logdiff(calm_scores),
                logdiff_conflict=logdiff(base.scores),
            )
            for layer in missing:
                frame = _layer_frame(model, base, given, table, layer, targets[layer], max_tokens, bar.update)
                frames.append(frame) if run is None else run.write(f"pairs-{number * _GROUP}-layer-{layer}", frame)
    if run is not None:
        return run.finish()
    provenance = Provenance.collect(model, seed=seed, parameters=parameters, wall_time=time.perf_counter() - start)
    return Result(KIND, pd.concat(frames, ignore_index=True), PATCH_COLUMNS, provenance, attachments)


def _given(
    model: Model,
    group: Sequence[int],
    givers: Mapping[int, int],
    prompts: Sequence[Prompt],
    sites: Sequence[tuple[str, int]],
    max_tokens: int,
) -> tuple[np.ndarray, dict[tuple[str, int], Tensor]]:
    """(prompt, answer) scores of a group's consistent prompts, and {(site, layer): (prompt, back, width)} what patches it."""
    asked = list(dict.fromkeys([*group, *(givers[at] for at in group)]))
    plain = prepare(model, [prompts[at] for at in asked], last=sites, max_tokens=max_tokens)
    places = [asked.index(givers[at]) for at in group]
    return plain.scores[: len(group)], {key: tensor[places] for key, tensor in plain.last.items()}


def _layer_frame(
    model: Model,
    base: Prepared,
    given: Mapping[tuple[str, int], Tensor],
    table: pd.DataFrame,
    layer: int,
    targets: Sequence[tuple[str, int]],
    max_tokens: int,
    done: Callable[[int], Any],
) -> pd.DataFrame:
    """Rows of `PATCH_COLUMNS` of one layer."""
    frames = []
    for name in dict.fromkeys(name for name, _ in targets):
        heads = [head for site, head in targets if site == name]
        site = model.arch.site("z" if name == "head" else name, layer)
        donors = given[site.name, layer]

        def changes(
            rows: Rows, site: Site = site, donors: Tensor = donors, heads: list[int] = heads
        ) -> list[tuple[Site, Visit]]:
            if heads == [-1]:
                return [replace_last(site, rows, donors)]
            return [_replace_head(site, rows, donors, torch.tensor(heads), model.arch.d_head)]

        scores = changed_scores(model, base, layer, len(heads), changes, max_tokens=max_tokens, done=done)
        frames += [
            table.assign(site=name, layer=layer, head=head, logdiff_patched=logdiff(one))
            for head, one in zip(heads, scores, strict=True)
        ]
    return pd.concat(frames, ignore_index=True)


def _replace_head(site: Site, rows: Rows, donors: Tensor, heads: Tensor, d_head: int) -> tuple[Site, Visit]:
    """As `replace_last`, in the columns of each row's own head."""
    head = heads[rows.variants[rows.row]]  # (place)
    given = donors[rows.prompts[rows.row], rows.back].unflatten(-1, (-1, d_head))[torch.arange(len(head)), head]

    def visit(z: Tensor) -> Tensor:
        changed = z.clone()
        by_head = changed.unflatten(-1, (-1, d_head))  # a view: (row, position, head, d_head)
        by_head[rows.row.to(z.device), rows.position.to(z.device), head.to(z.device)] = given.to(z)
        return changed

    return site, visit


def _targets(
    model: Model, site: str | Sequence[str], layers: Sequence[int] | None, heads: Sequence[Head] | None
) -> dict[int, list[tuple[str, int]]]:
    """{layer: [(site, head or -1)]}, layers in order."""
    sites = [site] if isinstance(site, str) else list(dict.fromkeys(site))
    for name in sites:
        if name not in PATCH_SITES:
            raise InputError(f"site {name!r}; expected one of {', '.join(PATCH_SITES)}")
    if heads is not None and "head" not in sites:
        raise InputError(f"heads= chooses among heads, and site={site!r} patches none; give site='head'")
    arch = model.arch
    chosen = range(arch.n_layers) if layers is None else sorted({arch.check_layer(layer) for layer in layers})
    by_layer: dict[int, list[int]] = {layer: list(range(arch.n_heads)) for layer in chosen}
    if heads is not None:
        given = check_heads(model, heads)
        by_layer = {
            layer: sorted(head for at, head in given if at == layer) for layer in sorted({at for at, _ in given})
        }
        by_layer = {layer: some for layer, some in by_layer.items() if layers is None or layer in chosen}
    found: dict[int, list[tuple[str, int]]] = {}
    for layer in sorted({*(by_layer if "head" in sites else ()), *(chosen if set(sites) - {"head"} else ())}):
        wanted = [(name, -1) for name in sites if name != "head" and layer in chosen]
        wanted += [("head", head) for head in by_layer.get(layer, ()) if "head" in sites]
        found[layer] = wanted
    if not found:
        raise InputError("no layer or head to patch; expected at least one")
    return found


def check_heads(model: Model, heads: Sequence[Head]) -> list[Head]:
    """(layer, head) pairs as non-negative indices, each once.

    Raises:
        InputError: none, out of range, or not pairs.
    """
    found = []
    for entry in heads:
        if not isinstance(entry, Sequence | np.ndarray) or isinstance(entry, str) or len(entry) != 2:
            raise InputError(f"head {entry!r}; expected (layer, head) pairs such as [(15, 3)]")
        found.append((model.arch.check_layer(entry[0]), model.arch.check_head(entry[1])))
    if not found:
        raise InputError("no head was given; expected at least one (layer, head)")
    return list(dict.fromkeys(found))


def _givers(pairs: Sequence[Pair], donor: str) -> dict[int, int]:
    """{pair: the pair whose consistent run it is patched from}, where there is one."""
    if donor == "same":
        return {at: at for at in range(len(pairs))}
    kinds: dict[tuple[str, ...], list[int]] = {}
    for at, pair in enumerate(pairs):
        kinds.setdefault((pair.family, pair.system_rule, pair.user_rule, pair.wording, pair.setting), []).append(at)
    found = {}
    for some in kinds.values():
        for place, at in enumerate(some):
            others = [
                other for other in (*some[place + 1 :], *some[:place]) if pairs[other].task.id != pairs[at].task.id
            ]
            if others:
                found[at] = others[0]
    return dict(sorted(found.items()))


def _n_last(encoded: Encoded, positions: str) -> int:
    return 1 if positions == "last" else encoded.suffix


def _prompts(
    model: Model,
    calm: Sequence[Encoded],
    torn: Sequence[Encoded],
    givers: Mapping[int, int],
    answers: Sequence[Contrast],
    positions: str,
) -> list[Prompt]:
    """The conflicting prompts; patched are the last tokens that all prompts concerned have in common."""
    found = []
    for at, (ours, one) in enumerate(zip(torn, answers, strict=True)):
        sources = [calm[at], calm[givers.get(at, at)]]
        n_last = min(_n_last(encoded, positions) for encoded in (ours, *sources))
        while n_last > 1 and any(ours.ids[-n_last:] != source.ids[-n_last:] for source in sources):
            n_last -= 1
        found.append(Prompt(ours.ids, n_last, one.ids, one.shared))
        check_context(model, max(len(encoded.ids) for encoded in (ours, *sources)), one)
    return found


def logdiff(scores: np.ndarray) -> np.ndarray:
    """(…, prompt) of (…, prompt, answer) scores: how much more likely the system's answer is, per token."""
    return scores[..., 0] - scores[..., 1]


def progress_bar(total: int, name: str, progress: bool | str) -> Any:
    """A bar on stderr that counts runs."""
    from tqdm.auto import tqdm

    description = progress if isinstance(progress, str) else name
    return tqdm(total=total, desc=description, unit="run", disable=not progress, leave=False)
