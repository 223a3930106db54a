"""Clamped greedy generation on the embedded model: `interp.clamp` and `Model.generate` against plain Hugging Face
(unclamped), a TransformerLens bridge with a hook, and nnsight with an edit at every step.

Same prompt, the same number of new tokens (the end token is switched off everywhere), KV cache on, one text. Each tool works
on its own copy of the model. Plain Hugging Face cannot clamp, so its text differs; the others must give the same tokens.

On one torch thread: a token is hundreds of small products, and two threads that share their cores with other programs wait
for each other longer than they compute, for every tool alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from tests.benchmarks.models import embedded
from tests.benchmarks.table import Row
from tests.benchmarks.timing import interleave, ratio_of

SUITE = "neurons"
PROMPT = "What is your favourite animal?"
LAYER, NEURON, VALUE = 27, 1510, -10.0


def run(quick: bool) -> list[Row]:
    """One row per rival."""
    from interp.intervene import clamp

    new, repeats = (16, 3) if quick else (32, 11)
    model = embedded()
    lens, sight = _lens(model), _sight(model)
    model.hf.generation_config.eos_token_id = None  # so that every tool makes the same number of tokens
    prompt = model.encode(PROMPT, chat=True)[0]
    ids = torch.tensor([prompt])

    def ours() -> list[int]:
        with clamp(model, layer=LAYER, neuron=NEURON, value=VALUE, site="hidden"):
            return model.generate_ids([prompt], max_new_tokens=new)[0]

    @torch.no_grad()
    def plain() -> list[int]:
        output = model.hf.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **_greedy(new))
        return output[0, len(prompt) :].tolist()

    cases: dict[str, Callable[[], list[int]]] = {
        "ours": ours,
        "Hugging Face, unclamped": plain,
        "TransformerLens": lambda: lens(ids, new),
        "nnsight": lambda: sight(ids, new),
    }
    said = {name: call() for name, call in cases.items()}
    wrong = [name for name, tokens in said.items() if len(tokens) != new]
    if wrong:
        raise RuntimeError(f"{wrong[0]} made {len(said[wrong[0]])} tokens, expected {new}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = interleave(cases, repeats)
    finally:
        torch.set_num_threads(threads)
    rows = []
    for rival, target in (("Hugging Face, unclamped", "<= 1.05"), ("TransformerLens", "< 1"), ("nnsight", "< 1")):
        same = sum(a == b for a, b in zip(said["ours"], said[rival], strict=True))
        if rival.startswith("Hugging Face"):
            note = f"unclamped; {same} of {new} tokens as ours by position"
        else:
            note = "clamped; the same tokens" if same == new else f"CLAMPED TEXT DIFFERS: {same} of {new} tokens agree"
        rows.append(
            Row(
                suite=SUITE,
                subject="generation",
                name="clamped greedy generation: time",
                against=rival,
                target=target,
                **ratio_of(times["ours"], times[rival]),
                n=f"{new} new tokens after {len(prompt)}, one torch thread",
                quick=quick,
                note=note,
            )
        )
    return rows


def _greedy(new: int) -> dict[str, Any]:
    none = {"temperature": None, "top_p": None, "top_k": None}
    return {"max_new_tokens": new, "do_sample": False, "use_cache": True, **none}


def _lens(model: Any) -> Callable[[Any, int], list[int]]:
    from interp.adapters.transformer_lens import to_transformer_lens

    bridge = to_transformer_lens(model)

    def set_neuron(value: Any, hook: Any) -> Any:
        value[:, :, NEURON] = VALUE
        return value

    @torch.no_grad()
    def call(ids: Any, new: int) -> list[int]:
        with bridge.hooks(fwd_hooks=[(f"blocks.{LAYER}.mlp.hook_post", set_neuron)]):
            output = bridge.generate(
                ids,
                max_new_tokens=new,
                do_sample=False,
                stop_at_eos=False,
                use_past_kv_cache=True,
                return_type="tokens",
                verbose=False,
            )
        return output[0, ids.shape[1] :].tolist()

    return call


def _sight(model: Any) -> Callable[[Any, int], list[int]]:
    from nnsight import TransformersModel

    hf = copy.deepcopy(model.hf)
    hf.generation_config.eos_token_id = None
    sight = TransformersModel(hf, task="text-generation", tokenizer=copy.deepcopy(model.tokenizer))

    @torch.no_grad()
    def call(ids: Any, new: int) -> list[int]:
        with sight.generate(ids, pad_token_id=0, **_greedy(new)) as tracer:
            for _ in tracer.iter[:new]:
                sight.model.layers[LAYER].mlp.down_proj.input[:, :, NEURON] = VALUE
            output = tracer.result.save()
        return output[0, ids.shape[1] :].tolist()

    return call
