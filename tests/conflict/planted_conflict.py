"""A conflict circuit written by hand into a tiny llama: one head decides whose rule is obeyed; all else is small and random.

Words are tokens; their embeddings are directions:

    SYS-YES  SYS-NO       rules of the system turn       "weak key",   and what they ask for: +ask (yes) or −ask (no)
    ALSO-YES ALSO-NO      user rules that agree          no key
    FOR-YES  FOR-NO       the same in other words        no key
    BUT-YES  BUT-NO       user rules that contradict     "strong key", +ask or −ask
    <assistant>           the last token of a prompt     "query"

The deciding head, at a (layer, head) of choice, has W_Q: query → a dimension that rotary embedding leaves alone, W_K: weak and
strong keys → the same dimension, W_V and W_O: ask → answer. So at the last token it reads the system's rule where nobody
contradicts and the user's where somebody does, and writes what that rule asks for; the LM head reads it: +answer is YES, −answer
is NO.

A decoy has the same W_Q and W_K and no W_O: its attention drifts as much, and nothing depends on it.
"""

from __future__ import annotations

from typing import Any

import torch

from interp.conflict.dialogues import Turn
from interp.conflict.pairs import Pair
from interp.conflict.verifiers import Verdict
from interp.conflict.wordings import Task

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKS = ["<pad>", "<system>", "<user>", "<end>", "<assistant>"]
RULES = [f"{kind}-{what}" for kind in ("SYS", "ALSO", "FOR", "BUT") for what in ("YES", "NO")]
WORDS = [f"word{number}" for number in range(12)]
VOCAB = [*MARKS, *RULES, "YES", "NO", *WORDS]
D_MODEL, N_HEADS, D_HEAD = 48, 4, 12
# Dimensions of the residual stream.
ASK, WEAK, STRONG, QUERY, ANSWER, FILL = 0, 1, 2, 3, 4, 5
# Half-split rotary embedding turns dimension 5 of 12 by 1e12 ** (-10 / 12) per token: not at all.
STILL = D_HEAD // 2 - 1


class Planted:
    """The family of rules: the answer says YES, or it says NO."""

    name = "planted"
    rules = ("yes", "no")

    def verify(self, rule: str, answer: str, finished: bool = True) -> Verdict:
        return Verdict(answer.split()[:1] == [rule.upper()], answer)

    def rewrite(self, rule: str, answer: str) -> str | None:
        return rule.upper()


def planted_pairs(n: int = 8) -> list[Pair]:
    """Pairs of `n` tasks, either rule in the system turn."""
    return [_pair(number, *rules) for number in range(n) for rules in (("yes", "no"), ("no", "yes"))]


def _pair(number: int, system_rule: str, user_rule: str) -> Pair:
    some = [WORDS[(number * step + step) % len(WORDS)] for step in range(1, 2 + number % 4)]
    task = Task(f"task-{number}", "localisation", " ".join(some))
    ours, theirs = system_rule.upper(), user_rule.upper()

    def asked(system: str | None, user: str | None) -> tuple[Turn, ...]:
        rule = () if user is None else (("other", " "), ("user_rule", user))
        turn = Turn("user", (("task", task.text), *rule))
        return (turn,) if system is None else (Turn("system", (("system_rule", system),)), turn)

    prompts = {
        "none": asked(None, None),
        "system": asked(f"SYS-{ours}", None),
        "user": asked(None, f"ALSO-{ours}"),
        "agree": asked(f"SYS-{ours}", f"ALSO-{ours}"),
        "paraphrase": asked(f"SYS-{ours}", f"FOR-{ours}"),
        "conflict": asked(f"SYS-{ours}", f"BUT-{theirs}"),
    }
    return Pair(f"{task.id}/{system_rule}", "planted", system_rule, user_rule, "simple", "user", task, prompts)


def planted_model(
    layer: int, head: int, *, n_layers: int = 3, decoy: tuple[int, int] | None = None, seed: int = 0
) -> Any:
    """A llama whose head (layer, head) decides.

    Args:
        layer, head: where it sits.
        n_layers: of the model.
        decoy: a (layer, head) that attends alike and writes nothing.
        seed: of everything else.
    """
    import transformers

    from interp.model import load_model

    config = transformers.LlamaConfig(
        hidden_size=D_MODEL,
        intermediate_size=16,
        num_hidden_layers=n_layers,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS,
        vocab_size=len(VOCAB),
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=VOCAB.index("<end>"),
    )
    torch.manual_seed(seed)
    hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.02)
        _write_embeddings(hf.model.embed_tokens.weight)
        for token, sign in (("YES", 1), ("NO", -1)):
            hf.lm_head.weight[VOCAB.index(token), ANSWER] = 1.0 * sign
        _write_head(hf.model.layers[layer].self_attn, head, 1.0)
        if decoy is not None:
            _write_head(hf.model.layers[decoy[0]].self_attn, decoy[1], 0.0)
    return load_model(hf, planted_tokenizer())


def _write_embeddings(table: torch.Tensor) -> None:
    for at, token in enumerate(VOCAB):
        table[at, FILL:] += torch.randn(D_MODEL - FILL) * 0.5
        if token in RULES:
            kind, what = token.split("-")
            table[at, ASK] = 4.0 if what == "YES" else -4.0
            table[at, WEAK] = 4.0 * (kind == "SYS")
            table[at, STRONG] = 4.0 * (kind == "BUT")
        table[at, QUERY] = 4.0 * (token == "<assistant>")
        table[at] *= D_MODEL**0.5 / table[at].norm()  # then RMSNorm leaves it as it is


def _write_head(attention: Any, head: int, strength: float) -> None:
    ours = slice(head * D_HEAD, (head + 1) * D_HEAD)
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.weight[ours] = 0
    attention.o_proj.weight[:, ours] = 0
    attention.q_proj.weight[ours][STILL, QUERY] = 2.0
    attention.k_proj.weight[ours][STILL, WEAK] = 1.0
    attention.k_proj.weight[ours][STILL, STRONG] = 2.0
    attention.v_proj.weight[ours][0, ASK] = 1.0
    attention.o_proj.weight[:, ours][ANSWER, 0] = strength


def planted_tokenizer() -> Any:
    """One token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(VOCAB)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<pad>")
    fast.chat_template = TEMPLATE
    return fast
