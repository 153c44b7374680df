"""Language models: any decoder that transformers' ``AutoModelForCausalLM`` knows, by hub name or local folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from llava_kit import adapters, hookimpl
from llava_kit.contracts import FinishReason, GenerateOptions, Generation, LoraOptions, Unsupported, is_meta_build
from llava_kit.errors import ModelError, Problem, ResourceError
from llava_kit.splice import has_hooks
from llava_kit.weights import find_model_folder, safetensors_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llava_kit.hookspecs import Register

WHERE = "model.language_model"


@dataclass(frozen=True, kw_only=True)
class CausalLmConfig:
    """Which model, from where."""

    model: str
    """A hub name (``owner/name``), or a local folder (an existing one, or a path that starts with ``.`` or ``/``)."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    architecture: dict[str, Any] | None = None
    """What the model's config.json says, so that a plan can be made before it is fetched; held to it when loading."""
    attention: str | None = None
    """Attention implementation in transformers' terms (``sdpa``, ``flash_attention_2``, …); its own choice if unset."""
    quantize: Literal["nf4"] | None = None
    """Keep the linear layers in four bits, for adapters to be trained beside them (QLoRA); needs a GPU."""

    def tiny(self, folder: Path) -> CausalLmConfig:
        """A random two-layer model of width 64 of the same architecture, with a character-level tokenizer."""
        target = folder / "language_model"
        known = self.architecture or {}
        if not known.get("model_type"):
            local = find_model_folder(self.model, self.revision, WHERE, offline=True)
            known = {"model_type": "llama"} if local is None else _read_config(local).to_dict()
        _write_tiny_checkpoint(known["model_type"], target)
        return replace(self, model=str(target), revision=None, architecture=None, quantize=None)

    @classmethod
    def from_hf(cls, folder: Path) -> CausalLmConfig | Unsupported:
        """For every architecture that transformers has a causal language model of."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        config = _read_config(folder)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            return Unsupported(f"transformers has no causal language model of type '{config.model_type}'")
        return cls(model=str(folder))


class CausalLanguageModel(nn.Module):
    """A transformers decoder behind the language model contract."""

    def __init__(self, lm: PreTrainedModel, folder: Path | None) -> None:
        super().__init__()
        self.lm = lm
        self.embed_dim: int = cast(Tensor, lm.get_input_embeddings().weight).shape[1]
        self._folder = folder

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's own tokenizer, read when first asked for."""
        from transformers import AutoTokenizer

        if self._folder is None:
            raise ModelError(Problem(f"{WHERE}.model", "the tokenizer is not here yet", "it comes with the weights"))
        try:
            tokenizer = AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(Problem(str(self._folder), f"the tokenizer cannot be read: {_line(error)}")) from error
        if not tokenizer.is_fast:
            raise ModelError(Problem(str(self._folder), "the tokenizer gives no character offsets", "use a fast one"))
        return cast("PreTrainedTokenizerBase", tokenizer)

    def embed(self, ids: Tensor) -> Tensor:
        """The model's own embedding layer, with whatever scaling or adapter it has."""
        return cast(Tensor, self.lm.get_input_embeddings()(ids))

    def embedding_table(self) -> Tensor | None:
        """The weight of a plain ``nn.Embedding``; ``None`` for scaled, adapted or hooked ones."""
        layer = self.lm.get_input_embeddings()
        return layer.weight if type(layer) is nn.Embedding and not has_hooks(layer) else None

    def hidden(self, embeds_BTD: Tensor) -> Tensor:
        """``[B, T, D] -> [B, T, D]``."""
        out = self.lm.base_model(inputs_embeds=embeds_BTD, use_cache=False)
        return cast(Tensor, out.last_hidden_state)

    def logits(self, hidden_LD: Tensor) -> Tensor:
        """The head with what the architecture does to its output."""
        logits_LV = cast(Tensor, self.lm.get_output_embeddings()(hidden_LD))
        config: Any = self.lm.config
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits_LV = logits_LV * scale
        if scaling := getattr(config, "logits_scaling", None):  # Granite
            logits_LV = logits_LV / scaling
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
            logits_LV = torch.tanh(logits_LV / cap) * cap
        return logits_LV

    def to_hf(self) -> tuple[dict[str, Any], dict[str, Tensor]] | Unsupported:
        """The checkpoint as it was read, or as it was trained; a tied head is left out."""
        if getattr(self.lm, "is_quantized", False):
            return Unsupported("its weights are quantized; load it with quantize=null")
        tensors = dict(self.lm.state_dict())
        for name in getattr(self.lm, "all_tied_weights_keys", {}):
            tensors.pop(name, None)
        ends = sorted(self._end_ids())
        return self.lm.config.to_dict() | {"eos_token_id": ends[0] if len(ends) == 1 else ends or None}, tensors

    def gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute activations of every layer in the backward pass, or keep them."""
        lm: Any = self.lm
        new_name = hasattr(lm, "activation_checkpointing_enable")  # transformers renamed them after 5.17
        switch = "activation_checkpointing" if new_name else "gradient_checkpointing"
        if enabled:
            getattr(lm, f"{switch}_enable")({"use_reentrant": False})
        else:
            getattr(lm, f"{switch}_disable")()

    def add_lora(self, options: LoraOptions) -> None:
        """Adapters beside the linear layers of the decoder."""
        adapters.add_lora(self.lm, options, head=self.lm.get_output_embeddings())

    def merge_lora(self) -> None:
        """What adapters have learned becomes part of the weights."""
        adapters.merge_lora(self.lm)

    @torch.no_grad()
    def generate(self, embeds_BTD: Tensor, mask_BT: Tensor, options: GenerateOptions, cache: Any = None) -> Generation:
        """Token by token with a key-value cache.

        transformers' own ``generate`` numbers positions wrongly when embeddings meet a warm cache (seen with 5.23),
        so the loop is here.
        """
        from transformers import DynamicCache

        cache = DynamicCache(config=self.lm.config) if cache is None else cache
        picker = _Picker(options, self.tokenizer, self._end_ids(), mask_BT.shape[0], embeds_BTD.device)
        position_BT = (mask_BT.long().cumsum(1) - 1).clamp(min=0)[:, -embeds_BTD.shape[1] :]
        while True:
            out = self.lm.base_model(
                inputs_embeds=embeds_BTD,
                attention_mask=mask_BT,
                position_ids=position_BT,
                past_key_values=cache,
                use_cache=True,
            )
            ids_B = picker.pick(self.logits(out.last_hidden_state[:, -1]))
            if picker.done:
                return Generation(ids=picker.ids, finish_reason=picker.finish_reason, cache=cache)
            embeds_BTD = self.embed(ids_B[:, None])
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1)
            position_BT = position_BT[:, -1:] + 1

    def _end_ids(self) -> set[int]:
        declared = getattr(self.lm.generation_config, "eos_token_id", None)
        ends = declared if isinstance(declared, list) else [declared]
        return {i for i in [*ends, self.tokenizer.eos_token_id] if i is not None}


class _Picker:
    """Chooses the next token of every sequence and knows which are finished."""

    def __init__(
        self, options: GenerateOptions, tokenizer: PreTrainedTokenizerBase, ends: set[int], count: int, device: Any
    ) -> None:
        self.options, self.tokenizer, self.ends = options, tokenizer, ends
        self.ids: list[list[int]] = [[] for _ in range(count)]
        self.reasons: list[FinishReason | None] = [None] * count
        self.generator = torch.Generator(device).manual_seed(options.seed)

    @property
    def done(self) -> bool:
        return all(self.reasons)

    @property
    def finish_reason(self) -> list[FinishReason]:
        return [reason or "length" for reason in self.reasons]

    def pick(self, logits_BV: Tensor) -> Tensor:
        """Next ids, ``[B]``; finished sequences are fed anything, nobody reads it."""
        ids_B = logits_BV.argmax(-1) if self.options.temperature == 0 else self._sample(logits_BV.float())
        for row, token in enumerate(ids_B.tolist()):
            if self.reasons[row] is None:
                self._take(row, token)
        return ids_B

    def _take(self, row: int, token: int) -> None:
        if token in self.ends:
            self.reasons[row] = "stop"
            return
        self.ids[row].append(token)
        if self.options.stop and self._ends_in_stop(self.ids[row]):
            self.reasons[row] = "stop"
        elif len(self.ids[row]) >= self.options.max_new_tokens:
            self.reasons[row] = "length"

    def _ends_in_stop(self, ids: list[int]) -> bool:
        longest = max(len(text) for text in self.options.stop)
        tail = self.tokenizer.decode(ids[-(longest + 8) :])  # a token is at least a byte; a little room for prefixes
        return any(text in tail for text in self.options.stop)

    def _sample(self, logits_BV: Tensor) -> Tensor:
        probability_BV = (logits_BV / self.options.temperature).softmax(-1)
        if self.options.top_p < 1.0:
            sorted_BV, order_BV = probability_BV.sort(descending=True)
            before_BV = sorted_BV.cumsum(-1) - sorted_BV
            sorted_BV = sorted_BV.masked_fill(before_BV >= self.options.top_p, 0.0)
            probability_BV = torch.zeros_like(probability_BV).scatter_(-1, order_BV, sorted_BV)
        return torch.multinomial(probability_BV, 1, generator=self.generator)[:, 0]


def build_causal_lm(config: CausalLmConfig) -> CausalLanguageModel:
    """The model with its weights, in the checkpoint's dtype.

    Raises:
        ModelError: it cannot be found or read, or it is not what ``architecture`` says.
    """
    meta = is_meta_build()
    folder = find_model_folder(config.model, config.revision, WHERE, offline=meta)
    if meta:
        return CausalLanguageModel(_shapes_only(config, folder), folder)
    if folder is None:
        raise ModelError(Problem(f"{WHERE}.model", f"'{config.model}' was not found"))
    _hold_to(config.architecture, _read_config(folder), folder)
    return CausalLanguageModel(_load(safetensors_folder(folder), config), folder)


def _shapes_only(config: CausalLmConfig, folder: Path | None) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    if folder is not None:
        found = _read_config(folder)
        _hold_to(config.architecture, found, folder)
    elif config.architecture and "model_type" in config.architecture:
        known = dict(config.architecture)
        found = AutoConfig.for_model(known.pop("model_type"), **known)
    else:
        what = f"'{config.model}' is not on this machine, so its sizes are unknown"
        hint = "state them under model.language_model.architecture, or fetch it first"
        raise ModelError(Problem(f"{WHERE}.model", what, hint))
    return cast("PreTrainedModel", AutoModelForCausalLM.from_config(found, attn_implementation=config.attention))


def _load(folder: Path, config: CausalLmConfig) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        lm, info = cast(Any, AutoModelForCausalLM).from_pretrained(
            folder,
            dtype="auto",
            attn_implementation=config.attention,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **(_four_bits() if config.quantize else {}),
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(Problem(str(folder), f"the model cannot be read: {_line(error)}")) from error
    problems = [Problem(str(folder), f"the weights lack '{key}'") for key in sorted(info["missing_keys"])]
    problems += [Problem(str(folder), f"'{m[0]}' has the wrong shape") for m in sorted(info["mismatched_keys"])]
    if problems:
        raise ModelError(problems)
    return cast("PreTrainedModel", lm)


def _four_bits() -> dict[str, Any]:
    """QLoRA's settings: NormalFloat, quantized constants, arithmetic in bf16.

    Raises:
        ResourceError: bitsandbytes or a GPU is missing.
    """
    where = f"{WHERE}.quantize"
    if find_spec("bitsandbytes") is None:
        what = "four bits need bitsandbytes, which is not installed"
        raise ResourceError(Problem(where, what, "pip install 'llava-kit[qlora]', or leave quantize out"))
    if not torch.cuda.is_available():
        raise ResourceError(Problem(where, "four bits need a GPU, and there is none", "leave quantize out"))
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": quantization}


def _read_config(folder: Path) -> PretrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return cast("PretrainedConfig", AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ModelError(Problem(str(folder / "config.json"), f"cannot be read: {_line(error)}")) from error


def _hold_to(declared: dict[str, Any] | None, found: PretrainedConfig, folder: Path) -> None:
    """Refuse a checkpoint that is not what the recipe says it is."""
    actual = found.to_dict()
    problems = [
        Problem(f"{WHERE}.architecture.{key}", f"the recipe says {value!r}, {folder} has {actual.get(key)!r}")
        for key, value in (declared or {}).items()
        if actual.get(key) != value
    ]
    if problems:
        raise ModelError(problems)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _write_tiny_checkpoint(model_type: str, folder: Path) -> None:
    """A random model of this architecture in the hub's format; sizes are small, everything else is the default."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = _tiny_tokenizer()
    config = AutoConfig.for_model(
        model_type,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tiny_tokenizer() -> Any:
    """Characters and bytes with LLaMA's prefix and special tokens, and ChatML's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    characters = ["▁", *map(chr, range(33, 127))]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


@hookimpl
def register_language_models(register: Register) -> None:
    """``causal_lm``"""
    register("causal_lm", build_causal_lm, CausalLmConfig)
