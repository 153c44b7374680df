"""Conversation templates: how LLaVA and its relatives write a conversation, and what of it they learn.

Each one renders exactly the text that the original trains on, so ids and labels agree with it.  A prompt (``reply``)
is always a prefix of the training text: what the model meets in use is what it has learned to continue.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_kit import hookimpl
from llava_kit.contracts import ImageSlot, Segment, Turn

if TYPE_CHECKING:
    from llava_kit.hookspecs import Register

HUMAN_ASSISTANT = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
USER_ASSISTANT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VISION_ASSISTANT = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
SAFE_ASSISTANT = (
    "You are a helpful, respectful and honest assistant. "
    "Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, "
    "explain why instead of answering something not correct. "
    "If you don't know the answer to a question, please don't share false information."
)
MPT_ASSISTANT = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)


# --- what templates have in common -----------------------------------------------------------------------------------


def control(text: str, trained: bool = False) -> Segment:
    """Text of the template itself; special tokens in it mean what they say."""
    return Segment(kind="control", text=text, trained=trained)


def literal(text: str, trained: bool = False) -> Segment:
    """Somebody's words, whatever they look like."""
    return Segment(kind="text", text=text, trained=trained)


def content(turn: Turn) -> list[Segment]:
    """A human's turn: words and images in their order."""
    return [Segment(kind="image") if isinstance(part, ImageSlot) else literal(part) for part in turn.parts]


def check_turns(turns: Sequence[Turn], reply: bool) -> None:
    """Refuse what no template can write.

    Raises:
        ValueError: turns do not alternate from a human's on, do not end as ``reply`` needs, or answer with an image.
    """
    if not turns:
        raise ValueError("the conversation has no turns")
    for number, turn in enumerate(turns, start=1):
        expected = "human" if number % 2 else "assistant"
        if turn.role != expected:
            raise ValueError(f"turn {number} should be the {expected}'s, but it is the {turn.role}'s")
        if turn.role == "assistant" and any(isinstance(part, ImageSlot) for part in turn.parts):
            raise ValueError(f"turn {number} is an answer and holds an image")
    if reply != (turns[-1].role == "human"):
        raise ValueError(
            "an answer is asked for, but the last turn is one" if reply else "the last question has no answer"
        )


