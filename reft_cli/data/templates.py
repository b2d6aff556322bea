"""How fields become the text of a prompt and of its answer; a template is kept in the checkpoint and used again there.

Three kinds: text with {column} placeholders, the chat template of a tokenizer, and the bare text (or pair of texts) of
a classifier. A placeholder is a name and nothing else: no attributes, no indexing, no conversions.
"""

from __future__ import annotations

import dataclasses
import re
import string
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from reft_cli.data.formats import Format, as_text, not_text
from reft_cli.errors import DataError, Problem, SpecError
from reft_cli.kinds import ANSWERED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
NAMES = ("alpaca", "plain", "chat")
CONVERSATIONS = ("messages", "preference_messages")  # formats whose rows have turns


@dataclass(frozen=True)
class Inline:
    """A template as a spec has it."""

    prompt: str
    completion: str | None = None
    reference: str | None = None
    replace: Mapping[str, str] = field(default_factory=dict)


class Template(ABC):
    """Fields -> texts."""

    name: str
    special_tokens: bool = True
    """Whether the tokenizer's own special tokens (BOS, [CLS]) are put around the text."""

    @property
    @abstractmethod
    def prompt_fields(self) -> tuple[str, ...]:
        """Names that a prompt cannot do without."""

    @abstractmethod
    def render_prompt(self, fields: Mapping[str, Any], *, where: str = "prompt") -> str:
        """The text up to where the model takes over; DataError, with `where`, if a field is missing."""

    @abstractmethod
    def render_completion(self, fields: Mapping[str, Any], *, where: str = "row") -> str:
        """The text that is learned."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint; `template_from_dict` reads them."""

    def render_reference(self, fields: Mapping[str, Any], *, where: str = "row") -> str | None:
        """The text that an answer is scored against, where that is not the completion."""
        return None

    def render_pair(self, fields: Mapping[str, Any], *, where: str = "prompt") -> str | None:
        """The second text of a pair, for tokenizers that join two texts themselves."""
        return None

    def fields_from_text(self, text: str) -> dict[str, Any]:
        """Fields of one typed prompt, as `reft infer --prompt` has it; DataError if one text is not enough."""
        names = self.prompt_fields
        if len(names) != 1:
            raise DataError(
                f"the template's prompt needs the columns {', '.join(names)}; give rows in a file: --input FILE.jsonl"
                if names
                else "the template's prompt has no {column} that a text could go into"
            )
        return {names[0]: [{"role": "user", "content": text}] if names == ("messages",) else text}


@dataclass(frozen=True)
class TextTemplate(Template):
    """Text with placeholders; `prompt_without_input` is used for rows whose `input` is absent or empty.

    `replace` are texts that the completion has in other words than the row.
    """

    prompt: str
    completion: str
    prompt_without_input: str | None = None
    name: str = "inline"
    reference: str | None = None
    replace: Mapping[str, str] = field(default_factory=dict)

    @property
    def prompt_fields(self) -> tuple[str, ...]:
        """The placeholders of the prompt, each once."""
        return placeholders(self.prompt_without_input or self.prompt)

    def render_prompt(self, fields: Mapping[str, Any], *, where: str = "prompt") -> str:
        """The prompt with its placeholders filled."""
        short = self.prompt_without_input
        chosen = short if short is not None and fields.get("input") in (None, "") else self.prompt
        return _fill(chosen, fields, where=where)

    def render_completion(self, fields: Mapping[str, Any], *, where: str = "row") -> str:
        """The answer with its placeholders filled."""
        text = _fill(self.completion, fields, where=where)
        for old, new in self.replace.items():
            text = text.replace(old, new)
        return text

    def render_reference(self, fields: Mapping[str, Any], *, where: str = "row") -> str | None:
        """The reference with its placeholders filled; None if there is none, or the row has null in its place."""
        if self.reference is None or any(fields.get(name, "") is None for name in placeholders(self.reference)):
            return None
        return _fill(self.reference, fields, where=where)

    def after(self, examples: str) -> TextTemplate:
        """The template with a text before each prompt, such as solved examples."""
        literal = examples.replace("{", "{{").replace("}", "}}")
        short = self.prompt_without_input
        return dataclasses.replace(
            self, prompt=literal + self.prompt, prompt_without_input=None if short is None else literal + short
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "kind": "text",
            "name": self.name,
            "prompt": self.prompt,
            "completion": self.completion,
            "prompt_without_input": self.prompt_without_input,
            "reference": self.reference,
            "replace": dict(self.replace),
        }


