"""What a scan reads off one layer of one batch, reduced to a few numbers per text and head.

Of a layer's residual stream (the block's output), per text (`residual_measures`):
    resid_first, resid_sinks      ‖x‖ at position 0; mean over the sink tokens
    resid_others, resid_others_max  median and maximum over the other tokens
    massive_1 … 3                 the three largest |x|, with dimension and position (Sun et al., arXiv 2402.17762)
    median_abs                    median |x|, over at most 128 evenly spaced tokens

Of its attention, per text and head (`attention_measures`); A is the pattern, S the sink set:
    mass_first     m_0 = Σ_q A[q, 0] / (queries that see key 0)             (Gu et al., arXiv 2410.10781)
    mass_sinks     Σ_q Σ_{k ∈ S} A[q, k] / (queries that see a key of S); missing where S is empty
    value_first    ‖W_O v_0‖; value_sinks: mean over S; value_others: median over the other tokens
    output_norm    ‖W_O z_q‖, mean over the queries after the first
    delta_logit    score to key 0 minus the mean score of the other visible keys, neither key 0 nor the query itself; mean over
                   the queries that see key 0 and at least one of those    (Guo et al., arXiv 2410.13835)

*Sink tokens* are tokens whose residual norm exceeds `peak` times the text's median: for attention, in the stream that enters this
layer or one below it; for the residual measures, also in this layer's output.
*Others* are real tokens that are neither sinks nor position 0. Medians of an even count are the lower of the two.
Everything is float32, and padding (on the right) enters nowhere.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.recorded_attention import Seen, block_scores, visible

RESIDUAL_MEASURES = ("resid_first", "resid_sinks", "resid_others", "resid_others_max", "median_abs")
MASSIVE = 3
ATTENTION_MEASURES = (
    "mass_first",
    "mass_sinks",
    "value_first",
    "value_sinks",
    "value_others",
    "output_norm",
    "delta_logit",
)
_MEDIAN_TOKENS = 128
_SUM_BLOCK = 64  # positions
# Scores of queries against sink tokens that live at a time: 64 MiB of float32.
_SINK_SCORES = 2**24


def find_sinks(
    norms: Float[Tensor, "batch position"], mask: Bool[Tensor, "batch position"], peak: float
) -> Bool[Tensor, "batch position"]:
    """Tokens whose norm exceeds `peak` times the median of their text.

    Example:
        >>> find_sinks(torch.tensor([[50.0, 1.0, 2.0, 1.0]]), torch.ones(1, 4, dtype=torch.bool), 10.0).tolist()
        [[True, False, False, False]]
    """
    median = norms.masked_fill(~mask, float("nan")).nanmedian(1, keepdim=True).values
    return (norms > peak * median) & mask


def residual_measures(
    resid: Float[Tensor, "batch position d_model"],
    mask: Bool[Tensor, "batch position"],
    sinks: Bool[Tensor, "batch position"],
    norms: Float[Tensor, "batch position"],
) -> dict[str, Tensor]:
    """Measures of a layer's output; each (batch,), the massive ones (batch, 3)."""
    missing = float("nan")
    others = norms.masked_fill(~_others(mask, sinks), missing)
    # The three largest entries lie in the three tokens with the largest maxima.
    peaks = torch.maximum(resid.amax(-1), -resid.amin(-1)).float().masked_fill(~mask, -1)
    tokens = peaks.topk(min(MASSIVE, peaks.shape[1]), dim=1).indices  # (batch, 3)
    rows = torch.arange(len(resid), device=resid.device)[:, None]
    candidates = resid[rows, tokens].float().masked_fill(~mask[rows, tokens][..., None], 0)
    largest = candidates.abs().flatten(1).topk(MASSIVE, dim=1).indices
    position, dimension = tokens.gather(1, largest // resid.shape[-1]), largest % resid.shape[-1]
    # Evenly spaced within each text's own length, so that padding decides nothing.
    counts, steps = mask.sum(1, keepdim=True), torch.arange(min(_MEDIAN_TOKENS, mask.shape[1]), device=mask.device)
    spaced = torch.where(counts > len(steps), steps * counts // len(steps), steps)  # (batch, sample)
    sample = resid[rows, spaced].float().abs().masked_fill_((steps >= counts)[..., None], missing)
    return {
        "resid_first": norms[:, 0],
        "resid_sinks": _mean_where(norms, sinks),
        "resid_others": others.nanmedian(1).values,
        "resid_others_max": others.nan_to_num(nan=-1).amax(1).where(_others(mask, sinks).any(1), missing),
        "median_abs": sample.flatten(1).nanmedian(1).values,
        "massive": candidates.flatten(1).gather(1, largest),
        "massive_dim": dimension,
        "massive_position": position,
    }


def attention_measures(
    seen: Seen,
    mask: Bool[Tensor, "batch position"],
    sinks: Bool[Tensor, "batch position"],
    writes: Float[Tensor, "head d_head d_head"],
) -> dict[str, Tensor]:
    """Measures of a layer's heads; each (batch, head).

    Args:
        seen: what the attention function recorded.
        mask: real tokens.
        sinks: sink tokens.
        writes: per head, the triangular factor R of its output projection: ‖W_O v‖ = ‖R v‖.
    """
    values = _written_norms(seen.value.transpose(1, 2), writes)  # (batch, head, position)
    outputs = _written_norms(seen.output, writes)
    others = values.masked_fill(~_others(mask, sinks)[:, None], float("nan"))
    later = mask.clone()
    later[:, 0] = False
    first, on_sinks, difference = (_from_pattern if seen.pattern is not None else _from_lse)(seen, mask, sinks)
    return {
        "mass_first": first,
        "mass_sinks": on_sinks,
        "value_first": values[..., 0],
        "value_sinks": _mean_where(values, sinks[:, None].expand_as(values)),
        "value_others": others.nanmedian(-1).values,
        "output_norm": _mean_where(outputs, later[:, None].expand_as(outputs)),
        "delta_logit": difference,
    }


def output_factors(weight: Float[Tensor, "head d_head d_model"]) -> Float[Tensor, "head d_head d_head"]:
    """Per head a triangular R with ‖v @ weight‖ = ‖v @ R‖, so that norms need d_head numbers and not d_model."""
    return torch.linalg.qr(weight.float().transpose(1, 2), mode="r").R.transpose(1, 2).contiguous()


def _written_norms(vectors: Tensor, writes: Tensor) -> Tensor:
    """‖v R_h‖ of (batch, position, head or kv_head, d_head) vectors: (batch, head, position)."""
    batch, length, given, width = vectors.shape
    heads = len(writes)
    # All heads of a group in one product: (group, position, d) @ (group, d, heads of the group · d).
    factors = writes.reshape(given, heads // given, width, width).permute(0, 2, 1, 3).reshape(given, width, -1)
    written = vectors.float().transpose(1, 2) @ factors  # (batch, group, position, heads of the group · d)
    norms = written.unflatten(-1, (heads // given, width)).norm(dim=-1)  # (batch, group, position, head of the group)
    return norms.transpose(2, 3).reshape(batch, heads, length)


def _from_lse(seen: Seen, mask: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masses and Δlogit from the log-sum-exp: A[q, k] = exp(s_qk − lse_q)."""
    lse = seen.lse
    assert lse is not None
    length, window = mask.shape[1], seen.window
    query = seen.query
    positions = torch.arange(length, device=mask.device)
    sees_first = mask & (positions < (window or length))
    to_first = _scores_to(seen, torch.zeros(len(mask), 1, dtype=torch.long, device=mask.device))[..., 0]
    first = _mean_where((to_first - lse).exp(), sees_first[:, None].expand_as(lse))

    # Texts have different numbers of sinks: pad to the largest, and go some sinks at a time where they are many.
    counts = sinks.sum(1)
    most = int(counts.max())
    mass, sees = torch.zeros_like(lse), torch.zeros_like(mask)
    order = sinks.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    step = max(1, _SINK_SCORES // lse.numel())
    for start in range(0, most, step):
        at = order[:, start : start + step]  # (batch, sink)
        distance = positions[None, :, None] - at[:, None]
        real = (torch.arange(start, start + at.shape[1], device=at.device) < counts[:, None])[:, None]
        seen_by = (distance >= 0) & real & mask[:, :, None]
        if window is not None:
            seen_by &= distance < window
        attention = (_scores_to(seen, at) - lse[..., None]).exp()
        mass += attention.masked_fill_(~seen_by[:, None], 0).sum(-1)
        sees |= seen_by.any(-1)
    on_sinks = _mean_where(mass, sees[:, None].expand_as(mass))

    # Others of query q: keys 1 … q − 1; all of them are visible wherever key 0 is.
    compared = sees_first & (positions >= 2)
    if seen.softcap is None:
        # Σ_k s_qk = q · Σ_k k: a running sum of keys. Queries 0 and 1 have no others.
        keys = _running_sums(seen.key[:, :, 1:-1])
        mean_others = _dot(query[:, :, 2:], keys) * (seen.scaling / (positions[2:] - 1))
        mean_others = torch.nn.functional.pad(mean_others, (min(2, length), 0))
    else:
        mean_others = _capped_means(seen)
    difference = _mean_where(to_first - mean_others, compared[:, None].expand_as(lse))
    return first, on_sinks, difference


def _from_pattern(seen: Seen, mask: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the pattern and from explicit scores."""
    assert seen.pattern is not None
    pattern = seen.pattern.float()
    length = mask.shape[1]
    sees = visible(0, length, 0, length, seen.window, mask.device)
    queries = mask[:, None, :]
    first = _mean_where(pattern[..., 0], (queries & sees[:, 0]).expand_as(pattern[..., 0]))
    mass = (pattern * sinks[:, None, None, :]).sum(-1)
    sees_sink = (sees[None] & sinks[:, None, :]).any(-1)
    on_sinks = _mean_where(mass, (queries & sees_sink[:, None]).expand_as(mass))
    scores = block_scores(seen.query, _per_head(seen.key, seen.query), seen.scaling, seen.softcap)
    others = sees.clone().fill_diagonal_(False)
    others[:, 0] = False
    mean_others = _mean_where(scores, others.expand_as(scores))
    compared = (queries & sees[:, 0] & others.any(1)).expand_as(mean_others)
    return first, on_sinks, _mean_where(scores[..., 0] - mean_others, compared)


def _running_sums(keys: Tensor) -> Tensor:
    """Sums over positions up to each, float32: within short blocks, and over the blocks before in float64, since they grow."""
    length = keys.shape[2]
    padded = torch.nn.functional.pad(keys.float(), (0, 0, 0, -length % _SUM_BLOCK))
    within = padded.unflatten(2, (-1, _SUM_BLOCK)).cumsum(3)  # (batch, kv_head, block, position, d_head)
    totals = within[:, :, :, -1]
    wide = torch.float32 if keys.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    before = (totals.to(wide).cumsum(2) - totals.to(wide)).float()
    return within.add_(before[:, :, :, None]).flatten(2, 3)[:, :, :length]


def _scores_to(seen: Seen, at: Tensor) -> Tensor:
    """Scores of every query to chosen keys, (batch, sink) positions: (batch, head, position, sink)."""
    index = at[:, None, :, None].expand(-1, seen.key.shape[1], -1, seen.key.shape[-1])
    keys = _per_head(seen.key.gather(2, index), seen.query)
    return block_scores(seen.query, keys, seen.scaling, seen.softcap)


def _capped_means(seen: Seen) -> Tensor:
    """Mean soft-capped score of each query over keys 1 … q − 1, a block of queries at a time."""
    keys = _per_head(seen.key, seen.query).float()
    batch, heads, length, _ = seen.query.shape
    step = max(16, _SINK_SCORES // (batch * heads * length))
    means = []
    for start in range(0, length, step):
        end = min(start + step, length)
        scores = block_scores(seen.query[:, :, start:end], keys[:, :, :end], seen.scaling, seen.softcap)
        others = visible(start, end, 0, end, None, keys.device)
        distance = torch.arange(start, end, device=keys.device)[:, None] - torch.arange(end, device=keys.device)
        others &= distance > 0
        others[:, 0] = False
        means.append(_mean_where(scores, others.expand_as(scores)))
    return torch.cat(means, 2)


def _per_head(shared: Tensor, query: Tensor) -> Tensor:
    """Key-value heads repeated for the query heads that share them."""
    groups = query.shape[1] // shared.shape[1]
    return shared.repeat_interleave(groups, dim=1) if groups > 1 else shared


def _dot(query: Tensor, keys: Tensor) -> Tensor:
    """Each query with its own key vector, keys shared by groups of heads: (batch, head, position)."""
    batch, heads, length, width = query.shape
    grouped = query.float().reshape(batch, keys.shape[1], heads // keys.shape[1], length, width)
    return (grouped * keys[:, :, None]).sum(-1).reshape(batch, heads, length)


def _others(mask: Tensor, sinks: Tensor) -> Tensor:
    others = mask & ~sinks
    others[:, 0] = False
    return others


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Mean over the last dimension where `where` is True; missing where it never is."""
    # masked_fill and not a product: what padding queries hold may be infinite.
    total = values.masked_fill(~where, 0).sum(-1)
    return total / where.sum(-1)  # 0 / 0 is NaN
