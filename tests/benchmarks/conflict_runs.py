"""Instruction conflicts on the embedded model: what localisation, patching and answering cost beside the plain way.

1. *Drift*: `localize` on 200 pairs against the plain forward passes of the same prompts, in the same batches, without LM head.
   Memory: the extra peak of 200 pairs against that of 20.
2. *Patching sweep*: the attention output of every layer in turn, against one plain forward pass per layer, pair and
   answer with a hook that puts the same values in; these are captured once per pair, all layers in one pass of the consistent
   prompt. Both give the same preferences, and the row says how far they differ.
3. *Answers*: generated in batches against one at a time, both with a KV cache; equal answers are counted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.benchmarks.memory import MIB, measure
from tests.benchmarks.models import embedded
from tests.benchmarks.table import Row
from tests.benchmarks.timing import Times, interleave, ratio_of

SUITE = "conflict"
_MAX_TOKENS = 4096
_ANSWER_TOKENS = 12
_NEW_TOKENS = 48


def run(quick: bool) -> list[Row]:
    """All rows."""
    model = embedded()
    n = 4 if quick else 200
    return [
        drift_row(model, n, 1 if quick else 3, quick),
        memory_row(2 if quick else 20, n, quick),
        patch_row(model, 1 if quick else 8, [0, 1] if quick else None, quick),
        answers_row(model, 2 if quick else 32, 4 if quick else _NEW_TOKENS, quick),
    ]


def drift_row(model: Any, n_pairs: int, repeats: int, quick: bool) -> Row:
    """Localisation against the forward passes that it cannot do without."""
    from interp.conflict import encode_pair, localize, make_pairs

    pairs = make_pairs("localisation", n_pairs)
    prompts = [encoded.ids for pair in pairs for encoded in encode_pair(model, pair).values()]
    cases = {
        "ours": lambda: localize(model, pairs, max_tokens=_MAX_TOKENS, progress=False),
        "theirs": lambda: plain_passes(model, prompts),
    }
    times = interleave(cases, repeats)
    return _row(
        quick,
        **ratio_of(times["ours"], times["theirs"]),
        name="attention drift of all heads: time",
        against="plain forward passes of the same prompts, no LM head",
        target="<= 1.2",
        n=f"{n_pairs} pairs, {len(prompts)} prompts, {sum(map(len, prompts)):,} tokens",
        note="ours renders and encodes the prompts within the time",
    )


def memory_row(few: int, many: int, quick: bool) -> Row:
    """The extra peak memory of many pairs against that of few."""
    small, large = (measure("conflict_runs", "localize_in_memory", n_pairs=n) for n in (few, many))
    return _row(
        quick,
        name="attention drift of all heads: extra peak memory",
        against=f"the same on {few} pairs",
        ratio=large["extra"] / small["extra"],
        target="<= 1.2",
        repeats=1,
        ours=large["extra"] / MIB,
        theirs=small["extra"] / MIB,
        unit="MiB",
        n=f"{many} pairs against {few}",
        note="the table of results grows with the pairs, the run does not",
    )


def localize_in_memory(n_pairs: int) -> Any:
    """What `memory_row` measures in a fresh process."""
    from interp.conflict import localize, make_pairs

    model = embedded()
    localize(model, make_pairs("localisation", 1), progress=False)
    pairs = make_pairs("localisation", n_pairs)

    def call() -> None:
        localize(model, pairs, max_tokens=1024, progress=False)

    return call


@torch.no_grad()
def plain_passes(model: Any, prompts: list[tuple[int, ...]]) -> None:
    """The prompts' forward passes and nothing else."""
    from interp.batching import for_each_batch, token_batches
    from interp.capture import forward

    batches = token_batches(prompts, max_tokens=_MAX_TOKENS, pad_id=model.pad_id)
    for_each_batch(batches, lambda batch: forward(model, batch.to(model.device), logits=False))


