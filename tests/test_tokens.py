from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import CHATML, gpt_like, llama_like
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llava_kit.contracts import IGNORE, IMAGE_TOKEN, ImageSlot, Segment, Turn
from llava_kit.errors import RecipeError, SampleError
from llava_kit.tokens import Encoder, Tokens, check_template, fit, tokenize, without_surrogates
from llava_kit_plugins import templates

IMAGE = Segment(kind="image")
TWO_TURNS = [
    Turn("human", (ImageSlot(0), "\nWhat is this?")),
    Turn("assistant", ("A cat.",)),
    Turn("human", ("Color?",)),
    Turn("assistant", ("Black and white.",)),
]
TEXT_TWIN = [Turn("human", ("What is this?",)), *TWO_TURNS[1:]]
VICUNA = templates.Vicuna(templates.VicunaConfig())
LLAMA_2 = templates.Llama2(templates.LlavaLlama2Config())
V0 = templates.LlavaV0(templates.LlavaV0Config())
PLAIN = templates.Plain(templates.PlainConfig())
CHATML_TEMPLATE = templates.Chatml(templates.ChatmlConfig())
AWKWARD = [
    "A cat.",
    "It ends </s> here",
    "<s></s><unk>",
    "an <image> tag",
    "well ASSISTANT: yes USER: no",
    "### Human: hi\n### Assistant: bye",
    "<|im_end|><|im_start|>user\n",
    "[/INST] </s><s>[INST]",
    "😀👍🏽 naïve",
    "שלום עולם",
    "two\n\nlines\n",
    "  indented",
    "trailing  ",
    "",
    "\x00\x07",
]


def text(words: str, trained: bool = False) -> Segment:
    return Segment(kind="text", text=words, trained=trained)


def control(words: str, trained: bool = False) -> Segment:
    return Segment(kind="control", text=words, trained=trained)


def trained_places(tokens: Tokens) -> list[int]:
    return [place for place, label in enumerate(tokens.labels) if label != IGNORE]


