"""The task against a loop over characters, scipy's stationary law, and the published facts."""

from __future__ import annotations

import json
from importlib.resources import files

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from interp.errors import InputError
from interp.sinks import bigram_backcopy, bigram_published
from interp.sinks.bigram_backcopy import BigramBackcopy, _alias

STATISTICS = json.loads(files("interp.sinks").joinpath("tiny_shakespeare_bigrams.json").read_text(encoding="utf-8"))


def loop(n: int, length: int, seed: int, n_triggers: int = 3) -> np.ndarray:
    """(sequence, position) the task as it is stated, a character at a time."""
    random = np.random.default_rng(seed)
    unigram, bigram = np.array(STATISTICS["unigram"]), np.array(STATISTICS["bigram"])
    triggers = set(np.argsort(-unigram)[:n_triggers].tolist())
    first = np.array([0 if token in triggers else share for token, share in enumerate(unigram)])
    sequences = []
    for _ in range(n):
        tokens = [65, random.choice(65, p=first / first.sum())]
        while len(tokens) < length:
            law = bigram[tokens[-1]] / bigram[tokens[-1]].sum()
            tokens.append(tokens[-2] if tokens[-1] in triggers else random.choice(65, p=law))
        sequences.append(tokens)
    return np.array(sequences)


def test_the_statistics_are_those_of_the_specification() -> None:
    assert len(STATISTICS["characters"]) == 65
    np.testing.assert_allclose(np.sum(STATISTICS["bigram"], axis=1), 1, atol=1e-6)


def test_every_transition_has_the_probability_that_the_task_states() -> None:
    task = BigramBackcopy()
    tokens = task.sample(2000, 100, seed=3)
    before, after = tokens[:, 1:-1].flatten(), tokens[:, 2:].flatten()
    trigger = task.is_trigger(before)
    copied = tokens[:, :-2].flatten()
    assert (after[trigger] == copied[trigger]).all()
    assert (tokens[:, 0] == 65).all()
    assert (tokens[:, 1:] < 65).all()
    tested = 0
    for character in before[~trigger].unique().tolist():
        follows = np.bincount(after[~trigger & (before == character)].numpy(), minlength=65)
        law = np.array(STATISTICS["bigram"][character])
        assert follows[law == 0].sum() == 0
        expected = law / law.sum() * follows.sum()
        common = expected >= 10
        if common.sum() < 2:
            continue
        rest = np.array([[follows[~common].sum()], [expected[~common].sum()]])
        seen, due = np.append(follows[common], rest[0]), np.append(expected[common], rest[1])
        keep = due > 0
        assert scipy.stats.chisquare(seen[keep], due[keep]).pvalue > 1e-5, STATISTICS["characters"][character]
        tested += 1
    assert tested > 30


def test_first_characters_follow_the_unigram_law_without_triggers() -> None:
    task = BigramBackcopy()
    first = task.sample(20_000, 2, seed=5)[:, 1]
    assert not task.is_trigger(first).any()
    law = np.array(STATISTICS["unigram"])
    law[list(task.triggers)] = 0
    expected = law / law.sum() * 20_000
    common = expected >= 10
    seen = np.bincount(first.numpy(), minlength=65)
    seen, due = np.append(seen[common], seen[~common].sum()), np.append(expected[common], expected[~common].sum())
    assert scipy.stats.chisquare(seen, due).pvalue > 1e-5


def test_same_law_as_a_loop_over_characters() -> None:
    """Two samples, one of them by the loop: the counts of what stands at position 40 do not differ more than by chance."""
    slow, fast = loop(1500, 42, seed=1)[:, 40], BigramBackcopy().sample(1500, 42, seed=1)[:, 40].numpy()
    counts = np.stack([np.bincount(one, minlength=66) for one in (slow, fast)])
    common = counts.sum(0) >= 20
    table = np.column_stack([counts[:, common], counts[:, ~common].sum(1)])
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-4


def test_facts_of_the_specification() -> None:
    task = BigramBackcopy()
    assert [task.characters[token] for token in task.triggers] == [" ", "e", "t"]
    exact = task.oracle(256)
    tokens = task.sample(4000, 256, seed=11)
    trigger = task.is_trigger(tokens)
    assert not (trigger[:, 1:] & trigger[:, :-1]).any()
    assert trigger.float().mean().item() == pytest.approx(exact.trigger_share, abs=1e-3)
    # Published figures are those of a sample; ours are exact.
    assert exact.trigger_share == pytest.approx(bigram_published.TRIGGER_SHARE, abs=1e-3)
    assert exact.bigram_risk == pytest.approx(bigram_published.ORACLE, abs=5e-3)
    assert exact.backcopy_risk == 0


def test_oracle_is_the_risk_of_the_law_on_samples() -> None:
    task = BigramBackcopy()
    tokens = loop(400, 65, seed=2)
    law = task.law(torch.tensor(tokens[:, :-1]))
    trigger = task.is_trigger(torch.tensor(tokens[:, :-1]))
    entropy = torch.special.entr(law).sum(-1)
    assert entropy[trigger].abs().max() == 0
    assert entropy[~trigger].mean().item() == pytest.approx(task.oracle(64).bigram_risk, abs=0.03)
    chosen = law.gather(-1, torch.tensor(tokens[:, 1:, None]))[..., 0]
    assert chosen.min() > 0
    assert chosen[trigger].min() == 1
    # what is drawn has the log-likelihood that the law says
    assert -chosen[~trigger].log().mean().item() == pytest.approx(entropy[~trigger].mean().item(), abs=0.03)
    torch.testing.assert_close(law.sum(-1), torch.ones_like(entropy))


