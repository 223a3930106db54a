"""Scanning for attention sinks: against the plain forward pass, Hugging Face's eager patterns and TransformerLens' cache.

1. *Fused scan at 2,048 tokens* against the same forward passes with scaled dot-product attention and nothing measured; neither
   runs the LM head.
2. *8,192 tokens*: peak memory of the whole process while one text is scanned.
3. *Two domains × 64 texts × 256 tokens*: Hugging Face with `output_attentions=True` and TransformerLens' `run_with_cache` of the
   patterns, both as documented (their LM head runs; Hugging Face also without it), in batches of as many tokens as ours, each
   batch reduced to its attention on the first token before the next. Ours never runs the LM head, and measures six more
   things per head and sixteen per layer. The masses are compared.
4. *Ablation* of some heads, batched over heads with the layers below computed once, against one forward pass per head with
   `interp.HeadAblation`; losses compared.
5. How time and memory grow with the length and with the number of texts, in fresh processes: rows, and one figure in
   reports/sinks_growth.html.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from tests.benchmarks.activations import standard_library_texts
from tests.benchmarks.memory import MIB, ROOT, measure
from tests.benchmarks.models import embedded
from tests.benchmarks.table import Row
from tests.benchmarks.timing import interleave, ratio_of

SUITE = "sinks"
_BATCH = 16  # texts of 256 tokens, as many as ours takes
_GIB = 2**30


def run(quick: bool) -> list[Row]:
    """All rows; the figure is written beside them."""
    return [*_against_forward(quick), *_against_others(quick), *_long(quick), *_ablation(quick), *_growth(quick)]


def _about(quick: bool, **more: Any) -> dict[str, Any]:
    return {"suite": SUITE, "subject": "sink_scan", "quick": quick, **more}


def _against_forward(quick: bool) -> list[Row]:
    from interp.sinks import scan

    length, n, repeats = (512, 2, 2) if quick else (2048, 4, 3)
    model = embedded()
    texts = standard_library_texts(model, n, length)

    @torch.no_grad()
    def plain() -> None:
        for ids in texts:
            model.hf.base_model(input_ids=torch.tensor([ids]), use_cache=False)

    times = interleave({"ours": lambda: scan(model, texts, max_tokens=length, progress=False), "plain": plain}, repeats)
    return [
        Row(
            **_about(quick, name="fused scan: time", against="plain forward pass", n=f"{n} texts × {length} tokens"),
            **ratio_of(times["ours"], times["plain"]),
            target="<= 1.1",
            note="neither runs the LM head; attention is sdpa there",
        )
    ]


def _against_others(quick: bool) -> list[Row]:
    from interp.adapters.transformer_lens import to_transformer_lens
    from interp.sinks import scan

    n_texts, repeats = (32, 1) if quick else (128, 2)
    model = embedded()
    bridge = to_transformer_lens(model)
    texts = standard_library_texts(model, n_texts, 256)
    domains = {"first": texts[: n_texts // 2], "second": texts[n_texts // 2 :]}
    ours = torch.tensor(scan(model, domains, progress=False).frame.query("head >= 0")["mass_first"].to_numpy())
    errors = []
    some = len(texts[:_BATCH]) * model.arch.n_layers * model.arch.n_heads
    for others in (hugging_face_masses(model, texts[:_BATCH]), lens_masses(bridge, texts[:_BATCH])):
        errors.append((ours[:some] - others.flatten()).abs().max().item())
    times = interleave(
        {
            "ours": lambda: scan(model, domains, progress=False),
            "hugging": lambda: hugging_face_masses(model, texts),
            "lens": lambda: lens_masses(bridge, texts),
            "hugging_headless": lambda: hugging_face_masses(model, texts, head=False),
        },
        repeats,
        warm=True,
    )
    del bridge, model
    names = {"hugging": "Hugging Face eager, output_attentions", "lens": "TransformerLens, cached patterns"}
    bare = Row(
        **_about(quick, against=f"{names['hugging']}, no LM head", n=f"2 domains × {n_texts // 2} texts × 256 tokens"),
        **ratio_of(times["ours"], times["hugging_headless"]),
        name="scan of two domains: time",
        target="< 1",
        note="both pass the same layers and nothing else",
    )
    rows = []
    memory = {case: measure("sink_scan", f"{case}_in_memory", n_texts=n_texts)["extra"] for case in ("ours", *names)}
    for (case, name), error in zip(names.items(), errors, strict=True):
        about = _about(quick, against=name, n=f"2 domains × {n_texts // 2} texts × 256 tokens")
        note = f"batches of {_BATCH} texts; attention on the first token agrees within {error:.0e}"
        rows.append(
            Row(
                **about,
                **ratio_of(times["ours"], times[case]),
                name="scan of two domains: time",
                target="<= 0.5",
                note=note,
            )
        )
        rows.append(
            Row(
                **about,
                name="scan of two domains: extra peak memory",
                ratio=memory["ours"] / memory[case],
                target="<= 0.25",
                repeats=1,
                ours=memory["ours"] / MIB,
                theirs=memory[case] / MIB,
                unit="MiB",
                note=note,
            )
        )
    return [*rows, bare]


@torch.no_grad()
def hugging_face_masses(model: Any, texts: list[list[int]], head: bool = True) -> torch.Tensor:
    """(text, layer, head) attention on the first token, as `output_attentions` gives it."""
    run = model.hf if head else model.hf.base_model
    parts = []
    with model.attention_implementation("eager"):
        for start in range(0, len(texts), _BATCH):
            output = run(input_ids=torch.tensor(texts[start : start + _BATCH]), output_attentions=True)
            parts.append(torch.stack([pattern[..., 0].mean(-1) for pattern in output.attentions], 1))
    return torch.cat(parts)


@torch.no_grad()
def lens_masses(bridge: Any, texts: list[list[int]]) -> torch.Tensor:
    """The same from TransformerLens' cache."""
    parts = []
    for start in range(0, len(texts), _BATCH):
        tokens = torch.tensor(texts[start : start + _BATCH])
        _, cache = bridge.run_with_cache(tokens, names_filter=lambda name: name.endswith("attn.hook_pattern"))
        patterns = [cache[f"blocks.{layer}.attn.hook_pattern"] for layer in range(bridge.cfg.n_layers)]
        parts.append(torch.stack([pattern[..., 0].mean(-1) for pattern in patterns], 1))
    return torch.cat(parts)


