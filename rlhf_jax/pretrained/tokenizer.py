"""Text to tokens: the model's own tokenizer and chat template, used the same way everywhere."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from experiment_runs.errors import UserError

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARK = "\N{BLACK SQUARE}mark\N{BLACK SQUARE}"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A prompt becomes prefix + text + suffix; a response becomes text + end."""

    huggingface: PreTrainedTokenizerFast
    prefix: tuple[int, ...]  # the chat template before the user's text
    suffix: tuple[int, ...]  # and after it, up to where the assistant begins to write
    end: int  # ends a response
    pad: int  # never equal to `end`: a padded end would teach the model never to stop

    @classmethod
    def of(cls, huggingface: PreTrainedTokenizerFast) -> "Tokenizer":
        """Wraps a transformers tokenizer with a chat template.

        The system message is empty, so that models whose template adds a default one get none.

        Raises:
          UserError: there is no chat template, no end token, or no token left to pad with.
        """
        if not huggingface.chat_template or huggingface.eos_token_id is None:
            raise UserError(
                f"{huggingface.name_or_path}: tokenizer_config.json lacks chat_template or "
                "eos_token; choose an instruction-tuned model"
            )
        messages = [{"role": "system", "content": ""}, {"role": "user", "content": MARK}]
        text = huggingface.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        before, after = (
            tuple(huggingface(part, add_special_tokens=False)["input_ids"])
            for part in text.split(MARK)
        )
        # From here on special tokens written by users are plain text, not instructions.
        huggingface.backend_tokenizer.encode_special_tokens = True
        pad = choose_pad(huggingface, used={*before, *after})
        return cls(huggingface, before, after, huggingface.eos_token_id, pad)

    @functools.cached_property
    def vocab_size(self) -> int:
        return len(self.huggingface)

    @property
    def template_length(self) -> int:
        """Tokens that the template adds to a prompt."""
        return len(self.prefix) + len(self.suffix)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Plain tokens of each text, without template."""
        encoded = self.huggingface.backend_tokenizer.encode_batch_fast(
            list(texts), add_special_tokens=False
        )
        return [item.ids for item in encoded]

    def decode(self, tokens: Sequence[int] | Int[np.ndarray, "time"]) -> str:
        """The text of tokens; the end token and padding show as nothing."""
        kept = [int(token) for token in tokens if token not in (self.end, self.pad)]
        return self.huggingface.decode(kept, clean_up_tokenization_spaces=False)

    def decode_exact(self, tokens: Sequence[int] | Int[np.ndarray, "time"]) -> str:
        """The text of tokens with every special token written out."""
        return self.huggingface.decode(list(tokens), clean_up_tokenization_spaces=False)


def choose_pad(huggingface: PreTrainedTokenizerFast, used: set[int]) -> int:
    """The tokenizer's pad token, or another special token where that one has a meaning."""
    used = used | {huggingface.eos_token_id}
    special = [huggingface.pad_token_id, huggingface.unk_token_id]
    special += sorted(huggingface.added_tokens_decoder)
    for token in special:
        if token is not None and token not in used:
            return token
    raise UserError(
        f"{huggingface.name_or_path}: no special token to pad with that is not in use; "
        "add a pad_token other than eos_token to tokenizer_config.json"
    )


def byte_tokenizer() -> Tokenizer:
    """256 bytes and four special tokens, for tests and the `tiny` profile."""
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    return Tokenizer.of(
        byte_level(vocabulary, [], special, end="<|im_end|>", pad="<|pad|>", template=CHATML)
    )


def byte_level(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    special: list[str],
    *,
    end: str,
    pad: str | None,
    template: str,
    split_digits: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer from its parts."""
    backend = Backend(BPE(vocab=vocabulary, merges=merges, fuse_unk=False))
    split = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    split.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=end,
        pad_token=pad,
        unk_token=special[0] if pad is None else special[-1],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
