"""An encoder that tells praise from blame in film reviews: the classifier whose predictions are explained.

Neely et al. (2022, arXiv 2205.04559) explain DistilBERT classifiers of three seeds; ours is MiniLM (BERT, 6 layers, d_model 384),
fine-tuned on review snippets that people rated (Hutto and Gilbert, VADER, ICWSM 2014).

1. Reviews with |mean rating| above a threshold are positive or negative; the others are neutral and left out.
2. A hash of the text puts a review in train, validation or test, so that equal texts never cross, whatever the threshold.
3. BERT with a new classifier on its pooler is fine-tuned by AdamW with warm-up and linear decay; settings were chosen on
   validation. Explanations are run on test, which nothing else sees.
4. The folder appears whole or not at all, with `training.json`: settings, hashes, and what was measured on test.

    python -m analyses.encoder_classifier [--seed 0 --seed 1] [--out reports/encoder]
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import typer
from tqdm.auto import tqdm

from interp import load_model
from interp.agreement.ground_truth import recovery
from interp.atomic import replace_folder
from interp.batching import for_each_batch, pad, token_batches
from interp.cli import show
from interp.errors import InputError, ModelError
from interp.model import Model, set_seed
from interp.neurons.atlas import wilson
from interp.resources import fetch

LABELS = {0: "negative", 1: "positive"}
SPLITS = {"train": 0.8, "validation": 0.1, "test": 0.1}  # shares of the texts
STAMP = "training.json"


@dataclass(frozen=True)
class Settings:
    """How the encoder is fine-tuned.

    Warm-up is a share of the steps, `clip` the largest gradient norm. Only the last `trained_layers` are trained, with pooler
    and classifier; `None`: all, embeddings included. Longer reviews are cut to `max_tokens`, with the separator kept.
    """

    epochs: int = 1
    batch_size: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    trained_layers: int | None = None
    max_tokens: int = 64


def read_reviews() -> pd.DataFrame:
    """The 10,605 film review snippets as the corpus has them: "&amp;" and two apostrophes for a quotation mark included.

    Returns:
        Columns id, rating (mean of people's ratings, −4 to 4), text.
    """
    path = fetch("hutto-icwsm-2014") / "movieReviewSnippets_GroundTruth.txt"
    lines = path.read_text(encoding="utf-8").split("\n")
    frame = pd.DataFrame([line.split("\t") for line in lines if line], columns=["id", "rating", "text"])
    return frame.astype({"id": int, "rating": float})


def split_reviews(frame: pd.DataFrame, seed: int = 0, threshold: float = 1.5) -> pd.DataFrame:
    """Label the clear reviews and divide them.

    Args:
        frame: what `read_reviews` gave.
        seed: of the division; models of several seeds share one.
        threshold: reviews with |rating| above it are labelled; the others are neutral and dropped.

    Returns:
        The labelled reviews with columns label (a key of `LABELS`) and split (a key of `SPLITS`). Texts that differ at most
        in case, spaces and punctuation are in the same split.

    Raises:
        InputError: a column is missing, or the threshold leaves a class empty.
    """
    if not {"rating", "text"} <= set(frame):
        raise InputError(f"the reviews have columns {', '.join(map(str, frame))}; expected rating and text")
    if not threshold >= 0:
        raise InputError(f"threshold={threshold}; expected 0 or more")
    clear = frame[frame["rating"].abs() > threshold].reset_index(drop=True)
    labels = (clear["rating"] > 0).astype(int)
    if labels.nunique() < 2:
        raise InputError(f"threshold={threshold} leaves {len(labels)} reviews; expected some of both classes")
    bounds = np.cumsum(list(SPLITS.values()))
    splits = [list(SPLITS)[int(np.searchsorted(bounds[:-1], _place(text, seed), "right"))] for text in clear["text"]]
    return clear.assign(label=labels, split=splits)


def _place(text: str, seed: int) -> float:
    """A number in [0, 1) from what distinguishes a text."""
    key = " ".join(re.findall(r"\w+", text.casefold())) or text
    digest = hashlib.sha256(f"{seed}\n{key}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def train_encoder(
    seed: int,
    out: Path,
    *,
    reviews: pd.DataFrame | None = None,
    base: Path | None = None,
    settings: Settings = Settings(),
    attention: str | None = None,
    progress: bool = True,
) -> Model:
    """The classifier of a seed: the one in `out` if it is whole and made in the same way, else fine-tuned and put there.

    Args:
        seed: of the new head, the order of the reviews and dropout. With as many threads it fixes the weights.
        out: the model's folder: safetensors, tokenizer and `training.json`.
        reviews: what `split_reviews` gave; by default of all reviews, with its own defaults.
        base: folder of a BERT encoder and its tokenizer; by default all-MiniLM-L6-v2, fetched once.
        settings, progress: of the fine-tuning.
        attention: "eager", "sdpa" …; `Model.attention_implementation` changes it later.

    Returns:
        A `Model` around a BertForSequenceClassification whose config names the `LABELS`.

    Raises:
        InputError: a negative seed, reviews without labels and splits, a split without both classes, unfit settings.
        ModelError: the base is no BERT encoder, or the loss is not finite.
        ResourceError: the base cannot be fetched, or the folder cannot be written.
    """
    reviews = split_reviews(read_reviews()) if reviews is None else reviews
    _check(seed, reviews, settings)
    base = fetch("all-minilm-l6-v2") if base is None else Path(base)
    made = {
        "seed": seed,
        "settings": asdict(settings),
        "reviews": hashlib.sha256(reviews[["text", "label", "split"]].to_json().encode()).hexdigest(),
        "base": _hashes(base, "*.safetensors", "tokenizer.json"),
    }
    if read_stamp(out, made) is None:
        start = time.perf_counter()
        model = _fine_tune(seed, reviews, base, settings, progress)
        measured = {"seconds": time.perf_counter() - start, "threads": torch.get_num_threads()}
        test = reviews[reviews["split"] == "test"]
        measured |= scores(test["label"], predict(model, test["text"], settings.max_tokens))

        def fill(folder: Path) -> None:
            model.hf.save_pretrained(folder)
            model.tokenizer.save_pretrained(folder)
            stamp = json.dumps({**made, "measured": measured, "files": _hashes(folder, "*")}, indent=1)
            (folder / STAMP).write_text(stamp, encoding="utf-8")

        replace_folder(out, fill)
    return _classifier(out, attention)


def read_stamp(folder: Path, made: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The folder's `training.json`; `None` where it is damaged, differs from `made`, or a file is not what it was."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # what cannot be read is damaged
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        if stamp["files"] == _hashes(folder, "*") and all(stamp[key] == value for key, value in (made or {}).items()):
            return stamp
    if folder.exists():
        print(f"interp: {folder.name} is damaged, or was made in another way; it is not used", file=sys.stderr)
    return None


def predict(model: Model, texts: Any, max_tokens: int = 64) -> np.ndarray:
    """(text, class) probabilities in float32."""
    return _per_text(model, model.hf, texts, max_tokens, lambda output, mask: output.logits.float().softmax(-1)).numpy()


def scores(labels: Any, probability: np.ndarray, n_resamples: int = 1000) -> dict[str, float]:
    """Accuracy with Wilson's interval, and AUC with the percentile interval of resampled reviews (95 %).

    `labels` are (text) 0 or 1, `probability` is (text, 2) as `predict` gives it.
    """
    labels, positive = np.asarray(labels), probability[:, 1]
    right, n = int((probability.argmax(1) == labels).sum()), len(labels)
    draws = np.random.default_rng(0).integers(n, size=(n_resamples, n))
    auc = np.nanquantile([recovery(positive[draw], labels[draw] == 1) for draw in draws], [0.025, 0.975])
    values = (right / n, *wilson(right, n), recovery(positive, labels == 1), *auc.tolist())
    names = ("accuracy", "accuracy_low", "accuracy_high", "auc", "auc_low", "auc_high")
    return {**dict(zip(names, values, strict=True)), "n": n}


def control_scores(reviews: pd.DataFrame, base: Path | None = None, max_tokens: int = 64) -> pd.DataFrame:
    """Two controls on the same test: the training split's majority, and a logistic head on the encoder as it is.

    The head reads the mean over a review's tokens, as all-MiniLM-L6-v2 was trained to; its L2 penalty is chosen on validation.
    """
    start = time.perf_counter()
    encoder = _classifier(fetch("all-minilm-l6-v2") if base is None else base)
    means = _per_text(encoder, encoder.hf.bert, reviews["text"], max_tokens, _token_mean)
    rows = {name: np.flatnonzero(reviews["split"] == name) for name in SPLITS}
    means = (means - means[rows["train"]].mean(0)) / means[rows["train"]].std(0).clamp(min=1e-6)
    means = torch.cat([means, torch.ones(len(means), 1)], 1)  # for the bias
    labels = reviews["label"].to_numpy()
    heads = [_logistic(means[rows["train"]], labels[rows["train"]], penalty) for penalty in (1e-4, 1e-3, 1e-2, 1e-1)]
    right = [((means @ head > 0).numpy() == labels)[rows["validation"]].mean() for head in heads]
    positive = torch.sigmoid(means[rows["test"]] @ heads[int(np.argmax(right))]).numpy()
    shares = np.full(len(rows["test"]), labels[rows["train"]].mean())
    measured = [scores(labels[rows["test"]], np.stack([1 - p, p], 1)) for p in (shares, positive)]
    names = pd.DataFrame({"model": ["majority of the training split", "frozen encoder, logistic head"]})
    return names.join(pd.DataFrame(measured)).assign(seconds=[0.0, time.perf_counter() - start])


def _token_mean(output: Any, mask: torch.Tensor) -> torch.Tensor:
    return (output.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def _check(seed: int, reviews: pd.DataFrame, settings: Settings) -> None:
    if not {"text", "label", "split"} <= set(reviews):
        raise InputError(f"the reviews have columns {', '.join(map(str, reviews))}; expected what split_reviews gives")
    lacking = [name for name in SPLITS if set(reviews.loc[reviews["split"] == name, "label"]) != set(LABELS)]
    if lacking:
        raise InputError(f"not both classes are in {', '.join(lacking)}; give more reviews")
    if (
        seed < 0
        or min(settings.epochs, settings.batch_size) < 1
        or settings.max_tokens < 3
        or (settings.trained_layers or 0) < 0
    ):
        raise InputError(f"seed={seed}, {settings}; expected at least 0, 1 epoch, 1 review a batch, 3 tokens")


def _classifier(folder: Path, attention: str | None = None) -> Model:
    """Folder → BertForSequenceClassification in a `Model`; what the folder lacks (a head, a pooler) is drawn afresh."""
    from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification

    try:
        if AutoConfig.from_pretrained(folder).model_type != "bert":
            raise ModelError(f"{folder} holds a model of another type; expected a BERT encoder")
        names = {"id2label": LABELS, "label2id": {name: label for label, name in LABELS.items()}}
        hf = BertForSequenceClassification.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, **names)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load a BERT encoder and tokenizer from {folder}: {error}") from error
    return load_model(hf, tokenizer, attention=attention)


def _fine_tune(seed: int, reviews: pd.DataFrame, base: Path, settings: Settings, progress: bool) -> Model:
    set_seed(seed)  # the head is drawn from the global generator, and dropout too
    model = _classifier(base)
    hf = model.hf.train()
    if settings.trained_layers is not None:
        hf.bert.embeddings.requires_grad_(False)
        hf.bert.encoder.layer[: max(0, model.arch.n_layers - settings.trained_layers)].requires_grad_(False)
    train = reviews[reviews["split"] == "train"]
    rows = model.tokenizer(train["text"].tolist(), truncation=True, max_length=settings.max_tokens)["input_ids"]
    labels = torch.tensor(train["label"].to_numpy())
    random, lengths = np.random.default_rng(seed), [len(row) for row in rows]
    batches = [chosen for _ in range(settings.epochs) for chosen in _batches(lengths, settings.batch_size, random)]
    n_steps, n_warm = len(batches), max(1, round(settings.warmup * len(batches)))
    trained = [parameter for parameter in hf.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for p in trained if p.dim() > 1]}]
    groups += [{"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / n_warm, (n_steps - step) / max(1, n_steps - n_warm))
    )
    for chosen in tqdm(batches, desc=f"seed {seed}", unit="step", disable=not progress, leave=False):
        batch = pad([rows[i] for i in chosen], chosen, model.pad_id)
        loss = F.cross_entropy(hf(input_ids=batch.input_ids, attention_mask=batch.mask.long()).logits, labels[chosen])
        if not torch.isfinite(loss):
            raise ModelError(f"the loss became {loss.item()}; lower learning_rate")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        schedule.step()
    hf.eval()
    return model


def _batches(lengths: list[int], size: int, random: np.random.Generator) -> list[list[int]]:
    """A random order cut into batches of like lengths: sorted within 16 batches at a time, which saves padding."""
    order = random.permutation(len(lengths))
    batches: list[list[int]] = []
    for start in range(0, len(order), 16 * size):
        pool = sorted(order[start : start + 16 * size].tolist(), key=lambda i: lengths[i])
        batches += [pool[at : at + size] for at in range(0, len(pool), size)]
    return [batches[i] for i in random.permutation(len(batches))]


@torch.no_grad()
def _per_text(model: Model, module: Any, texts: Any, max_tokens: int, reduce: Callable[..., Any]) -> torch.Tensor:
    """(text, …) what `reduce` makes of the module's output and the mask, in the texts' order."""
    rows = model.tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    found: dict[int, torch.Tensor] = {}

    def step(batch: Any) -> None:
        output = module(input_ids=batch.input_ids, attention_mask=batch.mask.long())
        found.update(zip(batch.rows, reduce(output, batch.mask), strict=True))

    for_each_batch([batch.to(model.device) for batch in token_batches(rows, pad_id=model.pad_id)], step)
    return torch.stack([found[row] for row in range(len(rows))]).cpu()


def _logistic(x: torch.Tensor, labels: np.ndarray, penalty: float) -> torch.Tensor:
    """Weights that minimise mean log loss + penalty / 2 · |w|²."""
    w, y = torch.zeros(x.shape[1], requires_grad=True), torch.as_tensor(labels, dtype=x.dtype)
    optimizer = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(x @ w, y) + penalty / 2 * (w @ w)
        value.backward()
        return value

    optimizer.step(loss)
    return w.detach()


def _hashes(folder: Path, *patterns: str) -> dict[str, str]:
    """{file name: sha256} of the files that match, without the stamp."""
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.name != STAMP})
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def main(
    seed: Annotated[list[int] | None, typer.Option(help="Once or several times.")] = None,
    threshold: Annotated[float, typer.Option(help="Reviews with a smaller |rating| are neutral.")] = 1.5,
    out: Annotated[Path, typer.Option()] = Path("reports/encoder"),
) -> None:
    """Fine-tune the classifiers, or take those that are there, and print how good they are."""
    reviews = split_reviews(frame := read_reviews(), threshold=threshold)
    sizes = ", ".join(f"{name} {n:,}" for name, n in reviews["split"].value_counts()[list(SPLITS)].items())
    print(f"{len(reviews):,} of {len(frame):,} reviews have |rating| > {threshold:g} ({sizes}); the rest is left out")
    rows = []
    for one in seed or [0]:
        folder = out / f"minilm-reviews-{one}"
        train_encoder(one, folder, reviews=reviews)
        rows.append({"model": folder.name, **(read_stamp(folder) or {}).get("measured", {})})
    show(pd.concat([control_scores(reviews), pd.DataFrame(rows)], ignore_index=True))


if __name__ == "__main__":
    typer.run(main)
