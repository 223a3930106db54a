"""Two answers per prompt, scored with something changed inside the model; what no change reaches is computed once.

1. `prepare` passes each prompt up to its last few tokens through the model once and keeps keys and values
   (`interp.conflict.kept_keys`). The last tokens and both answers then run behind them; the residual stream that enters chosen
   layers is kept, and so are chosen sites at the prompt's last tokens.
2. `changed_scores` runs variants. A row of a batch is one (variant, prompt). It begins at the lowest changed layer
   (`interp.from_layer`), holds the last tokens and the answers alone, and reads keys and values of the layers above.
3. Both answers stand in one row, and neither sees the other: a mask of our own, as in tree decoding (Miao et al., SpecInfer,
   arXiv 2305.09781). Where some layer's window is shorter than a text, or the attention kernel takes no mask, each answer is a
   row of its own. Rows are padded on the left, before the kept keys, and on the right: between real tokens the distance in the
   row is the distance in the text, so that then masks are the family's own. Where attention is neither full nor a sliding window
   no keys are kept either, and rows hold the whole prompt.
4. The score of an answer is its mean log-probability per token, in nats, from the first token on in which the two answers differ:
   what both begin with cancels. The LM head reads these positions alone, some hundreds at a time, and softmax is float32.

Batches hold at most `max_tokens` tokens, those whose keys are kept included; one that runs out of memory is halved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.architectures import Site
from interp.batching import Batch, check_memory, for_each_batch, token_batches
from interp.conflict.kept_keys import KeptKeys, keep_keys, keeps_keys
from interp.from_layer import from_layer
from interp.model import Model

Visit = Callable[[Tensor], "Tensor | None"]
# Logits that live at a time: they should stay small on a CPU, and fill a GPU.
_LOGITS = {"cpu": 2**22, "cuda": 2**26}


@dataclass(frozen=True)
class Prompt:
    """A prompt with two answers.

    Attributes:
        ids: token ids of the prompt.
        n_last: how many of its last tokens changes may reach; at least 1.
        answers: token ids of both answers.
        scored: the first token in which they differ.
    """

    ids: tuple[int, ...]
    n_last: int
    answers: tuple[tuple[int, ...], tuple[int, ...]]
    scored: int


@dataclass(frozen=True)
class Line:
    """What one row holds: the prompt's tokens from `start` on, and one or both answers without their last token.

    Attributes:
        prompt: its number.
        start: tokens of the prompt before it have their keys kept and do not run again.
        answers: which answers, 0 or 1.
        ids: token ids.
        offsets: where in the row each answer begins.
    """

    prompt: int
    start: int
    answers: tuple[int, ...]
    ids: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """Rows of one batch.

    Attributes:
        variants, prompts, lines: (row) which variant, prompt and line each is.
        row, position, back: (place) flat indices of the prompts' last tokens: their row, their position there, and how many
            tokens of the prompt follow (0: it is the last).
    """

    variants: Int[Tensor, " row"]
    prompts: Int[Tensor, " row"]
    lines: Int[Tensor, " row"]
    row: Int[Tensor, " place"]
    position: Int[Tensor, " place"]
    back: Int[Tensor, " place"]


# What a batch of variants changes: sites and what is done there.
Changes = Callable[[Rows], Sequence[tuple[Site, Visit]]]


@dataclass
class Prepared:
    """What `prepare` computed once.

    Attributes:
        prompts: as given.
        lines: what rows hold; one or two per prompt.
        kept: keys and values of the tokens before the lines.
        residuals: {layer: (line, position, d_model)} site "resid_pre".
        last: {(site, layer): (prompt, back, width)} the site at the prompts' last tokens, counted from the end.
        scores: (prompt, answer) nats per token, unchanged model.
    """

    prompts: list[Prompt]
    lines: list[Line]
    kept: KeptKeys
    residuals: dict[int, Tensor] = field(default_factory=dict)
    last: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    scores: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))


def packs(model: Model, longest: int) -> bool:
    """Whether two answers can stand in one row: every layer sees all of up to `longest` tokens through a mask that is given."""
    config = model.arch.config
    kinds = getattr(config, "layer_types", None)
    slides = not kinds or "sliding_attention" in kinds
    window = getattr(config, "sliding_window", None) or longest
    return keeps_keys(model) and model.attention in ("sdpa", "eager") and not (slides and int(window) < longest)


@torch.no_grad()
def prepare(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    residuals: Sequence[int] = (),
    last: Sequence[tuple[str, int]] = (),
    whole: bool = False,
    max_tokens: int = 4096,
) -> Prepared:
    """Pass prompts and answers through the model as it is, and keep what changed runs need.

    Args:
        model: a causal LM.
        prompts: at least one.
        residuals: layers at which changed runs will begin.
        last: (site, layer) pairs to keep at the prompts' last tokens.
        whole: keep no keys, so that changes may reach every position.
        max_tokens: budget of padded tokens in a batch.

    Raises:
        MemoryBudgetError: one prompt alone does not fit, or what is kept does not.
    """
    whole = whole or not keeps_keys(model)
    longest = max(len(prompt.ids) + max(map(len, prompt.answers)) for prompt in prompts)
    together = [(0, 1)] if packs(model, longest) else [(0,), (1,)]
    lines = [
        _line(at, prompt, 0 if whole else len(prompt.ids) - prompt.n_last, answers)
        for at, prompt in enumerate(prompts)
        for answers in together
    ]
    beginnings = [lines[at * len(together)].start for at in range(len(prompts))]
    kept = keep_keys(model, [one.ids[:start] for one, start in zip(prompts, beginnings, strict=True)], max_tokens)
    prepared = Prepared(list(prompts), lines, kept)
    n_last, width = max(prompt.n_last for prompt in prompts), max(len(line.ids) for line in lines)
    numbers = len(residuals) * len(lines) * width * model.arch.d_model
    numbers += len(last) * len(prompts) * n_last * max(model.arch.d_model, model.arch.n_heads * model.arch.d_head)
    check_memory(numbers * model.dtype.itemsize, "cpu", f"what is kept of {len(prompts)} prompts")
    for layer in residuals:
        prepared.residuals[layer] = torch.zeros(len(lines), width, model.arch.d_model, dtype=model.dtype)

    def keep_residual(layer: int, rows: Rows) -> Visit:
        def visit(tensor: Tensor) -> None:
            prepared.residuals[layer][rows.lines, : tensor.shape[1]] = tensor.cpu()

        return visit

    def keep_last(site: tuple[str, int], rows: Rows) -> Visit:
        def visit(tensor: Tensor) -> None:
            found = tensor[rows.row.to(tensor.device), rows.position.to(tensor.device)].cpu()
            if site not in prepared.last:
                prepared.last[site] = torch.zeros(len(prompts), n_last, found.shape[-1], dtype=found.dtype)
            prepared.last[site][rows.prompts[rows.row], rows.back] = found

        return visit

    def keep(rows: Rows) -> list[tuple[Site, Visit]]:
        changes = [(model.arch.site("resid_pre", layer), keep_residual(layer, rows)) for layer in residuals]
        return changes + [(model.arch.site(*site), keep_last(site, rows)) for site in last]

    prepared.scores = changed_scores(model, prepared, None, 1, keep, max_tokens=max_tokens)[0]
    return prepared


@torch.no_grad()
def changed_scores(
    model: Model,
    prepared: Prepared,
    layer: int | None,
    n_variants: int,
    changes: Changes,
    *,
    max_tokens: int = 4096,
    done: Callable[[int], Any] = lambda _: None,
) -> Float[np.ndarray, "variant prompt answer"]:
    """Scores of both answers to every prompt under each variant of a change.

    Args:
        model: that of `prepare`.
        prepared: with the residual stream of `layer`.
        layer: the lowest layer that changes, where runs begin; `None` to run all layers.
        n_variants: how many variants.
        changes: gives the sites of a batch and what is done there; called once per batch.
        max_tokens: budget of padded tokens in a batch.
        done: called with the number of answers that were scored.

    Returns:
        Mean log-probability per token in nats, float64.

    Raises:
        MemoryBudgetError: one row alone does not fit.
    """
    lines, n_lines = prepared.lines, len(prepared.lines)
    scores = np.full((n_variants, len(prepared.prompts), 2), np.nan)

    def step(batch: Batch) -> None:
        # A row's number is variant · n_lines + line; of the batch itself only these and its size count.
        rows = _rows(prepared, [divmod(row, n_lines) for row in batch.rows])
        with contextlib.ExitStack() as stack:
            if layer is not None:
                width = max(len(lines[line].ids) for line in rows.lines)
                stack.enter_context(
                    from_layer(model, layer, prepared.residuals[layer][rows.lines, :width].to(model.device))
                )
            for site, visit in changes(rows):
                stack.callback(site.attach(visit).remove)
            hidden = _run(model, prepared, rows, layer or 0)
        found = iter(_answer_scores(model, prepared, rows, hidden))
        n_scored = 0
        for variant, line in zip(rows.variants.tolist(), rows.lines.tolist(), strict=True):
            for answer in lines[line].answers:
                scores[variant, lines[line].prompt, answer] = next(found)
                n_scored += 1
        done(n_scored)

    wholes = [(*prepared.prompts[line.prompt].ids[: line.start], *line.ids) for line in lines]
    for_each_batch(token_batches(wholes * n_variants, max_tokens=max_tokens, pad_id=model.pad_id), step)
    return scores


def replace_last(site: Site, rows: Rows, donors: Float[Tensor, "prompt back width"]) -> tuple[Site, Visit]:
    """A change: the site gets a donor's values at the prompts' last tokens."""
    given = donors[rows.prompts[rows.row], rows.back]

    def visit(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[rows.row.to(tensor.device), rows.position.to(tensor.device)] = given.to(tensor)
        return changed

    return site, visit


def _line(at: int, prompt: Prompt, start: int, answers: tuple[int, ...]) -> Line:
    ids, offsets = prompt.ids[start:], []
    for answer in answers:
        offsets.append(len(ids))
        ids = (*ids, *prompt.answers[answer][:-1])  # an answer's last token predicts nothing
    return Line(at, start, answers, ids, tuple(offsets))


def _rows(prepared: Prepared, at: Sequence[tuple[int, int]]) -> Rows:
    """Rows of (variant, line) pairs."""
    places = [
        (row, prepared.lines[line].offsets[0] - 1 - back, back)
        for row, (_, line) in enumerate(at)
        for back in range(prepared.prompts[prepared.lines[line].prompt].n_last)
    ]
    variants, lines = (torch.tensor(column) for column in zip(*at, strict=True))
    row, position, back = (torch.tensor(column) for column in zip(*places, strict=True))
    prompts = torch.tensor([prepared.lines[line].prompt for _, line in at])
    return Rows(variants, prompts, lines, row, position, back)


def _run(model: Model, prepared: Prepared, rows: Rows, layer: int) -> Float[Tensor, "row position d_model"]:
    """Final hidden states of rows, after the final norm; layers below `layer` are expected to be skipped."""
    lines = [prepared.lines[line] for line in rows.lines]
    before, width = max(line.start for line in lines), max(len(line.ids) for line in lines)
    ids = torch.full((len(lines), width), model.pad_id)
    positions = torch.zeros(len(lines), width, dtype=torch.long)
    part = torch.full((len(lines), width), -1)  # of each token: 0 the prompt, 1 and 2 the answers, -1 padding
    for row, line in enumerate(lines):
        n_ids, n_prompt = len(line.ids), line.offsets[0]
        ids[row, :n_ids] = torch.tensor(line.ids)
        positions[row, :n_prompt] = line.start + torch.arange(n_prompt)
        part[row, :n_prompt] = 0
        for number, (start, end) in enumerate(zip(line.offsets, (*line.offsets[1:], n_ids), strict=True), 1):
            positions[row, start:end] = line.start + n_prompt + torch.arange(end - start)
            part[row, start:end] = number
    starts = torch.tensor([line.start for line in lines])
    real = torch.cat([torch.arange(-before, 0) >= -starts[:, None], part >= 0], dim=1)  # (row, key)
    together = len(lines[0].answers) > 1
    mask = _mask(real, part, before, model) if together else real.long().to(model.device)
    cached: dict[str, Any] = {"use_cache": False}
    if before:
        cached = {"use_cache": True, "past_key_values": prepared.kept.cache(rows.prompts, before, layer)}
    return model.hf.base_model(
        input_ids=ids.to(model.device), attention_mask=mask, position_ids=positions.to(model.device), **cached
    ).last_hidden_state


def _mask(real: Tensor, part: Tensor, before: int, model: Model) -> Float[Tensor, "row 1 position key"]:
    """0 where a token sees a key: the prompt's, and earlier ones of its own part; the least number elsewhere."""
    width = part.shape[1]
    inside = ((part[:, None] == 0) | (part[:, None] == part[:, :, None])) & torch.ones(width, width).tril().bool()
    seen = torch.cat(
        [real[:, None, :before].expand(-1, width, -1), inside], dim=2
    )  # padding sees itself: no row is empty
    mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill_(~seen, torch.finfo(model.dtype).min)
    return mask[:, None].to(model.device)