@dataclass(frozen=True)
class ChatTemplate(Template):
    """A tokenizer's chat template with the special tokens it writes, for `messages` or for one turn of the user.

    `source` is its Jinja text, rendered by transformers in a sandbox. The template writes all special tokens itself.
    """

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)
    user: tuple[str, ...] = ("messages",)
    """`messages`, or the fields that make the user's turn: those that are not empty, a blank line between them."""
    answer: str | None = None
    """The field that is the assistant's turn; None: the last of `messages`."""
    name: str = "chat"
    special_tokens: bool = False

    @property
    def prompt_fields(self) -> tuple[str, ...]:
        """`messages`, or the first field of the user's turn."""
        return self.user[:1] if "input" in self.user else self.user

    def render_prompt(self, fields: Mapping[str, Any], *, where: str = "prompt") -> str:
        """The conversation up to the header of the assistant's next turn."""
        return self._render(self._turns(fields, where=where), True, where=where)

    def render_completion(self, fields: Mapping[str, Any], *, where: str = "row") -> str:
        """The assistant's last turn with what ends it: the whole conversation less `render_prompt`'s part."""
        turns, prompt = self._turns(fields, where=where), self.render_prompt(fields, where=where)
        if self.answer is not None:
            answer: dict[str, Any] = {"role": "assistant", "content": _text(fields, self.answer, where=where)}
        elif (answer := fields["messages"][-1])["role"] != "assistant":
            raise DataError(f"{where}: the last message is of `{answer['role']}`; it has to be the assistant's answer")
        whole = self._render([*turns, answer], False, where=where)
        if not whole.startswith(prompt):
            raise DataError(
                f"{where}: the chat template writes the conversation differently once it is answered, so that no "
                f"prompt can be cut off; use an inline data.template"
            )
        return whole[len(prompt) :]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "kind": "chat",
            "source": self.source,
            "tokens": dict(self.tokens),
            "user": list(self.user),
            "answer": self.answer,
        }

    def _turns(self, fields: Mapping[str, Any], *, where: str) -> list[dict[str, Any]]:
        """The conversation without its answer."""
        if self.user == ("messages",):
            if not fields.get("messages"):
                raise DataError(f"{where}: no messages; there are {', '.join(fields) or 'no columns'}")
            messages: list[dict[str, Any]] = list(fields["messages"])
            return messages[:-1] if messages[-1]["role"] == "assistant" else messages
        texts = [_text(fields, self.user[0], where=where)]
        texts += [_text(fields, name, where=where) for name in self.user[1:] if fields.get(name) not in (None, "")]
        return [{"role": "user", "content": "\n\n".join(texts)}]

    def _render(self, messages: list[dict[str, Any]], generation_prompt: bool, *, where: str) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, _ = render_jinja_template(
                [messages], chat_template=self.source, add_generation_prompt=generation_prompt, **self.tokens
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"{where}: the chat template refuses the conversation: {error}") from error
        return str(texts[0])


@dataclass(frozen=True)
class BareTemplate(Template):
    """The row's own text, or its two texts as the tokenizer's pair; there is no answer to write."""

    pair: bool = False
    name: str = "bare"

    @property
    def prompt_fields(self) -> tuple[str, ...]:
        """`text`, and `text_pair` if there are two."""
        return ("text", "text_pair") if self.pair else ("text",)

    def render_prompt(self, fields: Mapping[str, Any], *, where: str = "prompt") -> str:
        """The text."""
        return _text(fields, "text", where=where)

    def render_pair(self, fields: Mapping[str, Any], *, where: str = "prompt") -> str | None:
        """The second text."""
        return _text(fields, "text_pair", where=where) if self.pair else None

    def render_completion(self, fields: Mapping[str, Any], *, where: str = "row") -> str:
        """Nothing."""
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"kind": "bare", "pair": self.pair}


def template_from_dict(stored: Mapping[str, Any]) -> Template:
    """The inverse of `Template.to_dict`."""
    kind, values = stored["kind"], {key: value for key, value in stored.items() if key != "kind"}
    if kind == "chat":
        return ChatTemplate(values["source"], values["tokens"], tuple(values["user"]), values["answer"])
    return TextTemplate(**values) if kind == "text" else BareTemplate(**values)