def patch_row(model: Any, n_pairs: int, layers: list[int] | None, quick: bool) -> Row:
    """The sweep over layers against a forward pass per layer, pair and answer, and one per pair that captures."""
    from interp.conflict import make_contrasts, make_pairs, patch

    wanted = make_pairs("localisation", n_pairs, families=["case", "quotation"])
    contrasts = make_contrasts(model, wanted).found
    pairs = [pair for pair in wanted if pair.id in contrasts]
    swept = list(range(model.arch.n_layers)) if layers is None else layers
    times = {"ours": Times(), "theirs": Times()}
    patch(model, pairs[:1], layers=swept[:1], contrasts=contrasts, answer_tokens=_ANSWER_TOKENS, progress=False)
    result = times["ours"].add(
        lambda: patch(model, pairs, layers=swept, contrasts=contrasts, answer_tokens=_ANSWER_TOKENS, progress=False)
    )
    found = times["theirs"].add(lambda: plain_sweep(model, pairs, contrasts, swept))
    ours = result.frame.set_index(["pair", "layer"])["logdiff_patched"]
    error = max(abs(ours[key] - value) for key, value in found.items())
    return _row(
        quick,
        **ratio_of(times["ours"], times["theirs"]),
        name="patching sweep over layers: time",
        against="a forward pass per layer, pair and answer, after one per pair that captures",
        target="<= 0.2",
        n=f"{len(pairs)} pairs, {len(swept)} layers, two answers of {_ANSWER_TOKENS} tokens",
        note=f"preferences agree within {error:.0e} nats per token",
    )


@torch.no_grad()
def plain_sweep(model: Any, pairs: Any, contrasts: Any, layers: list[int]) -> dict[tuple[str, int], float]:
    """{(pair, layer): preference for the system's answer} with the layer's attention output patched, one run at a time."""
    from interp.conflict import encode_pair

    found = {}
    for pair in pairs:
        encoded = encode_pair(model, pair, ("agree", "conflict"))
        prompt, n_last = encoded["conflict"].ids, encoded["conflict"].suffix
        answers = (contrasts[pair.id].system_ids, contrasts[pair.id].user_ids)
        shared = next(at for at, (a, b) in enumerate(zip(*answers, strict=False)) if a != b)
        answers = tuple(ids[: shared + _ANSWER_TOKENS] for ids in answers)
        kept = captured(model, encoded["agree"].ids, layers, n_last)
        place = slice(len(prompt) - n_last, len(prompt))
        for layer in layers:

            def put(_: Any, __: Any, out: Any, new: torch.Tensor = kept[layer], place: slice = place) -> Any:
                changed = out[0].clone()
                changed[0, place] = new
                return (changed, *out[1:])

            handle = model.arch.attention(layer).register_forward_hook(put)
            try:
                means = []
                for ids in answers:
                    logits = model.hf(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0]
                    scores = logits[len(prompt) - 1 + shared : -1].float().log_softmax(-1)  # of the tokens that count
                    means.append(np.mean([float(scores[at, token]) for at, token in enumerate(ids[shared:])]))
            finally:
                handle.remove()
            found[pair.id, layer] = float(means[0] - means[1])
    return found


@torch.no_grad()
def captured(model: Any, ids: tuple[int, ...], layers: list[int], n_last: int) -> dict[int, torch.Tensor]:
    """{layer: what its attention writes at the prompt's last tokens}, all layers in one pass without LM head."""
    kept: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_: Any, __: Any, out: Any) -> None:
            kept[layer] = out[0][0, -n_last:].clone()

        return hook

    handles = [model.arch.attention(layer).register_forward_hook(keep(layer)) for layer in layers]
    try:
        model.hf.base_model(torch.tensor([ids]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def answers_row(model: Any, n: int, new_tokens: int, quick: bool) -> Row:
    """Answers in batches against one at a time."""
    from interp.conflict import encode_pair, make_pairs
    from interp.conflict.answers import answer_ids

    prompts = [encode_pair(model, pair, ("conflict",))["conflict"].ids for pair in make_pairs("held-out", n)]
    times = {"ours": Times(), "theirs": Times()}
    answer_ids(model, prompts[:1], max_new_tokens=2)
    ours = times["ours"].add(lambda: answer_ids(model, prompts, max_new_tokens=new_tokens))
    theirs = times["theirs"].add(lambda: [answer_ids(model, [ids], max_new_tokens=new_tokens)[0] for ids in prompts])
    same = sum(a.ids == b.ids for a, b in zip(ours, theirs, strict=True))
    return _row(
        quick,
        **ratio_of(times["ours"], times["theirs"]),
        name="answers to score: time",
        against="one at a time",
        target="<= 0.25",
        n=f"{n} conflicting prompts, up to {new_tokens} tokens",
        note=f"{same} of {n} answers are the same to the token; rounding differs between batches",
    )


def _row(quick: bool, **about: Any) -> Row:
    return Row(suite=SUITE, subject="conflict_runs", quick=quick, **about)
