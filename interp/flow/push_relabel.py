"""The maximum flow through layers of attention, in whole numbers: highest-label push-relabel, compiled by numba.

Node (l, i) is position i after l layers, and edge (l + 1, i) → (l, k) carries at most `capacity[l, i, k]`. Flow enters
at (L, q) and leaves at the sinks, positions of layer 0.

1. *Potentials.* `sink_potential[l, i]` is at least what (l, i) can deliver to the sinks, `source_potential[l, k]` at
   least what (l, k) can receive from the source: each is the sum over a node's edges of the smaller of the edge and the
   neighbour's potential. What passes layer l is at most Σ_k min(both), and the smallest of these sums bounds the flow
   (`layer_bound`). On attention graphs of language models this bound is nearly always the flow itself.
2. *First wave.* The source gets the bound, and nothing more, to send. Layer by layer each node shares what it has among its
   edges in proportion to the room they have under both potentials. Where all arrives, the flow is found and proved by the bound.
3. *Push-relabel* for what is stuck (Goldberg & Tarjan 1988; highest label first and the gap heuristic: Cherkassky & Goldberg
   1997). Labels start as exact distances to the sinks in the residual graph. It stops when the bound has arrived, or when no
   excess can reach a sink any more: then the flow is maximal, although what is stuck is not sent back.
4. `sink_side` marks the nodes that can reach a sink in the residual graph; the edges that lead into that set from outside are a
   minimum cut, the one nearest to the sinks.

Under causal attention only positions from the first sink to the target are looked at. The arrays are int64, so that sums of all
capacities must stay below 2⁶⁰: `interp.flow.exact` scales them. Nothing here is rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_UNBOUNDED = np.int64(1 << 61)


def _compile(function: Any) -> Any:
    """Compile on first use, and keep what was compiled beside the source or in the user's cache, if either can be written."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


@_compile
def sink_potential(capacity: Any, sinks: Any, causal: Any, potential: Any) -> None:
    """Writes (layer + 1, position) upper bounds of what a node can deliver to the sinks."""
    n_layers, length, _ = capacity.shape
    for k in range(length):
        potential[0, k] = _UNBOUNDED if sinks[k] else 0
    for layer in range(n_layers):
        for i in range(length):
            end = i + 1 if causal else length
            row, below = capacity[layer, i, :end], potential[layer, :end]
            total = np.int64(0)
            for k in range(row.shape[0]):
                total += min(row[k], below[k])
            potential[layer + 1, i] = total


@_compile
def source_potential(capacity: Any, target: Any, causal: Any, potential: Any) -> None:
    """Writes (layer + 1, position) upper bounds of what a node can receive from the target."""
    n_layers = capacity.shape[0]
    high = target + 1 if causal else capacity.shape[1]
    potential[:] = 0
    potential[n_layers, target] = _UNBOUNDED
    for layer in range(n_layers - 1, -1, -1):
        for i in range(high):
            above = potential[layer + 1, i]
            if above > 0:
                end = i + 1 if causal else high
                row, below = capacity[layer, i, :end], potential[layer, :end]
                for k in range(row.shape[0]):
                    below[k] += min(row[k], above)


@_compile
def layer_bound(from_sinks: Any, from_source: Any, low: Any, high: Any) -> Any:
    """The smallest sum over a layer's nodes of what can pass them."""
    best = _UNBOUNDED
    for layer in range(from_sinks.shape[0]):
        total = np.int64(0)
        for k in range(low, high):
            # Sums cannot overflow: where neither potential is a sum of capacities, one node is all that counts.
            total = min(_UNBOUNDED, total + min(from_sinks[layer, k], from_source[layer, k]))
        best = min(best, total)
    return best


@_compile
def _reset(capacity: Any, residual: Any, carried: Any, excess: Any, low: Any, high: Any, causal: Any) -> None:
    n_layers = capacity.shape[0]
    excess[:, low:high] = 0
    for layer in range(n_layers):
        for i in range(low, high):
            end = i + 1 if causal else high
            residual[layer, i, low:end] = capacity[layer, i, low:end]
            carried[layer, i, (i if causal else low) : high] = 0


