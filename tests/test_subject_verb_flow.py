"""Subject–verb sentences: pairs that exchange roles, scores against planted graphs, claims both ways."""

from __future__ import annotations

import doctest
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import tiny_encoder, tiny_hf, tiny_tokenizer

from analyses import subject_verb_claims as claims
from analyses import subject_verb_flow as flow
from analyses import subject_verb_heads as by_head
from analyses import subject_verb_measures as measures
from analyses import subject_verb_sentences as made
from analyses import subject_verb_tables as tables
from interp import load_model
from interp.errors import InputError
from interp.flow import attention_graph
from interp.report import write_report

AT = {"graph": "mean", "side": "below", "n_layers": 2, "correction": "none"}


class Splitter:
    """Words with their leading space and commas are tokens; those in `cut` fall into letters."""

    bos_token_id, name = 1, "splitter"

    def __init__(self, *cut: str) -> None:
        self.cut, self.known = set(cut), {"<|endoftext|>": 0}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        pieces: list[str] = []
        for piece in re.findall(r" ?\w+|,", text):
            pieces += list(piece.strip()) if piece.strip() in self.cut else [piece]
        return {"input_ids": [self.known.setdefault(piece, len(self.known)) for piece in pieces]}

    def get_vocab(self) -> dict[str, int]:
        return self.known

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.known[token]

    def text(self, ids: Any) -> str:
        return "".join(list(self.known)[at] for at in ids)


def generated(n_pairs: int = 32, *cut: str, **options: Any) -> tuple[list[made.Sentence], Splitter]:
    tokenizer = Splitter(*cut)
    model: Any = SimpleNamespace(tokenizer=tokenizer, name="splitter")
    return made.generate(model, n_pairs, **options), tokenizer


def scored(sentences: list[made.Sentence], score: Any) -> pd.DataFrame:
    """A frame with score(sentence, position) of both nouns."""
    rows = []
    for index, one in enumerate(sentences):
        about = measures.describe(index, one)
        values = {role: float(score(one, one.nouns[one.noun(role)][0])) for role in made.ROLES}
        rows.append(about | AT | {"method": "exact"} | values)
    return pd.DataFrame(rows)


# Sentences


def test_pairs_have_the_same_nouns_at_the_same_positions_and_exchange_roles() -> None:
    sentences, tokenizer = generated(64)
    assert len(sentences) == 128
    for first, second in zip(sentences[::2], sentences[1::2], strict=True):
        assert (first.order, second.order) == ("first", "second")
        assert first.pair == second.pair
        assert (first.words, first.nouns, len(first.ids)) == (second.words, second.nouns, len(second.ids))
        assert first.noun("subject") == second.noun("attractor") == 0
        assert first.noun("attractor") == second.noun("subject") == 1
        assert first.ids != second.ids
        for one in (first, second):
            assert one.ids[0] == 0  # the document start
            assert tokenizer.text(one.ids[1:]) == one.text
            for word, positions in zip(one.words, one.nouns, strict=True):
                assert tokenizer.text(one.ids[at] for at in positions) == f" {word}"
        if first.frame == "clause":
            assert sum(a != b for a, b in zip(first.ids, second.ids, strict=True)) == 1
    assert len({one.text for one in sentences}) > 120
    assert len({(a.text, b.text) for a, b in zip(sentences[::2], sentences[1::2], strict=True)}) == 64


def test_frames_numbers_and_adjectives_are_balanced() -> None:
    sentences, _ = generated(64)
    count = Counter((one.frame, one.order, one.numbers, one.adjective) for one in sentences)
    assert len(count) == 4 * 2 * 4 * 2
    assert set(count.values()) == {2}
    rows = {(row["word"], row["plural"]) for kind in ("thing", "person") for row in made.read_words()[kind]}
    for one in sentences:
        for word, other, number in zip(one.words, one.others, one.numbers, strict=True):
            assert ((word, other) if number == "singular" else (other, word)) in rows
        assert one.congruent == (one.numbers[0] == one.numbers[1])
        adjectives = {row["word"] for row in made.read_words()["adjective"]}
        assert bool(adjectives & set(one.text.split())) == one.adjective