def _answer_scores(
    model: Model, prepared: Prepared, rows: Rows, hidden: Float[Tensor, "row position d_model"]
) -> Float[np.ndarray, " answer"]:
    """Scores of the rows' answers, row by row."""
    places, targets, counts = [], [], []
    for row, line in enumerate(prepared.lines[at] for at in rows.lines):
        prompt = prepared.prompts[line.prompt]
        for answer, offset in zip(line.answers, line.offsets, strict=True):
            ids = prompt.answers[answer]
            for token in range(prompt.scored, len(ids)):
                places.append((row, offset + token - 1 if token else line.offsets[0] - 1))
            targets += ids[prompt.scored :]
            counts.append(len(ids) - prompt.scored)
    row_at, position_at = (torch.tensor(column, device=hidden.device) for column in zip(*places, strict=True))
    vectors, goals = hidden[row_at, position_at], torch.tensor(targets, device=hidden.device)
    head: Any = model.arch.lm_head()
    cap = getattr(model.arch.config, "final_logit_softcapping", None)
    step = max(16, _LOGITS.get(hidden.device.type, _LOGITS["cuda"]) // model.arch.vocab_size)
    found = []
    for start in range(0, len(goals), step):
        logits = head(vectors[start : start + step])
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        goal = goals[start : start + step].to(logits.device)
        found.append(-torch.nn.functional.cross_entropy(logits.float(), goal, reduction="none").cpu())
    logprobs = torch.cat(found).double().numpy()
    return np.add.reduceat(logprobs, np.cumsum([0, *counts[:-1]])) / np.array(counts)