SAID = (
    "{% macro said(message) %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)
"""What a message says in Jinja: a string, or words and images, each of which has a line of its own."""


def in_jinja(start: str, user: str, assistant: str, end: str = "") -> str:
    """A chat template: ``start``, then each message in the form of its role (Jinja expressions that call ``said``)."""
    each = f"{{% if message['role'] == 'user' %}}{{{{ {user} }}}}{{% else %}}{{{{ {assistant} }}}}{{% endif %}}"
    loop = f"{{% for message in messages %}}{each}{{% endfor %}}"
    closing = f"{{% if add_generation_prompt %}}{{{{ {quoted(end)} }}}}{{% endif %}}" if end else ""
    return f"{SAID}{{{{ {quoted(start)} }}}}{loop}{closing}"


def quoted(text: str) -> str:
    """As a string of Jinja's."""
    return json.dumps(text, ensure_ascii=False)


# --- plain: the caption after the image, LLaVA's stage one since v1.0 ------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PlainConfig:
    """``plain`` has nothing to set."""


class Plain:
    """The image and its caption; the human's words are left out."""

    stop = ("\n",)

    def __init__(self, config: PlainConfig) -> None:
        self.config = config

    def render(self, turns: Sequence[Turn], reply: bool) -> list[Segment]:
        check_turns(turns, reply)
        if len(turns) != (1 if reply else 2):
            raise ValueError(f"'plain' writes one question and its answer, but there are {len(turns)} turns")
        images = [segment for segment in content(turns[0]) if segment.kind == "image"]
        if not images:
            raise ValueError("'plain' leaves out the question's words, and this question has no image")
        if reply:
            return images
        return [*images, literal(turns[1].text, trained=True), control("\n", trained=True)]

    def required_tokens(self) -> tuple[str, ...]:
        return ()


# --- vicuna: USER: … ASSISTANT: …</s> --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class VicunaConfig:
    system: str = USER_ASSISTANT
    end: str = "</s>"
    """Special token that ends an answer; for models outside the LLaMA family, their own."""


@dataclass(frozen=True, kw_only=True)
class LlavaV1Config(VicunaConfig):
    system: str = HUMAN_ASSISTANT


class Vicuna:
    """``system USER: question ASSISTANT: answer</s>USER: …``; learns each answer and its end token."""

    def __init__(self, config: VicunaConfig) -> None:
        self.config = config
        self.stop = (config.end,)

    def render(self, turns: Sequence[Turn], reply: bool) -> list[Segment]:
        check_turns(turns, reply)
        segments = [literal(self.config.system), control(" ")] if self.config.system else []
        for turn in turns:
            if turn.role == "human":
                segments += [control("USER: "), *content(turn), control(" ASSISTANT:")]
            else:
                # The space is learned too: the prompt ends at the colon, so the model has to write it.
                space = [control(" ", trained=True)] if turn.text else []
                segments += [*space, literal(turn.text, trained=True), control(self.config.end, trained=True)]
        return segments

    def original_drops(self, turns: Sequence[Turn]) -> bool:
        """Where the original's count of tokens goes wrong: it splits the finished text again at these signs."""
        answers = [turn.text for turn in turns if turn.role == "assistant"]
        return not all(answers) or any(
            sign in turn.text for turn in turns for sign in (self.config.end, " ASSISTANT: ", "<unk>")
        )

    def required_tokens(self) -> tuple[str, ...]:
        return (self.config.end,)

    def chat_template(self) -> str:
        start = f"{self.config.system} " if self.config.system else ""
        user, assistant = "'USER: ' ~ said(message) ~ ' ASSISTANT:'", f"' ' ~ said(message) ~ {quoted(self.config.end)}"
        return in_jinja(start, user, assistant)


# --- llava_v0: ### Human: … ### Assistant: … -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LlavaV0Config:
    system: str = HUMAN_ASSISTANT


class LlavaV0:
    """``system, blank line, ### Human: question, ### Assistant: answer, … ###``, a line each.

    Learns the assistant's lines with their header and every ``###``, which is how an answer ends.
    """

    stop = ("###",)

    def __init__(self, config: LlavaV0Config) -> None:
        self.config = config

    def render(self, turns: Sequence[Turn], reply: bool) -> list[Segment]:
        check_turns(turns, reply)
        segments = [literal(self.config.system), control("\n\n")]
        for turn in turns:
            if turn.role == "human":
                segments += [control("###", trained=True), control(" Human: "), *content(turn), control("\n")]
            else:
                answer = literal(turn.text, trained=True)
                segments += [control("### Assistant: ", trained=True), answer, control("\n", trained=True)]
        return [*segments, control("### Assistant:" if reply else "### ", trained=True)]

    def required_tokens(self) -> tuple[str, ...]:
        return ()

    def chat_template(self) -> str:
        user, assistant = (f"'### {role}: ' ~ said(message) ~ '\\n'" for role in ("Human", "Assistant"))
        return in_jinja(f"{self.config.system}\n\n", user, assistant, "### Assistant:")


# --- llama_2: [INST] … [/INST] … </s><s> -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Llama2Config:
    system: str = SAFE_ASSISTANT


@dataclass(frozen=True, kw_only=True)
class LlavaLlama2Config(Llama2Config):
    system: str = VISION_ASSISTANT


class Llama2:
    """``[INST] <<SYS>> system <</SYS>> question [/INST] answer </s><s>[INST] …``; the tokenizer adds ``<s>``."""

    stop = ("</s>",)

    def __init__(self, config: Llama2Config) -> None:
        self.config = config

    def render(self, turns: Sequence[Turn], reply: bool) -> list[Segment]:
        check_turns(turns, reply)
        segments = [control("[INST] ")]
        if self.config.system:
            segments += [control("<<SYS>>\n"), literal(self.config.system), control("\n<</SYS>>\n\n")]
        for number, turn in enumerate(turns):
            if turn.role == "human":
                segments += [control("<s>[INST] ")] if number else []
                segments += [*content(turn), control(" [/INST]")]
            else:
                answer = literal(turn.text, trained=True)
                segments += [control(" ", trained=True), answer, control(" </s>", trained=True)]
        return segments

    def required_tokens(self) -> tuple[str, ...]:
        return ("<s>", "</s>")

    def chat_template(self) -> str:
        system = f"<<SYS>>\n{self.config.system}\n<</SYS>>\n\n" if self.config.system else ""
        user = "('' if loop.first else '<s>[INST] ') ~ said(message) ~ ' [/INST]'"
        return in_jinja(f"[INST] {system}", user, "' ' ~ said(message) ~ ' </s>'")


# --- mpt and chatml: <|im_start|>user … <|im_end|> -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MptConfig:
    system: str = MPT_ASSISTANT


@dataclass(frozen=True, kw_only=True)
class ChatmlConfig(MptConfig):
    system: str = "Answer the questions."


class Chatml:
    """``<|im_start|>role, new line, words<|im_end|>`` for each turn; learns each answer and its end token."""

    stop = ("<|im_end|>",)

    def __init__(self, config: MptConfig) -> None:
        self.config = config

    def render(self, turns: Sequence[Turn], reply: bool) -> list[Segment]:
        check_turns(turns, reply)
        segments: list[Segment] = []
        if self.config.system:
            segments += [control("<|im_start|>system\n"), literal(self.config.system), control("<|im_end|>")]
        for turn in turns:
            if turn.role == "human":
                segments += [control("<|im_start|>user\n"), *content(turn)]
                segments += [control("<|im_end|><|im_start|>assistant\n")]
            else:
                segments += [literal(turn.text, trained=True), control("<|im_end|>", trained=True)]
        return segments

    def required_tokens(self) -> tuple[str, ...]:
        return ("<|im_start|>", "<|im_end|>")

    def chat_template(self) -> str:
        start = f"<|im_start|>system\n{self.config.system}<|im_end|>" if self.config.system else ""
        user = "'<|im_start|>user\\n' ~ said(message) ~ '<|im_end|><|im_start|>assistant\\n'"
        return in_jinja(start, user, "said(message) ~ '<|im_end|>'")


@hookimpl
def register_templates(register: Register) -> None:
    register("plain", Plain, PlainConfig)
    register("vicuna_v1", Vicuna, VicunaConfig)
    register("llava_v1", Vicuna, LlavaV1Config)
    register("llava_v0", LlavaV0, LlavaV0Config)
    register("llama_2", Llama2, Llama2Config)
    register("llava_llama_2", Llama2, LlavaLlama2Config)
    register("mpt", Chatml, MptConfig)
    register("chatml", Chatml, ChatmlConfig)
