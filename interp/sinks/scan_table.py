"""The table of a scan, and what is read off it: means with intervals, sink rates, sink tokens, massive activations.

Rows are per text. Every mean is over texts, with n and a bootstrap interval over texts (`interp.intervals`); nothing
here needs the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from interp.errors import InputError
from interp.intervals import bootstrap_mean
from interp.results import Column, Result
from interp.sinks.measures import ATTENTION_MEASURES, MASSIVE, RESIDUAL_MEASURES

SCAN_COLUMNS = (
    Column("domain", "category", "", "kind of text"),
    Column("text", "int32", "index", "0-based index of the text within its domain"),
    Column("layer", "int16", "layer", "0-based"),
    Column("head", "int16", "head", "0-based; -1 for the layer's residual stream (the block's output)"),
    Column("n_tokens", "int32", "tokens", "length of the text"),
    Column("mass_first", "float32", "probability", "attention on key 0, mean over the queries that see it"),
    Column(
        "mass_sinks", "float32", "probability", "attention on the sink set, mean over the queries that see one of it"
    ),
    Column("value_first", "float32", "norm", "norm of what the value vector at position 0 writes (after W_O)"),
    Column("value_sinks", "float32", "norm", "the same, mean over the sink set"),
    Column("value_others", "float32", "norm", "the same, median over tokens that are neither sinks nor position 0"),
    Column("output_norm", "float32", "norm", "norm of what the head writes, mean over positions after the first"),
    Column(
        "delta_logit",
        "float32",
        "nats",
        "score to key 0 minus the mean score to other visible keys but the query's own",
    ),
    Column("resid_first", "float32", "norm", "residual norm at position 0"),
    Column("resid_sinks", "float32", "norm", "residual norm, mean over the sink set"),
    Column("resid_others", "float32", "norm", "residual norm, median over tokens neither sinks nor position 0"),
    Column("resid_others_max", "float32", "norm", "residual norm, maximum over the same tokens"),
    Column("median_abs", "float32", "activation", "median absolute entry of the residual stream"),
    *(
        column
        for rank in range(1, MASSIVE + 1)
        for column in (
            Column(f"massive_{rank}", "float32", "activation", f"entry number {rank} by absolute size"),
            Column(f"massive_{rank}_dim", "Int32", "index", "its dimension"),
            Column(f"massive_{rank}_position", "Int32", "index", "its token's position"),
        )
    ),
    Column("n_sinks", "Int32", "tokens", "tokens in the sink set so far"),
    Column("sink_tokens", "str", "", "on the last layer's own row: the first sinks as position:token id"),
)
# Derived per text, so that a ratio's interval is that of the ratio.
_RATIOS = {
    "value_ratio": ("value_first", "value_others"),
    "resid_ratio": ("resid_first", "resid_others"),
    "massive_ratio": ("massive_1", "median_abs"),
}
_HEAD_MEASURES = (*ATTENTION_MEASURES, "value_ratio")
_LAYER_MEASURES = (*RESIDUAL_MEASURES, "massive_1", "n_sinks", "resid_ratio", "massive_ratio")


class Scan(Result):
    """What `scan` gives: a frame with one row per domain, text, layer and head (head −1: the layer's residual stream).

    `heads`, `layers`, `sink_rate`, `sink_tokens` and `massive_activations` summarise it; `interp.sinks.compare` tests
    domains against each other and `interp.sinks.classify` names heads.

    Attributes: as `Result`.
    """

    @property
    def domains(self) -> list[str]:
        """Names of the domains, in the order given."""
        return [str(name) for name in self.frame["domain"].cat.categories]

    def only(self, domains: Sequence[str]) -> Scan:
        """The same scan with some of its domains, in the order given.

        Raises:
            InputError: none is named, or one is not in the scan.
        """
        unknown = [name for name in domains if name not in self.domains]
        if isinstance(domains, str) or unknown or not domains:
            raise InputError(f"domains {domains!r}; expected a list of some of {', '.join(self.domains)}")
        parts = [self.frame[self.frame["domain"] == name] for name in domains]
        frame = pd.concat(parts, ignore_index=True)
        frame["domain"] = frame["domain"].cat.set_categories(list(domains))
        parameters = {**self.provenance.parameters, "domains": list(domains)}
        return replace(self, frame=frame, provenance=replace(self.provenance, parameters=parameters))

    def values(self, measure: str = "mass_first", *, per: str = "head") -> dict[str, pd.DataFrame]:
        """One measure by text.

        Args:
            measure: a column, or value_ratio, resid_ratio, massive_ratio.
            per: "head" or "layer".

        Returns:
            {domain: frame with one row per text and one column per (layer, head), or per layer}.

        Raises:
            InputError: no such measure of heads or layers.
        """
        known = {"head": _HEAD_MEASURES, "layer": _LAYER_MEASURES}.get(per)
        if known is None or measure not in known:
            raise InputError(
                f"measure {measure!r} per {per!r}; expected one of {', '.join(_HEAD_MEASURES)} per 'head', or of "
                f"{', '.join(_LAYER_MEASURES)} per 'layer'"
            )
        rows = self.frame[self.frame["head"] >= 0 if per == "head" else self.frame["head"] < 0]
        numbers = _measure(rows, measure)
        keys = ["layer", "head"] if per == "head" else ["layer"]
        tables = {}
        for domain in self.domains:
            here = (rows["domain"] == domain).to_numpy()
            table = rows.loc[here, ["text", *keys]].assign(value=numbers[here])
            tables[domain] = table.pivot(index="text", columns=keys, values="value")
        return tables

    def heads(
        self, measures: Sequence[str] = _HEAD_MEASURES, *, n_resamples: int = 2000, level: float = 0.95, seed: int = 0
    ) -> pd.DataFrame:
        """Per domain, layer, head and measure: mean over texts with its bootstrap interval.

        Returns:
            domain, layer, head, measure, mean, low, high, n (texts with a value).
        """
        return self._summary(measures, "head", n_resamples, level, seed)

    def layers(
        self, measures: Sequence[str] = _LAYER_MEASURES, *, n_resamples: int = 2000, level: float = 0.95, seed: int = 0
    ) -> pd.DataFrame:
        """Per domain, layer and measure of the residual stream: mean over texts with its bootstrap interval.

        Returns:
            domain, layer, measure, mean, low, high, n.
        """
        return self._summary(measures, "layer", n_resamples, level, seed)

    def _summary(self, measures: Sequence[str], per: str, n_resamples: int, level: float, seed: int) -> pd.DataFrame:
        parts = []
        for measure in [measures] if isinstance(measures, str) else measures:
            for domain, table in self.values(measure, per=per).items():
                numbers = table.to_numpy(dtype=np.float64)
                mean, low, high = mean_and_interval(numbers, n_resamples, level, seed)
                keys = table.columns.to_frame(index=False)
                count = (~np.isnan(numbers)).sum(0)
                parts.append(
                    pd.concat([pd.DataFrame({"domain": domain}, index=keys.index), keys], axis=1).assign(
                        measure=measure, mean=mean, low=low, high=high, n=count
                    )
                )
        return pd.concat(parts, ignore_index=True)

    def sink_rate(self, epsilons: Sequence[float] | None = None, measure: str = "mass_first") -> pd.DataFrame:
        """Share of texts on which a head's mass exceeds ε, for a whole range of ε (Gu et al., section 3: ε = 0.3).

        Args:
            epsilons: thresholds; 0.05, 0.10 … 0.95 by default.
            measure: "mass_first" or "mass_sinks".

        Returns:
            domain, layer, head, epsilon, rate, n (texts).
        """
        thresholds = np.linspace(0.05, 0.95, 19).round(2) if epsilons is None else np.asarray(epsilons, dtype=float)
        parts = []
        for domain, table in self.values(measure).items():
            numbers = np.nan_to_num(table.to_numpy(dtype=float), nan=0.0)  # no sink: no mass on sinks
            rates = (numbers[None] > thresholds[:, None, None]).mean(1)  # (epsilon, head)
            keys = table.columns.to_frame(index=False)
            for epsilon, rate in zip(thresholds, rates, strict=True):
                parts.append(keys.assign(domain=domain, epsilon=epsilon, rate=rate, n=len(numbers)))
        return pd.concat(parts, ignore_index=True)[["domain", "layer", "head", "epsilon", "rate", "n"]]

    def sink_tokens(self, tokenizer: Any = None) -> pd.DataFrame:
        """Which tokens are sinks: how often each is one, by domain.

        Args:
            tokenizer: to show tokens as text.

        Returns:
            domain, token_id, token (where there is a tokenizer), first (share of its occurrences as a sink at position 0),
            texts (share of texts where it is a sink), n (texts). Of a text's sinks the first 16 are counted.
        """
        last = self.frame[(self.frame["head"] < 0) & (self.frame["layer"] == self.frame["layer"].max())]
        rows = [
            {"domain": str(row.domain), "text": int(row.text), "position": int(at), "token_id": int(token)}
            for row in last.itertuples()
            for at, token in (entry.split(":") for entry in str(row.sink_tokens).split())
        ]
        if not rows:
            return pd.DataFrame(columns=["domain", "token_id", "first", "texts", "n"])
        n = last.groupby("domain", observed=True)["text"].nunique()
        groups = pd.DataFrame(rows).groupby(["domain", "token_id"])
        table = groups.agg(
            first=("position", lambda at: float((at == 0).mean())), texts=("text", "nunique")
        ).reset_index()
        table["n"] = [int(n[domain]) for domain in table["domain"]]
        table["texts"] = table["texts"] / table["n"]
        if tokenizer is not None:
            table.insert(2, "token", [tokenizer.decode([token]) for token in table["token_id"]])
        return table.sort_values(["domain", "texts"], ascending=[True, False], ignore_index=True)

    def massive_activations(self) -> pd.DataFrame:
        """Per domain and layer: the dimension that most often holds the largest entry, and how large it is.

        Returns:
            domain, layer, dim, share (of texts whose largest entry lies there), at_first (share at position 0), mean (of the
            largest |x|), ratio (mean of the largest |x| over the text's median |x|), n.
        """
        rows = self.frame[self.frame["head"] < 0]
        parts = []
        for (domain, _), group in rows.groupby(["domain", "layer"], observed=True):
            dims = group["massive_1_dim"].astype(int)
            dim = int(dims.mode().iloc[0])
            parts.append(
                {
                    "domain": domain,
                    "layer": int(group["layer"].iloc[0]),
                    "dim": dim,
                    "share": float((dims == dim).mean()),
                    "at_first": float((group["massive_1_position"] == 0).mean()),
                    "mean": float(group["massive_1"].abs().mean()),
                    "ratio": float((group["massive_1"].abs() / group["median_abs"]).mean()),
                    "n": len(group),
                }
            )
        return pd.DataFrame(parts)


def mean_and_interval(
    numbers: np.ndarray, n_resamples: int, level: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, low and high over the texts that have a value, column by column where some are missing."""
    missing = np.isnan(numbers)
    low, high = bootstrap_mean(numbers, n_resamples, level, seed)
    mean = numbers.mean(0)
    for column in np.flatnonzero(missing.any(0)):
        known = numbers[~missing[:, column], column]
        mean[column] = known.mean() if len(known) else np.nan
        low[column], high[column] = bootstrap_mean(known, n_resamples, level, seed) if len(known) else (np.nan, np.nan)
    return mean, low, high


def _measure(rows: pd.DataFrame, measure: str) -> np.ndarray:
    if measure in _RATIOS:
        above, below = (rows[name].to_numpy(dtype=np.float64, na_value=np.nan) for name in _RATIOS[measure])
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.abs(above) / below
    return rows[measure].to_numpy(dtype=np.float64, na_value=np.nan)
