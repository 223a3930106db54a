"""Models whose explanation is known: what a ranking method has to recover.

1. `linear_classifier`: logits are a sum over positions of W e(token), plus a bias. Whatever is complete and exact on a
   linear function (integrated gradients, occlusion, Shapley values …) gives position i exactly w · (e_i − b), for a baseline
   embedding b: `true_scores`.
2. `train_marked_tokens`: a small Llama reads filler words among which a few *marked* words have a weight. The answer at
   the query at the end is "yes" where the weights sum to more than 0, else "no"; the sum is never 0. Any filler may become any
   other filler: the marked positions alone are relevant, and their weights are the true signed scores.
3. `recovery`: how far a score vector ranks the relevant positions first, as the area under the ROC curve; chance is ½.

A model that was trained on 2 may still use something else where that does no harm: its accuracy on fresh texts is returned,
and the answer's independence of the fillers can be measured, not proved. 1 leaves no such doubt.
Why: agreement between explanations is no measure of their quality (Neely et al. 2022, arXiv 2205.04559); a known ranking is.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.atomic import replace_folder
from interp.errors import InputError
from interp.families import Family, register
from interp.model import Model, load_model, set_seed

LINEAR_TYPE = "interp_linear_classifier"


@dataclass
class LinearConfig:
    """What interp reads of a Hugging Face config, for a model without layers."""

    vocab_size: int
    hidden_size: int
    num_labels: int
    model_type: str = LINEAR_TYPE
    num_attention_heads: int = 1
    name_or_path: str = "linear-classifier"
    _attn_implementation: str = "eager"

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes, as Hugging Face configs give them."""
        return {at: f"LABEL_{at}" for at in range(self.num_labels)}

    def to_dict(self) -> dict[str, Any]:
        """The fields, as Hugging Face configs give them."""
        return asdict(self)