def _long(quick: bool) -> list[Row]:
    length = 2048 if quick else 8192
    seen = measure("sink_scan", "scan_in_memory", n_texts=1, length=length, engine="fused")
    patterns = 30 * 9 * length**2 * 4 / _GIB
    return [
        Row(
            **_about(
                quick, name=f"fused scan at {length:,} tokens: peak memory of the process", against="4 GiB", n="1 text"
            ),
            ratio=seen["process"] / (4 * _GIB),
            target="<= 1",
            repeats=1,
            ours=seen["process"] / MIB,
            theirs=4096.0,
            unit="MiB",
            note=f"{seen['said']['seconds']:.0f} s; the scan itself needs {seen['extra'] / MIB:,.0f} MiB on top of Python, model "
            f"and libraries; all patterns at once would be {patterns:.0f} GiB",
        )
    ]


def _ablation(quick: bool) -> list[Row]:
    from interp.intervene import HeadAblation, intervene
    from interp.sinks import ablate
    from interp.sinks.ablated_runs import plain_losses

    layers, n, repeats = ((15,), 2, 1) if quick else ((3, 11, 19, 27), 4, 2)
    model = embedded()
    texts = standard_library_texts(model, n, 64)
    heads = [(layer, head) for layer in layers for head in range(model.arch.n_heads)]

    def ours() -> Any:
        return ablate(model, heads, texts, n_random=0, scan=False, progress=False).frame

    def one_by_one() -> torch.Tensor:
        losses = []
        for layer, head in heads:
            with intervene(model, HeadAblation(layer, head)):
                losses.append(torch.tensor(plain_losses(model, texts, 4096)))
        return torch.stack(losses)

    found = torch.tensor(ours().sort_values(["layer", "head", "text"])["loss_ablated"].to_numpy())
    error = (found - one_by_one().flatten()).abs().max().item()
    times = interleave({"ours": ours, "others": one_by_one}, repeats)
    return [
        Row(
            **_about(
                quick,
                name="ablation: time",
                against="one forward pass per head",
                n=f"{len(heads)} heads × {n} texts × 64",
            ),
            **ratio_of(times["ours"], times["others"]),
            target="< 1",
            note=f"layers {', '.join(map(str, layers))}; losses agree within {error:.0e}",
        )
    ]


