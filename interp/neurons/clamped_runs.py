"""Many clamped copies of one prompt for little more than the layers in which they differ.

A sweep asks for the same prompt under many clamps. Below a clamp's layer all of them compute the same, so:

1. A prompt enters once, as one unclamped row. At the layer of a clamp its row is copied from the unclamped row and joins
   the batch; from there it goes its own way. So a clamp at layer l of L costs (L − l) / L of a prompt.
2. The KV cache that results has fewer rows in lower layers; they are copied too. Hugging Face's own `generate` goes on from
   there, all rows in one batch with their own clamps, at every position (`interp.intervene`).
3. The first step's logits give the next token's statistics: probability and rank of a concept, and the divergence
   KL(clamped ‖ unclamped) = Σ p log(p / q), in nats, from the unclamped row of the same batch.
4. Continuations are scored by the unclamped model from the prompt's cache, each distinct one once:
   perplexity = exp(mean negative log-likelihood of its tokens), the end token left out.

Batches hold rows of one prompt, so there is no padding; they go through `interp.batching`, which halves them when memory
runs out. Outcomes equal those of one clamped prompt at a time within float32 rounding.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.batching import Batch, current_rows, for_each_batch, pad
from interp.errors import InputError
from interp.intervene import Clamp, intervene
from interp.model import NO_SAMPLING, PLAIN_GENERATION, Model, set_seed

_LOGIT_BYTES = 256 * 2**20  # logits held while continuations are scored


@dataclass(frozen=True)
class Run:
    """One prompt under one clamp.

    Attributes:
        prompt: index of the prompt.
        clamp: a `Clamp` of one neuron with one value at all positions; `None` for the model as it is.
    """

    prompt: int
    clamp: Clamp | None = None


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
        p_concept: probability of the concept's tokens as the next token after the prompt.
        rank: rank of the best of them, 1 for the most probable token.
        p_unrelated: probability of the unrelated concept's tokens; NaN without one.
        kl: KL(clamped ‖ unclamped) of the next token, nats.
        ids: the continuation's token ids without the end token; empty if none was asked for.
    """

    p_concept: float
    rank: int
    p_unrelated: float
    kl: float
    ids: tuple[int, ...] = ()


@torch.no_grad()
def run_clamped(
    model: Model,
    prompts: Sequence[Sequence[int]],
    runs: Sequence[Run],
    concept: Sequence[int],
    unrelated: Sequence[int] = (),
    *,
    max_new_tokens: int = 0,
    temperature: float = 0.0,
    seed: int = 0,
    max_tokens: int = 4096,
    progress: bool | str = False,
) -> list[Outcome]:
    """Next-token statistics and continuations of prompts under clamps.

    Args:
        model: what `load_model` gave, a decoder.
        prompts: token ids of each prompt.
        runs: which prompts under which clamps.
        concept: token ids whose probability is summed.
        unrelated: token ids of an unrelated concept.
        max_new_tokens: longest continuation; 0 for none, which costs one forward pass.
        temperature: 0 for greedy decoding, above 0 to sample.
        seed: of the sampling; each batch is seeded by itself, so other prompts do not matter.
        max_tokens: budget of tokens (prompt and continuation) in a batch.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        One `Outcome` per run, in the order given.

    Raises:
        InputError: the model is an encoder, prompt and continuation exceed the context, a clamp is out of range, or a
            clamp makes the logits NaN.
        MemoryBudgetError: a single row does not fit.
    """
    _check(model, prompts, max_new_tokens, temperature)
    outcomes: dict[int, Outcome] = {}
    readout = _Readout(list(concept), list(unrelated))

    def step(batch: Batch) -> None:
        ids = batch.input_ids[:1].to(model.device)
        order = _Order(model, [runs[row] for row in batch.rows])
        if temperature > 0:
            set_seed(seed + 7919 * batch.rows[0])
        # Clamps count rows of this batch, which has an unclamped row of its own.
        with _local_rows(), intervene(model, *order.clamps()):
            logits, continuations = _forked(model, ids, order, max_new_tokens, temperature)
        read = readout(logits, [runs[row] for row in batch.rows], order)
        for at, row in enumerate(batch.rows):
            outcomes[row] = Outcome(*read[at], continuations[order.place[at]])

    for_each_batch(_batches(model, prompts, runs, max_new_tokens, max_tokens), step, progress=progress, unit="run")
    return [outcomes[row] for row in range(len(runs))]