def test_occupancy_against_the_whole_chain_and_its_stationary_law() -> None:
    """The chain over (character before, character) pairs, built entry by entry; its stationary law from scipy."""
    task = BigramBackcopy()
    bigram = np.array(STATISTICS["bigram"])
    bigram /= bigram.sum(1, keepdims=True)
    triggers = list(task.triggers)
    chain = np.zeros((65 + 195, 65 + 195))  # non-triggers, then (character, trigger)
    for character in range(65):
        for after in range(65):
            to = 65 + character * 3 + triggers.index(after) if after in triggers else after
            chain[character, to] += bigram[character, after]
        chain[65 + character * 3 : 68 + character * 3, character] = 1
    law = np.array(STATISTICS["unigram"] + [0.0] * 195)
    law[triggers] = 0
    law /= law.sum()
    plain, waiting = task.occupancy(60)
    for step in range(59):
        np.testing.assert_allclose(plain[step], law[:65], atol=1e-12)
        np.testing.assert_allclose(waiting[step], law[65:].reshape(65, 3).sum(1), atol=1e-12)
        law = law @ chain
    # "3" is always followed by a space: the only stationary law is "3 3 3 …", half of it triggers, and nothing to predict.
    used = np.setdiff1d(np.arange(260), triggers)  # a trigger alone is no state
    reached = chain[np.ix_(used, used)]
    values, vectors = scipy.linalg.eig(reached.T)
    assert (np.abs(values - 1) < 1e-9).sum() == 1
    stationary = np.real(vectors[:, np.argmin(np.abs(values - 1))])
    stationary /= stationary.sum()
    three = STATISTICS["characters"].index("3")
    assert stationary[list(used).index(three)] == pytest.approx(0.5)
    far = task.oracle(4_000_000 // 1000)
    assert far.bigram_risk < task.oracle(256).bigram_risk
    assert far.trigger_share > task.oracle(256).trigger_share


@pytest.mark.parametrize("law", [[1.0], [0.5, 0.5], [0.0, 1.0, 0.0], [0.7, 0.1, 0.1, 0.1], [1e-9, 0.3, 0.7 - 1e-9]])
def test_alias_tables_give_back_their_law(law: list[float]) -> None:
    threshold, alias = _alias(np.array(law))
    made = threshold / len(law)
    np.add.at(made, alias, (1 - threshold) / len(law))
    np.testing.assert_allclose(made, law, atol=1e-12)


def test_both_ways_of_walking_are_the_same() -> None:
    tables = bigram_backcopy._tables(3, "cpu")
    slots, uniform = torch.randint(65, (50, 300)), torch.rand(50, 300)
    ways = [walk(slots, uniform, tables, 65) for walk in (bigram_backcopy._walk, bigram_backcopy._walk_anywhere)]
    assert torch.equal(*ways)


def test_seeds_and_options() -> None:
    task = BigramBackcopy()
    assert torch.equal(task.sample(5, 20, seed=1), task.sample(5, 20, seed=1))
    assert not torch.equal(task.sample(5, 20, seed=1), task.sample(5, 20, seed=2))
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(task.sample(5, 20, seed=generator), task.sample(5, 20, seed=1))
    assert not torch.equal(task.sample(5, 20, seed=generator), task.sample(5, 20, seed=1))
    without = BigramBackcopy(start=False).sample(200, 30)
    assert (without < 65).all()
    assert not task.is_trigger(without[:, 0]).any()
    assert BigramBackcopy(start=False).oracle(255).bigram_risk < task.oracle(256).bigram_risk
    assert BigramBackcopy(n_triggers=0).sample(3, 9).shape == (3, 9)
    assert BigramBackcopy(n_triggers=0).oracle(50).trigger_share == 0
    assert task.sample(1, 1).tolist() == [[65]]
    assert task.text(torch.tensor([65, 0, 64])) == ["⟨s⟩", "\n", "z"]


@pytest.mark.parametrize("n_triggers", [-1, 65, True])
def test_bad_numbers_of_triggers(n_triggers: int) -> None:
    with pytest.raises(InputError, match="n_triggers"):
        BigramBackcopy(n_triggers)


def test_bad_input() -> None:
    task = BigramBackcopy()
    for n, length in ((0, 5), (5, 0)):
        with pytest.raises(InputError, match="at least 1"):
            task.sample(n, length)
    with pytest.raises(InputError, match="nothing before it"):
        task.law(torch.tensor([[1, 5]]))
    with pytest.raises(InputError, match="vocabulary"):
        task.law(torch.tensor([[66, 5]]))
    with pytest.raises(InputError, match="length"):
        task.oracle(0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    tokens = BigramBackcopy().sample(4000, 64, device="cuda")
    assert tokens.is_cuda
    share = BigramBackcopy().is_trigger(tokens).float().mean().item()
    assert share == pytest.approx(BigramBackcopy().oracle(64).trigger_share, abs=3e-3)
