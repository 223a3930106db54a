"""Which attention score ranks tokens as their effect on the prediction does? Measured for `analyses.attention_flow`.

1. *Sentences*: single sentences of film reviews (interp.sinks' domains), cut where a word begins: the model reads the first part
   and the word's first token is what it should predict. Everything is scored at the last position.
2. *Blank-out* (Abnar & Zuidema, arXiv 2005.00928, section 4): each token in turn is replaced by a neutral one; the effect is the
   absolute change of log p of the true next token. A second neutral token gives the ceiling: how well blank-out agrees
   with itself.
3. *Input gradients*: the L2 norm of the gradient of that log p with respect to each token's embedding.
4. *Scores*: raw attention of the top layer, rollout, widest, soft, exact, bounds; on the graph of the first n layers, for several
   n; without correction, against uniform attention, without the sink; and on the whole depth with norm-weighted heads and with
   contributions. *Position* is the score that knows nothing: the later the higher.
5. Spearman and Kendall correlation over a sentence's tokens, the document-start token left out; and Spearman with position held
   constant, since both score and effect follow it. Sentences are the unit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor
from tqdm.auto import tqdm

from interp.batching import Batch, for_each_batch, token_batches
from interp.capture import run_probes
from interp.errors import InputError
from interp.flow import AttentionGraph, attention_graph, influence
from interp.flow.influences import CORRECTIONS, METHODS
from interp.intervals import bootstrap_mean
from interp.model import Model
from interp.provenance import Provenance
from interp.results import Column, Result
from interp.sinks import read_domain

NEUTRAL = (" the", ",")  # the first blanks out, the second measures the ceiling
SCORES = ("raw", *METHODS)
REFERENCES = ("blank-out", "gradient")
FAITHFULNESS_COLUMNS = (
    Column("text", "int32", "index", "0-based index of the sentence"),
    Column("n_tokens", "int32", "tokens", "tokens that are ranked: the document start is not"),
    Column("graph", "category", "", "how heads become one: mean, norm or contribution; empty for position and ceiling"),
    Column("n_layers", "int16", "layers", "the graph's layers, from the bottom; 0 for position and ceiling"),
    Column("method", "category", "", "the score; position: its rank in the text; ceiling: blank-out by another token"),
    Column("correction", "category", "", "none, uniform or drop_sink"),
    Column("reference", "category", "", "blank-out or gradient"),
    Column(
        "spearman", "float64", "", "rank correlation of score and reference over the sentence's tokens; NaN: constant"
    ),
    Column("kendall", "float64", "", "Kendall's τ-b of the same"),
    Column(
        "partial", "float64", "", "Spearman with the token's position held constant; NaN: nothing is left without it"
    ),
    Column("with_position", "float64", "", "Spearman of the score with the token's position"),
)


def sentences(
    model: Model, n: int, *, start: Any, shortest: int = 8, longest: int = 28, seed: int = 0
) -> list[list[int]]:
    """Token ids of sentences cut before a word, that word's first token last.

    Args:
        model: whose tokenizer is used.
        n: how many.
        start: the document-start token, as text.
        shortest, longest: text tokens that are read, the start and the word to be predicted not counted.
        seed: of the choice of sentences and cuts.

    Raises:
        InputError: too few sentences that are long enough.
    """
    _, documents = read_domain("movie-reviews", model, length=longest, n=n)
    before = start_ids(model, start)
    rng = np.random.default_rng(seed)
    found: list[list[int]] = []
    for at in rng.permutation(len(documents)):
        if len(found) == n:
            break
        ids = model.tokenizer(documents[at], add_special_tokens=False)["input_ids"]
        words = [
            place
            for place in range(shortest, min(longest, len(ids) - 1) + 1)
            if _begins_word(model.tokenizer.decode([ids[place]]))
        ]
        if words:
            found.append([*before, *ids[: int(rng.choice(words)) + 1]])
    if len(found) < n:
        raise InputError(f"{len(found)} sentences have {shortest} tokens and a word behind them; {n} were asked for")
    return found


def _begins_word(piece: str) -> bool:
    return len(piece) > 1 and piece[0] == " " and piece[1].isalpha()


def start_ids(model: Model, start: Any) -> list[int]:
    """What `analyses.sink_heads.document_start` names, as token ids."""
    if start in ("auto", True):
        return [int(model.tokenizer.bos_token_id)]
    return [int(model.tokenizer.convert_tokens_to_ids(start))]


def blank_out(
    model: Model, texts: Sequence[Sequence[int]], neutral: str, progress: bool | str = False
) -> list[np.ndarray]:
    """|Δ log p| of a text's last token when each token before it is replaced; the first is left alone.

    Args:
        model: a causal LM.
        texts: token ids, the one to be predicted last.
        neutral: one token, as text.
        progress: a progress bar on stderr.

    Returns:
        Per text (read tokens − 1) absolute changes in nats.

    Raises:
        InputError: the neutral text is not one token.
    """
    ids = model.tokenizer(neutral, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(f"{neutral!r} is {len(ids)} tokens; expected one")
    rows, owner = [], []
    for text, tokens in enumerate(texts):
        read = list(tokens[:-1])
        rows.append(read)
        owner.append((text, 0))
        for place in range(1, len(read)):
            rows.append([*read[:place], ids[0], *read[place + 1 :]])
            owner.append((text, place))
    probe = _NextToken(model, [texts[text][-1] for text, _ in owner])
    run_probes(model, rows, [probe], progress=progress)
    whole = {text: probe.log_p[row] for row, (text, place) in enumerate(owner) if place == 0}
    changes: list[list[float]] = [[] for _ in texts]
    for row, (text, place) in enumerate(owner):
        if place:
            changes[text].append(abs(float(probe.log_p[row] - whole[text])))
    return [np.array(change) for change in changes]


class _NextToken:
    """log p of a given token at the last position, without the other positions' logits."""

    def __init__(self, model: Model, wanted: Sequence[int]) -> None:
        self.model, self.wanted = model, list(wanted)
        self.sites = [("resid_post", model.arch.n_layers - 1)]
        self.log_p = np.full(len(wanted), np.nan)

    def update(self, site: str, layer: int, tensor: Tensor, batch: Batch) -> Tensor:
        """Final norm and head at the last token of each text."""
        last = tensor[torch.arange(batch.size, device=tensor.device), batch.last]
        log_p = self.model.head_logits(last).float().log_softmax(-1)
        wanted = torch.tensor([self.wanted[row] for row in batch.rows], device=tensor.device)
        return log_p.gather(1, wanted[:, None])[:, 0].cpu()

    def merge(self, site: str, layer: int, partial: Tensor, batch: Batch) -> None:
        """Keep by text."""
        self.log_p[list(batch.rows)] = partial.double().numpy()