def test_a_seed_gives_the_same_sentences_and_another_others() -> None:
    assert generated(8)[0] == generated(8)[0]
    assert generated(8)[0] != generated(8, seed=1)[0]
    assert made.digest(generated(8)[0]) != made.digest(generated(8, seed=1)[0])


def test_words_that_are_cut_differently_in_the_two_orders_are_not_used() -> None:
    words = made.read_words() | {"place": [{"word": "near"}, {"word": "behind"}]}
    sentences, _ = generated(32, "Behind", words=words)
    places = {
        frame: {word for one in sentences if one.frame == frame for word in one.text.lower().split()}
        for frame in made.FRAMES
    }
    assert "near" in places["preposition"] & places["adverb"]
    assert "behind" not in places["preposition"] | places["adverb"]
    assert {"near", "behind"} <= places["clause"]  # never at the beginning


def test_a_noun_of_several_tokens_is_one_group() -> None:
    nouns = [row[form] for row in made.read_words()["thing"] for form in ("word", "plural")]
    sentences, tokenizer = generated(8, *nouns)
    for one in sentences:
        assert len(one.nouns[0]) == len(one.words[0])
        assert tokenizer.text(one.ids[at] for at in one.nouns[0]) == one.words[0]


def test_impossible_sentences_are_errors() -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        made.generate(SimpleNamespace(tokenizer=None, name="m"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="n_pairs=0"):
        generated(0)
    words = {kind: rows[:1] for kind, rows in made.read_words().items()}
    with pytest.raises(InputError, match=r"no new pair of the frame 'preposition' after 200 draws"):
        generated(1, words=words)  # one thing cannot be both nouns
    with pytest.raises(InputError, match="begins the singular and the plural"):
        made.verb_tokens(made.Encoder(SimpleNamespace(tokenizer=Blind(), name="m")))  # type: ignore[arg-type]


class Blind(Splitter):
    """A tokenizer to which every word is the same."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1 for _ in re.findall(r" ?\w+|,", text)]}


# Comparisons


@pytest.mark.parametrize("seed", range(10))
def test_what_depends_on_position_and_noun_alone_gets_exactly_half(seed: int) -> None:
    sentences, _ = generated(32)
    rng = np.random.default_rng(seed)
    values: dict[Any, float] = {}

    def score(one: made.Sentence, position: int) -> float:
        noun = one.words[[group[0] for group in one.nouns].index(position)]
        return values.setdefault((position, noun), rng.random())

    pairs = tables.paired(scored(sentences, score))
    assert (pairs["accuracy"] == 0.5).all()
    assert (pairs["contrast"] == 0).all()
    assert (pairs["controlled"] == 0.5).all()
    row = tables.summary(pairs).iloc[0]
    assert (row["accuracy"], row["accuracy low"], row["accuracy high"]) == (0.5, 0.5, 0.5)


def test_a_score_of_the_role_is_right_and_its_contrast_is_known() -> None:
    sentences, _ = generated(32)
    subject = scored(sentences, lambda one, position: 3.0 if position == one.nouns[one.noun("subject")][0] else 1.0)
    pairs = tables.paired(subject)
    assert (pairs[["first", "second", "accuracy", "controlled"]] == 1).all(axis=None)
    assert pairs["contrast"].tolist() == pytest.approx([0.5] * 32)
    wrong = subject.rename(columns={"subject": "attractor", "attractor": "subject"})
    assert (tables.paired(wrong)[["first", "second", "accuracy", "controlled"]] == 0).all(axis=None)
    # Position on top of it hides the role from the ranking, and not from the comparison at the same position.
    both = scored(sentences, lambda one, p: 100 / p + (p == one.nouns[one.noun("subject")][0]))
    assert (tables.paired(both)[["accuracy", "controlled"]] == [0.5, 1]).all(axis=None)


def test_a_pair_without_one_of_its_sentences_is_an_error() -> None:
    sentences, _ = generated(4)
    with pytest.raises(InputError, match="lack the sentence"):
        tables.paired(scored(sentences[:-1], lambda *_: 1.0))


def test_halves_take_half_of_every_frame() -> None:
    sentences, _ = generated(32)
    pairs = tables.paired(scored(sentences, lambda *_: 1.0))
    half = tables.halves(pairs, seed=3)
    assert half.groupby(pairs.set_index("pair")["frame"]).sum().tolist() == [4] * 4
    assert not half.equals(tables.halves(pairs, seed=4))


def head_frame(sentences: list[made.Sentence], knows: bool = True) -> pd.DataFrame:
    """Two layers of three heads; head 1 of layer 1 attends to the subject, the others to the first noun."""
    rows = []
    for index, one in enumerate(sentences):
        for layer in range(2):
            for head in range(3):
                right = knows and (layer, head) == (1, 1)
                nouns = {role: 0.2 if one.noun(role) == 0 else 0.1 for role in made.ROLES}
                values = {"subject": 0.12, "attractor": 0.1} if right else nouns
                rows.append(measures.describe(index, one) | {"layer": layer, "head": head} | values)
    return pd.DataFrame(rows)


def test_the_planted_head_is_found_and_confirmed() -> None:
    sentences, _ = generated(32)
    pairs = tables.paired(scored(sentences, lambda *_: 1.0))
    half, level = tables.halves(pairs), tables.accuracies(pairs, 2)
    best = by_head.best_heads(head_frame(sentences), half, level, 2)
    assert best["head"].tolist()[0] == "L1H1"
    assert best.iloc[0][["accuracy where chosen", "accuracy", "its layer's mean", "above flow", "n"]].tolist() == [
        *(1, 1, 0.5, 0.5, 16),
    ]
    assert claims.head(best).holds is True
    assert claims.head(by_head.best_heads(head_frame(sentences, knows=False), half, level)).holds is False
    assert claims.head(by_head.best_heads(head_frame(sentences), half, level + 0.5)).holds is False


# Scores


def planted(one: made.Sentence, n_layers: int = 2) -> torch.Tensor:
    """(layer, head, query, key): the top layer's last row has .6 on the subject; below, all keep to themselves."""
    length = len(one.ids)
    pattern = torch.eye(length).repeat(n_layers, 1, 1, 1)
    subject = one.nouns[one.noun("subject")][0]
    pattern[-1, 0, -1] = 0.4 / (length - 1)
    pattern[-1, 0, -1, subject] = 0.6
    return pattern


def test_planted_flow_to_the_subject_is_found_by_every_method_that_follows_it() -> None:
    sentences, _ = generated(8)
    rows = []
    for index, one in enumerate(sentences):
        graph = attention_graph(planted(one), residual="none")
        effect = np.zeros(len(one.ids) - 1)
        effect[one.nouns[one.noun("subject")][0] - 1] = 1.0
        about = measures.describe(index, one) | {"graph": "mean"}
        rows += [about | row for row in measures.graph_scores(graph, one, effect, [1, 2])]
    pairs = tables.paired(pd.DataFrame(rows))
    table = tables.summary(pairs).set_index(["side", "n_layers", "method", "correction"])
    for method in ("raw", "exact", "rollout", "widest", "soft", "layer_bound"):
        assert table.loc["below", 2, method, "none"]["accuracy"] == 1, method
        assert table.loc["above", 1, method, "none"]["accuracy"] == 1, method
        assert table.loc["below", 1, method, "none"]["accuracy"] == 0.5, method
    for one_pair in pairs[(pairs["method"] == "exact") & (pairs["n_layers"] == 2)].itertuples():
        other = 0.4 / (len(sentences[2 * one_pair.pair].ids) - 1)
        assert one_pair.contrast == pytest.approx((0.6 - other) / (0.6 + other), abs=1e-5)
    # Layer 0 takes the same from both nouns; the target's own row gives no less to what comes first.
    assert table.loc["below", 2, "bound", "none"]["accuracy"] == 0.5
    assert table.loc["below", 2, "target_cut", "none"]["first"] == 1
    assert table.loc["below", 2, "target_cut", "none"]["second"] == 0
    assert table.loc["below", 2, "exact", "uniform"]["accuracy"] == 1
    assert table.loc["below", 2, "exact", "drop_sink"]["accuracy"] == 1


@pytest.mark.parametrize("seed", range(5))
def test_the_ends_bound_the_flow_of_every_causal_graph(seed: int) -> None:
    sentences, _ = generated(4, "keys", "cabinet", "tents", seed=seed)
    torch.manual_seed(seed)
    for one in sentences:
        logits = 3 * torch.randn(5, 2, len(one.ids), len(one.ids))
        closed = torch.ones_like(logits[0, 0], dtype=torch.bool).triu(1)
        graph = attention_graph(logits.masked_fill(closed, float("-inf")).softmax(-1))
        rows = pd.DataFrame(measures.graph_scores(graph, one, np.arange(len(one.ids) - 1.0), [2, 5]))
        plain = rows[rows["correction"] == "none"]
        for (side, depth), part in plain.groupby(["side", "n_layers"]):
            at = part.set_index("method")
            for role in made.ROLES:
                values = at[role]
                assert values["widest"] <= values["exact"] + 1e-5, (side, depth)
                assert values["rollout"] <= values["exact"] + 1e-5, (side, depth)
                assert values["exact"] <= values["ends"] + 1e-5, (side, depth)
                assert values["ends"] == min(values["target_cut"], values["bound"]), (side, depth)
        whole = plain[plain["n_layers"] == 5].set_index("method")
        below, beyond = (whole[whole["side"] == side]["subject"] for side in measures.SIDES)
        pd.testing.assert_series_equal(below, beyond)


def test_a_group_counts_as_one_source() -> None:
    sentences, _ = generated(1, *[row["word"] for row in made.read_words()["thing"]])
    one = sentences[0]
    graph = attention_graph(
        torch.ones(1, 1, len(one.ids), len(one.ids)).tril() / torch.arange(1, len(one.ids) + 1)[:, None]
    )
    nouns, tokens = measures._noun_scores(graph, one, "exact", "none")
    assert nouns[0] == pytest.approx(tokens[list(one.nouns[0])].sum())  # one layer: flow is attention
    assert measures._noun_scores(graph, one, "raw", "none")[0][0] == pytest.approx(len(one.nouns[0]) / len(one.ids))


def test_spearman_is_scipys_and_nan_where_nothing_can_be_ranked() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 5, 9).astype(float), rng.integers(0, 5, 9).astype(float)
        assert measures.spearman(a, b) == pytest.approx(spearmanr(a, b)[0])
    assert np.isnan(measures.spearman(np.ones(3), np.arange(3.0)))
    assert np.isnan(measures.spearman(np.array([np.nan, 1, 2]), np.arange(3.0)))
    with pytest.raises(InputError, match="3 scores and 2 effects"):
        measures.spearman(np.arange(3.0), np.arange(2.0))


