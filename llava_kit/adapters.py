"""Low-rank adapters in a language model, through peft (the extra ``lora``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import nn

from llava_kit.errors import ModelError, Problem, RecipeError, ResourceError

if TYPE_CHECKING:
    from llava_kit.contracts import LoraOptions


def add_lora(model: nn.Module, options: LoraOptions, *, head: nn.Module | None = None) -> None:
    """Put adapters beside the linear layers of ``model``, in place; those of a stage before are gone on with.

    Args:
        options: without targets, every linear layer but ``head`` gets one, as in LLaVA.

    Raises:
        ResourceError: peft is not installed.
        RecipeError: a target is no layer, or the model has adapters of other sizes.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        hint = "pip install 'llava-kit[lora]'"
        raise ResourceError(
            Problem("trainable.language_model", "adapters need peft, which is missing", hint)
        ) from error
    before = getattr(model, "lora_options", None)
    if before is not None:
        if before != options:
            what = f"the model has other adapters of an earlier stage already ({before})"
            raise RecipeError(Problem("lora", what, "give both stages the same"))
        return
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    known = sorted({name.rsplit(".", 1)[-1] for name, module in linear.items() if module is not head})
    unknown = [target for target in options.targets if not any(_is_target(target, name) for name in linear)]
    if unknown or not known:
        shown = ", ".join(unknown) or "the model"
        what = f"{shown}: no linear layer of that name"
        raise RecipeError(Problem("lora.targets", what, f"there is {', '.join(known) or 'none'}"))
    config = LoraConfig(
        r=options.r,
        lora_alpha=cast(int, options.alpha),  # a number in truth
        lora_dropout=options.dropout,
        target_modules=list(options.targets) or known,
        bias="none",
    )
    on_meta = next(model.parameters()).device.type == "meta"
    inject_adapter_in_model(config, model, low_cpu_mem_usage=on_meta)
    cast(Any, model).lora_options = options


def _is_target(target: str, name: str) -> bool:
    """A target is a layer's whole name or the end of it, as in peft."""
    return name == target or name.endswith(f".{target}")


def merge_lora(model: nn.Module) -> None:
    """Add what the adapters have learned to the weights beside them, and take the adapters away.

    Raises:
        ModelError: a sum is not finite.
    """
    if getattr(model, "lora_options", None) is None:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        layer: Any = module
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise ModelError(Problem(f"language_model.{name}", f"its adapter cannot be merged: {error}")) from error
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    cast(Any, model).lora_options = None
