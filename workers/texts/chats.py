"""Chats in the model's own words: its template, in transformers' sandbox. No torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rayprune.specs.errors import SpecError
from rayprune.workers.texts.fields import Message, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Who speaks in ShareGPT's words, and in those of chat templates."""
_TODAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
"""Before templates that ask for the date, so that a text gives the same tokens every day."""


def chat_ids(
    messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", where: str
) -> list[int]:
    """The token ids of a chat of plain messages, as the model's template writes it, without a
    prompt for an answer.

    Raises:
        SpecError: the model has no template, or its template refuses the chat.
    """
    text = rendered(messages, tokenizer, where)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def rendered(
    messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", where: str
) -> str:
    """A chat of plain messages as the model's template writes it.

    Raises:
        SpecError: the model has no template, or its template refuses the chat.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise SpecError(
            f"{where}: is a chat, but the model has no chat template; put its chat_template.jinja"
            " into the model folder, or give plain text"
        )
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = _TODAY + template
        text: Any = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    # a template is a program of the model's: it may fail in any way
    except Exception as error:
        raise SpecError(
            f"{where}: the model's chat template refuses this chat ({str(error)[:200]}); mend or"
            " remove it"
        ) from None
    return str(text)


def plain_messages(messages: Sequence[Message], where: str) -> list[dict[str, Any]]:
    """Messages with `role` and `content`, whichever way they were written.

    Raises:
        SpecError: a message has another form, an unknown speaker, or more than text.
    """
    return [
        _plain(message, f"{where}: message {number}") for number, message in enumerate(messages, 1)
    ]


def _plain(message: Message, where: str) -> dict[str, Any]:
    if "role" in message:
        kept = {key: value for key, value in message.items() if value is not None}
        content = kept.get("content")
        if not isinstance(kept.get("role"), str):
            raise SpecError(f"{where}: its role is no text")
        if isinstance(content, list):
            kept["content"] = content = "".join(_part(part, where) for part in content)
        if not (isinstance(content, str) or (content is None and "tool_calls" in kept)):
            raise SpecError(f"{where}: has no text under 'content'; there are {listed(message)}")
        return kept
    speaker, text = message["from"], message.get("value")
    if not isinstance(text, str):
        raise SpecError(f"{where}: has no text under 'value'; there are {listed(message)}")
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise SpecError(
            f"{where}: is from {speaker!r}; known are {', '.join(_ROLES)}: rename or remove it"
        )
    return {"role": _ROLES[speaker], "content": text}


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise SpecError(f"{where}: holds {kind!r}; only text can be read: leave it out")
