"""Short forms that a recipe may use, and what they stand for."""

from __future__ import annotations

from dataclasses import replace

from llava_kit.recipe_yaml import Node

LORA = "*.lora_*"
"""Pattern of the names that adapters' parameters have."""
ORIGINAL = ("no_clipping", "micro_batch_mean", "mismatch")
"""What a recipe may have as in the original's code, though it is not what is meant."""
_PATTERNS = {"all": "*", "lora": LORA}


def spell_share(node: Node) -> Node:
    """``all`` as nothing."""
    return replace(node, value=None) if node.value == "all" else node


def spell_trainable(node: Node) -> Node:
    """``[connector]`` and ``{connector: all}`` as ``{connector: ["*"]}``, and ``lora`` as the pattern of adapters."""
    entries = node.value
    if isinstance(entries, list) and all(isinstance(item.value, str) for item in entries):
        entries = {item.value: replace(item, value="all") for item in entries}
    if not isinstance(entries, dict):
        return node
    spelt = {
        key: Node([Node(_PATTERNS[one.value], one.where)], one.where)
        for key, one in entries.items()
        if isinstance(one.value, str) and one.value in _PATTERNS
    }
    return replace(node, value=entries | spelt)


def spell_compatibility(node: Node) -> Node:
    """``original`` as a list of everything it means."""
    if node.value != "original":
        return node
    return replace(node, value=[Node(name, node.where) for name in ORIGINAL])
