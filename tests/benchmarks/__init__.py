"""Speed and memory against other tools, as ratios measured in one run: `python -m tests.benchmarks` (`make bench`).

    table.py       a row, the printed table, reports/bench.json
    timing.py      paired, interleaved timing; how a time grows
    memory.py      peak memory of one call in a fresh process
    models.py      the embedded model in memory of its own
    decoding.py    neurons: decode against the bare matrix products and TransformerLens
    checkpoint.py  neurons: one layer of Llama-3.1-8B's shape from disk
    generation.py  neurons: clamped generation against Hugging Face, TransformerLens and nnsight
    activations.py neurons: activation statistics against TransformerLens
    sink_scan.py   sinks: a scan against the plain forward pass, Hugging Face and TransformerLens; how it grows
    bigram_generator.py  sinks: the toy task's generator against a loop per character
    flow_solvers.py  flow: exact against networkx, igraph, OR-Tools and scipy, widest against Vico's form; long texts
    flow_growth.py flow: how every method's time grows with tokens and layers
    flow_graphs.py, flow_peers.py  the graphs of both, and the calls of the others
    attributions.py  agreement: leave-one-out, KernelSHAP, integrated gradients against captum; the default comparison's cost
    captum_peers.py  the calls of captum
    conflict_runs.py  conflict: drift against plain passes, the patching sweep against single passes, answers in batches
    imports.py     core: `import interp`, `interp --help`

A subject is a module with `SUITE` and `run(quick) -> list[Row]`; a new one is named in `__main__.SUBJECTS`. Nothing here
asserts a time: a target that is missed is a row that says so.
"""
