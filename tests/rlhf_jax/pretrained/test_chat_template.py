"""Tokenizers and templates as people have them: what is read is the template as a whole."""

import json
import re

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from experiment_runs.errors import UserError
from rlhf_jax.export import model_card
from rlhf_jax.pretrained.tokenizer import CHATML, Tokenizer

WORD = "\N{LOWER ONE EIGHTH BLOCK}"
CORPUS = ["user assistant word words Two words two spaces before the line ends after it"] * 9 + [
    "a line.\n\nanother  line ends.\n after \n1. item\n2. item", "model [INST] [/INST] user",
    "indented\n  lines\n  of code\n  here</p>\n</p>",
] * 9  # fmt: skip
QUESTIONS = [
    "Why?", "two words", "  spaces around \n", "\n\n1. a list\n2. of items\n", "ends.", "(x)",
    "naïve — 東京 🙂", "\ttab", "line\n\n\n", ".\n", "def f(x):\n    return x",
]  # fmt: skip
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)  # TinyLlama
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() }}"
    "{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (m['content'] | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA3 = GEMMA.replace(
    "{{ raise_exception('System role not supported') }}{% endif %}", "{% else %}"
).replace("{% endfor %}", "{% endif %}{% endfor %}").replace(
    "'\n' + (m", "'\n' + (messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' "
    "else '') + (m",
)  # fmt: skip
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + '[/INST]' }}{% elif m['role'] == 'assistant' %}"
    "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sentence_piece(normalizer, pre_tokenizer=None, *, added=(), template, **options):
    """A tokenizer of Llama's or Gemma's kind, trained on a few lines."""
    special = ["<unk>", "<s>", "</s>"]
    learner = Backend(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "removed"), pre_tokenizers.Metaspace(replacement=WORD)]
    )  # no piece of a real model has a line's end inside
    trainer = trainers.BpeTrainer(vocab_size=160, show_progress=False)
    learner.train_from_iterator(CORPUS, trainer)
    model = json.loads(learner.to_str())["model"]
    words = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    backend = Backend(
        models.BPE(
            {word: i for i, word in enumerate(words)}, [tuple(merge) for merge in model["merges"]],
            unk_token="<unk>", fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer or backend.pre_tokenizer
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(WORD, " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    backend.add_special_tokens(special)
    for text, is_special in added:
        backend.add_tokens([AddedToken(text, special=is_special, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template=template, **options,
    )  # fmt: skip


SPACES = normalizers.Replace(" ", WORD)
LEGACY = normalizers.Sequence([normalizers.Prepend(WORD), SPACES])
FIRST = pre_tokenizers.Metaspace(replacement=WORD, prepend_scheme="first", split=False)
TURNS = (("<start_of_turn>", True), ("<end_of_turn>", True), ("\n", False), ("\n\n", False))
TURNS += ((f"{WORD}{WORD}", False), ("<b>", False), ("<think>", False))


def byte_pairs(pattern, *, added=(), template=CHATML, end="<|im_end|>"):
    """A tokenizer of Qwen's or GPT-2's kind."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated") if pattern else None
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    before = pre_tokenizers.Sequence([split, byte_level]) if split else byte_level
    learner = Backend(models.BPE())
    learner.pre_tokenizer = before
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    learner.train_from_iterator(CORPUS, trainer)
    learner.decoder = decoders.ByteLevel()
    learner.add_special_tokens(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<|fim_pad|>"]
    )
    learner.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=learner, eos_token=end, unk_token="<|endoftext|>", chat_template=template
    )


KINDS = {
    "TinyLlama": lambda: sentence_piece(LEGACY, template=ZEPHYR),
    "Llama 2": lambda: sentence_piece(LEGACY, template=LLAMA2),
    "Mistral": lambda: sentence_piece(LEGACY, template=MISTRAL),
    "Mistral with tokens of its own": lambda: sentence_piece(
        None, FIRST, added=(("[INST]", True), ("[/INST]", True)), template=MISTRAL
    ),
    "Gemma": lambda: sentence_piece(SPACES, added=TURNS, template=GEMMA),
    "Gemma 3": lambda: sentence_piece(SPACES, added=TURNS, template=GEMMA3),
    "Qwen": lambda: byte_pairs(QWEN, added=("<think>", "</think>", "<tool_call>")),
    "GPT-2": lambda: byte_pairs(None),
    "Qwen base": lambda: byte_pairs(QWEN, end="<|endoftext|>"),
}


@pytest.fixture(params=KINDS)
def huggingface(request):
    return KINDS[request.param]()


def rendered(huggingface, question, answer=None):
    """Tokens of a conversation as transformers reads it, without a system message if it can be."""
    messages = [{"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    if "im_start" in huggingface.chat_template or huggingface.chat_template == ZEPHYR:
        messages.insert(0, {"role": "system", "content": ""})
    text = huggingface.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=answer is None
    )
    return huggingface(text, add_special_tokens=False)["input_ids"]


def test_prompt_and_reply_have_the_tokens_of_the_template_as_a_whole(huggingface):
    tokenizer = Tokenizer.of(huggingface)

    def kept(slot, text):
        ((kept, _),) = tokenizer.plain.read(slot, [text])
        assert kept.strip() == text.strip()
        return kept

    for question in QUESTIONS:
        (asked,) = tokenizer.encode([question])
        asked = [*tokenizer.prefix, *asked, *tokenizer.suffix]
        expected = rendered(huggingface, kept(tokenizer.prompt, question))
        assert asked == expected, repr(question)
        for answer in QUESTIONS:
            (replied,) = tokenizer.encode([answer], reply=True)
            whole = [*asked, *replied, *tokenizer.closing, *tokenizer.tail]
            answered = kept(tokenizer.reply, answer)
            expected = rendered(huggingface, kept(tokenizer.prompt, question), answered)
            assert whole == expected, (question, answer)
            assert tokenizer.decode(replied).strip() == answer.strip()


def test_the_code_on_a_card_makes_the_tokens_of_the_training(huggingface):
    tokenizer = Tokenizer.of(huggingface)
    code = f"{model_card.prompt_code(tokenizer)}\n{model_card.text_code(tokenizer)}"
    for question, answer in (("Why?", "two words"), ("ends.", "1. item\n")):
        scope = {"tokenizer": huggingface, "question": question, "answer": answer}
        exec(code, scope)
        (asked,), (replied,) = tokenizer.encode([question]), tokenizer.encode([answer], reply=True)
        expected = [*tokenizer.prefix, *asked, *tokenizer.suffix, *replied, *tokenizer.closing]
        assert huggingface(scope["text"], add_special_tokens=False)["input_ids"] == expected


def test_users_cannot_write_control_tokens(huggingface):
    tokenizer = Tokenizer.of(huggingface)
    huggingface("a call of the wrapped tokenizer changes nothing")
    controls = tokenizer.plain.controls
    assert {*huggingface.all_special_ids, *tokenizer.closing[-1:]} <= {*controls}
    written = [*controls.values()]
    texts = [*written, "".join(written), "a ".join(written), *(f"x{t}\n{t} y" for t in written)]
    for reply in (False, True):
        for text, tokens in zip(texts, tokenizer.encode(texts, reply=reply), strict=True):
            assert not {*tokens} & {*controls}, text
            assert tokenizer.decode(tokens).strip() == text.strip()


def test_a_control_token_that_a_user_writes_is_read_as_if_it_were_none():
    added, without = byte_pairs(QWEN, added=("</think>",)), byte_pairs(QWEN)
    text = "a</think>b <|im_end|>"
    assert [Tokenizer.of(added).encode([text])] == [Tokenizer.of(without).encode([text])]


def test_only_white_space_that_makes_one_token_with_the_template_is_dropped():
    tokenizer = Tokenizer.of(KINDS["GPT-2"]())
    texts = [" word", "word ", "word\n", "  word"]
    kept = [text for text, _ in tokenizer.plain.read(tokenizer.prompt, texts)]
    assert kept == [" word", "word ", "word\n", "word"]


def test_line_ends_spaces_and_html_are_text_and_markers_are_not():
    huggingface = KINDS["Gemma"]()
    tokenizer = Tokenizer.of(huggingface)
    ids = huggingface.get_vocab()
    (tokens,) = tokenizer.encode([f"a\n\n<b>c{WORD}{WORD}d\n<think>{huggingface.eos_token}"])
    assert {ids["\n"], ids["\n\n"], ids["<b>"], ids[f"{WORD}{WORD}"]} <= {*tokens}
    assert not {ids["<think>"], ids["</s>"]} & {*tokens}


def test_a_word_of_the_vocabulary_that_is_a_control_token_is_spelled_out():
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<pad>", 0.0)]
    pieces += [(letter, -5.0) for letter in f"{WORD}<>/abdps\n"]
    backend = Backend(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=WORD, prepend_scheme="never")
    backend.decoder = decoders.Metaspace(replacement=WORD, prepend_scheme="never")
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    tokenizer = Tokenizer.of(
        PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
            pad_token="<pad>",
            chat_template="{% for m in messages %}{{ '<s>' + m['content'] + '</s>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<s>' }}{% endif %}",
        )
    )  # fmt: skip
    (tokens,) = tokenizer.encode(["<s>a</s> <pad>b"])
    assert not {*tokens} & {1, 2, 3}
    assert tokenizer.decode(tokens) == "<s>a</s> <pad>b"


def test_a_response_ends_where_the_template_ends_it_and_at_every_end_of_the_generation_config():
    huggingface = KINDS["Qwen base"]()
    ids = huggingface.get_vocab()
    tokenizer = Tokenizer.of(huggingface, ends=[ids["<|fim_pad|>"]])
    assert tokenizer.end == ids["<|im_end|>"] != huggingface.eos_token_id
    assert tokenizer.ends == (ids["<|im_end|>"], ids["<|fim_pad|>"], ids["<|endoftext|>"])
    assert tokenizer.closing == (tokenizer.end,)
    assert tokenizer.decode(tokenizer.tail) == "\n"


def test_a_pad_is_none_of_the_ends():
    huggingface = KINDS["Qwen base"]()
    assert Tokenizer.of(huggingface).pad not in Tokenizer.of(huggingface).ends
    ids = huggingface.get_vocab()
    with pytest.raises(UserError, match="no special token to pad with"):
        Tokenizer.of(huggingface, ends=[ids["<|fim_pad|>"], ids["<|pad|>"]])


def test_a_template_that_has_variants_takes_the_default():
    huggingface = byte_pairs(QWEN)
    expected = Tokenizer.of(huggingface).prefix
    huggingface.chat_template = {"tool_use": ZEPHYR, "default": CHATML}
    assert Tokenizer.of(huggingface).prefix == expected
    huggingface.chat_template = {"only": CHATML}
    assert Tokenizer.of(huggingface).prefix == expected
    huggingface.chat_template = {"tool_use": ZEPHYR, "rag": CHATML}
    with pytest.raises(UserError, match=r"\['rag', 'tool_use'\]"):
        Tokenizer.of(huggingface)


def test_todays_date_in_a_template_does_not_change_the_prompt():
    template = "{{ '<|im_start|>' + strftime_now('%d %b %Y, %Y-%m-%d') + '\n' }}" + CHATML
    tokenizer = Tokenizer.of(byte_pairs(QWEN, template=template))
    assert "26 Jul 2024, 2024-07-26" in tokenizer.decode_exact(tokenizer.prefix)


MERGED = "{% for m in messages %}{{ m['content'] + '!' }}{% endfor %}"  # with "!" runs
FAILING = "{{ raise_exception('only tools') }}"
TWICE = "{% for m in messages %}{{ m['content'] + '<|im_end|>' + m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "named"),
    [(FAILING, "only tools"), (TWICE, "does not show every message once"), (MERGED, "as a whole")],
)
def test_a_template_that_cannot_be_used_is_refused(template, named):
    huggingface = byte_pairs(QWEN, template=template)
    huggingface.backend_tokenizer.add_tokens([AddedToken("e!", normalized=False)])
    with pytest.raises(UserError, match=named):
        Tokenizer.of(huggingface)


def thinking(opened, *, history=""):
    """A template whose answers begin inside an opened thought, as later turns show it or not."""
    shown = "{% set shown = '" + history + "' if m['role'] == 'assistant' else '' %}"
    return (
        "{% for m in messages %}" + shown + "{{ '<|im_start|>' + m['role'] + '\n' + shown + "
        "m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n" + opened + "' }}{% endif %}"
    )


@pytest.mark.parametrize("history", ["", "<think>\n\n</think>\n\n"])
@pytest.mark.parametrize("opened", ["<think>\n", "<think>", "[THINK]", "<seed:think>", "◁think▷"])
def test_a_template_that_only_thinks_is_refused_with_what_would_do(opened, history):
    with pytest.raises(UserError, match=f"inside {re.escape(opened.strip())} .* instruct model"):
        Tokenizer.of(byte_pairs(QWEN, template=thinking(opened, history=history)))


@pytest.mark.parametrize("history", ["", "<think>\n\n</think>\n\n"])
@pytest.mark.parametrize("switch", [True, False])
def test_a_template_whose_thoughts_are_switched_off_or_ended_is_read(switch, history):
    template = thinking("<think>\n\n</think>\n\n", history=history)
    if switch:
        template = "{% if enable_thinking is defined and enable_thinking is false %}" + template
        template += "{% else %}" + thinking("<think>\n") + "{% endif %}"
    tokenizer = Tokenizer.of(byte_pairs(QWEN, template=template))
    suffix = tokenizer.decode_exact(tokenizer.suffix)
    assert suffix.endswith("assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode_exact(tokenizer.closing) == "<|im_end|>"


def test_a_vocabulary_may_be_larger_than_the_embedding_only_in_what_nobody_writes():
    huggingface = KINDS["Gemma"]()
    count = len(huggingface)
    huggingface.backend_tokenizer.add_tokens(["image"])
    tokenizer = Tokenizer.of(huggingface, embeddings=count)
    (tokens,) = tokenizer.encode(["an image of it"])
    assert max(tokens) < count
    for embeddings in (100, 300):
        with pytest.raises(UserError, match=f"the model has {embeddings} embeddings"):
            Tokenizer.of(huggingface, embeddings=embeddings)


def test_an_embedding_may_be_larger_than_the_vocabulary():
    huggingface = KINDS["Qwen"]()
    tokenizer = Tokenizer.of(huggingface, embeddings=len(huggingface) + 50)
    tokens = [*tokenizer.encode(["word"])[0], len(huggingface) + 7]
    assert tokenizer.decode(tokens) == tokenizer.decode_exact(tokens) == "word"


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer", "Made-up"])
def test_a_folder_gives_the_tokens_of_its_tokenizer_file_whatever_class_it_names(kind, tmp_path):
    """A tokenizer with rules of its own, such as digits apart, saved under another's class."""
    huggingface = byte_pairs(r"\p{N}|\s?\p{L}+|\s+|[^\s\p{L}\p{N}]")
    huggingface.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": kind}))
    ends = huggingface.convert_tokens_to_ids(["<|endoftext|>", "<|fim_pad|>"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    tokenizer = Tokenizer.from_folder(tmp_path, embeddings=len(huggingface))
    expected = Backend.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*QUESTIONS, "\n\n1. 12345  67", "  2024"]:
        ((kept, tokens),) = tokenizer.plain.read(tokenizer.prompt, [text])
        read = expected.encode(f"user\n{kept}", add_special_tokens=False).ids
        lead = expected.encode("user\n", add_special_tokens=False).ids
        assert [*lead, *tokens] == read, repr(text)
    assert {*ends} < {*tokenizer.ends}


@pytest.mark.parametrize("content", ["{", '{"version": "1.0"}'])
def test_a_broken_tokenizer_is_named(content, tmp_path):
    byte_pairs(QWEN).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer.json"):
        Tokenizer.from_folder(tmp_path, embeddings=400)


@pytest.mark.parametrize(
    "part",
    [
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 10**9}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"model": {"continuing_subword_prefix": "######"}},
    ],
    ids=lambda part: [*part][0],
)  # fmt: skip
def test_a_tokenizer_that_ends_its_library_is_one_message(part, tmp_path):
    """What panics in Rust is no Exception in Python, at loading, at reading or at writing."""
    byte_pairs(QWEN).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = json.loads(file.read_text())
    ((name, changes),) = part.items()
    file.write_text(
        json.dumps(whole | {name: whole[name] | changes if name == "model" else changes})
    )
    with pytest.raises(UserError, match="tokenizer.json: .*Panic"):
        Tokenizer.from_folder(tmp_path, embeddings=400)


def test_a_length_that_the_file_cuts_at_cuts_nothing(tmp_path):
    huggingface = byte_pairs(QWEN)
    huggingface.backend_tokenizer.enable_truncation(8)
    huggingface.backend_tokenizer.enable_padding(length=64)
    tokenizer = Tokenizer.of(huggingface)
    assert tokenizer.decode(tokenizer.encode(["word " * 40])[0]) == "word " * 40