@pytest.fixture(params=[True, False], ids=["legacy", "not legacy"])
def legacy(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def llama(legacy: bool, tmp_path: Path) -> Any:
    """LLaMA's own tokenizer, with the prefix handling of either kind."""
    folder = os.environ.get("LLAVA_KIT_LLAMA_TOKENIZER")
    if not folder:
        pytest.skip("set LLAVA_KIT_LLAMA_TOKENIZER to a folder with LLaMA's tokenizer.model")
    copy = tmp_path / "llama"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    copy.chmod(0o755)
    config = copy / "tokenizer_config.json"
    spelled = {True: '"legacy": true', False: '"legacy": false'}
    config.write_text(config.read_text().replace(spelled[True], spelled[legacy]))
    return AutoTokenizer.from_pretrained(copy)


# --- the original's ids and labels, with LLaMA's own tokenizer -------------------------------------------------------


def test_vicuna_v1_ids_and_labels(llama: Any, legacy: bool) -> None:
    tokens = tokenize(VICUNA.render(TWO_TURNS, False), llama)
    assert tokens.ids[:4] == [1, 319, 13563, 1546]
    assert tokens.ids.index(IMAGE_TOKEN) == 35
    assert trained_places(tokens)[:4] == [47, 48, 49, 50]
    if legacy:
        assert len(tokens.ids) == 66
        assert trained_places(tokens)[4:] == [61, 62, 63, 64, 65]
        assert tokens.ids[51:53] == [3148, 1001]
    else:
        assert len(tokens.ids) == 65
        assert trained_places(tokens)[4:] == [60, 61, 62, 63, 64]
        assert tokens.ids[51] == 11889
    assert tokens.trained == [319, 6635, 29889, 2, 6054, 322, 4796, 29889, 2]
    assert len(tokenize(VICUNA.render(TEXT_TWIN, False), llama).ids) == (62 if legacy else 61)


def test_llama_2_ids_and_labels(llama: Any) -> None:
    tokens = tokenize(LLAMA_2.render(TWO_TURNS, False), llama)
    assert len(tokens.ids) == 84
    assert trained_places(tokens) == [63, 64, 65, 66, 67, 78, 79, 80, 81, 82, 83]


def test_llava_v0_ids_and_labels(llama: Any) -> None:
    tokens = tokenize(V0.render(TWO_TURNS, False), llama)
    assert len(tokens.ids) == 75
    assert trained_places(tokens) == [33, 34, *range(46, 57), *range(62, 75)]


def test_plain_ids_and_labels(llama: Any) -> None:
    tokens = tokenize(PLAIN.render(TWO_TURNS[:2], False), llama)
    assert tokens.ids == [1, IMAGE_TOKEN, 319, 6635, 29889, 13]
    assert trained_places(tokens) == [2, 3, 4, 5]


def test_text_is_cut_at_images_as_in_the_original(llama: Any) -> None:
    encoder = Encoder(llama)
    assert encoder([IMAGE]).ids == [1, IMAGE_TOKEN]
    assert encoder([IMAGE, text("\nhi")]).ids == [1, IMAGE_TOKEN, 29871, 13, 2918]
    assert encoder([text("hi "), IMAGE]).ids == [1, 7251, 29871, IMAGE_TOKEN]
    assert encoder([IMAGE, IMAGE]).ids == [1, IMAGE_TOKEN, IMAGE_TOKEN]


@pytest.mark.parametrize("template", [VICUNA, LLAMA_2, V0, PLAIN])
def test_the_templates_fit_llama(template: Any, llama: Any) -> None:
    check_template(template, llama)


@pytest.mark.parametrize("answer", AWKWARD)
def test_awkward_answers_with_llama(answer: str, llama: Any) -> None:
    assert learned_text(VICUNA, answer, llama) == answer + "</s>"


# --- the same kind of tokenizer, made here ---------------------------------------------------------------------------


def learned_text(template: Any, answer: str, tokenizer: Any) -> str:
    """What the second answer of a conversation is learned as."""
    turns = [*TWO_TURNS[:3], Turn("assistant", (answer,))]
    encoder = Encoder(tokenizer)
    first = encoder(template.render(turns[:2], False)).trained
    return str(tokenizer.decode(encoder(template.render(turns, False)).trained[len(first) :]))


@pytest.mark.parametrize("answer", AWKWARD)
def test_what_is_learned_is_the_answer_and_its_end(answer: str, legacy: bool) -> None:
    tokenizer = llama_like(legacy)
    assert learned_text(VICUNA, answer, tokenizer) == answer + "</s>"
    assert learned_text(LLAMA_2, answer, tokenizer) == f"{answer} </s>"
    # Decoding leaves out a space at the very start, and here it is the answer's own.
    assert learned_text(CHATML_TEMPLATE, answer, llama_like(legacy, CHATML)) == f"{answer}<|im_end|>".removeprefix(" ")


@pytest.mark.parametrize("answer", AWKWARD)
def test_what_is_learned_with_a_byte_level_tokenizer(answer: str) -> None:
    assert learned_text(CHATML_TEMPLATE, answer, gpt_like()) == f"{answer}<|im_end|>"


@pytest.mark.parametrize("answer", AWKWARD)
def test_what_is_learned_by_plain_and_v0(answer: str, legacy: bool) -> None:
    tokenizer = llama_like(legacy)
    encoder = Encoder(tokenizer)
    caption = [TWO_TURNS[0], Turn("assistant", (answer,))]
    assert tokenizer.decode(encoder(PLAIN.render(caption, False)).trained) == f"{answer}\n".removeprefix(" ")
    learned = tokenizer.decode(encoder(V0.render(caption, False)).trained)
    assert learned == f"###### Assistant: {answer}\n### "


def test_words_behind_an_end_token_have_a_prefix_only_in_legacy_tokenizers() -> None:
    def behind(tokenizer: Any) -> str:
        ids = Encoder(tokenizer)([control("hi</s>hi")]).ids
        return str(tokenizer.convert_ids_to_tokens(ids[ids.index(2) + 1]))

    assert behind(llama_like(True)).startswith("▁")
    assert not behind(llama_like(False)).startswith("▁")


def test_ids_are_those_of_the_tokenizer_where_text_holds_no_special_token(legacy: bool) -> None:
    tokenizer = llama_like(legacy)
    whole = "A chat. USER: What is this? ASSISTANT: A cat.</s>USER: Color?\n  ASSISTANT: 😀</s>"
    cut = [control("A chat. USER: "), text("What is this?"), control(" ASSISTANT:"), control(" ", True)]
    cut += [text("A cat.", True), control("</s>", True), control("USER: "), text("Color?\n ")]
    cut += [control(" ASSISTANT: "), text("😀"), control("</s>")]
    assert Encoder(tokenizer)(cut).ids == tokenizer(whole).input_ids


def test_special_tokens_count_only_in_control_text() -> None:
    encoder = Encoder(llama_like())
    assert 2 not in encoder([text("a </s> b")]).ids
    assert encoder([control("a </s> b")]).ids.count(2) == 1
    assert encoder([text("<image>")]).ids.count(IMAGE_TOKEN) == 0


def test_a_token_is_learned_if_it_reaches_into_a_learned_segment() -> None:
    tokenizer = llama_like()
    tokens = Encoder(tokenizer)([control("7"), text("8 9", True), control("0")])  # digits stay alone
    assert tokenizer.convert_ids_to_tokens(tokens.trained) == ["8", "▁", "9"]
    joined = Encoder(tokenizer)([control("ca"), text("t", True)])  # "▁cat" is one token
    assert tokenizer.decode(joined.trained) == "cat"


def test_the_start_token_stands_in_front_of_the_first_chunk_only() -> None:
    assert Encoder(llama_like())([IMAGE, text("hi"), IMAGE]).ids.count(1) == 1
    assert Encoder(gpt_like())([IMAGE]).ids == [IMAGE_TOKEN]


def test_labels_are_the_ids_and_as_many() -> None:
    tokens = Encoder(llama_like())(VICUNA.render(TWO_TURNS, False))
    assert len(tokens.ids) == len(tokens.labels)
    assert all(label in (IGNORE, index) for index, label in zip(tokens.ids, tokens.labels, strict=True))


def test_lone_surrogates_are_replaced_and_pairs_joined() -> None:
    assert without_surrogates("a\ud800b") == "a\ufffdb"
    assert without_surrogates("\ud83d\ude00") == "😀"
    assert Encoder(llama_like())([text("a\ud800b")]).ids == Encoder(llama_like())([text("a\ufffdb")]).ids


def test_an_encoder_can_be_sent_to_another_process() -> None:
    encoder = Encoder(llama_like(False))
    segments = VICUNA.render(TWO_TURNS, False)
    assert pickle.loads(pickle.dumps(encoder))(segments) == encoder(segments)


# --- cutting to a length ---------------------------------------------------------------------------------------------


def tokens_of(*ids: int, learned: int) -> Tokens:
    """Ids of which those from place ``learned`` on are learned."""
    return Tokens(ids=list(ids), labels=[IGNORE] * learned + list(ids[learned:]))


def test_what_fits_stays_whole() -> None:
    tokens = tokens_of(1, IMAGE_TOKEN, 5, 6, learned=2)
    fitted = fit(tokens, [4], 7)
    assert (fitted.tokens, fitted.images, fitted.length, fitted.full_length) == (tokens, 1, 7, 7)
    assert not fitted.truncated


def test_the_tail_is_cut_with_image_rows_counted() -> None:
    fitted = fit(tokens_of(1, IMAGE_TOKEN, 5, 6, learned=2), [4], 6)
    assert fitted.tokens.ids == [1, IMAGE_TOKEN, 5]
    assert (fitted.length, fitted.full_length, fitted.truncated) == (6, 7, True)


def test_a_cut_inside_an_image_moves_in_front_of_it() -> None:
    fitted = fit(tokens_of(1, 5, 6, IMAGE_TOKEN, 7, learned=1), [4], 5)
    assert (fitted.tokens.ids, fitted.images, fitted.length, fitted.full_length) == ([1, 5, 6], 0, 3, 8)


def test_nothing_to_learn_is_an_error() -> None:
    with pytest.raises(SampleError, match="nothing to learn: the answer begins behind row 5 of 7; raise max_length"):
        fit(tokens_of(1, IMAGE_TOKEN, 5, 6, learned=2), [4], 5)
    with pytest.raises(SampleError, match="nothing to learn: the conversation has no trained text"):
        fit(tokens_of(1, 2, learned=2), [], 5)
    with pytest.raises(SampleError, match="nothing to learn"):  # nothing stands in front of it to predict it
        fit(tokens_of(1, learned=0), [], 5)


def test_the_images_must_be_as_many_as_the_ids_say() -> None:
    with pytest.raises(SampleError, match="the conversation has 1 images, but 2 were given"):
        fit(tokens_of(1, IMAGE_TOKEN, 5, learned=2), [4, 4], 20)


# --- does a template fit a tokenizer? --------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [VICUNA, LLAMA_2, V0, PLAIN])
def test_templates_fit_the_small_tokenizers(template: Any, legacy: bool) -> None:
    assert check_template(template, llama_like(legacy)).start == [1]
    check_template(CHATML_TEMPLATE, gpt_like())
    check_template(CHATML_TEMPLATE, llama_like(legacy, CHATML))


def test_missing_special_tokens_are_all_named() -> None:
    with pytest.raises(RecipeError) as error:
        check_template(CHATML_TEMPLATE, llama_like())
    assert [problem.what for problem in error.value.problems] == [
        "the template needs the special token '<|im_start|>', which it lacks",
        "the template needs the special token '<|im_end|>', which it lacks",
    ]


def test_a_tokenizer_without_an_end_token_does_not_fit() -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=llama_like().backend_tokenizer)
    with pytest.raises(RecipeError, match="it has no end token; set eos_token"):
        check_template(PLAIN, plain)


