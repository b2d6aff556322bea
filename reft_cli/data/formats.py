"""What a row's columns mean: the formats, and how a row becomes named fields.

Fields are the row's columns with those that the format knows under the format's names. A template may use any of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from reft_cli.errors import DataError, Problem

Fields = dict[str, Any]
SHAREGPT = {"role": "from", "content": "value"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Format:
    """Names of the columns of a row; `columns` says where they stand in the file, {name: column}."""

    name: str
    prompt: tuple[str, ...] = ()
    answer: str | None = None
    optional: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    """Names inside a message."""
    rejected: str | None = None
    """The answer that is not wanted, where a row is a pair."""
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def needed(self) -> tuple[str, ...]:
        """Names without which a training row cannot be read."""
        return (*self.prompt, *filter(None, (self.answer, self.rejected)))

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that can be mapped to a column."""
        return (*self.needed, *self.optional, *self.inside)

    def fields_of(self, row: Mapping[str, Any], *, where: str, with_answer: bool = True) -> Fields:
        """The row's columns, those of the format under its names and checked; `where` is the row's place."""
        fields = dict(row) | {name: row[column] for name, column in self.columns.items() if column in row}
        for name in self.needed if with_answer else self.prompt:
            if name not in fields:
                raise DataError(f"{where}: no column `{self.columns.get(name, name)}`; the row has {_listed(row)}")
            if name == "messages":
                fields[name] = self._messages(fields[name], where=where)
            elif not self._is_several(name, fields[name]) and as_text(fields[name]) is None:
                remedy = "; write data.format: preference_messages" if self._is_conversation(name, fields[name]) else ""
                raise DataError(f"{where}: column `{self.columns.get(name, name)}` {not_text(fields[name])}{remedy}")
        return fields

    def single(self, fields: Fields, *, where: str) -> Fields:
        """The fields of which one prompt and one answer can be written: of a pair with several answers, the first."""
        return fields if self.rejected is None else self.split(fields, where=where)[0]

    def _is_conversation(self, name: str, value: object) -> bool:
        """Whether a pair holds messages where texts were expected."""
        messages = isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)
        return self.rejected is not None and messages

    def _is_several(self, name: str, value: object) -> bool:
        """Whether it is a pair's answer as a list of texts."""
        is_answer = self.rejected is not None and name in (self.answer, self.rejected)
        texts = isinstance(value, list) and bool(value) and all(as_text(each) is not None for each in value)
        return is_answer and texts

    def split(self, fields: Mapping[str, Any], *, where: str) -> list[Fields]:
        """The fields of a pair; where its answers are lists, of the first with the first, the second with the second.

        What one list has more is left out. DataError: one is a list and the other is not.
        """
        assert self.answer is not None and self.rejected is not None, "a pair has two answers"
        several = [isinstance(fields[name], list) for name in (self.answer, self.rejected)]
        if not any(several):
            return [dict(fields)]
        if not all(several):
            names = [self.columns.get(name, name) for name in (self.answer, self.rejected)]
            raise DataError(f"{where}: of the columns {' and '.join(names)} one holds a list and the other does not")
        found = []
        for chosen, rejected in zip(fields[self.answer], fields[self.rejected], strict=False):
            answer, other = ({name, self.columns.get(name, name)} for name in (self.answer, self.rejected))
            found.append(dict(fields) | dict.fromkeys(answer, chosen) | dict.fromkeys(other, rejected))
        return found

    def rejected_first(self, fields: Mapping[str, Any]) -> Fields:
        """The fields of a pair with the rejected answer in the place of the chosen one."""
        assert self.answer is not None and self.rejected is not None, "a pair has two answers"
        other = fields[self.rejected]
        return dict(fields) | {self.answer: other, self.columns.get(self.answer, self.answer): other}

    def _messages(self, given: object, *, where: str, name: str = "messages") -> list[dict[str, Any]]:
        column = self.columns.get(name, name)
        if not isinstance(given, list) or not given:
            raise DataError(f"{where}: column `{column}` has to be a list of messages, {{role: …, content: …}}")
        role, content = (self.columns.get(name, name) for name in ("role", "content"))
        messages = []
        for number, message in enumerate(given, start=1):
            place = f"{where}: message {number} of `{column}`"
            if not isinstance(message, dict) or not {role, content} <= message.keys():
                found = _listed(message) if isinstance(message, dict) else "no object"
                sharegpt = isinstance(message, dict) and {*SHAREGPT.values()} <= message.keys()
                remedy = f"; write data.columns: {{{_pairs(SHAREGPT)}}}" if sharegpt else ""
                raise DataError(f"{place} needs texts {role} and {content}; it has {found}{remedy}")
            for key in (role, content):
                if not isinstance(message[key], str) or as_text(message[key]) is None:
                    raise DataError(f"{place}: {key} {not_text(message[key])}")
            rest = {key: value for key, value in message.items() if key not in (role, content) and value is not None}
            speaker = SHAREGPT_ROLES.get(message[role], message[role]) if role != "role" else message[role]
            messages.append({"role": speaker, "content": message[content], **rest})
        return messages

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint; `format_from_dict` reads them."""
        return {"name": self.name, "columns": dict(self.columns)}


class ConversationPairs(Format):
    """Pairs whose answers are conversations that differ in their last turn; `prompt` may hold the turns before them."""

    def fields_of(self, row: Mapping[str, Any], *, where: str, with_answer: bool = True) -> Fields:
        """The row's columns, and `messages`: the conversation up to and with the chosen answer, if there is one."""
        fields = dict(row) | {name: row[column] for name, column in self.columns.items() if column in row}
        before = self._turns(fields["prompt"], "prompt", where) if fields.get("prompt") else []
        if not with_answer and "chosen" not in fields:
            given = self._messages(fields["messages"], where=where) if "messages" in fields else before
            return fields | {"messages": given}
        for name in ("chosen", "rejected") if with_answer else ("chosen",):
            if name not in fields:
                raise DataError(f"{where}: no column `{self.columns.get(name, name)}`; the row has {_listed(row)}")
            turns = self._turns(fields[name], name, where)
            fields[name] = turns if turns[: len(before)] == before else [*before, *turns]
        if with_answer and fields["chosen"][:-1] != fields["rejected"][:-1]:
            raise DataError(f"{where}: the chosen and the rejected conversation differ before their last message")
        return fields | {"messages": fields["chosen"]}

    def _turns(self, given: object, name: str, where: str) -> list[dict[str, Any]]:
        """Messages; a text is one, of the user in a prompt and else of the assistant."""
        text = as_text(given) if isinstance(given, str) else None
        if text is not None:
            return [{"role": "user" if name == "prompt" else "assistant", "content": text}]
        return self._messages(given, where=where, name=name)

    def split(self, fields: Mapping[str, Any], *, where: str) -> list[Fields]:
        """The fields themselves."""
        return [dict(fields)]

    def rejected_first(self, fields: Mapping[str, Any]) -> Fields:
        """The fields with the rejected conversation in the place of the chosen one."""
        return dict(fields) | {"messages": fields["rejected"]}


