"""Conflict: who wins when system and user disagree, which layers settle it, and can those layers alone be trained to obey."""

from importlib import import_module
from typing import Any

_NAMES = {
    "Pair": "pairs",
    "make_pairs": "pairs",
    "encode_pair": "pairs",
    "Turn": "dialogues",
    "encode_dialogue": "dialogues",
    "TEMPLATES": "dialogues",
    "family": "verifiers",
    "family_names": "verifiers",
    "register": "wordings",
    "follow": "answers",
    "follow_summary": "follow_summaries",
    "followed_rules": "follow_summaries",
    "followed_families": "follow_summaries",
    "obedience_change": "follow_summaries",
    "generate_answers": "answers",
    "cras": "adherence",
    "queries_from_follow": "adherence",
    "cras_summary": "cras_summaries",
    "RoleQuery": "judges",
    "RuleJudge": "judges",
    "LocalJudge": "local_judge",
    "ApiJudge": "api_judge",
    "compare_judges": "judge_agreement",
    "localize": "localization",
    "head_scores": "focal",
    "layer_scores": "focal",
    "focal_heads": "focal",
    "focal_layers": "focal",
    "stability": "focal_checks",
    "middle_layers": "focal_checks",
    "make_contrasts": "contrasts",
    "patch": "patching",
    "recovery": "recoveries",
    "restoring_layers": "recoveries",
    "agreement_with_drift": "recoveries",
    "thirds": "recoveries",
    "ablate_heads": "head_ablation",
    "ablation_summary": "head_ablation",
    "make_preferences": "preferences",
    "balanced": "preference_table",
    "align": "aligning",
    "arms": "layer_arms",
    "adapted": "adapters",
    "load_adapter": "adapters",
    "read_tasks": "wordings",
}
# Whose further functions are reached as `interp.conflict.wordings.rule_texts`.
_MODULES = ("answers", "dialogues", "pairs", "plots", "verifiers", "wordings")
__all__ = [*_NAMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"interp.conflict.{name}")
    if name in _NAMES:
        return getattr(import_module(f"interp.conflict.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'interp.conflict' has no attribute {name!r}")