class LinearClassifier(nn.Module):
    """Embedding `embed_tokens`, no `layers`, and a `classifier` on the sum over unmasked positions."""

    is_classifier = True  # what interp.agreement.tasks asks for

    def __init__(self, config: LinearConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList()
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.embed_tokens

    def set_attn_implementation(self, name: str) -> None:
        """Recorded in the config; without attention nothing else changes."""
        self.config._attn_implementation = name

    def forward(
        self,
        input_ids: Int[Tensor, "batch position"] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "batch position d_model"] | None = None,
        **unread: Any,
    ) -> SimpleNamespace:
        """`.logits` (batch, n_classes); masked positions add nothing. Other arguments of Hugging Face models are not read.

        Raises:
            InputError: both or neither of ids and embeddings.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give either input_ids or inputs_embeds")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is not None:
            # Not a product: 0 · inf of an unused embedding would be NaN.
            embeds = embeds.masked_fill(~attention_mask.bool()[..., None], 0.0)
        return SimpleNamespace(logits=self.classifier(embeds.sum(1)), attentions=())


def linear_classifier(n_tokens: int = 64, d_model: int = 16, n_classes: int = 2, seed: int = 0) -> LinearClassifier:
    """A random linear classifier that interp can wrap: `load_model(linear_classifier(), tokenizer, check=False)`.

    Args:
        n_tokens, d_model, n_classes: size of the vocabulary, width of the embedding, number of logits.
        seed: of the weights; torch's global generator is left alone.

    Raises:
        InputError: a size below 1, or fewer than two classes.

    Example:
        >>> model = load_model(linear_classifier(), check=False)
        >>> model.hf(torch.tensor([[3, 1, 4]])).logits.shape, model.arch.n_layers
        (torch.Size([1, 2]), 0)
    """
    if n_tokens < 1 or d_model < 1 or n_classes < 2:
        raise InputError(f"n_tokens={n_tokens}, d_model={d_model}, n_classes={n_classes}; expected at least 1, 1 and 2")
    register(Family("linear classifier", (LINEAR_TYPE,), head=("classifier",), gate=None, decoder=False))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = LinearClassifier(LinearConfig(n_tokens, d_model, n_classes))
    return hf.eval()


def true_scores(model: Model, ids: Sequence[int], baseline: Tensor, target: int | tuple[int, int]) -> Tensor:
    """What each position adds to a linear classifier's logit, or difference of two logits, over the baseline.

    Args:
        model: a wrapped `linear_classifier`.
        ids: token ids of one text.
        baseline: (d_model) or (position, d_model) embedding that stands for an absent token.
        target: a class, or (a, b) for logit a − logit b.

    Returns:
        (position) w · (e_i − b), in logits; it sums to f(x) − f(x₀).

    Raises:
        InputError: another model, an unknown class, or a baseline of another shape.
    """
    hf = model.hf
    if not isinstance(hf, LinearClassifier):
        raise InputError(f"{model.name} is {type(hf).__name__}; true scores are known for a linear_classifier only")
    classes = (target,) if isinstance(target, int) else tuple(target)
    last, width = hf.config.num_labels - 1, hf.config.hidden_size
    if len(classes) not in (1, 2) or not all(0 <= c <= last for c in classes):
        raise InputError(f"target={target!r}; expected a class or a pair of classes from 0 to {last}")
    if tuple(baseline.shape) not in {(width,), (len(ids), width)}:
        raise InputError(f"baseline is {tuple(baseline.shape)}; expected ({width},) or one such row per token")
    rows = hf.classifier.weight.detach()[list(classes)]
    return (hf.embed_tokens.weight.detach()[list(ids)] - baseline) @ (rows[0] - rows[1:].sum(0))


# The marked-token task. Ids are places in VOCABULARY.
_MARKED = {"terrible": -3, "awful": -2, "bad": -1, "good": 1, "great": 2, "superb": 3}
_FILLERS = ("the", "a", "of", "and", "in", "on", "with", "table", "river", "paper", "road", "stone", "cloud", "lamp")
VOCABULARY = ("<pad>", "<unk>", "?", "no", "yes", *_MARKED, *_FILLERS)
QUERY = VOCABULARY.index("?")
ANSWERS = (VOCABULARY.index("no"), VOCABULARY.index("yes"))  # by label
WEIGHTS = {VOCABULARY.index(word): weight for word, weight in _MARKED.items()}
FILLERS = tuple(range(len(VOCABULARY) - len(_FILLERS), len(VOCABULARY)))
LENGTHS = (8, 16)  # fewest and most words before the query


class MarkedExample(NamedTuple):
    """A text of the task: `ids` end with the query; `label` is 0 (no) or 1 (yes); `relevant` are the marked positions."""

    ids: list[int]
    label: int
    relevant: tuple[int, ...]


@dataclass(frozen=True)
class MarkedTraining:
    """`accuracy` on `n` fresh texts, where the right answer must beat the whole vocabulary; `seconds` of training."""

    seed: int
    steps: int
    accuracy: float
    n: int
    seconds: float


def marked_examples(n: int, seed: int = 0) -> list[MarkedExample]:
    """Texts of the marked-token task; a larger n adds texts and changes none.

    Raises:
        InputError: n or seed below 0.

    Example:
        >>> ids, label, relevant = marked_examples(1)[0]
        >>> label == (sum(WEIGHTS[ids[position]] for position in relevant) > 0)
        True
    """
    if n < 0 or seed < 0:
        raise InputError(f"n={n}, seed={seed}; expected 0 or more")
    return [_draw(np.random.default_rng([seed, row])) for row in range(n)]


def true_weights(ids: Sequence[int]) -> np.ndarray:
    """(position) each word's weight in the task: the true signed scores; 0 for fillers and the query."""
    return np.array([WEIGHTS.get(token, 0) for token in ids], dtype=float)


