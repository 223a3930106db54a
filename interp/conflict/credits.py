"""Credit of every answer token, measured once before the training, on the reference model: the base as it is.

1. Log-probabilities ℓ_ref of each answer's tokens after the pair's prompt.
2. Credit "reward": ℓ_rm of the same tokens under a reward model, r_t = β (ℓ_rm − ℓ_ref). The released code takes another language
   model that reads the same prompt. Without one, it is the base model that reads the same task with the rule in the user turn and
   nothing against it: a model that is told clearly.
3. Credit "attention": g_t = mean over focal heads of the attention to the system's rule from position t − 1, which predicts t.
4. Factors of the loss: `interp.conflict.sail_loss`.

Since neither model changes during the training, no training step runs them again. Nor do log-probabilities depend on the layers
that are trained: with a folder they are kept there, for several runs and for one that was interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.atomic import write_atomically
from interp.batching import Batch, for_each_batch, token_batches
from interp.capture import run_probes
from interp.conflict.preference_table import Preference, tokenizer_hash
from interp.conflict.sail_loss import attention_factors, check_credit, reward_factors
from interp.conflict.shared_prompts import answer_log_probs, pad_pairs
from interp.errors import InputError
from interp.model import Model
from interp.recorded_attention import check_causal

Head = tuple[int, int]
# (prompt, first answer, second answer) in token ids.
Text = tuple[Sequence[int], Sequence[int], Sequence[int]]
# Of preferences to (chosen, rejected) log-probabilities of each answer token.
RewardModel = Callable[[Sequence[Preference]], Sequence[tuple[Sequence[float], Sequence[float]]]]


@dataclass(frozen=True)
class CreditedPair:
    """A preference with what the loss needs to know of its tokens; each array is (token,) float32.

    Attributes:
        preference: token ids.
        chosen_reference, rejected_reference: ℓ_ref, nats.
        chosen_credit, rejected_credit: r_t or g_t; zeros for credit "none".
        chosen_factors, rejected_factors: c_t.
    """

    preference: Preference
    chosen_reference: np.ndarray
    rejected_reference: np.ndarray
    chosen_credit: np.ndarray
    rejected_credit: np.ndarray
    chosen_factors: np.ndarray
    rejected_factors: np.ndarray


def credit_pairs(
    model: Model,
    preferences: Sequence[Preference],
    credit: str = "reward",
    *,
    heads: Sequence[Head] | None = None,
    alpha: float = 0.5,
    beta: float = 0.1,
    reward_model: Model | RewardModel | None = None,
    max_tokens: int = 4096,
    folder: str | Path | None = None,
    progress: bool | str = False,
) -> list[CreditedPair]:
    """Reference log-probabilities and factors of every pair.

    Args:
        model: the base.
        preferences: at least one.
        credit: "reward", "attention" or "none".
        heads: focal heads of credit "attention", (layer, head).
        alpha, beta: of the loss.
        reward_model: of credit "reward": another model with the same tokenizer, or a function; see the module's step 2.
        max_tokens: budget of padded tokens in a batch.
        folder: where models' log-probabilities are kept and looked for.
        progress: progress bars on stderr; a string is their description.

    Raises:
        InputError: an unknown credit, no heads for "attention", a reward model with another tokenizer, or one that gives another
            number of values than there are tokens.
    """
    check_credit(credit, alpha, beta)
    if not preferences:
        raise InputError("no preferences were given; expected at least one pair")

    def named(what: str) -> bool | str:
        return f"{progress}: {what}" if isinstance(progress, str) else what if progress else False

    texts = [(item.prompt, item.chosen, item.rejected) for item in preferences]
    score = partial(_kept, folder=None if folder is None else Path(folder), max_tokens=max_tokens)
    reference = score(model, texts, progress=named("reference"))
    if credit == "reward":
        clear = _rewards(model, preferences, reward_model, partial(score, progress=named("reward")))
        credits_ = [
            (beta * (good - ref_good), beta * (bad - ref_bad))
            for (good, bad), (ref_good, ref_bad) in zip(clear, reference, strict=True)
        ]
        factors = [(reward_factors(good, alpha, True), reward_factors(bad, alpha, False)) for good, bad in credits_]
    elif credit == "attention":
        credits_ = rule_attention(model, preferences, heads, max_tokens=max_tokens, progress=named("attention"))
        factors = [(attention_factors(good, alpha), attention_factors(bad, alpha)) for good, bad in credits_]
    else:
        credits_ = [(np.zeros(len(good)), np.zeros(len(bad))) for good, bad in reference]
        factors = [(np.ones(len(good)), np.ones(len(bad))) for good, bad in reference]
    return [
        CreditedPair(item, *(np.asarray(values, dtype=np.float32) for both in parts for values in both))
        for item, *parts in zip(preferences, reference, credits_, factors, strict=True)
    ]


@torch.no_grad()
def pair_log_probs(
    model: Model,
    texts: Sequence[Text],
    *,
    max_tokens: int = 4096,
    progress: bool | str = False,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Log-probabilities of each token of two answers to a prompt.

    Args:
        model: a causal LM.
        texts: (prompt, first answer, second answer) in token ids.
        max_tokens: budget of padded tokens in a batch.
        progress: a progress bar on stderr.

    Returns:
        ((token,), (token,)) float32, in nats, per text.
    """
    found: list[Any] = [None] * len(texts)

    def step(batch: Batch) -> None:
        some = [texts[row] for row in batch.rows]
        prompts, first, second = zip(*some, strict=True)
        pairs = pad_pairs(prompts, first, second, model.pad_id).to(model.device)
        values = answer_log_probs(model.hf, pairs).cpu().numpy()
        for at, row in enumerate(batch.rows):
            found[row] = (values[at, : len(first[at])], values[len(some) + at, : len(second[at])])

    # The whole length stands for what a pair costs.
    lengths = [(*prompt, *first, *second) for prompt, first, second in texts]
    for_each_batch(token_batches(lengths, max_tokens=max_tokens), step, progress=progress, unit="pair")
    return found


