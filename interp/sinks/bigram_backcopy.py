"""Bigram-Backcopy: the toy task on which attention sinks emerge, with its exact generator and its exact oracle.

Guo et al. 2024, "Active-Dormant Attention Heads" (arXiv 2410.13835), section 2.

1. The vocabulary is the 65 characters of tiny Shakespeare and ⟨s⟩. Triggers are the most frequent characters.
2. A sequence is ⟨s⟩, then a non-trigger from the unigram law. After a trigger comes the character before it (backcopy);
   after any other character the next one is drawn from that character's bigram law. So two triggers never follow one
   another.
3. `sample` walks a Markov chain whose states are the non-triggers, the pairs (non-trigger, trigger) and the beginning.
   All sequences take a step at once, each with one lookup in Walker's alias table (Vose 1991): exact, on any device; on
   a CPU the steps are compiled (`bigram_walk`).
4. `oracle` propagates the chain's law through the positions and so gives the least possible risks without sampling, in
   nats.

The chain has an absorbing class: in the text "3" is always followed by a space, so "3" and the space alternate for
ever. The stationary law is that class alone, with risk 0; what describes the data is the law at the positions of a
sequence of a given length.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import InputError

_STATISTICS = Path(__file__).with_name("tiny_shakespeare_bigrams.json")


@dataclass(frozen=True)
class Oracle:
    """The best that any model can do on sequences of one length; exact.

    Attributes:
        bigram_risk: mean entropy of the next character at ⟨s⟩ and non-triggers, in nats.
        backcopy_risk: at triggers, in nats: 0, since the next character is certain.
        trigger_share: expected share of input positions that hold a trigger.
        length: input positions, ⟨s⟩ included where there is one.
    """

    bigram_risk: float
    backcopy_risk: float
    trigger_share: float
    length: int


@dataclass(frozen=True)
class BigramBackcopy:
    """The task.

    Attributes:
        n_triggers: how many of the most frequent characters are triggers.
        start: whether sequences begin with ⟨s⟩.

    Raises:
        InputError: fewer than no trigger, or more than leave a character to copy.

    Example:
        >>> task = BigramBackcopy()
        >>> [task.characters[token] for token in task.triggers]
        [' ', 'e', 't']
        >>> print(f"{task.oracle(256).trigger_share:.3f} {task.oracle(256).bigram_risk:.3f}")
        0.255 2.223
    """

    n_triggers: int = 3
    start: bool = True

    def __post_init__(self) -> None:
        most = len(_statistics()[0]) - 1
        if (
            isinstance(self.n_triggers, bool)
            or not isinstance(self.n_triggers, int)
            or not 0 <= self.n_triggers <= most
        ):
            raise InputError(f"n_triggers={self.n_triggers!r}; expected a whole number from 0 to {most}")

    @property
    def characters(self) -> tuple[str, ...]:
        """The 65 characters; token t is characters[t]."""
        return _statistics()[0]

    @property
    def start_token(self) -> int:
        """The id of ⟨s⟩, behind the characters."""
        return len(self.characters)

    @property
    def vocabulary(self) -> int:
        """Number of tokens, ⟨s⟩ included."""
        return len(self.characters) + 1

    @cached_property
    def triggers(self) -> tuple[int, ...]:
        """The most frequent characters, most frequent first."""
        return tuple(int(token) for token in np.argsort(-_statistics()[1], kind="stable")[: self.n_triggers])

    def is_trigger(self, tokens: Int[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """Which tokens are triggers."""
        return torch.isin(tokens, torch.tensor(self.triggers, dtype=tokens.dtype, device=tokens.device))

    def text(self, tokens: Int[Tensor, " position"]) -> list[str]:
        """A sequence as characters, ⟨s⟩ among them."""
        names = (*self.characters, "⟨s⟩")
        return [names[token] for token in tokens.tolist()]

    def sample(
        self, n: int, length: int, *, seed: int | torch.Generator = 0, device: torch.device | str = "cpu"
    ) -> Int[Tensor, "sequence position"]:
        """Draws sequences.

        Args:
            n: how many.
            length: tokens of each, ⟨s⟩ included where there is one.
            seed: a whole number, or a generator of that device, which goes on from where it is.
            device: where the draws are made and stay. The same seed gives other draws on other kinds of device.

        Raises:
            InputError: n or length is below 1.
        """
        for name, value in (("n", n), ("length", length)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}={value!r}; expected a whole number of at least 1")
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator(device).manual_seed(seed)
        first = 1 if self.start else 0
        steps = length - first
        tables = _tables(self.n_triggers, str(device))
        slots = torch.randint(self.start_token, (steps, n), generator=generator, device=device)  # (step, sequence)
        uniform = torch.rand(steps, n, generator=generator, device=device)
        states = _walk(slots, uniform, tables, self.start_token)
        tokens = torch.full((n, length), self.start_token, device=device)
        tokens[:, first:] = tables.token[states].T
        return tokens

    def law(self, tokens: Int[Tensor, "... position"]) -> Float[Tensor, "... position vocabulary"]:
        """The true law of the token that follows each position, given the tokens up to it.

        Raises:
            InputError: a token is outside the vocabulary, or a trigger has nothing before it.
        """
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocabulary:
            raise InputError(
                f"token {int(tokens.min())} or {int(tokens.max())}; the vocabulary is 0 … {self.vocabulary - 1}"
            )
        trigger = self.is_trigger(tokens)
        if trigger[..., :1].any():
            raise InputError("a sequence begins with a trigger, which has nothing before it to copy")
        rows = torch.from_numpy(np.vstack([self._bigram, self._first])).float()
        rows = torch.nn.functional.pad(rows, (0, 1)).to(tokens.device)  # ⟨s⟩ never follows
        before = torch.nn.functional.one_hot(tokens.roll(1, -1), self.vocabulary).float()
        return torch.where(trigger[..., None], before, rows[tokens])

    def oracle(self, length: int) -> Oracle:
        """The least possible risks over the input positions of sequences of a length, exactly.

        Args:
            length: input positions, ⟨s⟩ included where there is one; their next tokens are what is predicted.

        Raises:
            InputError: length is below 1.
        """
        if length < 1:
            raise InputError(f"length={length}; expected at least 1")
        plain, waiting = self.occupancy(length)
        entropy = -np.where(
            self._bigram > 0, self._bigram * np.log(np.where(self._bigram > 0, self._bigram, 1)), 0
        ).sum(1)
        risk, positions = float((plain @ entropy).sum()), float(plain.sum())
        if self.start:
            first = self._first[self._first > 0]
            risk, positions = risk - float(first @ np.log(first)), positions + 1
        return Oracle(risk / positions, 0.0, float(waiting.sum()) / length, length)

    def occupancy(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the chain is at each input position behind ⟨s⟩.

        Returns:
            (position, character) probability that a non-trigger stands there; (position, character) probability that a
            trigger stands there, by the character before it.
        """
        steps = length - 1 if self.start else length
        plain, waiting = np.zeros((steps, self.start_token)), np.zeros((steps, self.start_token))
        triggers = list(self.triggers)
        onward = self._bigram.copy()
        onward[:, triggers] = 0
        to_trigger = self._bigram[:, triggers].sum(1)
        for step in range(steps):
            if step == 0:
                plain[0] = self._first
                continue
            plain[step] = plain[step - 1] @ onward + waiting[step - 1]
            waiting[step] = plain[step - 1] * to_trigger
        return plain, waiting

    @cached_property
    def _bigram(self) -> np.ndarray:
        """(character, next) law, rows of sum 1: the file is rounded."""
        return _statistics()[2]

    @cached_property
    def _first(self) -> np.ndarray:
        """Law of the first character: the unigram law without triggers."""
        law = _statistics()[1].copy()
        law[list(self.triggers)] = 0
        return law / law.sum()