def marked_tokenizer() -> Any:
    """A tokenizer of the task's whole words, divided by white space; it adds no special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def train_marked_tokens(
    seed: int = 0, steps: int = 400, out: str | os.PathLike[str] | None = None, *, progress: bool = False
) -> tuple[Model, MarkedTraining]:
    """A Llama of 2 layers, d_model 64 and 4 heads that answers the marked-token task; 400 steps take seconds.

    Args:
        seed: of weights and texts; the same seed gives the same weights (on as many threads).
        steps: of AdamW, 64 texts each.
        out: folder to save the model in, for `load_model`; what is there is replaced.
        progress: a progress bar on stderr.

    Returns:
        The model with its tokenizer, and what was measured on 2,000 fresh texts.

    Raises:
        InputError: seed or steps out of range.
        ResourceError: the folder cannot be written.
    """
    if seed < 0 or steps < 1:
        raise InputError(f"seed={seed}, steps={steps}; expected at least 0 and 1")
    hf, seconds = _train(seed, steps, progress)
    training = MarkedTraining(seed, steps, answer_accuracy(hf, marked_examples(2000, seed + 10_000)), 2000, seconds)
    model = load_model(hf, marked_tokenizer())
    model.name = "marked-tokens"
    if out is not None:

        def fill(folder: Path) -> None:
            hf.save_pretrained(folder)
            model.tokenizer.save_pretrained(folder)
            (folder / "training.json").write_text(json.dumps(asdict(training), indent=1), encoding="utf-8")

        replace_folder(out, fill)
    return model, training


@torch.no_grad()
def answer_accuracy(hf: Any, examples: Sequence[MarkedExample]) -> float:
    """Share of examples whose right answer has the highest logit of the whole vocabulary."""
    right = 0
    for length in {len(example.ids) for example in examples}:
        same = [example for example in examples if len(example.ids) == length]
        best = hf(torch.tensor([example.ids for example in same])).logits[:, -1].argmax(-1)
        right += int((best == torch.tensor([ANSWERS[example.label] for example in same])).sum())
    return right / len(examples)


def _train(seed: int, steps: int, progress: bool) -> tuple[Any, float]:
    from tqdm.auto import tqdm
    from transformers import LlamaConfig, LlamaForCausalLM

    start = time.perf_counter()
    set_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    hf = LlamaForCausalLM(LlamaConfig(vocab_size=len(VOCABULARY), max_position_embeddings=64, **sizes, **special))
    optimizer = torch.optim.AdamW(hf.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 - step / steps))
    rng = np.random.default_rng([seed, 0, 1])  # no stream of marked_examples
    for _ in tqdm(range(steps), desc="marked tokens", unit="step", disable=not progress, leave=False):
        length = int(rng.integers(LENGTHS[0], LENGTHS[1] + 1))  # one a batch: then there is no padding
        examples = [_draw(rng, length) for _ in range(64)]
        logits = hf(torch.tensor([e.ids for e in examples]), use_cache=False, logits_to_keep=1).logits[:, -1]
        loss = F.cross_entropy(logits, torch.tensor([ANSWERS[e.label] for e in examples]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return hf.eval(), time.perf_counter() - start


def _draw(rng: np.random.Generator, length: int = 0) -> MarkedExample:
    """`length` words (0: any) of which 1 to 4 are marked, with weights that do not sum to 0; then the query."""
    length = length or int(rng.integers(LENGTHS[0], LENGTHS[1] + 1))
    total = 0
    while total == 0:
        relevant = np.sort(rng.permutation(length)[: rng.integers(1, 5)])
        marked = rng.choice(list(WEIGHTS), size=len(relevant))
        total = sum(WEIGHTS[int(token)] for token in marked)
    ids = rng.choice(FILLERS, size=length)
    ids[relevant] = marked
    return MarkedExample([*ids.tolist(), QUERY], int(total > 0), tuple(relevant.tolist()))


def recovery(scores: Sequence[float] | np.ndarray | Tensor, relevant: Sequence[int] | np.ndarray) -> float:
    """Area under the ROC curve of scores for telling relevant positions from the others; ties count ½.

    Args:
        scores: (position), high where a position counts; take absolute values first where the sign does not matter.
        relevant: the relevant positions, or a boolean mask over all positions.

    Returns:
        1 if every relevant position is above every other, ½ by chance; NaN if all are relevant or none is, or a score is NaN.

    Raises:
        InputError: scores that are no vector, a mask of another length, a position out of range.

    Example:
        >>> recovery([0.9, 0.1, 0.5, 0.1], relevant=[0, 1])
        0.625
    """
    from scipy.stats import rankdata

    values = np.asarray(scores.detach().cpu() if isinstance(scores, Tensor) else scores, dtype=float)
    marks = np.asarray(relevant)
    if values.ndim != 1 or (marks.dtype == bool and marks.shape != values.shape):
        raise InputError(f"scores are {values.shape}, relevant is {marks.shape}; expected a vector, and a mask as long")
    if marks.dtype != bool:
        places, marks = marks.astype(int), np.zeros(len(values), dtype=bool)
        if ((places < 0) | (places >= len(values))).any():
            raise InputError(f"relevant positions {places.tolist()}; expected 0 to {len(values) - 1}")
        marks[places] = True
    hits = int(marks.sum())
    if hits in (0, len(values)) or np.isnan(values).any():
        return float("nan")
    return float((rankdata(values)[marks].mean() - (hits + 1) / 2) / (len(values) - hits))  # Mann and Whitney's U
