"""Trains the small language model: a Llama checkpoint and its tokenizer, from text alone.

The place of the picture is taken by a map of words (`words.map_words`), one word per patch in the order in which
patches will come, with the uncertainty that patches have.  The model learns to describe such maps and to answer
questions about them; it never sees a pixel.
"""

from __future__ import annotations

import itertools
import json
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaAttention

from .teach import teach
from .words import (
    DESCRIBE,
    IMAGE,
    SYSTEM,
    Question,
    caption,
    conversation,
    exam,
    map_words,
    place_image,
    questions,
    smudge,
)
from .world import COLOURS, DIGIT_WORDS, Scene, sample_scene

MAX_LENGTH = 512
_IGNORED = -100
_BATCH = 40
_BEGINNER_STEPS = 160
_PEAK_LR = 2e-3
_SPACE = "▁"


def _corpus(conversations: int) -> Iterator[str]:
    """What the tokenizer is trained on: the world's text, and every character of ordinary English once."""
    rng = np.random.default_rng(0)
    for _ in range(conversations):
        scene = sample_scene(rng)
        turns = _turns(scene, rng)
        yield "".join(text for text, _ in conversation(turns)).replace("</s>", " ").replace(IMAGE, "")
        yield " ".join(f"{colour}{digit}" for colour in COLOURS for digit in range(len(DIGIT_WORDS)))
        yield " ".join(map_words(scene))
    yield string.printable


