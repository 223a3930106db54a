"""Maximum flows and widest paths through real attention: against networkx, igraph, OR-Tools, scipy and Vico's own form.

The graphs are those of `flow_graphs`. Ours takes the capacities as they are and does all that a user's call does, with
as many threads as torch has; the others' graphs are built beforehand, and the solvers run on one thread. What ours takes
on one thread stands in the note, and in the file as `single_thread_ratio`. The values are compared.

1. *One target*, the last token, and all sources.
2. *All pairs* with the source not behind the target, against a loop over scipy.
3. *Widest path*, all pairs, against the released broadcast: time, and memory in fresh processes.
4. *512 tokens*, one target, all sources: time and memory, against nothing.
5. *With gradients*, against the forward call alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks import flow_peers
from tests.benchmarks.flow_graphs import corner, on_one_thread, real_capacity, spread, warm_up
from tests.benchmarks.memory import MIB, measure
from tests.benchmarks.table import Row
from tests.benchmarks.timing import Times, interleave, ratio_of

SUITE = "flow"


def run(quick: bool) -> list[Row]:
    """All rows."""
    capacity = real_capacity(512)
    warm_up(capacity)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "capacity.pt")
        torch.save(capacity, path)
        return [
            *_short_text(corner(capacity, 27), quick),
            *_one_target(corner(capacity, 128), quick),
            _all_pairs(corner(capacity, 128), quick),
            *_widest(corner(capacity, 256), path, quick),
            *_long(path, quick),
            _gradients(corner(capacity, 128), quick),
        ]


def _short_text(capacity: Tensor, quick: bool) -> list[Row]:
    n, repeats = (3, 1) if quick else (27, 2)
    peers = {
        "networkx as in attention_flow (Edmonds-Karp)": (flow_peers.edmonds_karp_solver, n, 1),
        "networkx, preflow-push": (flow_peers.networkx_solver, 3 * n if quick else n, repeats),
    }
    # Ours takes milliseconds: ten calls for one of theirs.
    return [
        _against(capacity, peer, make, n_sources, "<= 0.005", quick, rounds, calls=10)
        for peer, (make, n_sources, rounds) in peers.items()
    ]


def _one_target(capacity: Tensor, quick: bool) -> list[Row]:
    peers = {
        "igraph": flow_peers.igraph_solver,
        "OR-Tools": flow_peers.ortools_solver,
        "scipy, loop": flow_peers.scipy_solver,
    }
    n, repeats = (32, 2) if quick else (128, 3)
    return [_against(capacity, peer, make, n, "< 1", quick, repeats) for peer, make in peers.items()]


def _against(
    capacity: Tensor,
    peer: str,
    make: Callable[[Tensor], Any],
    n: int,
    target: str,
    quick: bool,
    repeats: int,
    calls: int = 1,
) -> Row:
    """The last token and `n` sources, one solver."""
    from interp.flow.exact import maximum_flow

    n_layers, length, _ = capacity.shape
    sources, theirs = spread(length, n), make(capacity)
    return _row(
        quick,
        f"exact, last token, {length} tokens",
        peer,
        *_measured(
            lambda: maximum_flow(capacity, [-1], sources).flatten(),
            lambda: torch.tensor([theirs(length - 1, source) for source in sources]),
            repeats,
            calls,
        ),
        target=target,
        n=f"{n_layers} layers, {_these(sources, length, 'source')}",
    )


def _all_pairs(capacity: Tensor, quick: bool) -> Row:
    from interp.flow.exact import maximum_flow

    n_layers, length, _ = capacity.shape
    targets = spread(length, 4 if quick else length)
    pairs = [(row, target, source) for row, target in enumerate(targets) for source in range(target + 1)]
    solver = flow_peers.scipy_solver(capacity)

    def theirs() -> Tensor:
        flows = torch.zeros(len(targets), length)
        for row, target, source in pairs:
            flows[row, source] = solver(target, source)
        return flows

    times, error = _measured(lambda: maximum_flow(capacity, targets), theirs, 2 if quick else 1)
    note = f"{len(pairs):,} flows in {times['ours'].median:.2f} s, {times['ours_one'].median:.2f} s on one thread"
    return _row(
        quick,
        f"exact, all pairs, {length} tokens",
        "scipy, loop",
        times,
        error,
        target="<= 0.2",
        n=f"{n_layers} layers, {_these(targets, length, 'target')} × all sources not behind them",
        note=note,
    )


def _widest(capacity: Tensor, path: str, quick: bool) -> list[Row]:
    from interp.flow.widest import widest_path

    n_layers, length, _ = capacity.shape
    name, peer = f"widest, all pairs, {length} tokens", "Vico's T × T × T broadcast"
    about: dict[str, Any] = {"target": "< 1", "n": f"{n_layers} layers", "theirs_on_one": False}
    measured = _measured(lambda: widest_path(capacity), lambda: flow_peers.vico_widest(capacity), 2 if quick else 5)
    rows = [_row(quick, f"{name}: time", peer, *measured, **about)]
    sizes = (length, 2 * length)
    ours = {at: measure("flow_solvers", "widest_in_memory", path=path, length=at)["extra"] / MIB for at in sizes}
    theirs = {
        at: measure("flow_solvers", "vico_in_memory", path=path, length=at)["extra"] / MIB
        for at in sizes[: 1 if quick else 2]
    }
    grown = [
        f"{who} {', '.join(f'{value:,.0f} MiB at {at}' for at, value in extra.items())}"
        for who, extra in (("ours", ours), ("theirs", theirs))
    ]
    rows.append(
        Row(
            **_about(quick, f"{name}: extra peak memory", peer),
            ratio=ours[length] / theirs[length],
            target="<= 0.25",
            repeats=1,
            ours=ours[length],
            theirs=theirs[length],
            unit="MiB",
            n=f"{n_layers} layers",
            note=f"ours is O(T²), theirs O(T³): {'; '.join(grown)} tokens; the capacities themselves have "
            f"{capacity.numel() * 4 / MIB:.0f} MiB at {length}",
            more={
                f"{who}_at_{at}": value
                for who, extra in (("ours", ours), ("theirs", theirs))
                for at, value in extra.items()
            },
        )
    )
    return rows


def _long(path: str, quick: bool) -> list[Row]:
    length = 256 if quick else 512
    seen = measure("flow_solvers", "exact_in_memory", path=path, length=length)
    said = seen["said"]
    about: dict[str, Any] = {"ratio": None, "target": None, "repeats": 1}
    work = f"{said['n_layers']} layers, all {length} sources, {said['threads']} threads, a fresh process"
    graph = f"the capacities themselves have {said['graph'] / MIB:.0f} MiB"
    return [
        Row(
            **_about(quick, f"exact, last token, {length} tokens: time", "–"),
            **about,
            ours=said["seconds"],
            unit="s",
            n=work,
            note=f"{said['seconds'] / length * 1000:.1f} ms a flow; flows {said['lowest']:.3f} … {said['highest']:.3f}",
            more={"processor_seconds": said["processor"]},
        ),
        Row(
            **_about(quick, f"exact, last token, {length} tokens: extra peak memory", "–"),
            **about,
            ours=seen["extra"] / MIB,
            unit="MiB",
            n=work,
            note=f"{graph}; peak of the whole process {seen['process'] / MIB:,.0f} MiB",
            more={"process": seen["process"] / MIB},
        ),
    ]


def _gradients(capacity: Tensor, quick: bool) -> Row:
    from interp.flow.exact import maximum_flow

    leaf = capacity.clone().requires_grad_()
    cases: dict[str, Callable[[], Any]] = {
        "both": lambda: torch.autograd.grad(maximum_flow(leaf, [-1]).sum(), leaf),
        "forward": lambda: maximum_flow(capacity, [-1]),
    }
    times = interleave(cases, 3 if quick else 7)
    return Row(
        **_about(quick, "exact with gradients, last token, 128 tokens", "forward alone"),
        **ratio_of(times["both"], times["forward"]),
        target="<= 2",
        n=f"{capacity.shape[0]} layers, all 128 sources",
        note=f"backward is the minimum cut of what the forward call leaves behind; {torch.get_num_threads()} threads",
    )


def _measured(
    ours: Callable[[], Tensor], theirs: Callable[[], Tensor], repeats: int, calls: int = 1
) -> tuple[dict[str, Times], float]:
    """Ours, ours on one thread, theirs, in turn; and how far the values differ.

    Args:
        ours, theirs: give the same values.
        repeats: rounds.
        calls: how many of ours a round has; the times are those of one.
    """
    found: dict[str, Tensor] = {}

    def kept(name: str, call: Callable[[], Tensor], n: int) -> Callable[[], None]:
        def several() -> None:
            for _ in range(n):
                found[name] = call()

        return several

    cases = {
        "ours": kept("ours", ours, calls),
        "theirs": kept("theirs", theirs, 1),
        "ours_one": kept("ours_one", lambda: on_one_thread(ours), calls),
    }
    times = interleave(cases, repeats, warm=True)
    for name in ("ours", "ours_one"):
        times[name] = Times(*([one / calls for one in part] for part in (times[name].wall, times[name].processor)))
    difference = max((found[name] - found["theirs"]).abs().max().item() for name in ("ours", "ours_one"))
    return times, difference


def _row(
    quick: bool,
    name: str,
    against: str,
    times: dict[str, Times],
    difference: float,
    *,
    target: str,
    n: str,
    note: str = "",
    theirs_on_one: bool = True,
) -> Row:
    figures = ratio_of(times["ours"], times["theirs"])
    single = ratio_of(times["ours_one"], times["theirs"])["ratio"]
    figures["more"] = {**(figures["more"] or {}), "single_thread_ratio": single}
    threads = torch.get_num_threads()
    who = f"ours on {threads} threads and theirs on 1" if theirs_on_one else f"both on {threads} threads"
    values = f"values differ by at most {difference:.0e}" if difference else "all values are the same in float32"
    said = f"{who}; ours on 1 thread: ratio {single:.2g}; {values}"
    return Row(
        **_about(quick, name, against),
        **figures,
        target=target,
        n=n,
        note="; ".join(part for part in (note, said) if part),
    )


def _about(quick: bool, name: str, against: str) -> dict[str, Any]:
    return {"suite": SUITE, "subject": "flow_solvers", "quick": quick, "name": name, "against": against}


def _these(positions: Sequence[int], length: int, what: str) -> str:
    return (
        f"all {length} {what}s" if len(positions) == length else f"{len(positions)} of {length} {what}s, evenly spread"
    )


def widest_in_memory(path: str, length: int) -> Callable[[], Any]:
    """For `memory`: our widest paths, all pairs."""
    from interp.flow.widest import widest_path

    return _kept(widest_path, path, length)


def vico_in_memory(path: str, length: int) -> Callable[[], Any]:
    """For `memory`: the same by Vico's form."""
    return _kept(flow_peers.vico_widest, path, length)


def _kept(method: Callable[[Tensor], Tensor], path: str, length: int) -> Callable[[], None]:
    capacity = corner(torch.load(path), length)
    method(corner(capacity, 16))

    def call() -> None:
        kept = method(capacity)
        del kept

    return call


def exact_in_memory(path: str, length: int) -> Callable[[], dict[str, float]]:
    """For `memory`: flows of all sources to the last token, and what they took."""
    from interp.flow.exact import maximum_flow

    capacity = corner(torch.load(path), length)
    warm_up(capacity)

    def call() -> dict[str, float]:
        times = Times()
        flows = times.add(lambda: maximum_flow(capacity, [-1]))
        return {
            "seconds": times.median,
            "processor": times.processor[0],
            "n_layers": capacity.shape[0],
            "threads": torch.get_num_threads(),
            "graph": capacity.numel() * capacity.element_size(),
            "lowest": flows.min().item(),
            "highest": flows.max().item(),
        }

    return call
