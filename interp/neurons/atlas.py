"""An atlas: what every neuron decodes to, and the questions asked of it.

`find` neurons of a concept, `nearest` to a given one, `card` of one; `specialised` neurons (the concept's token is top-1 and at
least three of the top five are spellings of it), their share by layer, and `coverage`: the share of the vocabulary that has one.

An atlas holds the k best tokens of every neuron and sign. Probabilities outside them are unknown, but below the k-th.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from operator import index
from typing import Any, SupportsIndex

import numpy as np
import pandas as pd

from interp.errors import InputError, ResultError
from interp.neurons.concepts import Concept, find_concept
from interp.results import Column, Result

ATLAS_COLUMNS = (
    Column("layer", "int16", "layer", "0-based layer of the neuron"),
    Column("neuron", "int32", "index", "0-based index of the neuron within its layer"),
    Column("sign", "int8", "", "1: the weights as they are; -1: their negative"),
    Column("rank", "int8", "rank", "1 for the neuron's most probable token; ties by lower token id"),
    Column("token_id", "int32", "id", "the token"),
    Column("token", "category", "", "the token's text"),
    Column("probability", "float32", "probability", "softmax of the decoded logits over the whole vocabulary"),
    Column("logsumexp", "float32", "nats", "log-sum-exp of the decoded logits"),
    Column("entropy", "float32", "nats", "entropy of the softmax; log(vocabulary) is a flat one"),
    Column("cosine", "float32", "", "cosine of the neuron's up row and down column"),
)
_TOP = 5  # Specialised: at least _VARIANTS of the _TOP best tokens are spellings of the best one.
_VARIANTS = 3


def atlas_frame(parts: Sequence[Any], tokens: Sequence[str]) -> pd.DataFrame:
    """The long frame of decoded layers (see `interp.neurons.decoding.LayerPart`), ordered by layer, neuron, sign, rank."""
    if not parts:
        return pd.DataFrame({column.name: [] for column in ATLAS_COLUMNS})
    k, signs = parts[0].token_id.shape[2], parts[0].signs
    sizes = [len(part.neurons) for part in parts]
    ids = np.concatenate([part.token_id.reshape(-1) for part in parts]).astype(np.int32)
    # Categories by text, since several ids can share one text (bytes that are no text by themselves).
    categories = sorted(set(tokens))
    code = {text: at for at, text in enumerate(categories)}
    code_of = np.fromiter((code[text] for text in tokens), np.int32, len(tokens))

    def each(name: str) -> np.ndarray:
        return np.repeat(np.concatenate([getattr(part, name).reshape(-1) for part in parts]), k)

    per_neuron = len(signs) * k
    return pd.DataFrame(
        {
            "layer": np.repeat([part.layer for part in parts], [size * per_neuron for size in sizes]).astype(np.int16),
            "neuron": np.repeat(np.concatenate([part.neurons for part in parts]), per_neuron).astype(np.int32),
            "sign": np.tile(np.repeat(np.array(signs, dtype=np.int8), k), sum(sizes)),
            "rank": np.tile(np.arange(1, k + 1, dtype=np.int8), sum(sizes) * len(signs)),
            "token_id": ids,
            "token": pd.Categorical.from_codes(code_of[ids], categories=pd.Index(categories, dtype="str")),
            "probability": np.concatenate([part.probability.reshape(-1) for part in parts]),
            "logsumexp": each("logsumexp"),
            "entropy": each("entropy"),
            "cosine": np.repeat(np.concatenate([part.cosine for part in parts]), per_neuron),
        },
        copy=False,  # the arrays are nobody else's
    )


class Atlas(Result):
    """What every neuron of a model decodes to; a `Result` that answers questions.

    Example:
        >>> atlas = decode(load_model(), site="up")                    # doctest: +SKIP
        >>> atlas.find(" water", top=3)[["layer", "neuron", "sign", "probability"]]      # doctest: +SKIP
    """

    @property
    def top_k(self) -> int:
        """Tokens kept per neuron and sign."""
        return int(self.provenance.parameters["top_k"])

    @cached_property
    def neurons(self) -> pd.DataFrame:
        """One row per neuron and sign: layer, neuron, sign, best token and its probability, entropy, cosine, specialised."""
        first = self.frame.iloc[:: self.top_k]
        if not (first["rank"] == 1).all():
            raise ResultError("the atlas's rows are not ordered by layer, neuron, sign and rank: it was changed")
        columns = ["layer", "neuron", "sign", "token_id", "token", "probability", "logsumexp", "entropy", "cosine"]
        return first[columns].reset_index(drop=True).assign(specialised=self._specialised)

    @cached_property
    def _ids(self) -> np.ndarray:
        return self.frame["token_id"].to_numpy().reshape(-1, self.top_k)

    @cached_property
    def _probabilities(self) -> np.ndarray:
        return self.frame["probability"].to_numpy().reshape(-1, self.top_k)

    @cached_property
    def _specialised(self) -> np.ndarray:
        if self.top_k < _TOP:
            return np.zeros(len(self._ids), dtype=bool)
        stems = _stems(list(self.frame["token"].cat.categories.astype(str)))
        top = stems[self.frame["token"].cat.codes.to_numpy().reshape(-1, self.top_k)[:, :_TOP]]
        return (top[:, 0] >= 0) & ((top == top[:, :1]).sum(1) >= _VARIANTS)

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        if "tokenizer" not in self.attachments:
            raise InputError("the atlas was made without a tokenizer; give token ids instead of text")
        return Tokenizer.from_str(self.attachments["tokenizer"])

    def concept(self, concept: str | Sequence[str] | Concept, *, variants: bool = True) -> Concept:
        """A concept's single tokens in this atlas's tokenizer.

        Raises:
            InputError: empty, or several tokens (names the pieces).
        """
        if isinstance(concept, Concept):
            return concept
        unknown = self._tokenizer.model.unk_token if hasattr(self._tokenizer.model, "unk_token") else None
        return find_concept(
            concept,
            lambda text: self._tokenizer.encode(text, add_special_tokens=False).ids,
            lambda i: self._tokenizer.decode([i], skip_special_tokens=False),
            variants=variants,
            unknown=None if unknown is None else self._tokenizer.token_to_id(unknown),
        )

    def find(self, concept: str | Sequence[str] | Concept, top: int = 20, *, variants: bool = True) -> pd.DataFrame:
        """The neurons that hold a concept, best first.

        Args:
            concept: a word such as " water", or several tokens.
            top: rows returned.
            variants: also count the word's other single-token spellings.

        Returns:
            layer, neuron, sign, probability (summed over the concept's tokens among the neuron's top k), rank of the best of
            them, token (that one), tokens (the neuron's best five), entropy, cosine, specialised. `attrs["concept"]`
            holds the `Concept`: the spellings that were counted and those that are several tokens. Neurons without one
            of the tokens in their top k are left out.

        Raises:
            InputError: see `concept`.
        """
        wanted = self.concept(concept, variants=variants)
        hit = np.isin(self._ids, wanted.token_ids)
        scores = np.where(hit, self._probabilities, 0).sum(1, dtype=np.float64)
        rows = np.flatnonzero(hit.any(1))
        rows = rows[np.argsort(-scores[rows], kind="stable")][:top].tolist()
        best = hit[rows].argmax(1)
        neurons = self.neurons.iloc[rows]
        result = pd.DataFrame(
            {
                "layer": neurons["layer"].to_numpy(),
                "neuron": neurons["neuron"].to_numpy(),
                "sign": neurons["sign"].to_numpy(),
                "probability": scores[rows],
                "rank": best + 1,
                "token": [self._texts(row)[at] for row, at in zip(rows, best, strict=True)],
                "tokens": [" ".join(map(repr, self._texts(row)[:_TOP])) for row in rows],
                "entropy": neurons["entropy"].to_numpy(),
                "cosine": neurons["cosine"].to_numpy(),
                "specialised": neurons["specialised"].to_numpy() & (best == 0),
            }
        )
        result.attrs["concept"] = {
            "name": wanted.name,
            "tokens": list(wanted.tokens),
            "dropped": {spelling: list(pieces) for spelling, pieces in wanted.dropped.items()},
        }
        return result

    def _texts(self, row: int) -> list[str]:
        return self.frame["token"].iloc[row * self.top_k : (row + 1) * self.top_k].astype(str).tolist()

    def card(self, layer: SupportsIndex, neuron: SupportsIndex, sign: SupportsIndex = 1) -> pd.DataFrame:
        """One neuron's rows of the frame.

        Raises:
            InputError: the atlas has no such neuron and sign.
        """
        at = self._row(layer, neuron, sign)
        return self.frame.iloc[at * self.top_k : (at + 1) * self.top_k].reset_index(drop=True)

    def _row(self, layer: SupportsIndex, neuron: SupportsIndex, sign: SupportsIndex) -> int:
        table = self.neurons
        layer, neuron, sign = index(layer), index(neuron), index(sign)
        rows = np.flatnonzero((table["layer"] == layer) & (table["neuron"] == neuron) & (table["sign"] == sign))
        if len(rows) == 0:
            layers, size = sorted(set(table["layer"])), int(table["neuron"].max()) + 1
            raise InputError(
                f"no neuron ({layer}, {neuron}) with sign {sign} in this atlas of {len(layers)} layers ({layers[0]} … "
                f"{layers[-1]}) with {size} neurons and signs {sorted(set(table['sign']))}"
            )
        return int(rows[0])

    @cached_property
    def _sparse(self) -> Any:
        """(neuron and sign) × token matrix of top-k probabilities, rows of length 1."""
        from scipy.sparse import csr_matrix

        n, k = self._ids.shape
        lengths = np.maximum(np.linalg.norm(self._probabilities, axis=1, keepdims=True), 1e-30)
        return csr_matrix(
            ((self._probabilities / lengths).ravel(), self._ids.ravel(), np.arange(0, n * k + 1, k)),
            shape=(n, int(self._ids.max()) + 1),
        )

    def nearest(
        self, layer: SupportsIndex, neuron: SupportsIndex, sign: SupportsIndex = 1, top: int = 10
    ) -> pd.DataFrame:
        """Neurons that decode most like a given one: cosine of their top-k probability vectors.

        Returns:
            layer, neuron, sign, similarity (0 … 1), token, probability, tokens; the neuron itself is left out.

        Raises:
            InputError: the atlas has no such neuron and sign.
        """
        row = self._row(layer, neuron, sign)
        similarity = np.asarray((self._sparse @ self._sparse[row].T).todense()).ravel()
        similarity[row] = -1
        rows = np.argsort(-similarity, kind="stable")[:top]
        table = self.neurons.iloc[rows]
        return (
            table[["layer", "neuron", "sign"]]
            .reset_index(drop=True)
            .assign(
                similarity=similarity[rows],
                token=table["token"].astype(str).to_numpy(),
                probability=table["probability"].to_numpy(),
                tokens=[" ".join(map(repr, self._texts(at)[:_TOP])) for at in rows.tolist()],
            )
        )

    def by_layer(self, threshold: float = 0.5) -> pd.DataFrame:
        """Per layer, over neurons and signs.

        Args:
            threshold: probability from which a top-1 token counts as peaked.

        Returns:
            layer, n, mean and quartiles of the top-1 probability (p25, p50, p75), share peaked, share specialised with
            its 95 % Wilson interval (low, high), mean entropy (nats), mean cosine.
        """
        groups = self.neurons.groupby("layer", observed=True)
        rows = []
        for _, group in groups:
            p = group["probability"].to_numpy()
            low, high = wilson(int(group["specialised"].sum()), len(group))
            quartiles = np.quantile(p, [0.25, 0.5, 0.75])
            rows.append(
                {
                    "layer": int(group["layer"].iloc[0]),
                    "n": len(group),
                    "mean": float(p.mean()),
                    **dict(zip(("p25", "p50", "p75"), map(float, quartiles), strict=True)),
                    "peaked": float((p >= threshold).mean()),
                    "specialised": float(group["specialised"].mean()),
                    "low": low,
                    "high": high,
                    "entropy": float(group["entropy"].mean()),
                    "cosine": float(group["cosine"].mean()),
                }
            )
        return pd.DataFrame(rows)

    def coverage(self, threshold: float = 0.5) -> dict[str, Any]:
        """Which share of the vocabulary has a neuron of its own.

        Args:
            threshold: probability that a token's best neuron must reach.

        Returns:
            vocabulary (tokens), top1 (share that is top-1 of some neuron and sign), peaked (… with at least `threshold`),
            specialised (… of some specialised neuron, any probability).
        """
        vocabulary = int(self.provenance.parameters["vocab_size"])
        table = self.neurons

        def share(rows: np.ndarray) -> float:
            return len(np.unique(table["token_id"].to_numpy()[rows])) / vocabulary

        return {
            "vocabulary": vocabulary,
            "top1": share(np.ones(len(table), dtype=bool)),
            "peaked": share((table["probability"] >= threshold).to_numpy()),
            "specialised": share(table["specialised"].to_numpy()),
        }


def _stems(texts: Sequence[str]) -> np.ndarray:
    """One number per text, equal for spellings of a word (case, space, plural); −1 for what has no letter."""
    numbers: dict[str, int] = {}
    result = np.full(len(texts), -1, dtype=np.int64)
    for at, text in enumerate(texts):
        word = text.strip().lower()
        if not any(letter.isalpha() for letter in word):
            continue
        if len(word) > 4 and word.endswith("ies"):
            word = word[:-3] + "y"
        elif len(word) > 3 and word.endswith("es") and word[-3] in "sxzh":
            word = word[:-2]
        elif len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
            word = word[:-1]
        result[at] = numbers.setdefault(word, len(numbers))
    return result


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share (95 % for z = 1.96).

    Example:
        >>> [round(bound, 3) for bound in wilson(5, 10)]
        [0.237, 0.763]
    """
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    middle = share + z * z / (2 * n)
    spread = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return float((middle - spread) / scale), float((middle + spread) / scale)