def choose_template(
    given: str | Inline | None,
    *,
    data_format: Format,
    task_kind: str,
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> Template:
    """The template that `data.template` means for rows of this format.

    `given` is a name, an inline one, or None for the format's own. SpecError for an unknown name or
    placeholder; DataError if the rows have nothing for the task to learn.
    """
    learns_text = task_kind in ANSWERED
    if isinstance(given, Inline):
        return _inline(given, data_format=data_format, columns=columns, learns_text=learns_text)
    if given is not None and given not in NAMES:
        raise SpecError(_unknown_template(given))
    if not learns_text and data_format.name not in ("text", "pair"):
        raise DataError(
            f"task.kind {task_kind} needs format text (text, label) or pair (text, text_pair, label), "
            f"the rows have format {data_format.name}; map them, for example columns: {{text: {columns[0]}, label: …}}"
        )
    if given is None and not learns_text:
        return BareTemplate(pair=data_format.name == "pair")
    if given == "chat" or (given is None and data_format.name in CONVERSATIONS):
        return _chat(data_format, tokenizer)
    return _named(given, data_format)


def placeholders(text: str) -> tuple[str, ...]:
    """Names in braces, each once, in their order."""
    return tuple(dict.fromkeys(name for _, name in _segments(text) if name is not None))


def _named(given: str | None, data_format: Format) -> Template:
    if data_format.name == "alpaca" and given != "plain":
        return TextTemplate(ALPACA_WITH_INPUT, "{output}", ALPACA, "alpaca")
    if data_format.name == "alpaca":
        return TextTemplate("{instruction}\n\n{input}", "{output}", "{instruction}", "plain")
    if data_format.name in CONVERSATIONS:
        raise DataError(f"template `{given}` does not fit format {data_format.name}; write data.template: chat")
    if len(data_format.prompt) != 1 or data_format.answer is None or (given, data_format.name) == (None, "text"):
        wanted = f"template `{given}`" if given else "task.kind causal_lm"
        shown = " ".join(f"{{{name}}}" for name in data_format.prompt)
        raise DataError(
            f"{wanted} cannot tell prompt and answer apart in format {data_format.name}; write both: "
            f'data.template: {{prompt: "{shown}\\nAnswer:", completion: " {{label}}"}}'
        )
    main, answer = data_format.prompt[0], f"{{{data_format.answer}}}"
    if given == "alpaca":
        return TextTemplate(ALPACA.replace("{instruction}", f"{{{main}}}"), answer, name="alpaca")
    return TextTemplate(f"{{{main}}}", answer, name="plain")


def _chat(data_format: Format, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    if not tokenizer.chat_template:
        raise SpecError(
            Problem(
                f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template; "
                "use plain, alpaca, or {prompt: …, completion: …}",
                key="data.template",
            )
        )
    tokens = {name: str(tok) for name, tok in tokenizer.special_tokens_map.items() if not isinstance(tok, list | tuple)}
    if data_format.name in CONVERSATIONS:
        return ChatTemplate(tokenizer.get_chat_template(), tokens)
    return ChatTemplate(
        tokenizer.get_chat_template(), tokens, (*data_format.prompt, *data_format.optional), data_format.answer
    )


def _inline(given: Inline, *, data_format: Format, columns: Sequence[str], learns_text: bool) -> TextTemplate:
    completion = given.completion
    if completion is None and data_format.answer is None and learns_text:
        raise SpecError(
            Problem("missing; the format has no answer of its own to put here", key="data.template.completion")
        )
    if completion is None:
        completion = f"{{{data_format.answer}}}" if data_format.answer else ""
    names = tuple(dict.fromkeys((*data_format.columns, *data_format.needed, *data_format.optional, *columns)))
    for part, text in (("prompt", given.prompt), ("completion", completion), ("reference", given.reference or "")):
        key = f"data.template.{part}"
        try:
            used = placeholders(text)
        except ValueError as error:
            raise SpecError(Problem(str(error), key=key)) from error
        for name in used:
            if name not in names:
                near = get_close_matches(name, names, n=1)
                meant = f"; did you mean `{{{near[0]}}}`?" if near else ""
                raise SpecError(Problem(f"`{{{name}}}` is no column; there are {', '.join(names)}{meant}", key=key))
        written = "".join(literal + ("" if name is None else "{") for literal, name in _segments(text))
        doubled = next((each for each in re.findall(r"{([^{}]*)}", written) if each.strip() in names), None)
        if doubled is not None:  # as Jinja has it; each row would have the same text
            said = (
                f"`{{{{{doubled}}}}}` stands for the text `{{{doubled}}}`; for the column write `{{{doubled.strip()}}}`"
            )
            raise SpecError(Problem(said, key=key))
    return TextTemplate(given.prompt, completion, reference=given.reference, replace=given.replace)


def _unknown_template(given: str) -> Problem:
    if "{" in given:
        hint = f"a text goes into a mapping: template: {{prompt: {given!r}, completion: …}}"
    else:
        near = get_close_matches(given, NAMES, n=1)
        hint = (f"did you mean `{near[0]}`? " if near else "") + f"there are {', '.join(NAMES)}, or a mapping"
    return Problem(f"`{given}` is not a template; {hint}", key="data.template")


@lru_cache(maxsize=64)
def _segments(text: str) -> tuple[tuple[str, str | None], ...]:
    """(literal, placeholder after it or None); ValueError for anything that is not a plain name."""
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{str(error).lower()}; write {{{{ and }}}} for braces that are text") from error
    for _, name, spec, conversion in parsed:
        if name is not None and (spec or conversion or not name.strip() or set(name) & set(".[]")):
            shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(
                f"`{{{shown}}}` is not the plain name of a column; write {{{{ and }}}} for braces that are text"
            )
    return tuple((literal, name) for literal, name, _, _ in parsed)


def _fill(text: str, fields: Mapping[str, Any], *, where: str) -> str:
    return "".join(
        literal + (_text(fields, name, where=where) if name is not None else "") for literal, name in _segments(text)
    )


def _text(fields: Mapping[str, Any], name: str, *, where: str) -> str:
    if name not in fields:
        raise DataError(
            f"{where}: no column `{name}`, which the template uses; there are {', '.join(fields) or 'none'}"
        )
    text = as_text(fields[name])
    if text is None:
        raise DataError(f"{where}: column `{name}` {not_text(fields[name])}")
    return text