@dataclass(frozen=True)
class _Tables:
    """Walker's alias tables of the chain.

    Attributes:
        threshold: (state · character) below which the slot's own character is taken.
        outcome: (state · character · 2) next state: the slot's own, else its alias.
        token: (state) the character that a state shows.
    """

    threshold: Tensor
    outcome: Tensor
    token: Tensor


def _walk(slots: Tensor, uniform: Tensor, tables: _Tables, characters: int) -> Tensor:
    """(step, sequence) states: a lookup per step for all sequences together."""
    beginning = len(tables.token) - 1
    if slots.device.type == "cpu":
        from interp.sinks.bigram_walk import walk

        chain = (slots.numpy(), uniform.numpy(), tables.threshold.numpy(), tables.outcome.numpy())
        return torch.from_numpy(walk(*chain, beginning, characters))
    return _walk_anywhere(slots, uniform, tables, characters)


def _walk_anywhere(slots: Tensor, uniform: Tensor, tables: _Tables, characters: int) -> Tensor:
    """The same by torch's operations, on any device."""
    states = torch.empty_like(slots)
    state = slots.new_full(slots.shape[1:], len(tables.token) - 1)
    for step in range(len(slots)):
        cell = torch.add(slots[step], state, alpha=characters)
        state = tables.outcome[2 * cell + (uniform[step] >= tables.threshold[cell])]
        states[step] = state
    return states


@lru_cache(maxsize=16)
def _tables(n_triggers: int, device: str) -> _Tables:
    task = BigramBackcopy(n_triggers)
    n, triggers = task.start_token, list(task.triggers)
    # States: characters, then (character before, trigger), then the beginning.
    laws = [*task._bigram, *np.eye(n).repeat(max(1, n_triggers), axis=0)[: n * n_triggers], task._first]
    into = np.tile(np.arange(n), (len(laws), 1))  # (state, character) state that drawing it leads to
    for character in range(n):
        into[character, triggers] = n + character * n_triggers + np.arange(n_triggers)
    threshold, outcome = np.ones((len(laws), n)), np.zeros((len(laws), n, 2), dtype=np.int64)
    for state, law in enumerate(laws):
        threshold[state], alias = _alias(law)
        outcome[state] = np.stack([into[state], into[state, alias]], axis=1)
    token = np.array([*range(n), *np.tile(triggers, n), n], dtype=np.int64)
    return _Tables(
        torch.from_numpy(threshold.ravel()).float().to(device),
        torch.from_numpy(outcome.ravel()).to(device),
        torch.from_numpy(token).to(device),
    )


def _alias(law: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vose's method: every slot holds its own character below a threshold and one alias above it."""
    share, alias = law * len(law) / law.sum(), np.arange(len(law))
    small, large = [list(np.flatnonzero(share < 1)), list(np.flatnonzero(share >= 1))]
    threshold = np.ones(len(law))
    while small and large:
        low, high = small.pop(), large[-1]
        threshold[low], alias[low] = share[low], high
        share[high] -= 1 - share[low]
        if share[high] < 1:
            small.append(large.pop())
    return threshold, alias  # what is left has share 1, but for rounding


@lru_cache(maxsize=1)
def _statistics() -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Characters, unigram law, bigram laws."""
    content = json.loads(_STATISTICS.read_text(encoding="utf-8"))
    bigram = np.array(content["bigram"])
    return tuple(content["characters"]), np.array(content["unigram"]), bigram / bigram.sum(1, keepdims=True)
