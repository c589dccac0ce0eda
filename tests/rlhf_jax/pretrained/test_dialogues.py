"""Dialogues of several turns in the chat template, for policies and reward models alike."""

import dataclasses

import pytest

from experiment_runs.errors import UserError
from experiment_runs.files import fingerprint
from rlhf_jax.data import dialogues
from rlhf_jax.data.preferences import posts_fingerprint, preference_posts
from rlhf_jax.pretrained.prompt_rows import cut_texts, prompt_rows, read_prompts
from rlhf_jax.pretrained.tokenizer import CHATML, Tokenizer
from rlhf_jax.reward_model.encoding import encode_posts

TURNS = (("user", "one"), ("assistant", "two"), ("user", "three"))
SYSTEM = ("system", "Be brief.")
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
PASSES_OVER = CHATML.replace("in messages %}", "in messages if message['role'] != 'system' %}")


def with_template(model, template):
    huggingface = model.tokenizer.huggingface
    copy = type(huggingface)(
        tokenizer_object=huggingface.backend_tokenizer, eos_token="<|im_end|>",
        pad_token="<|pad|>", unk_token="<|unk|>", chat_template=template,
    )  # fmt: skip
    return Tokenizer.of(copy)


def of_template(tokenizer, turns):
    """What transformers makes of messages."""
    messages = [{"role": role, "content": text} for role, text in turns]
    text = tokenizer.huggingface.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return tuple(tokenizer.huggingface(text, add_special_tokens=False)["input_ids"])


def tokens_of(tokenizer, turns):
    return tokenizer.encode_dialogues([turns])[0]


@pytest.mark.parametrize("turns", [TURNS, TURNS[:1]])
def test_a_dialogue_has_the_tokens_of_the_chat_template(model, turns):
    """With an empty system message, as single questions have it."""
    tokenizer = model.tokenizer
    assert tokens_of(tokenizer, turns) == of_template(tokenizer, [("system", ""), *turns])
    with_system = [SYSTEM, *turns]
    assert tokens_of(tokenizer, with_system) == of_template(tokenizer, with_system)


def test_a_text_and_a_dialogue_of_one_question_are_the_same_row(model):
    rows = [read_prompts([one], model.tokenizer, length=80)[0][0] for one in ("one", TURNS[:1])]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("template", [REFUSES + CHATML, PASSES_OVER])
def test_a_system_message_without_a_place_stands_before_the_first_question(model, template):
    tokenizer = with_template(model, template)
    merged = [("user", f"{SYSTEM[1]}\n\none"), *TURNS[1:]]
    assert tokens_of(tokenizer, [SYSTEM, *TURNS]) == of_template(tokenizer, merged)


def test_what_is_too_long_loses_its_oldest_exchanges_then_the_end_then_the_system_message(model):
    tokenizer = model.tokenizer
    whole = [SYSTEM, *TURNS]
    lengths = [
        len(tokens_of(tokenizer, turns)) for turns in (whole, [SYSTEM, TURNS[-1]], TURNS[-1:])
    ]

    def read(length):
        (tokens, cut), *_ = read_prompts([tuple(whole)], tokenizer, length=length)
        assert len(tokens) <= length
        return tokenizer.decode_exact(tokens), cut

    assert read(lengths[0])[1] is None
    text, cut = read(lengths[0] - 1)
    assert cut == "Be brief.\n\nthree" and "one" not in text and "Be brief." in text
    assert read(lengths[1] - 2) == (text.replace("three", "thr"), "Be brief.\n\nthr")
    text, cut = read(lengths[1] - 5)
    assert cut == "three" and "Be brief." not in text
    assert read(lengths[2] - 4)[1] == "t"
    tokens, mask, count = prompt_rows([tuple(whole), "a"], tokenizer, length=lengths[1] - 2)
    assert count == 1 and mask.sum() == lengths[1] - 2 + len(tokens_of(tokenizer, [("user", "a")]))
    assert cut_texts([tuple(whole), "a"], tokenizer, length=lengths[0]) == ["", ""]


def test_a_cut_never_leaves_half_a_character(model):
    dialogue = (SYSTEM, ("user", "é" * 30))
    for shorter in range(1, 8):
        length = len(tokens_of(model.tokenizer, dialogue)) - shorter
        (_, cut), *_ = read_prompts([dialogue], model.tokenizer, length=length)
        assert cut.startswith("Be brief.\n\né") and set(cut.split("\n\n")[1]) == {"é"}


def test_nobody_writes_control_tokens_into_a_dialogue(model):
    turns = (*TURNS[:2], ("user", "Stop<|im_end|>now"))
    with pytest.raises(UserError, match="a turn of the user's holds '<.im_end.>'.*take it out"):
        tokens_of(model.tokenizer, turns)


def test_a_reward_model_learns_dialogues_as_a_policy_reads_them(model):
    messages = [{"role": role, "content": text} for role, text in TURNS]
    pair = {"prompt": messages, "chosen": "Yes.", "rejected": "No."}
    (post,) = preference_posts([pair])
    assert post.turns == TURNS and post.prompt == "Human: one\n\nAssistant: two\n\nHuman: three"
    ((encoded,), fit) = encode_posts([post], model.tokenizer, max_tokens=200)
    assert encoded.prompt == read_prompts([post.turns], model.tokenizer, length=200)[0][0]
    assert fit.prompts_cut == 0
    ((cut,), fit) = encode_posts([post], model.tokenizer, max_tokens=len(encoded.prompt))
    assert fit.prompts_cut == 1 and cut.prompt == tokens_of(model.tokenizer, TURNS[-1:])
    assert cut.cut_tokens == len(encoded.prompt) - len(cut.prompt)


def test_posts_of_single_questions_keep_the_identity_that_they_had_without_turns(model):
    pair = {"prompt": "one", "chosen": "Yes.", "rejected": "No."}
    (post,) = preference_posts([pair])
    *values, turns = dataclasses.astuple(post)
    assert turns == ()
    assert posts_fingerprint({"train": [post]}) == fingerprint({"train": [values]})
    other = dataclasses.replace(post, turns=TURNS)
    assert posts_fingerprint({"train": [post]}) != posts_fingerprint({"train": [other]})


def test_functions_get_messages_and_logs_get_text():
    assert dialogues.messages("one") == dialogues.shown("one") == "one"
    assert dialogues.messages(TURNS[:1]) == [{"role": "user", "content": "one"}]
    assert dialogues.shown(TURNS) == "Human: one\n\nAssistant: two\n\nHuman: three"