def test_a_tokenizer_that_loses_words_does_not_fit() -> None:
    words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "yes": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    with pytest.raises(RecipeError, match="the answer 'two red cats' comes back from its ids as '<unk>"):
        check_template(VICUNA, tokenizer)


def test_a_template_that_never_ends_an_answer_does_not_fit() -> None:
    class Endless(templates.Vicuna):
        def render(self, turns: Any, reply: bool) -> list[Segment]:
            return [s for s in super().render(turns, reply) if s.text != "</s>"]

    with pytest.raises(RecipeError, match="nothing that is learned ends an answer"):
        check_template(Endless(templates.VicunaConfig()), llama_like())


def test_a_template_whose_prompt_differs_from_training_does_not_fit() -> None:
    class Shifty(templates.Vicuna):
        def render(self, turns: Any, reply: bool) -> list[Segment]:
            return [control("Now: " if reply else "Then: "), *super().render(turns, reply)]

    with pytest.raises(RecipeError, match="the prompt is tokenised unlike the beginning of the training text"):
        check_template(Shifty(templates.VicunaConfig()), llama_like())


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        name_or_path = "slow"

    with pytest.raises(RecipeError, match="tokenizer slow: it gives no character offsets"):
        Encoder(Slow())  # type: ignore[arg-type]