def _kept(
    model: Model, texts: Sequence[Text], folder: Path | None, max_tokens: int, progress: bool | str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """As `pair_log_probs`, from the folder where this model's are there."""
    if folder is None:
        return pair_log_probs(model, texts, max_tokens=max_tokens, progress=progress)
    plain = [[list(map(int, part)) for part in text] for text in texts]
    name = hashlib.sha256(f"{model.fingerprint} {plain}".encode()).hexdigest()[:24]
    path = folder / f"{name}.npy"
    ends = np.cumsum([len(answer) for _, *answers in texts for answer in answers])
    with contextlib.suppress(OSError, ValueError, EOFError):  # not there, or damaged: measured again
        values = np.load(path, allow_pickle=False)
        if values.shape == (ends[-1],) and values.dtype == np.float32:
            parts = np.split(values, ends[:-1])
            return list(zip(parts[::2], parts[1::2], strict=True))
    found = pair_log_probs(model, texts, max_tokens=max_tokens, progress=progress)
    whole = np.concatenate([values for both in found for values in both])
    write_atomically(path, lambda file: np.save(file, whole))
    return found


def rule_attention(
    model: Model,
    preferences: Sequence[Preference],
    heads: Sequence[Head] | None,
    *,
    max_tokens: int = 4096,
    progress: bool | str = False,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """g_t of each token of both answers: ((token,), (token,)) per preference, probabilities.

    Args:
        model: a causal LM.
        preferences: with the positions of the system's rule.
        heads: (layer, head), at least one; negative ones count from the end.
        max_tokens: budget of padded tokens in a batch.
        progress: a progress bar on stderr.

    Raises:
        InputError: no head, one out of range, or a preference without a system's rule.
    """
    if not heads:
        raise InputError(
            "credit='attention' needs the focal heads; give heads=[(layer, head), …], such as localize found"
        )
    chosen = sorted({(model.arch.check_layer(layer), model.arch.check_head(head)) for layer, head in heads})
    check_causal(model, {layer for layer, _ in chosen})
    without = next((item.id for item in preferences if not item.rule_positions), None)
    if without is not None:
        raise InputError(
            f"preference {without!r} has no system rule in its prompt: nothing can be credited by attention to it"
        )
    texts = [[*item.prompt, *answer] for item in preferences for answer in (item.chosen, item.rejected)]
    positions = [item.rule_positions for item in preferences for _ in range(2)]
    probe = _RuleAttention(chosen, positions)
    run_probes(model, texts, [probe], max_tokens=max_tokens, progress=progress)
    means = [total / len(chosen) for total in probe.totals]
    found = []
    for at, item in enumerate(preferences):
        before = len(item.prompt) - 1  # the position that predicts an answer's first token
        found.append((means[2 * at][before:-1], means[2 * at + 1][before:-1]))
    return found


class _RuleAttention:
    """A probe: sum over heads of each position's attention to some positions of its text."""

    def __init__(self, heads: Sequence[Head], positions: Sequence[Sequence[int]]) -> None:
        self.heads: dict[int, list[int]] = {}
        for layer, head in heads:
            self.heads.setdefault(layer, []).append(head)
        self.positions = positions
        self.sites = [("pattern", layer) for layer in self.heads]
        self.totals: list[Any] = [0.0] * len(positions)

    def update(self, site: str, layer: int, tensor: Tensor, batch: Batch) -> list[np.ndarray]:
        """Per text (position,), summed over the layer's heads."""
        pattern = tensor[:, self.heads[layer]].float().sum(1)  # (text, query, key)
        return [
            pattern[at][:, list(self.positions[row])].sum(-1)[: int(batch.lengths[at])].double().cpu().numpy()
            for at, row in enumerate(batch.rows)
        ]

    def merge(self, site: str, layer: int, partial: Iterable[np.ndarray], batch: Batch) -> None:
        """Add up over layers."""
        for row, values in zip(batch.rows, partial, strict=True):
            self.totals[row] = self.totals[row] + values


def _rewards(
    model: Model,
    preferences: Sequence[Preference],
    reward_model: Model | RewardModel | None,
    score: Callable[..., list[tuple[np.ndarray, np.ndarray]]],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """ℓ_rm of both answers' tokens."""
    if reward_model is None:
        clear = [(item.clear, item.chosen, item.rejected) for item in preferences]
        return score(model, clear)
    if isinstance(reward_model, Model):
        if reward_model.tokenizer is None or tokenizer_hash(reward_model) != tokenizer_hash(model):
            raise InputError(
                f"the reward model {reward_model.name} has another tokenizer than {model.name}; give one with the same vocabulary"
            )
        same = [(item.prompt, item.chosen, item.rejected) for item in preferences]
        return score(reward_model, same)
    given = [tuple(np.asarray(part, dtype=np.float64) for part in both) for both in reward_model(preferences)]
    expected = [((len(item.chosen),), (len(item.rejected),)) for item in preferences]
    if [tuple(part.shape for part in both) for both in given] != expected:
        raise InputError(
            "the reward model must give, for each preference, one log-probability per token of both answers"
        )
    if not all(np.isfinite(part).all() for both in given for part in both):
        raise InputError("the reward model gave log-probabilities that are not finite")
    return given  # type: ignore[return-value]
