"""Text as token ids, each with whether it is trained.

The whole text is tokenised once, as serving does it; which token belongs to the assistant is read from the tokenizer's
character offsets. Tokenising the turns one by one and joining them gives other ids at the seams.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kaito_core.data.chat import Rendered, completed, render, special_tokens
from kaito_core.data.formats import Conversation, Text
from kaito_core.plugins.types import ChatFormat
from kaito_core.problems import Problem, UserError


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence to train on."""

    input_ids: Sequence[int]
    trained: Sequence[int]
    """Per token 1 (true) where it carries loss: what the assistant says and the token that ends it. As long as ``input_ids``."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trained_tokens(self) -> int:
        """How many tokens carry loss. The first token of a sequence never does: nothing predicts it."""
        return sum(self.trained) - (1 if len(self.trained) and self.trained[0] else 0)


class ChatTokenizer:
    """A model's tokenizer and chat template together: conversations and texts become `Example`s."""

    def __init__(self, model_folder: Path, chat: ChatFormat) -> None:
        """Reads ``tokenizer.json`` and ``tokenizer_config.json`` of ``model_folder``; runs none of the model's code.

        What ``chat`` leaves empty is taken from the model's own files; without a template there either, texts become examples
        and conversations do not. Raises `UserError` when no token is known that ends an answer."""
        self._tokenizer = _load(model_folder / "tokenizer.json")
        self.special = special_tokens(model_folder)
        self.chat = chat = completed(chat, model_folder)
        """With the template and the stop tokens that are really used."""
        if not chat.stop_tokens:
            raise UserError(f"neither the preset nor the files of the model in {model_folder} say which token ends an answer",
                            "choose a model whose tokenizer_config.json has an eos_token")  # fmt: skip
        self.stop_ids: dict[str, int] = {}
        """The stop tokens by their text, the usual one first."""
        for token in chat.stop_tokens:
            number = self._tokenizer.token_to_id(token)
            if number is not None:
                self.stop_ids[token] = number
        if not self.stop_ids:
            raise UserError(f"none of the preset's stop tokens ({', '.join(chat.stop_tokens)}) is known to the tokenizer in "
                            f"{model_folder}", "the model folder is not of this preset's model")  # fmt: skip
        added = [t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special]
        self._control = re.compile("|".join(re.escape(t) for t in sorted(added, key=len, reverse=True)) or r"(?!)")

    def encode(self, samples: Sequence[Rendered | Text]) -> list[Example]:
        """One `Example` per sample, not truncated. Uses all cores for many samples.

        The chat template writes every special token of a conversation itself, so the tokenizer adds none, exactly as
        ``apply_chat_template`` and the ``/v1/chat/completions`` endpoints do. A plain text gets what the tokenizer adds
        (a beginning-of-text token, say), and the stop token at its end."""
        chats = [s.text for s in samples if isinstance(s, Rendered)]
        texts = [s.text for s in samples if isinstance(s, Text)]
        encoded = iter(self._tokenizer.encode_batch(chats, add_special_tokens=False))
        plain = iter(self._tokenizer.encode_batch(texts, add_special_tokens=True))
        return [_labelled(next(encoded), s) if isinstance(s, Rendered) else self._whole(next(plain)) for s in samples]

    def render(self, sample: Conversation | Text) -> Rendered | Text:
        """The conversation as text; a text stays what it is. Raises `kaito_core.data.chat.ChatError`, and a plain `UserError`
        when the model has no chat template."""
        return render(sample.messages, self.chat, self.special) if isinstance(sample, Conversation) else sample

    def ids(self, text: str) -> list[int]:
        """The ids of a rendered prompt."""
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Text, special tokens included."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def has_control_tokens(self, sample: Conversation | Text) -> bool:
        """Whether the data itself spells a special token (``<|end|>``): it would be read as one."""
        parts = [m.content for m in sample.messages] if isinstance(sample, Conversation) else [sample.text]
        return any(self._control.search(p) for p in parts)

    def _whole(self, encoding: Any) -> Example:
        ids = array("i", encoding.ids)
        if not len(encoding.offsets) or all(s == e for s, e in encoding.offsets):
            return Example(array("i"), b"")  # an empty text: nothing but special tokens
        eos = self._tokenizer.token_to_id(self.special.get("eos_token", ""))
        stops = {*self.stop_ids.values(), eos}
        while ids and ids[-1] in stops:
            ids.pop()
        ids.append(next(iter(self.stop_ids.values())))
        return Example(ids, b"\1" * len(ids))


def _labelled(encoding: Any, rendered: Rendered) -> Example:
    """A token is trained when it begins inside a span. A special token may swallow the space behind it (``rstrip``), so where
    a token ends says nothing."""
    trained = bytearray(len(encoding.ids))
    begins = [start for start, _ in encoding.offsets]
    for start, end in rendered.spans:
        first, behind = bisect_left(begins, start), bisect_left(begins, end)
        trained[first:behind] = b"\1" * (behind - first)
    return Example(array("i", encoding.ids), bytes(trained))


def _load(path: Path) -> Any:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise UserError(Problem("the model has no tokenizer.json", "kaito reads fast tokenizers only: choose another revision",
                                file=str(path)))  # fmt: skip
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises plain Exception
        raise UserError(Problem(f"not a tokenizer: {e}", "fetch the model again", file=str(path))) from e
    tokenizer.no_truncation()  # a file may carry the settings of whoever saved it
    tokenizer.no_padding()
    return tokenizer