COLUMNS = Format("columns")
"""No names of its own: an inline template says what is used."""
FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        Format("completion", prompt=("prompt",), answer="completion"),
        Format("alpaca", prompt=("instruction",), answer="output", optional=("input",)),
        Format("messages", prompt=("messages",), inside=("role", "content")),
        Format("text", prompt=("text",), answer="label"),
        Format("pair", prompt=("text", "text_pair"), answer="label"),
        Format("preference", prompt=("prompt",), answer="chosen", rejected="rejected"),
        ConversationPairs(
            "preference_messages",
            answer="chosen",
            optional=("prompt",),
            inside=("role", "content"),
            rejected="rejected",
        ),
    )
}
DETECTED = {name: each for name, each in FORMATS.items() if each.rejected is None}
"""Formats that are found by the columns; pairs are what the task asks for."""
GLUE_PAIR = {"text": "sentence1", "text_pair": "sentence2"}
GUESSES = {
    "prompt": ("question", "instruction", "input", "query", "source", "context", "text", "sentence"),
    "completion": ("answer", "output", "response", "target", "label", "chosen", "summary"),
    "chosen": ("preferred", "better", "accepted", "response_chosen", "win", "answer"),
    "rejected": ("dispreferred", "worse", "response_rejected", "lose"),
    "instruction": ("question", "prompt", "query", "input", "text"),
    "output": ("answer", "completion", "response", "target", "label"),
    "messages": ("conversations", "conversation", "dialog", "chat", "turns"),
    "text": ("sentence", "review", "content", "question", "prompt", "premise", "sentence1", "question1"),
    "text_pair": ("sentence2", "hypothesis", "question2", "answer", "sentence", "passage", "context"),
    "label": ("labels", "class", "target", "score", "category", "completion", "answer", "output"),
}


def format_from_dict(stored: Mapping[str, Any]) -> Format:
    """The inverse of `Format.to_dict`."""
    return replace({**FORMATS, "columns": COLUMNS}[stored["name"]], columns=dict(stored["columns"]))


def choose_format(
    columns: Sequence[str],
    *,
    where: str,
    requested: str = "auto",
    mapping: Mapping[str, str] | None = None,
    any_columns: bool = False,
    with_answer: bool = True,
) -> Format:
    """The format of rows with these columns, bound to `mapping` {name: column}. DataError says what is missing.

    `where` is the place of the first row. `any_columns`: a template names all columns itself, so auto asks for none.
    `with_answer=False`: rows to be answered, which need the prompt's columns only.
    """
    bound = dict(mapping or {})
    known = None if any_columns and requested == "auto" else _known_names(requested)
    _check_mapping(bound, columns, known=known, where=where)
    if known is None:
        return replace(COLUMNS, columns=bound)
    if requested == "auto":
        return _detect(columns, bound, where=where, with_answer=with_answer)
    chosen = _bind(FORMATS[requested], columns, bound)
    missing = _missing(chosen, columns, with_answer=with_answer)
    if missing:
        raise DataError(
            Problem(
                f"format `{requested}` needs columns {_listed(chosen.needed)}; found {_listed(columns)}.",
                file=where,
                hint=_mapping_hint(chosen, columns) + _conversations_hint(missing, requested=requested),
            )
        )
    return chosen