def gradient_norms(model: Model, texts: Sequence[Sequence[int]], max_tokens: int = 1024) -> list[np.ndarray]:
    """‖∂ log p(last token) / ∂ embedding‖₂ of each token before it, the first left out.

    Args:
        model: a causal LM.
        texts: token ids, the one to be predicted last.
        max_tokens: budget of padded tokens in a batch.

    Returns:
        Per text (read tokens − 1) norms, in nats per unit of embedding.
    """
    norms: list[np.ndarray] = [np.zeros(0)] * len(texts)

    def step(batch: Batch) -> None:
        batch = batch.to(model.device)
        with torch.no_grad():
            embedded = model.arch.embedding()(batch.input_ids)
        embedded.requires_grad_(True)
        hidden = model.hf.base_model(
            inputs_embeds=embedded, attention_mask=batch.mask.long(), use_cache=False
        ).last_hidden_state
        last = hidden[torch.arange(batch.size, device=hidden.device), batch.last.to(hidden.device)]
        log_p = model.arch.lm_head()(last).float().log_softmax(-1)
        wanted = torch.tensor([texts[row][-1] for row in batch.rows], device=log_p.device)
        (gradient,) = torch.autograd.grad(log_p.gather(1, wanted[:, None]).sum(), embedded)
        sizes = gradient.float().norm(dim=-1).cpu().numpy()
        for at, row in enumerate(batch.rows):
            norms[row] = sizes[at, 1 : len(texts[row]) - 1].astype(np.float64)

    with torch.enable_grad():
        batches = token_batches([text[:-1] for text in texts], max_tokens=max_tokens, pad_id=model.pad_id, side="right")
        for_each_batch(batches, step)
    return norms


