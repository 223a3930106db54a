"""The review classifier on a tiny BERT and made-up reviews; one short run on the real encoder and corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from analyses import encoder_classifier
from analyses.encoder_classifier import (
    LABELS,
    SPLITS,
    STAMP,
    Settings,
    control_scores,
    predict,
    read_reviews,
    read_stamp,
    scores,
    split_reviews,
    train_encoder,
)
from interp.errors import InputError, ModelError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GOOD, BAD = [f"good{i}" for i in range(5)], [f"bad{i}" for i in range(5)]
PLAIN = [f"word{i}" for i in range(20)]
FAST = Settings(epochs=4, batch_size=16, learning_rate=3e-3)
SHORT = Settings(epochs=1, batch_size=64, learning_rate=1e-3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the encoder's package has it: weights of a BertModel, and a tokenizer."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("base")
    words = [*SPECIAL, *GOOD, *BAD, *PLAIN]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=64, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reviews() -> pd.DataFrame:
    """400 reviews with one telling word each."""
    random = np.random.default_rng(0)
    rows = []
    for row in range(400):
        label = row % 2
        words = random.choice(PLAIN, size=random.integers(4, 10)).tolist()
        words[random.integers(len(words))] = random.choice(GOOD if label else BAD)
        rows.append((row, 3.0 if label else -3.0, " ".join(words)))
    return split_reviews(pd.DataFrame(rows, columns=["id", "rating", "text"]))


@pytest.fixture(scope="module")
def trained(base: Path, reviews: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    out = tmp_path_factory.mktemp("out") / "toy-reviews-0"
    return train_encoder(0, out, reviews=reviews, base=base, settings=FAST, progress=False), out


# Reviews and splits


def test_clear_reviews_are_labelled_and_neutral_ones_dropped() -> None:
    frame = pd.DataFrame({"rating": [2.0, -2.0, 1.5, -1.5, 0.0], "text": list("abcde")})
    split = split_reviews(frame)
    assert split["text"].tolist() == ["a", "b"]
    assert [LABELS[label] for label in split["label"]] == ["positive", "negative"]
    assert len(split_reviews(frame, threshold=1)) == 4


def test_texts_never_cross_splits(reviews: pd.DataFrame) -> None:
    copies = pd.concat(
        [reviews, reviews.assign(text=reviews["text"].str.upper() + " ."), reviews.assign(text="  " + reviews["text"])]
    )
    split = split_reviews(copies)
    assert (split.groupby(split["text"].str.casefold().str.strip(" ."))["split"].nunique() == 1).all()
    shares = split_reviews(reviews)["split"].value_counts(normalize=True)
    assert all(abs(shares[name] - share) < 0.06 for name, share in SPLITS.items())


def test_a_split_depends_on_the_seed_and_not_on_the_threshold(reviews: pd.DataFrame) -> None:
    ratings = reviews.assign(rating=np.linspace(-4, 4, len(reviews)))
    narrow, wide = (split_reviews(ratings, threshold=t).set_index("id")["split"] for t in (2.0, 0.5))
    assert narrow.equals(wide[narrow.index])
    assert not wide.equals(split_reviews(ratings, seed=1, threshold=0.5).set_index("id")["split"])


def test_unfit_reviews_are_refused(reviews: pd.DataFrame, base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected rating and text"):
        split_reviews(pd.DataFrame({"text": ["a"]}))
    with pytest.raises(InputError, match="leaves 1 reviews"):
        split_reviews(pd.DataFrame({"text": ["a", "b"], "rating": [3.0, 0.0]}))
    with pytest.raises(InputError, match="threshold=-1"):
        split_reviews(reviews, threshold=-1)
    with pytest.raises(InputError, match="what split_reviews gives"):
        train_encoder(0, tmp_path / "m", reviews=pd.DataFrame({"text": ["a"]}), base=base)
    one_sided = reviews[(reviews["split"] != "test") | (reviews["label"] == 1)]
    with pytest.raises(InputError, match="not both classes are in test"):
        train_encoder(0, tmp_path / "m", reviews=one_sided, base=base)
    with pytest.raises(InputError, match="seed=-1"):
        train_encoder(-1, tmp_path / "m", reviews=reviews, base=base)
    with pytest.raises(InputError, match="epochs=0"):
        train_encoder(0, tmp_path / "m", reviews=reviews, base=base, settings=Settings(epochs=0))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot load a BERT encoder"):
        train_encoder(0, tmp_path / "m", reviews=reviews, base=tmp_path / "empty")
    assert not (tmp_path / "m").exists()


# Training


def test_separable_reviews_are_learned(trained: tuple[Any, Path], reviews: pd.DataFrame) -> None:
    model, out = trained
    stamp = read_stamp(out)
    assert stamp is not None
    measured = stamp["measured"]
    assert measured["accuracy"] > 0.95
    assert measured["auc"] > 0.98
    test = reviews[reviews["split"] == "test"]
    assert measured["n"] == len(test)
    right = predict(model, test["text"]).argmax(1) == test["label"].to_numpy()
    assert right.mean() == pytest.approx(measured["accuracy"])


def test_what_comes_back_is_a_classifier_for_interp(trained: tuple[Any, Path]) -> None:
    model, out = trained
    assert type(model.hf).__name__ == "BertForSequenceClassification"
    assert model.hf.config.id2label == LABELS
    assert not model.hf.training
    assert (model.arch.n_layers, model.arch.family.decoder, model.name) == (2, False, out.name)
    ids = torch.tensor([model.encode(f"{GOOD[0]} {PLAIN[0]}")[0]])
    assert ids.tolist()[0][0] == 2  # [CLS]
    with torch.no_grad():
        fused = model.hf(ids).logits
        with model.attention_implementation("eager"):
            output = model.hf(ids, output_attentions=True)
    torch.testing.assert_close(output.logits, fused)
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(1, 4, ids.shape[1]))


def test_a_second_run_reuses_the_folder(
    trained: tuple[Any, Path], reviews: pd.DataFrame, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = trained
    monkeypatch.setattr(encoder_classifier, "_fine_tune", lambda *args: pytest.fail("trained again"))
    again = train_encoder(0, out, reviews=reviews, base=base, settings=FAST, attention="eager", progress=False)
    assert again.fingerprint == model.fingerprint
    assert again.attention == "eager"


def test_seeds_fix_the_weights(base: Path, reviews: pd.DataFrame, tmp_path: Path) -> None:
    prints = [
        train_encoder(seed, tmp_path / name, reviews=reviews, base=base, settings=SHORT, progress=False).fingerprint
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("damage", ["stamp", "no stamp", "weights", "settings", "reviews"])
def test_what_does_not_match_is_trained_again(
    damage: str, base: Path, reviews: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, settings = tmp_path / "model", SHORT
    first = train_encoder(0, out, reviews=reviews, base=base, settings=settings, progress=False).fingerprint
    if damage == "stamp":
        (out / STAMP).write_text('{"seed": 0')
    elif damage == "no stamp":
        (out / STAMP).unlink()
    elif damage == "weights":
        content = bytearray((out / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (out / "model.safetensors").write_bytes(content)
    elif damage == "settings":
        settings = Settings(epochs=1, batch_size=64, learning_rate=1e-4)
    else:
        reviews = reviews[reviews["text"] != reviews["text"].iloc[0]]
    again = train_encoder(0, out, reviews=reviews, base=base, settings=settings, progress=False).fingerprint
    assert (again == first) == (damage not in ("settings", "reviews"))
    assert "not used" in capsys.readouterr().err
    assert read_stamp(out) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_interrupted_training_leaves_nothing(
    base: Path, reviews: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    for owner, name in ((torch.optim.AdamW, "step"), (transformers.PreTrainedTokenizerBase, "save_pretrained")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            with pytest.raises(KeyboardInterrupt):
                train_encoder(0, tmp_path / "m", reviews=reviews, base=base, settings=SHORT, progress=False)
        assert list(tmp_path.iterdir()) == []


def test_only_the_last_layers_move(base: Path, reviews: pd.DataFrame, tmp_path: Path) -> None:
    import transformers

    settings = Settings(epochs=1, batch_size=64, learning_rate=1e-3, trained_layers=1)
    model = train_encoder(0, tmp_path / "m", reviews=reviews, base=base, settings=settings, progress=False)
    before = transformers.BertModel.from_pretrained(base).state_dict()
    moved = {name for name, value in model.hf.bert.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith(("encoder.layer.1.", "pooler.")) for name in moved)


def test_a_loss_that_is_not_finite_is_an_error(base: Path, reviews: pd.DataFrame, tmp_path: Path) -> None:
    settings = Settings(epochs=3, batch_size=16, learning_rate=1e30, clip=1e30)
    with pytest.raises(ModelError, match="lower learning_rate"):
        train_encoder(0, tmp_path / "m", reviews=reviews, base=base, settings=settings, progress=False)
    assert list(tmp_path.iterdir()) == []


# Measures and controls


def test_scores_against_hand_computed_values() -> None:
    labels = [0, 0, 1, 1]
    positive = np.array([0.1, 0.6, 0.4, 0.9])  # right, wrong, wrong, right; 3 of 4 pairs in order
    measured = scores(labels, np.stack([1 - positive, positive], 1))
    assert measured["accuracy"] == 0.5
    assert measured["auc"] == 0.75
    assert measured["accuracy_low"] < 0.5 < measured["accuracy_high"]
    assert measured["auc_low"] <= 0.75 <= measured["auc_high"] <= 1


def test_controls_share_the_test_split(base: Path, reviews: pd.DataFrame) -> None:
    table = control_scores(reviews, base).set_index("model")
    test = reviews[reviews["split"] == "test"]
    most = reviews.loc[reviews["split"] == "train", "label"].mode()[0]
    majority, frozen = table.iloc[0], table.iloc[1]
    assert majority["accuracy"] == pytest.approx((test["label"] == most).mean())
    assert majority["auc"] == 0.5
    assert frozen["n"] == majority["n"] == len(test)
    assert frozen["auc"] > 0.8  # one telling word moves the mean of random embeddings


def test_predictions_do_not_depend_on_the_company(trained: tuple[Any, Path], reviews: pd.DataFrame) -> None:
    model, _ = trained
    texts = reviews["text"].head(12)
    alone = np.concatenate([predict(model, [text]) for text in texts])
    np.testing.assert_allclose(predict(model, texts), alone, atol=1e-5)
    long = " ".join([PLAIN[0]] * 200)
    np.testing.assert_allclose(predict(model, [long]), predict(model, [" ".join([PLAIN[0]] * 62)]), atol=1e-6)


def test_the_stamp_says_how_it_was_made(trained: tuple[Any, Path]) -> None:
    stamp = json.loads((trained[1] / STAMP).read_text())
    assert stamp["seed"] == 0
    assert stamp["settings"]["epochs"] == FAST.epochs
    assert stamp["measured"]["seconds"] > 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= stamp["files"].keys()


@pytest.mark.slow
def test_the_real_encoder_learns_from_300_reviews(tmp_path: Path) -> None:
    frame = read_reviews()
    assert frame.shape == (10_605, 3)
    assert frame["rating"].between(-4, 4).all()
    reviews = split_reviews(frame).groupby("split").sample(300, random_state=0)  # in the corpus praise comes first
    model = train_encoder(0, tmp_path / "m", reviews=reviews, settings=Settings(batch_size=8, learning_rate=2e-4))
    stamp = read_stamp(tmp_path / "m")
    assert stamp is not None
    test = reviews.loc[reviews["split"] == "test", "label"]
    assert stamp["measured"]["accuracy_low"] > test.value_counts(normalize=True).max()
    assert model.arch.n_layers == 6