def as_text(value: object) -> str | None:
    """Text of a column: texts as they are, numbers and truth values as JSON writes them; None for anything else."""
    if isinstance(value, str):
        return value if value.isascii() or _is_unicode(value) else None
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, int | float) and math.isfinite(value) else None


def not_text(value: object) -> str:
    """What to say of a value that `as_text` has no text for."""
    if value is None:
        return "is null"
    if isinstance(value, str):
        return "holds half of a surrogate pair, which is no Unicode text"
    if isinstance(value, float):
        return f"is {value}; a missing value has no text"
    return f"holds a {type(value).__name__}, not text"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _detect(columns: Sequence[str], mapping: Mapping[str, str], *, where: str, with_answer: bool) -> Format:
    bound = [_bind(each, columns, mapping) for each in DETECTED.values()]
    fits = [each for each in bound if set(mapping) <= set(each.names)]
    fits = [each for each in fits if not _missing(each, columns, with_answer=with_answer)]
    if len(fits) > 1:  # a pair has the columns of a text too
        fits = [each for each in fits if each.name != "text" or all(other.name != "pair" for other in fits)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        names = " and ".join(f"`{each.name}`" for each in fits)
        raise DataError(f"{where}: columns {_listed(columns)} fit formats {names}; write one as data.format")
    needs = " · ".join(f"{each.name}: {_listed(each.needed)}" for each in DETECTED.values())
    nearest = max(bound, key=lambda each: _nearness(each, columns))
    raise DataError(
        Problem(
            f"no format fits columns {_listed(columns)}; formats need {needs}.",
            file=where,
            hint=_mapping_hint(nearest, columns),
        )
    )


def _bind(chosen: Format, columns: Sequence[str], mapping: Mapping[str, str]) -> Format:
    """The format with the mapping, and GLUE's names for a pair where the pair's own are absent."""
    implied: dict[str, str] = {}
    if chosen.name == "pair" and not {"text", "text_pair"} & {*columns, *mapping}:
        implied = {name: column for name, column in GLUE_PAIR.items() if column in columns}
    return replace(chosen, columns=implied | dict(mapping))


def _missing(chosen: Format, columns: Sequence[str], *, with_answer: bool) -> list[str]:
    needed = chosen.needed if with_answer else chosen.prompt
    return [name for name in needed if chosen.columns.get(name, name) not in columns]


def _known_names(requested: str) -> tuple[str, ...]:
    if requested != "auto":
        return FORMATS[requested].names
    return tuple(dict.fromkeys(name for each in DETECTED.values() for name in each.names))


def _check_mapping(
    mapping: Mapping[str, str], columns: Sequence[str], *, known: Sequence[str] | None, where: str
) -> None:
    for name, column in mapping.items():
        if known is not None and name not in known:
            raise DataError(
                f"data.columns: `{name}` is not a name of the format; those are {_listed(known)}{_near(name, known)}"
            )
        if name not in ("role", "content") and column not in columns:
            raise DataError(
                f"{where}: no column `{column}` (data.columns.{name}); found {_listed(columns)}{_near(column, columns)}"
            )


def _guess(chosen: Format, columns: Sequence[str]) -> dict[str, str]:
    """A column for every needed name that a likely one is found for."""
    guessed: dict[str, str] = {}
    for name in chosen.needed:
        likely = [each for each in (name, *GUESSES[name]) if each in columns and each not in guessed.values()]
        if likely:
            guessed[name] = likely[0]
    return guessed


def _nearness(chosen: Format, columns: Sequence[str]) -> tuple[int, int, int]:
    """Few names without a column, then many with the very column, then many names."""
    guessed = _guess(chosen, columns)
    exact = sum(name == column for name, column in guessed.items())
    return len(guessed) - len(chosen.needed), exact, len(chosen.needed)


def _mapping_hint(chosen: Format, columns: Sequence[str]) -> str:
    guessed = _guess(chosen, columns)
    wanted = {name: guessed.get(name, "…") for name in chosen.needed if guessed.get(name) != name}
    return f"Map them: columns: {{{_pairs(wanted)}}}"


def _conversations_hint(missing: Sequence[str], *, requested: str) -> str:
    """For pairs of whole conversations, which have no column of their own for the prompt."""
    whole = requested == "preference" and missing == ["prompt"]
    return "; where chosen and rejected are conversations, data.format: preference_messages" if whole else ""


def _pairs(mapping: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {column}" for name, column in mapping.items())


def _near(given: str, known: Sequence[str]) -> str:
    near = get_close_matches(given, known, n=1)
    return f"; did you mean `{near[0]}`?" if near else ""


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(names) or "none"