def _growth(quick: bool) -> list[Row]:
    """Time and memory against length and number of texts."""
    lengths = {
        "fused": [128, 512] if quick else [256, 1024, 4096, 8192],
        "eager": [128, 512] if quick else [256, 1024, 2048],
    }
    counts = [4, 16] if quick else [16, 48, 128]
    points = []
    for engine, sizes in lengths.items():
        for length in sizes:
            points.append({"by": "length", "engine": engine, "n_texts": 1, "length": length})
    for count in counts:
        points.append({"by": "texts", "engine": "fused", "n_texts": count, "length": 256})
    for point in points:
        case = {name: point[name] for name in ("n_texts", "length", "engine")}
        seen = measure("sink_scan", "scan_in_memory", **case)
        point |= {"seconds": seen["said"]["seconds"], "extra": seen["extra"] / MIB}
    path = ROOT / "reports" / "sinks_growth.html"
    from interp.report import write_report

    write_report([growth_figure(points)], path, title="Scanning for sinks: time and memory")
    by_texts = [point for point in points if point["by"] == "texts"]
    long = [point for point in points if point["by"] == "length" and point["engine"] == "fused"]
    per_token = [point["extra"] / point["length"] for point in long]
    figure = f"the figure is in {path.relative_to(ROOT)}"
    return [
        Row(
            **_about(quick, name="fused scan: extra peak memory", against=f"the same for {counts[0]} texts"),
            ratio=by_texts[-1]["extra"] / by_texts[0]["extra"],
            target="<= 1.25",
            repeats=1,
            ours=by_texts[-1]["extra"],
            theirs=by_texts[0]["extra"],
            unit="MiB",
            n=f"{counts[-1]} texts × 256 tokens",
            note=f"memory flat in the number of texts; {figure}",
        ),
        Row(
            **_about(
                quick, name="fused scan: extra memory per token", against=f"the same at {long[-2]['length']:,} tokens"
            ),
            ratio=per_token[-1] / per_token[-2],
            target="<= 1.25",
            repeats=1,
            ours=per_token[-1] * 1024,
            theirs=per_token[-2] * 1024,
            unit="KiB",
            n=f"one text of {long[-1]['length']:,} tokens",
            note="no (query, key) matrix: a token costs the same in a longer text; " + figure,
        ),
    ]


def growth_figure(points: list[dict[str, Any]]) -> Any:
    """Four panels: seconds and MiB against length, and against the number of texts."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    from interp.plotting import PALETTE, template

    drawn = make_subplots(2, 2, subplot_titles=["one text, by length", "texts of 256 tokens, by number", "", ""])
    panels = [(1, "seconds", "seconds"), (2, "extra", "extra peak memory [MiB]")]
    for row, key, label in panels:
        for engine, color in (("fused", PALETTE[0]), ("eager", PALETTE[1])):
            for column, by, x in ((1, "length", "length"), (2, "texts", "n_texts")):
                here = [point for point in points if point["by"] == by and point["engine"] == engine]
                if here:
                    drawn.add_trace(
                        go.Scatter(
                            x=[point[x] for point in here],
                            y=[point[key] for point in here],
                            mode="lines+markers",
                            name=engine,
                            legendgroup=engine,
                            showlegend=row == 1 and column == 1,
                            line={"color": color},
                        ),
                        row,
                        column,
                    )
        drawn.update_yaxes(type="log", title_text=label, row=row)
    drawn.update_yaxes(type="linear", rangemode="tozero", row=2, col=2)  # flat should look flat
    drawn.update_xaxes(type="log", title_text="tokens in the text", col=1)
    drawn.update_xaxes(type="log", title_text="texts", col=2)
    drawn.update_layout(
        template=template(), title_text="Scanning for sinks: how time and memory grow (embedded model)", height=700
    )
    return drawn


def scan_in_memory(n_texts: int, length: int, engine: str) -> Callable[[], dict[str, float]]:
    """For `memory`: one scan, and the seconds it took."""
    from interp.sinks import scan

    model = embedded()
    texts = standard_library_texts(model, n_texts, length)
    scan(model, [texts[0][:16]], engine=engine, progress=False)

    def call() -> dict[str, float]:
        start = time.perf_counter()
        kept = scan(model, texts, engine=engine, progress=False)
        del kept
        return {"seconds": time.perf_counter() - start}

    return call


def ours_in_memory(n_texts: int) -> Callable[[], Any]:
    """For `memory`: our scan."""
    return scan_in_memory(n_texts, 256, "fused")


def hugging_in_memory(n_texts: int) -> Callable[[], None]:
    """For `memory`: Hugging Face's patterns."""
    model = embedded()
    texts = standard_library_texts(model, n_texts, 256)
    hugging_face_masses(model, [texts[0][:16]])

    def call() -> None:
        kept = hugging_face_masses(model, texts)
        del kept

    return call


def lens_in_memory(n_texts: int) -> Callable[[], None]:
    """For `memory`: TransformerLens' cache."""
    from interp.adapters.transformer_lens import to_transformer_lens

    model = embedded()
    texts = standard_library_texts(model, n_texts, 256)
    bridge = to_transformer_lens(model, copy=False)
    lens_masses(bridge, [texts[0][:16]])

    def call() -> None:
        kept = lens_masses(bridge, texts)
        del kept

    return call