@_compile
def _first_wave(
    residual: Any,
    carried: Any,
    excess: Any,
    from_sinks: Any,
    from_source: Any,
    low: Any,
    high: Any,
    causal: Any,
    free: Any,
    sent: Any,
) -> None:
    """`free` and `sent` are scratch. Rows are slices, so that the loops over them compile to vector instructions."""
    n = high - low
    for layer in range(residual.shape[0] - 1, -1, -1):
        for k in range(n):
            free[k] = min(from_sinks[layer, low + k], from_source[layer, low + k])
        for i in range(n - 1, -1, -1):
            have = excess[layer + 1, low + i]
            if have == 0:
                continue
            end = i + 1 if causal else n
            row, room, gone = residual[layer, low + i, low : low + end], free[:end], sent[:end]
            total = np.int64(0)
            for k in range(row.shape[0]):
                gone[k] = min(row[k], room[k])
                total += gone[k]
            if total == 0:
                continue
            if have < total:  # in proportion, and then what rounding down has left
                share, total = have / total, np.int64(0)
                for k in range(row.shape[0]):
                    # Beyond 2^53 the product may be rounded up past the room, and the sum past what there is.
                    gone[k] = min(gone[k], np.int64(gone[k] * share))
                    total += gone[k]
                k = 0
                while total > have:
                    less = min(gone[k], total - have)
                    gone[k] -= less
                    total -= less
                    k += 1
                k = 0
                while total < have:
                    more = min(min(row[k], room[k]) - gone[k], have - total)
                    gone[k] += more
                    total += more
                    k += 1
            into = excess[layer, low : low + end]
            for k in range(row.shape[0]):
                row[k] -= gone[k]
                room[k] -= gone[k]
                into[k] += gone[k]
            for k in range(end):
                carried[layer, low + k, low + i] = gone[k]
            excess[layer + 1, low + i] = have - total


@_compile
def _distances(
    residual: Any,
    carried: Any,
    sinks: Any,
    label: Any,
    low: Any,
    high: Any,
    causal: Any,
    dead: Any,
    queue: Any,
    left: Any,
    n_left: Any,
) -> None:
    """Writes distances to the sinks in the residual graph, `dead` where there is no way: breadth first.

    Every layer lists the positions without a label (`left`, `n_left`; with `queue` scratch): a node is looked at from few
    others, because attention has an edge almost everywhere.
    """
    n_layers, length = residual.shape[0], residual.shape[1]
    tail = 0
    for layer in range(n_layers + 1):
        kept = 0
        for k in range(low, high):
            if layer == 0 and sinks[k]:
                label[0, k] = 0
                queue[tail] = k
                tail += 1
            else:
                label[layer, k] = dead
                left[layer * length + kept] = k
                kept += 1
        n_left[layer] = kept
    head = 0
    while head < tail:
        node = queue[head]
        head += 1
        layer, k = node // length, node % length
        further = np.int32(label[layer, k] + 1)
        if layer < n_layers and n_left[layer + 1] > 0:
            kept, start = 0, (layer + 1) * length
            for at in range(n_left[layer + 1]):
                i = left[start + at]
                if (i >= k or not causal) and residual[layer, i, k] > 0:
                    label[layer + 1, i] = further
                    queue[tail] = start + i
                    tail += 1
                else:
                    left[start + kept] = i
                    kept += 1
            n_left[layer + 1] = kept
        if layer > 0 and n_left[layer - 1] > 0:
            kept, start = 0, (layer - 1) * length
            for at in range(n_left[layer - 1]):
                i = left[start + at]
                if (i <= k or not causal) and carried[layer - 1, i, k] > 0:
                    label[layer - 1, i] = further
                    queue[tail] = start + i
                    tail += 1
                else:
                    left[start + kept] = i
                    kept += 1
            n_left[layer - 1] = kept