def faithfulness(
    model: Model,
    texts: Sequence[Sequence[int]],
    depths: Sequence[int],
    *,
    graphs: Sequence[str] = ("mean", "norm", "contribution"),
    corrections: Sequence[str] = CORRECTIONS,
    n_ceiling: int = 48,
    progress: bool | str = "flow",
) -> Result:
    """Rank correlation of every score with blank-out and with input gradients.

    Args:
        model: a causal LM.
        texts: token ids that begin with the document start; the last is to be predicted.
        depths: numbers of layers; of graphs but "mean" the largest alone is looked at.
        graphs: "mean", "norm" and "contribution".
        corrections: see `interp.flow.attention_flow`.
        n_ceiling: on how many texts the second neutral token measures the ceiling.
        progress: a progress bar on stderr.

    Returns:
        A `Result` of kind "flow.faithfulness" with `FAITHFULNESS_COLUMNS`.
    """
    start = time.perf_counter()
    references = {"blank-out": blank_out(model, texts, NEUTRAL[0], progress), "gradient": gradient_norms(model, texts)}
    other = blank_out(model, texts[:n_ceiling], NEUTRAL[1], progress)
    found: list[list[tuple[dict[str, Any], np.ndarray]]] = []
    for text, tokens in enumerate(texts):
        alone: dict[str, Any] = {"graph": "", "n_layers": 0, "correction": "none"}
        found.append([({**alone, "method": "position"}, np.arange(len(tokens) - 2.0))])
        if text < len(other):
            found[-1].append(({**alone, "method": "ceiling"}, other[text]))
    for name in graphs:
        options = {"capacity": "contribution"} if name == "contribution" else {"heads": name}
        made = attention_graph(model, [list(ids[:-1]) for ids in texts], **options)
        for text, graph in enumerate(tqdm(made, desc=name, disable=not progress, leave=False)):
            for depth in depths if name == "mean" else [max(depths)]:
                for correction in corrections:
                    about = {"graph": name, "n_layers": depth, "correction": correction}
                    for method, score in scores(graph.below(depth), correction).items():
                        found[text].append(({**about, "method": method}, score[1:]))
    rows: list[dict[str, Any]] = []
    for text, given in enumerate(found):
        spearman, kendall = rank_correlations(
            np.stack([score for _, score in given]),
            np.stack([*(values[text] for values in references.values()), given[0][1]]),  # position last
        )
        for at, (about, score) in enumerate(given):
            for column, reference in enumerate(references):
                correlated = {
                    "spearman": spearman[at, column],
                    "kendall": kendall[at, column],
                    "partial": partial(spearman[at, column], spearman[at, -1], spearman[0, column]),
                    "with_position": spearman[at, -1],
                }
                rows.append({"text": text, "n_tokens": len(score), **about, "reference": reference, **correlated})
    parameters = {
        "depths": list(depths),
        "graphs": list(graphs),
        "corrections": list(corrections),
        "neutral": list(NEUTRAL),
        "n_ceiling": n_ceiling,
        "texts": digest(texts),
    }
    provenance = Provenance.collect(model, parameters=parameters, wall_time=time.perf_counter() - start)
    return Result("flow.faithfulness", pd.DataFrame(rows), FAITHFULNESS_COLUMNS, provenance)


def scores(graph: AttentionGraph, correction: str = "none") -> dict[str, np.ndarray]:
    """{method: (position) score at the last position}; raw attention first."""
    if correction == "uniform":  # what `influence` does, with the denominators kept
        plain, expected = scores(graph), _uniform_scores(graph)
        return {
            name: np.divide(score, expected[name], out=np.full(len(score), np.nan), where=expected[name] > 0)
            for name, score in plain.items()
        }
    raw = graph.without([0]).attention[-1, -1] if correction == "drop_sink" else graph.attention[-1, -1]
    found = {"raw": raw.double().numpy()}
    for method in METHODS:
        found[method] = influence(graph, [-1], method=method, correction=correction)[0].double().numpy()
    return found


def _uniform_scores(graph: AttentionGraph) -> dict[str, np.ndarray]:
    uniform = graph.uniform()
    key = (uniform.n_layers, len(uniform), float(uniform.capacity[0, -1, -1]))
    if key not in _KEPT:
        _KEPT[key] = scores(uniform)
    return _KEPT[key]


