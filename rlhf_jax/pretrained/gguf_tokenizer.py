"""The tokenizer that a GGUF file carries: vocabulary, merges or scores, and how text is split."""

from collections.abc import Mapping
from typing import Any

import gguf
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from experiment_runs.errors import UserError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentence-piece models write a space
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a byte-level model splits text, by the name of its rule (llama.cpp's), as in its own
# tokenizer.json; None is the rule of GPT-2, which comes with the bytes.
SPLITS = {
    "gpt-2": None,
    "smollm": pre_tokenizers.Digits(individual_digits=True),
    "llama-bpe": pre_tokenizers.Split(Regex(WORDS % "{1,3}"), behavior="isolated"),
    "qwen2": pre_tokenizers.Split(Regex(WORDS % ""), behavior="isolated"),
}


def gguf_tokenizer(fields: Mapping[str, Any], name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file.

    Raises:
      UserError: its kind, or the way it splits text, is not known.
    """
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    kind, split = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre")
    if kind == "gpt2" and split in SPLITS:
        backend = byte_level(fields, split)
    elif kind == "llama":
        backend = sentence_piece(fields)
    else:
        raise UserError(
            f"{name}: tokenizer.ggml.model={kind!r}, tokenizer.ggml.pre={split!r}: of GGUF files "
            f"the tokenizers 'llama' and 'gpt2' are read as their models do, the second with "
            f"{', '.join(SPLITS)}; use the folder with tokenizer.json and safetensors"
        )
    marked = list(zip(tokens, kinds, strict=True))
    control = [token for token, kind in marked if kind == gguf.TokenType.CONTROL]
    backend.add_special_tokens(control)
    added = [token for token, kind in marked if kind == gguf.TokenType.USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])

    def token(role):
        number = fields.get(f"tokenizer.ggml.{role}_token_id")
        return None if number is None else tokens[number]

    end, pad, unknown = token("eos"), token("padding"), token("unknown")
    huggingface = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=token("bos"),
        eos_token=end,
        pad_token=None if pad == end else pad,
        unk_token=unknown or next(iter(control), None),
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )
    huggingface.name_or_path = name
    return huggingface


def byte_level(fields: Mapping[str, Any], split: str) -> Backend:
    """Byte-pair encoding of bytes."""
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges", [])]
    whole = split == "llama-bpe"  # of words in the vocabulary, whatever the merges make of them
    vocabulary = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    backend = Backend(BPE(vocab=vocabulary, merges=merges, fuse_unk=False, ignore_merges=whole))
    if split == "qwen2":
        backend.normalizer = normalizers.NFC()
    rule = SPLITS[split]
    ours = split in ("gpt-2", "smollm")
    parts = [] if rule is None else [rule]
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=ours))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    backend.decoder = decoders.ByteLevel()
    return backend


def sentence_piece(fields: Mapping[str, Any]) -> Backend:
    """Byte-pair encoding of a sentence-piece model, with bytes for what it has no token for.

    Its file has no merges. They are the ways in which tokens are made of two others, best first: by
    the tokens' scores, but for Gemma, whose scores do not tell, by their numbers.
    """
    gemma = fields["general.architecture"].startswith("gemma")
    tokens = fields["tokenizer.ggml.tokens"]
    if gemma:  # runs of spaces are written as spaces
        tokens = [
            SPACE * len(token) if token and not token.strip(" ") else token for token in tokens
        ]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    scores = fields["tokenizer.ggml.scores"]
    if gemma:
        scores = [-float(number) for number in range(len(tokens))]
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    model = BPE(
        vocab=vocabulary, merges=merges_of(vocabulary, dict(zip(tokens, scores, strict=True))),
        unk_token=unknown, fuse_unk=True, byte_fallback=True,
    )  # fmt: skip
    backend = Backend(model)
    spaces = [normalizers.Replace(" ", SPACE)]
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("tokenizer.ggml.add_space_prefix", not gemma):
        spaces.insert(0, normalizers.Prepend(SPACE))
        parts.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(parts)
    return backend


def merges_of(vocabulary: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a third one, those of the highest score first."""
    found = []
    for token, score in scores.items():
        pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(-score, len(left), len(right), left, right) for left, right in known]
    found.sort(key=lambda one: one[:3])
    return [(left, right) for *_, left, right in found]