@_compile
def _drain(
    residual: Any,
    carried: Any,
    excess: Any,
    label: Any,
    first: Any,
    following: Any,
    count: Any,
    arrived: Any,
    limit: Any,
    low: Any,
    high: Any,
    causal: Any,
    dead: Any,
) -> Any:
    """Push-relabel from exact labels. Active nodes are in lists by label: `first[label]`, `following[node]`; −1 ends a list."""
    n_layers, length = residual.shape[0], residual.shape[1]
    for at in range(dead + 1):
        first[at] = -1
        count[at] = 0
    top = 0
    for layer in range(n_layers + 1):
        for k in range(low, high):
            here = label[layer, k]
            count[here] += 1
            if excess[layer, k] > 0 and 0 < here < dead:
                following[layer * length + k] = first[here]
                first[here] = layer * length + k
                top = max(top, here)
    while top > 0 and arrived < limit:
        node = first[top]
        if node < 0:
            top -= 1
            continue
        first[top] = following[node]
        layer, i = node // length, node % length
        here = label[layer, i]
        if here != top:  # the gap heuristic has given it up
            continue
        have = excess[layer, i]
        while have > 0:
            if layer > 0:
                end = i + 1 if causal else high
                row, below = residual[layer - 1, i, low:end], label[layer - 1, low:end]
                for at in range(row.shape[0]):
                    k = row.shape[0] - 1 - at  # itself first: the residual edge is the widest
                    if row[k] > 0 and below[k] == here - 1:
                        pushed = min(have, row[k])
                        row[k] -= pushed
                        k += low
                        carried[layer - 1, k, i] += pushed
                        have -= pushed
                        if here == 1:
                            arrived += pushed
                        elif excess[layer - 1, k] == 0:
                            following[(layer - 1) * length + k] = first[here - 1]
                            first[here - 1] = (layer - 1) * length + k
                        excess[layer - 1, k] += pushed
                        if have == 0:
                            break
            if have > 0 and layer < n_layers:
                start = i if causal else low
                row, upper = carried[layer, i, start:high], label[layer + 1, start:high]
                for at in range(row.shape[0]):
                    if row[at] > 0 and upper[at] == here - 1:
                        pushed = min(have, row[at])
                        row[at] -= pushed
                        p = start + at
                        residual[layer, p, i] += pushed
                        have -= pushed
                        if excess[layer + 1, p] == 0:
                            following[(layer + 1) * length + p] = first[here - 1]
                            first[here - 1] = (layer + 1) * length + p
                        excess[layer + 1, p] += pushed
                        if have == 0:
                            break
            top = max(top, here - 1)
            if have == 0:
                break
            nearest = dead
            if layer > 0:
                end = i + 1 if causal else high
                row, below = residual[layer - 1, i, low:end], label[layer - 1, low:end]
                for k in range(row.shape[0]):
                    nearest = min(nearest, below[k] if row[k] > 0 else dead)
            if layer < n_layers:
                start = i if causal else low
                row, upper = carried[layer, i, start:high], label[layer + 1, start:high]
                for p in range(row.shape[0]):
                    nearest = min(nearest, upper[p] if row[p] > 0 else dead)
            raised = min(np.int32(nearest + 1), dead)
            count[here] -= 1
            if count[here] == 0:  # a gap: no path crosses it, so nothing above it can reach a sink
                for other in range(n_layers + 1):
                    for k in range(low, high):
                        if here < label[other, k] < dead:
                            count[label[other, k]] -= 1
                            label[other, k] = dead
                raised = dead
            label[layer, i] = raised
            if raised == dead:
                break
            count[raised] += 1
            here = raised
        excess[layer, i] = have
    return arrived


@_compile
def solve(
    capacity: Any,
    target: Any,
    sinks: Any,
    low: Any,
    causal: Any,
    from_sinks: Any,
    from_source: Any,
    limit: Any,
    residual: Any,
    carried: Any,
    excess: Any,
    label: Any,
    first: Any,
    following: Any,
    count: Any,
) -> Any:
    """The maximum flow from (L, target) to the sinks.

    Args:
        capacity: (layer, query, key) int64, not negative.
        target: a position.
        sinks: (position) flags.
        low: the first sink; 0 where attention is not causal.
        causal: whether keys behind the query have capacity 0; they are not read then.
        from_sinks, from_source: the potentials.
        limit: send no more than this.
        residual, carried: (layer, position, position or more) int64 scratch. Afterwards `capacity − residual` is the
            flow on (query, key) and `carried` the same as (key, query), within the window; excess that is stuck is
            still on its way.
        excess, label: (layer + 1, position) int64 and int32 scratch.
        first, following, count: int64 scratch of (layers + 1) · positions + 2.

    Returns:
        The flow.
    """
    n_layers, length, _ = capacity.shape
    high = target + 1 if causal else length
    best = min(limit, layer_bound(from_sinks, from_source, low, high))
    _reset(capacity, residual, carried, excess, low, high, causal)
    if best <= 0:
        return np.int64(0)
    excess[n_layers, target] = best
    _first_wave(residual, carried, excess, from_sinks, from_source, low, high, causal, first, following)
    arrived = np.int64(0)
    for k in range(low, high):
        if sinks[k]:
            arrived += excess[0, k]
    if arrived >= best:
        return arrived
    dead = np.int32((n_layers + 1) * (high - low) + 1)
    _distances(residual, carried, sinks, label, low, high, causal, dead, following, first, count)
    return _drain(residual, carried, excess, label, first, following, count, arrived, best, low, high, causal, dead)


@_compile
def sink_side(
    residual: Any,
    carried: Any,
    sinks: Any,
    label: Any,
    low: Any,
    target: Any,
    causal: Any,
    first: Any,
    following: Any,
    count: Any,
    side: Any,
) -> None:
    """Writes (layer + 1, position) whether a node can reach a sink in the residual graph of a maximum flow.

    Positions behind a causal target count as sink side and those before the first sink as source side: no edge leads out of
    the window that way, so that the edges from source side to sink side are the cut.
    """
    n_layers, length = residual.shape[0], residual.shape[1]
    high = target + 1 if causal else length
    dead = np.int32((n_layers + 1) * (high - low) + 1)
    _distances(residual, carried, sinks, label, low, high, causal, dead, following, first, count)
    for layer in range(n_layers + 1):
        for k in range(length):
            side[layer, k] = k >= high or (k >= low and label[layer, k] < dead)