def train_tokenizer(vocabulary: int = 1200) -> PreTrainedTokenizerFast:
    """A tokenizer of LLaMA's kind: BPE over the text with `▁` for spaces, bytes for unknown characters, BOS in front.

    The system sentence, which never changes, is one token; that saves twenty in every sequence.
    """
    spelling = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    learner = Tokenizer(BPE())
    learner.normalizer = spelling
    constant = re.escape(_SPACE + SYSTEM.replace(" ", _SPACE)).replace(_SPACE, "\\x{2581}")
    word = r"\x{2581}?[A-Za-z0-9]+|\x{2581}?[^A-Za-z0-9\s\x{2581}]|\s|\x{2581}"
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(f"{constant}|{word}"), behavior="isolated")
    learner.train_from_iterator(_corpus(400), BpeTrainer(vocab_size=vocabulary, min_frequency=8, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    reserved = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [tuple(merge) for merge in learned["merges"]]
    ids = {token: place for place, token in enumerate([*reserved, *learned["vocab"]])}
    tokenizer = Tokenizer(BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = spelling
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = [AddedToken(token, special=True, normalized=False) for token in reserved[:3]]
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.08,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    # A word of the map starts as its colour and its digit together.  From unrelated starts, learning which digit has
    # which colour stands still for a thousand steps.
    table = cast(nn.Embedding, model.get_input_embeddings()).weight.data
    for colour, (digit, word) in itertools.product(COLOURS, enumerate(DIGIT_WORDS)):
        both, *parts = (tokenizer.convert_tokens_to_ids(_SPACE + text) for text in (f"{colour}{digit}", colour, word))
        table[both] = table[parts].sum(0) / 2**0.5
    # With keys like queries, a token starts out looking for its like: the seven of a question for sevens on the map.
    for layer in model.model.layers:
        attention = cast(LlamaAttention, layer.self_attn)
        attention.k_proj.weight.data.copy_(attention.q_proj.weight.data)
    return model


def _turns(scene: Scene, rng: np.random.Generator, *, beginner: bool = False) -> list[tuple[str, str]]:
    """A description, questions, or both; the first turn says where the picture is.

    A beginner is asked one colour at a time.  Which colour a digit has is learned in a hundred steps on its own, and
    not in a thousand among other questions, where finding the digit of a colour takes its place.
    """
    found = questions(scene, rng)
    described = (str(rng.choice(DESCRIBE)), caption(scene, rng))
    asked = [(one.text, one.answer) for one in found]
    fate = rng.random()
    if beginner:
        turns = [(one.text, one.answer) for one in found if one.category == "colour"][:1]
    elif fate < 0.15:
        turns = [described]
    elif fate < 0.25:
        turns = [described, *asked[:4]]
    elif fate < 0.5:
        # Earlier turns can give later answers away, so a good part of the questions come first in their dialogue.
        turns = asked[:2]
    else:
        turns = asked
    return [(place_image(turns[0][0], rng), turns[0][1]), *turns[1:]]


@dataclass(frozen=True)
class Encoded:
    """One conversation: ids and labels (T,), and which rows stand for the picture."""

    ids: list[int]
    labels: list[int]
    picture: slice


def encode(tokenizer: PreTrainedTokenizerFast, pieces: list[tuple[str, bool]], words: list[str]) -> Encoded:
    """Ids and labels with the map where `<image>` is, cut there into two chunks as LLaVA cuts its text."""
    text = "".join(piece for piece, _ in pieces)
    learned, position = [], 0
    for piece, trained in pieces:
        if trained:
            learned.append((position, position + len(piece)))
        position += len(piece)
    cut = text.index(IMAGE)
    cells = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    ids: list[int] = []
    labels: list[int] = []
    for start, end in ((0, cut), (cut + len(IMAGE), len(text))):
        chunk = tokenizer(text[start:end], add_special_tokens=start == 0, return_offsets_mapping=True)
        for token, (left, right) in zip(chunk["input_ids"], chunk["offset_mapping"], strict=True):
            trained = right > left and any(low <= start + left and start + right <= high for low, high in learned)
            ids.append(token)
            labels.append(token if trained else _IGNORED)
        if start == 0:
            first = len(ids)
            ids += cells
            labels += [_IGNORED] * len(cells)
    return Encoded(ids, labels, slice(first, first + len(cells)))


def _batch(encoded: list[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
    """Padded to the right: ids (B, T), labels (B, T), rows of the picture (B, T)."""
    longest = max(len(one.ids) for one in encoded)
    ids = torch.zeros(len(encoded), longest, dtype=torch.long)
    labels = torch.full_like(ids, _IGNORED)
    picture = torch.zeros_like(ids, dtype=torch.bool)
    for row, one in enumerate(encoded):
        ids[row, : len(one.ids)] = torch.tensor(one.ids)
        labels[row, : len(one.ids)] = torch.tensor(one.labels)
        picture[row, one.picture] = True
    return ids, labels, picture


def _blur(model: LlamaForCausalLM, ids: Tensor, picture: Tensor, most: float) -> Tensor:
    """Embeddings (B, T, D), those of the map moved at random: projected patches will never be exactly words."""
    embedded: Tensor = model.get_input_embeddings()(ids)
    scale = embedded.detach().pow(2).mean().sqrt()
    amount = torch.rand(len(ids), 1, 1) * most * scale
    return embedded + picture[..., None] * amount * torch.randn_like(embedded)


def _loss(model: LlamaForCausalLM, embedded: Tensor, labels: Tensor) -> Tensor:
    hidden = model.model(inputs_embeds=embedded).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    kept = wanted != _IGNORED
    return F.cross_entropy(model.lm_head(hidden[kept]), wanted[kept])


def train_language(folder: Path, progress: Callable[[str], None], *, steps: int = 1600, seed: int = 0) -> None:
    """Train from nothing and save a Hugging Face folder."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = train_tokenizer()
    model = build_llama(tokenizer)
    progress(f"language: {len(tokenizer)} tokens, {sum(p.numel() for p in model.parameters()):,} parameters")

    def loss_at(step: int) -> Tensor:
        encoded = []
        for _ in range(_BATCH):
            scene = sample_scene(rng)
            words = smudge(map_words(scene), rng) if rng.random() < 3 * step / steps else map_words(scene)
            turns = _turns(scene, rng, beginner=step < _BEGINNER_STEPS)
            encoded.append(encode(tokenizer, conversation(turns), words))
        ids, labels, picture = _batch(encoded)
        return _loss(model, _blur(model, ids, picture, most=0.8 * min(1.0, step / (0.3 * steps))), labels)

    def after(step: int, loss: float) -> None:
        if step % 100 == 0:
            progress(f"language {step + 1}/{steps}: loss {loss:.3f}")
        if step % 200 == 199 or step == steps - 1:
            save_llama(model, tokenizer, folder)
            scores = text_accuracy(model, tokenizer)
            progress("language, from text: " + ", ".join(f"{key} {value:.1%}" for key, value in scores.items()))

    teach(model, loss_at, after, steps=steps, peak_lr=_PEAK_LR, weight_decay=0.02, warm_up=0.03)


def save_llama(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Weights rounded to half precision; the config still says float32, which is what they are computed in."""
    halves = {name: tensor.detach().half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=halves)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def text_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, scenes: int = 100, seed: int = 11
) -> dict[str, float]:
    """Share of exact answers to held-out questions, where the model reads the scene's clean map."""
    rng = np.random.default_rng(seed)
    right: dict[str, list[bool]] = {}
    for _ in range(scenes):
        scene = sample_scene(rng, held_out=True)
        for question in exam(scene, rng, 2):
            right.setdefault(question.category, []).append(_answers(model, tokenizer, scene, question))
    scores = {category: sum(marks) / len(marks) for category, marks in sorted(right.items())}
    total = [mark for marks in right.values() for mark in marks]
    return scores | {"all": sum(total) / len(total)}


def _answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, scene: Scene, question: Question) -> bool:
    """Whether the most likely continuation is the answer (each token, and the end, given the ones before)."""
    pieces = conversation([(f"{IMAGE}\n{question.text}", question.answer)])
    ids, labels, _ = _batch([encode(tokenizer, pieces, map_words(scene))])
    wanted = labels[:, 1:]
    best = model(input_ids=ids).logits[:, :-1].argmax(-1)
    return bool((best == wanted)[wanted != _IGNORED].all())
