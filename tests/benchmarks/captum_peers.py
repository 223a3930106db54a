"""What captum alone computes for the examples of an `interp.agreement.Coalitions`, each with captum's documented calls.

Perturbations go through `LLMAttribution`, which explains log p of a string over the whole vocabulary, one example at a time and
one perturbed input at a time (`perturbations_per_eval` above 1 raises). A difference of two words' scores does not depend on
what p is normalised by: it is the score of the logit difference, for every method that is linear in the target.

Integrated gradients take a function of embeddings, here the logit difference at the last position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from captum.attr import IntegratedGradients, LLMAttribution, TextTokenInput
from torch import Tensor

from interp.agreement.coalitions import Coalitions
from interp.agreement.perturbations import draws_seed
from interp.agreement.prefix_tree import Prefix
from interp.model import set_seed


class PositionInput(TextTokenInput):
    """Captum's input of tokens, of which those at some positions are explained.

    `TextTokenInput` itself skips tokens by their ids, and a few-shot prompt shares ids with the text.

    Args:
        tokenizer: the model's.
        ids: the whole input.
        positions: which are explained.
        baseline: id of what replaces a token.
    """

    def __init__(self, tokenizer: Any, ids: Sequence[int], positions: Sequence[int], baseline: int) -> None:
        self.inp_tensor = torch.tensor([list(ids)])
        self.itp_mask = torch.zeros_like(self.inp_tensor, dtype=torch.bool)
        self.itp_mask[0, list(positions)] = True
        self.itp_tensor = self.inp_tensor[self.itp_mask][None]
        self.values = tokenizer.convert_ids_to_tokens(self.itp_tensor[0].tolist())
        self.n_itp_features = len(self.values)
        self.tokenizer, self.baselines, self.skip_tokens = tokenizer, baseline, None


@torch.no_grad()
def word_scores(
    coalitions: Coalitions, example: int, word: str, method: Any, seed: int | None = None, **options: Any
) -> np.ndarray:
    """(token) what a perturbation method says about log p(word).

    Args:
        coalitions: whose examples, model and baseline are used.
        example: which example.
        word: the explained string.
        method: captum's class, such as `FeatureAblation`.
        seed: for draws as `interp.agreement.perturbations` makes them, for its example 0.
        **options: of the method's `attribute`.
    """
    model, one = coalitions.model, coalitions.encoded[example]
    if seed is not None:
        set_seed(draws_seed(seed, 0))
    given = PositionInput(model.tokenizer, one.ids, one.positions, coalitions.baseline_id)
    explained = LLMAttribution(method(model.hf), model.tokenizer).attribute(
        given, target=word, perturbations_per_eval=1, **options
    )
    return explained.seq_attr.double().numpy()


def integrated_gradients(
    coalitions: Coalitions, example: int, n_steps: int, rows: int, prefix: Prefix | None = None
) -> np.ndarray:
    """(token) integrated gradients of the logit difference between the explained label word and the other.

    Args:
        coalitions: whose examples, model and baseline are used.
        example: which example.
        n_steps: of the integration.
        rows: captum's `internal_batch_size`.
        prefix: the example's first tokens, which do not pass through the model again; `None`: all do.
    """
    hf, one = coalitions.model.hf, coalitions.encoded[example]
    skip = len(prefix.ids) if prefix else 0
    words = coalitions.task.choices(coalitions.model)  # type: ignore[union-attr]
    wanted, other = words[coalitions.wanted[example][0]], words[coalitions.contrast[example][0]]

    def difference(embedded: Tensor) -> Tensor:
        past = prefix.cache(len(embedded)) if prefix else None
        logits = hf(inputs_embeds=embedded, past_key_values=past, use_cache=past is not None, logits_to_keep=1).logits
        return logits[:, -1, wanted] - logits[:, -1, other]

    ids = torch.tensor([one.ids])
    replaced = ids.clone()
    replaced[0, list(one.positions)] = coalitions.baseline_id
    with torch.no_grad():
        inputs, baselines = (hf.get_input_embeddings()(some[:, skip:]) for some in (ids, replaced))
    found = IntegratedGradients(difference).attribute(inputs, baselines, n_steps=n_steps, internal_batch_size=rows)
    return found.detach().sum(-1)[0, [at - skip for at in one.positions]].double().numpy()