def _check(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float) -> None:
    if not model.arch.family.decoder:
        raise InputError(f"{model.name} is an encoder ({model.arch.family.name}): it predicts no next token")
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens={max_new_tokens}; expected 0 or more")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise InputError(f"temperature={temperature}; expected 0 (greedy) or more")
    longest, limit = max(len(ids) for ids in prompts), model.arch.n_positions
    if limit is not None and longest + max_new_tokens > limit:
        raise InputError(
            f"a prompt of {longest} tokens and {max_new_tokens} new tokens exceed the context of {limit} tokens"
        )


def _batches(
    model: Model, prompts: Sequence[Sequence[int]], runs: Sequence[Run], max_new_tokens: int, max_tokens: int
) -> list[Batch]:
    """Batches of one prompt each, longest first; unclamped runs first, then by layer, so that rows join late."""
    if max_tokens < 1:
        raise InputError(f"max_tokens={max_tokens}; expected at least 1 token")
    by_prompt: dict[int, list[int]] = {}
    for row, run in enumerate(runs):
        by_prompt.setdefault(run.prompt, []).append(row)
    batches = []
    for prompt in sorted(by_prompt, key=lambda at: -len(prompts[at])):
        ids = list(prompts[prompt])
        rows = sorted(by_prompt[prompt], key=lambda row: _layer(model, runs[row].clamp, -1))
        size = max(1, max_tokens // (len(ids) + max_new_tokens))
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            batches.append(pad([ids] * len(some), some, model.pad_id))
    return batches


def _layer(model: Model, clamp: Clamp | None, unclamped: int) -> int:
    return unclamped if clamp is None else model.arch.check_layer(clamp.layer)


class _Order:
    """Where each run of a batch sits in the forked batch: row 0 is unclamped, the others follow in order of their layer.

    Attributes:
        place: (run,) the row of each run.
        size: number of rows.
        joining: {layer: rows that join there}.
    """

    def __init__(self, model: Model, runs: Sequence[Run]) -> None:
        first = next((at for at, run in enumerate(runs) if run.clamp is None), None)
        join = [_layer(model, run.clamp, model.arch.n_layers - 1) for run in runs]
        others = sorted((at for at in range(len(runs)) if at != first), key=lambda at: join[at])
        self.runs = runs
        self.place = [0] * len(runs)
        for row, at in enumerate(others, start=1):
            self.place[at] = row
        self.size = len(others) + 1
        self.joining = Counter(join[at] for at in others)

    def clamps(self) -> list[Clamp]:
        """One `Clamp` per neuron and mode, with a value per row."""
        groups: dict[tuple, list[tuple[int, float]]] = {}
        for run, row in zip(self.runs, self.place, strict=True):
            if run.clamp is not None:
                clamp = run.clamp
                key = (clamp.layer, clamp.neuron, clamp.site, clamp.mode)
                groups.setdefault(key, []).append((row, float(clamp.value)))  # type: ignore[arg-type]
        return [
            Clamp(layer, neuron, [value for _, value in some], site, mode, rows=[row for row, _ in some])
            for (layer, neuron, site, mode), some in groups.items()
        ]


@contextlib.contextmanager
def _local_rows() -> Iterator[None]:
    token = current_rows.set(None)
    try:
        yield
    finally:
        current_rows.reset(token)


@contextlib.contextmanager
def _fork(model: Model, order: _Order) -> Iterator[None]:
    """Inside the block a forward pass of one row gains the other rows at their layers."""

    def joiner(count: int) -> Callable[[Tensor], Tensor]:
        return lambda hidden: torch.cat([hidden, hidden[:1].expand(count, -1, -1)])

    with contextlib.ExitStack() as stack:
        for layer, count in order.joining.items():
            stack.callback(model.arch.site("resid_pre", layer).attach(joiner(count)).remove)
        yield


def _forked(
    model: Model, ids: Tensor, order: _Order, max_new_tokens: int, temperature: float
) -> tuple[Float[Tensor, "row vocab"], list[tuple[int, ...]]]:
    """Logits after the prompt and continuations, in the forked batch's order. Clamps are in place."""
    length = ids.shape[1]
    if max_new_tokens == 0:
        with _fork(model, order):
            logits = model.hf(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits, [()] * order.size
    past: dict[str, Any] = {}
    if length > 1:  # `generate` itself feeds the last token: it needs one to begin with
        with _fork(model, order):
            cache = model.hf.base_model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        past["past_key_values"] = _copy_rows(cache, order.size)
    first: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        if not first:
            first.append(output.logits[:, -1].clone())

    # As `Model.generate` decodes.
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    greedy = {"do_sample": False, **NO_SAMPLING}
    prompt = ids.expand(order.size, -1)
    handle = model.hf.register_forward_hook(keep)
    try:
        rows = model.hf.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            pad_token_id=model.pad_id,
            **PLAIN_GENERATION,
            **(sampling if temperature > 0 else greedy),
            **past,
        )[:, length:].tolist()
    finally:
        handle.remove()
    ends = model.end_ids()
    cut = [next((at for at, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return first[0], [tuple(row[:at]) for row, at in zip(rows, cut, strict=True)]


def _copy_rows(cache: Any, size: int) -> Any:
    """A KV cache with `size` rows in every layer: rows that a layer lacks are its row 0."""
    for layer in cache.layers:
        have = layer.keys.shape[0]
        if have < size:
            rows = [row if row < have else 0 for row in range(size)]
            layer.batch_select_indices(torch.tensor(rows, device=layer.keys.device))
    return cache


@dataclass(frozen=True)
class _Readout:
    """What is kept of the next token's logits."""

    concept: list[int]
    unrelated: list[int]

    def __call__(self, logits: Tensor, runs: Sequence[Run], order: _Order) -> list[tuple[float, int, float, float]]:
        log_p = logits.float().log_softmax(-1)  # (row, vocab)
        broken = torch.isnan(log_p).any(-1)
        for run, row in zip(runs, order.place, strict=True):
            if bool(broken[row]):
                raise InputError(
                    f"{run.clamp or 'the model'} makes the logits NaN; use a smaller value or dtype='float32'"
                )
        p = log_p.exp()
        p_concept = p[:, self.concept].sum(-1)
        rank = 1 + (log_p > log_p[:, self.concept].amax(-1, keepdim=True)).sum(-1)
        p_unrelated = p[:, self.unrelated].sum(-1) if self.unrelated else torch.full_like(p_concept, math.nan)
        kl = (p * (log_p - log_p[:1])).sum(-1).clamp(min=0)
        columns = [column.tolist() for column in (p_concept, rank, p_unrelated, kl)]
        return [(columns[0][row], columns[1][row], columns[2][row], columns[3][row]) for row in order.place]


@torch.no_grad()
def perplexities(
    model: Model,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[tuple[int, Sequence[int]]],
    *,
    max_tokens: int = 4096,
    progress: bool | str = False,
) -> list[float]:
    """Perplexity of continuations under the model as it is.

    Args:
        model: what `load_model` gave, a decoder.
        prompts: token ids of each prompt.
        continuations: (index of the prompt, token ids) pairs; equal ones are computed once.
        max_tokens: budget of tokens in a batch.
        progress: a progress bar on stderr; a string is its description.

    Returns:
        exp(mean negative log-likelihood per token) of each; NaN for an empty continuation.
    """
    distinct = sorted({(prompt, tuple(ids)) for prompt, ids in continuations if len(ids)}, key=lambda one: one[0])
    found: dict[tuple[int, tuple[int, ...]], float] = {}

    def step(batch: Batch) -> None:
        prompt = distinct[batch.rows[0]][0]
        batch = batch.to(model.device)
        past: dict[str, Any] = {"use_cache": False}
        if len(prompts[prompt]) > 1:
            ids = torch.tensor([list(prompts[prompt])[:-1]], device=model.device)
            cache = model.hf.base_model(input_ids=ids, use_cache=True).past_key_values
            past = {"past_key_values": _copy_rows(cache, batch.size), "use_cache": True}
        # Padding is on the right, where causal attention does not look.
        logits = model.hf(input_ids=batch.input_ids[:, :-1], **past).logits  # (row, position, vocab)
        losses = []
        for at, length in enumerate((batch.lengths - 1).tolist()):
            wanted = batch.input_ids[at, 1 : 1 + length].to(logits.device)
            losses.append(torch.nn.functional.cross_entropy(logits[at, :length].float(), wanted).item())
        for row, loss in zip(batch.rows, losses, strict=True):
            found[distinct[row]] = math.exp(min(loss, 700.0))

    batches = []
    for prompt in sorted({prompt for prompt, _ in distinct}, key=lambda at: -len(prompts[at])):
        rows = [row for row, one in enumerate(distinct) if one[0] == prompt]
        sequences = {row: [prompts[prompt][-1], *distinct[row][1]] for row in rows}
        longest = max(map(len, sequences.values()))
        fitting = _LOGIT_BYTES // (4 * longest * model.arch.vocab_size)
        size = max(1, min(max_tokens // (len(prompts[prompt]) + longest), fitting))
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            batches.append(pad([sequences[row] for row in some], some, model.pad_id))
    if batches:
        for_each_batch(batches, step, progress=progress)
    return [found.get((prompt, tuple(ids)), math.nan) for prompt, ids in continuations]