# On a model


def word_tokenizer() -> Any:
    """Every word of the sentences is one token, with its leading space, and the comma another."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rows = [row for kind in made.KINDS for row in made.read_words()[kind]]
    inside = {"the", "that", *(row[key] for row in rows for key in ("word", "plural") if key in row)}
    inside |= {verb.strip() for pair in made.VERBS for verb in pair}
    starts = {"The", *(row["word"].capitalize() for row in rows if row["kind"] in ("place", "lead"))}
    vocab = ["<pad>", "<bos>", "<eos>", "<unk>", ",", *sorted(starts), *sorted(f"▁{word}" for word in inside)]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(vocab)}, unk_token="<unk>"))
    comma = pre_tokenizers.Split(Regex(","), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([comma, pre_tokenizers.Metaspace("▁", "never")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def model() -> Any:
    tokenizer = word_tokenizer()
    return load_model(tiny_hf("llama", vocab_size=len(tokenizer.get_vocab())), tokenizer)


def test_agreement_is_what_the_model_says(model: Any) -> None:
    sentences = made.generate(model, 4)
    result = measures.agreement(model, sentences)
    table = result.frame
    tokenizer = model.tokenizer

    def log_odds(text: str, verbs: str, number: str, blank: int | None = None) -> float:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        if blank is not None:
            ids[blank] = tokenizer.unk_token_id
        with torch.no_grad():
            log_p = model.hf(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        singular, plural = (float(log_p[tokenizer.convert_tokens_to_ids(f"▁{verb}")]) for verb in verbs.split("/"))
        return singular - plural if number == "singular" else plural - singular

    rows = table.sample(40, random_state=0)
    assert set(rows["replacement"]) == {"none", "number", "neutral", "blank"}
    for row in rows.itertuples():
        one = sentences[row.sentence]
        number = one.numbers[one.noun("subject")]
        text, blank = one.text, None
        if row.replacement == "number":
            text = one.replaced(row.role, one.others[one.noun(row.role)])
        elif row.replacement == "neutral":
            text = one.replaced(row.role, "sheep")
        elif row.replacement == "blank":
            blank = row.position
        assert row.log_odds == pytest.approx(log_odds(text, row.verbs, number, blank), abs=1e-4)
    odds = measures.log_odds(result)
    # One change per token behind the start, in order.
    effects = tables.blank_effects(odds)
    assert [len(effect) for effect in effects] == [len(one.ids) - 1 for one in sentences]
    untouched = table[(table["sentence"] == 1) & (table["replacement"] == "none")]["log_odds"].mean()
    blanked = table[(table["sentence"] == 1) & (table["replacement"] == "blank") & (table["position"] == 3)]
    assert effects[1][2] == pytest.approx(abs(untouched - blanked["log_odds"].mean()))


def test_heads_are_the_models_attention(model: Any) -> None:
    sentences = made.generate(model, 8)
    frame = by_head.heads(model, sentences).frame.set_index(["sentence", "layer", "head"])
    with model.attention_implementation("eager"), torch.no_grad():
        for index in (0, 5, 15):
            one = sentences[index]
            patterns = model.hf(torch.tensor([one.ids]), output_attentions=True).attentions
            for layer, head in ((0, 0), (2, 3)):
                row = patterns[layer][0, head, -1]
                for role in made.ROLES:
                    expected = float(row[list(one.nouns[one.noun(role)])].sum())
                    assert frame.loc[index, layer, head][role] == pytest.approx(expected, abs=1e-5)


def test_a_head_is_switched_off(model: Any) -> None:
    sentences = made.generate(model, 2)
    result = by_head.switched_off(model, sentences, (1, 2), by_head.controls_of((1, 2), 4, 2))
    frame = result.frame.set_index(["sentence", "arm", "layer", "head"])["log_odds"]
    assert len(frame) == 4 * (1 + 1 + 2)
    width = model.arch.d_head

    def without(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        z = args[0].clone()
        z[..., 2 * width : 3 * width] = 0
        return (z,)

    verbs = made.verb_tokens(made.Encoder(model))
    for index, one in enumerate(sentences):
        for arm in ("none", "head"):
            hook = (
                model.hf.model.layers[1].self_attn.o_proj.register_forward_pre_hook(without) if arm == "head" else None
            )
            with torch.no_grad():
                log_p = model.hf(torch.tensor([one.ids])).logits[0, -1].log_softmax(-1)
            if hook is not None:
                hook.remove()
            leads = [float(log_p[singular] - log_p[plural]) * measures.sign(one) for singular, plural in verbs.values()]
            at = (1, 2) if arm == "head" else (-1, -1)
            assert frame[index, arm, *at] == pytest.approx(np.mean(leads), abs=1e-4)
    odds = measures.log_odds(measures.agreement(model, sentences))
    untouched = odds[odds["replacement"] == "none"].set_index("sentence")["log_odds"]
    assert frame[0, "none", -1, -1] == pytest.approx(untouched[0], abs=1e-4)


def test_the_analysis_writes_claims_and_a_report_and_is_reused(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "subject_verb_flow"
    section = flow.run(model, out, n_pairs=8, n_depths=2)
    rows = json.loads((out / "claims.json").read_text())
    assert [list(row) for row in rows] == [["claim", "source", "paper", "ours", "interval", "n", "holds"]] * len(rows)
    assert len(rows) == 16
    short = section.items[0].set_index("score")
    assert short.loc["position alone", "balanced accuracy"] == "0.50 [0.50, 0.50]"
    assert short["n"].tolist() == [8] * 7 + [4] + [8] * 2
    kinds = section.items[5].set_index("score")
    assert kinds.loc["number of pairs", ["all", "clause", "numbers differ"]].tolist() == ["8", "2", "4"]
    assert kinds.loc["blank-out", "all"] == short.loc["blank-out by its other number", "balanced accuracy"]
    overview = section.items[8]
    assert set(overview["graph"]) == {"mean", "norm", "contribution", "uniform", "blank-out"}
    assert len(overview) == 35
    assert write_report([section], tmp_path / "r.html").stat().st_size > 1_000_000

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    for name in ("agreement", "scores", "heads", "switched_off"):
        monkeypatch.setattr(flow, name, again)
    flow.run(model, out, n_pairs=8, n_depths=2)
    for changes in ({"n_pairs": 4}, {"seed": 1}):
        with pytest.raises(AssertionError, match="measured again"):
            flow.run(model, out, **({"n_pairs": 8, "n_depths": 2} | changes))


def test_depths_are_part_of_what_is_reused(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow.run(model, tmp_path, n_pairs=2, n_depths=1)
    calls: list[Any] = []
    original = flow.scores
    monkeypatch.setattr(flow, "scores", lambda *a, **k: calls.append(a[3]) or original(*a, **k))
    flow.run(model, tmp_path, n_pairs=2, n_depths=3)
    assert calls == [[1, 2, 3]]


def test_bad_input_is_an_error(model: Any) -> None:
    sentences = made.generate(model, 1)
    encoder = load_model(tiny_encoder(), tiny_tokenizer())
    with pytest.raises(InputError, match="is an encoder"):
        measures.agreement(encoder, sentences)
    for measure in (measures.agreement, by_head.heads):
        with pytest.raises(InputError, match="no sentences"):
            measure(model, [])
    with pytest.raises(InputError, match="effects of 0 sentences"):
        measures.scores(model, sentences, [], [1])
    graph = attention_graph(planted(sentences[0]))
    for wrong in (0, 3):
        with pytest.raises(InputError, match=f"n_layers={wrong}"):
            measures.above(graph, wrong)
    with pytest.raises(InputError, match="n_depths=0"):
        flow.depth_list(30, 0)
    assert flow.depth_list(3, 6) == [1, 2, 3]


def test_examples_of_docstrings() -> None:
    for module in (by_head, flow, made, measures, tables):
        assert doctest.testmod(module).failed == 0


# Claims


def made_pairs(**accuracies: float) -> pd.DataFrame:
    """Rows as `paired` gives them: 40 pairs, all of 2 layers; graph__method=share of pairs that are right."""
    known = {
        "mean__exact": 0.5,
        "uniform__exact": 0.5,
        "mean__rollout": 0.5,
        "mean__raw": 0.5,
        "mean__widest": 0.5,
        "mean__bound": 0.5,
    }
    known |= {"mean__ends": 0.5, "contribution__rollout": 0.5, "blank-out__number": 0.5, "blank-out__neutral": 0.5}
    rows = []
    for name, accuracy in (known | accuracies).items():
        graph, method = name.split("__")
        for side in measures.SIDES[: 1 if graph == "blank-out" else 2]:
            for pair in range(40):
                hit = float(pair < round(40 * accuracy)) if accuracy != 0.5 else 0.5
                about = AT | {"graph": graph, "side": side, "method": method}
                values = {"first": hit, "second": hit, "accuracy": hit, "contrast": 0.0, "controlled": 0.5}
                rows.append(
                    about | {"pair": pair, "frame": "clause", "congruent": pair % 2 == 0, "spearman": 0.0} | values
                )
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("right", "expected"), [(0.9, True), (0.55, False)])
def test_the_model_agrees(right: float, expected: bool) -> None:
    rows = pd.DataFrame({"congruent": [False] * 40 + [True] * 40, "order": ["first", "second"] * 40})
    hard = [1.0 if at < 40 * right else -1.0 for at in range(40)]
    claim = claims.agrees(rows.assign(log_odds=[*hard, *[1.0] * 40]))
    assert claim.holds is expected
    assert claim.n == 40
    assert "100% with nouns of one number" in str(claim.ours)


@pytest.mark.parametrize(("accuracy", "expected"), [(0.9, True), (0.55, False), (0.1, False)])
def test_ranks_hold_where_the_interval_is_above_half(accuracy: float, expected: bool) -> None:
    for number, name in enumerate(
        ("mean__exact", "mean__rollout", "mean__raw", "mean__widest", "contribution__rollout")
    ):
        found = claims.ranks(made_pairs(**{name: accuracy}), 2)
        assert [claim.holds for claim in found] == [expected if at == number else False for at in range(5)]
        assert found[number].n == 40
    assert claims.reference(made_pairs(**{"blank-out__number": accuracy})).holds is expected


def test_the_chosen_depth_is_confirmed_on_other_pairs() -> None:
    pairs = made_pairs(mean__exact=1.0)
    half = pd.Series([at % 2 == 0 for at in range(40)])
    for side in measures.SIDES:
        assert claims.chosen(pairs, half, side).holds is True
        assert claims.chosen(pairs, half, side).n == 20
    # Right on the half that chooses alone.
    exact = pairs["method"] == "exact"
    pairs.loc[exact, ["accuracy", "first", "second"]] = np.repeat(
        np.where(pairs.loc[exact, "pair"] % 2 == 0, 1.0, 0.0)[:, None], 3, axis=1
    )
    assert claims.chosen(pairs, half, "below").holds is False
    assert "0% on pairs that did not choose it (first 2 layers, mean" in str(claims.chosen(pairs, half, "below").ours)


def test_worth_is_paired() -> None:
    assert [claim.holds for claim in claims.worth(made_pairs(mean__exact=0.9), 2)] == [True, True]
    assert [claim.holds for claim in claims.worth(made_pairs(mean__exact=0.9, mean__rollout=0.9), 2)] == [False, True]
    assert [claim.holds for claim in claims.worth(made_pairs(), 2)] == [False, False]


@pytest.mark.parametrize(
    ("flow_rises", "ends_rise", "share", "expected"),
    [(0.1, 0.0, 1.0, True), (0.1, 0.1, 1.0, False), (0.1, 0.0, 0.5, False)],
)
def test_controlled_needs_more_than_the_ends(flow_rises: float, ends_rise: float, share: float, expected: bool) -> None:
    pairs = made_pairs()
    pairs.loc[pairs["method"] == "exact", "contrast"] = flow_rises
    pairs.loc[pairs["method"] == "exact", "controlled"] = share
    pairs.loc[pairs["method"] == "ends", "contrast"] = ends_rise
    assert claims.controlled(pairs, 2).holds is expected


@pytest.mark.parametrize(("head", "control", "expected"), [(1.0, 2.9, True), (1.0, 1.0, False), (3.0, 3.0, False)])
def test_the_used_head_costs_more_than_the_others(head: float, control: float, expected: bool) -> None:
    rows = [
        {"pair": pair, "order": order, "congruent": pair % 2 == 0, "arm": arm, "layer": 3, "head": at, "log_odds": lead}
        for pair in range(20)
        for order in made.ORDERS
        for arm, at, lead in (("none", -1, 3.0), ("head", 1, head), ("control", 0, control), ("control", 2, control))
    ]
    frame = pd.DataFrame(rows)
    claim = claims.used(frame)
    assert claim.holds is expected
    assert claim.interval == pytest.approx((control - head, control - head))
    assert f"L3H1: the right verb leads by {3 - head:.2f} nats less" in str(claim.ours)
    assert claims.used(frame[frame["arm"] != "control"]).holds is None


@pytest.mark.parametrize(("at_the_cut", "expected"), [(1.0, True), (0.9, False)])
def test_the_cut_is_where_flow_and_bound_are_equal(at_the_cut: float, expected: bool) -> None:
    rows = []
    for sentence in range(40):
        order = ("first", "second")[sentence % 2]
        roles = {"first": ("subject", "attractor"), "second": ("attractor", "subject")}[order]
        for method, values in (("exact", (0.7 * at_the_cut, 0.2)), ("target_cut", (0.7, 0.5))):
            rows.append(
                AT | {"sentence": sentence, "order": order, "method": method} | dict(zip(roles, values, strict=True))
            )
    claim = claims.cut(pd.DataFrame(rows), 2)
    assert claim.holds is expected
    assert "from the second noun in 0%" in str(claim.ours)


@pytest.mark.parametrize(
    ("rollout", "exact", "expected"), [(0.7, 0.7, True), (0.7, 0.2, False), (0.2, 0.7, False), (0.3, 0.3, False)]
)
def test_correlation_needs_both_above_raw(rollout: float, exact: float, expected: bool) -> None:
    pairs = made_pairs()
    for method, value in (("raw", 0.3), ("rollout", rollout), ("exact", exact)):
        pairs.loc[pairs["method"] == method, "spearman"] = value
    claim = claims.correlation(pairs, pairs, 2)
    assert claim.holds is expected
    assert f"raw 0.30 ± 0.00, rollout {rollout:.2f} ± 0.00, flow {exact:.2f} ± 0.00" in str(claim.ours)


def test_one_pair_has_no_interval_and_no_crash() -> None:
    pairs = made_pairs()
    pairs = pairs[pairs["pair"] == 0]
    half = pd.Series([True], index=[0])
    found = [claims.reference(pairs), *claims.ranks(pairs, 2), *claims.worth(pairs, 2), claims.controlled(pairs, 2)]
    found += [claims.correlation(pairs, pairs, 2), claims.chosen(pairs, half, "below")]
    assert {claim.holds for claim in found} == {None}
    assert {claim.interval for claim in found} == {None}


# On the embedded model


@pytest.mark.slow
def test_the_embedded_model_agrees_and_its_flow_goes_by_position(embedded: Any, tmp_path: Path) -> None:
    section = flow.run(embedded, tmp_path, n_pairs=8, n_depths=2)
    short, agreed = section.items[0].set_index("score"), section.items[6]
    right = agreed["model right"].str.split().str[0].astype(float)
    assert np.average(right, weights=agreed["n"]) > 0.8
    assert float(short.loc["blank-out by its other number", "balanced accuracy"].split()[0]) > 0.75
    assert short.loc["exact flow", ["subject first", "subject second"]].tolist() == [1, 0]
    scores = section.items[9].frame
    plain = scores[(scores["graph"] == "mean") & (scores["correction"] == "none")]
    both = plain.pivot_table(index=["sentence", "side", "n_layers"], columns="method", values="subject", observed=True)
    assert (both["exact"] <= both["ends"] + 1e-5).all()
    assert (both["rollout"] <= both["exact"] + 1e-5).all()