# Scores of uniform attention by layers, length, and what the last position gives itself, which tells graphs apart.
_KEPT: dict[tuple[int, int, float], dict[str, np.ndarray]] = {}


def rank_correlations(scores: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spearman's ρ and Kendall's τ-b of many scores with some references, ties included.

    Args:
        scores: (score, token).
        references: (reference, token).

    Returns:
        Two (score, reference) arrays; NaN where one of both is constant or has a NaN.

    Example:
        >>> rank_correlations(np.array([[1.0, 2.0, 3.0]]), np.array([[0.1, 0.5, 0.7], [3.0, 2.0, 1.0]]))[1].tolist()
        [[1.0, -1.0]]
    """
    first, second = (rankdata(values, axis=1, nan_policy="propagate") for values in (scores, references))
    first, second = (values - values.mean(1, keepdims=True) for values in (first, second))
    with np.errstate(invalid="ignore", divide="ignore"):
        spearman = first @ second.T / np.sqrt(np.outer((first**2).sum(1), (second**2).sum(1)))
        # Signs of all differences; a tie is 0, and the sums of squares count what is not tied.
        pairs = [np.sign(values[:, :, None] - values[:, None]).reshape(len(values), -1) for values in (first, second)]
        kendall = pairs[0] @ pairs[1].T / np.sqrt(np.outer((pairs[0] ** 2).sum(1), (pairs[1] ** 2).sum(1)))
    return spearman, kendall


def partial(both: float, first: float, second: float) -> float:
    """Correlation of two with a third held constant, from the three correlations; NaN where the third is one of them.

    Example:
        >>> round(partial(0.5, 0.0, 0.6), 3), partial(0.5, 1.0, 0.5)
        (0.625, nan)
    """
    left = (1 - first**2) * (1 - second**2)
    return float((both - first * second) / np.sqrt(left)) if left > 1e-12 else float("nan")


def digest(texts: Sequence[Sequence[int]]) -> str:
    """A hash of token ids."""
    import hashlib

    return hashlib.sha256(repr([list(text) for text in texts]).encode()).hexdigest()[:16]


def means(result: Result, statistic: str = "spearman") -> pd.DataFrame:
    """Mean over sentences with its bootstrap interval, by graph, depth, method, correction and reference.

    Args:
        result: what `faithfulness` gave.
        statistic: "spearman", "kendall", "partial" or "with_position".

    Returns:
        A frame with the columns graph, n_layers, method, correction, reference, mean, low, high, sd, n. Sentences whose
        score is constant are left out; n counts the others.
    """
    keys = ["graph", "n_layers", "method", "correction", "reference"]
    rows = []
    for key, group in result.frame.groupby(keys, observed=True, sort=False):
        values = group[statistic].dropna().to_numpy()
        low, high = bootstrap_mean(values)
        rows.append(
            {
                **dict(zip(keys, key, strict=True)),
                "mean": values.mean() if len(values) else np.nan,
                "low": float(low),
                "high": float(high),
                "sd": values.std(ddof=1) if len(values) > 1 else np.nan,
                "n": len(values),
            }
        )
    return pd.DataFrame(rows)


def paired(
    result: Result, first: dict[str, Any], second: dict[str, Any], statistic: str = "spearman"
) -> dict[str, float]:
    """Mean difference of two scores over the same sentences, with its bootstrap interval.

    Args:
        result: what `faithfulness` gave.
        first, second: values of columns that pick one row per sentence each.
        statistic: "spearman", "kendall", "partial" or "with_position".

    Returns:
        first, second (their means over these sentences), difference, low, high, n.
    """
    columns = []
    for chosen in (first, second):
        rows = result.frame
        for name, value in chosen.items():
            rows = rows[rows[name] == value]
        columns.append(rows.set_index("text")[statistic])
    both = pd.concat(columns, axis=1, keys=["first", "second"]).dropna()
    difference = (both["first"] - both["second"]).to_numpy()
    low, high = bootstrap_mean(difference)
    return {
        "first": float(both["first"].mean()),
        "second": float(both["second"].mean()),
        "difference": float(difference.mean()) if len(difference) else float("nan"),
        "low": float(low),
        "high": float(high),
        "n": len(both),
    }
