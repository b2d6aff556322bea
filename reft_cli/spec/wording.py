"""What is said about a fault: the problem in plain words, and what to write instead where that can be guessed."""

from __future__ import annotations

from difflib import get_close_matches

from reft_cli.errors import Problem
from reft_cli.spec.faults import Fault
from reft_cli.spec.fields import Branch, branches_at, in_words, keys_in, options
from reft_cli.spec.names import nearest_keys, remark_on
from reft_cli.spec.quoting import KeyPath, dotted, listed, printable, yaml_inline
from reft_cli.spec.scalars import Scalar, read_scalar
from reft_cli.spec.task import KINDS_ELSEWHERE
from reft_cli.spec.yaml_tree import Node

Said = tuple[str, str | None]  # a message, and the bare value to write instead
OTHER_WORDS = {
    "yes": "true",
    "on": "true",
    "y": "true",
    "no": "false",
    "off": "false",
    "n": "false",
    "none": "null",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "nodireft": "direft",
    "4bit": "nf4",
    "int4": "nf4",
    "8bit": "int8",
    "fp8": "float8",
    "cosine_with_restarts": "cosine",
    "constant_with_warmup": "constant",
    **KINDS_ELSEWHERE,
    "em": "exact_match",
    "mcc": "matthews",
    "sharegpt": "messages",
    "openai": "messages",
    "chatml": "messages",
}


def problem_of(fault: Fault, root: Node) -> Problem:
    """The problem of a fault, at the place that a user wrote."""
    node = _nearest(root, fault.path)
    message, hint = _said(fault, node)
    return node.at.problem(message, key=dotted(fault.path), hint=hint or _of_a_suite(fault, root))


def _nearest(root: Node, path: KeyPath) -> Node:
    """The node at a path, or the one above it that is there and that a user wrote."""
    for part in path:
        inner = root.child(part)
        if inner is None or inner.at.suite:
            break
        root = inner
    return root


def _said(fault: Fault, node: Node) -> Said:
    if fault.is_unknown_key:
        return _unknown_key(fault.path)
    if fault.kind == "missing":
        return _missing(fault.path), None
    if fault.kind == "too_short":
        return f"at least {fault.error['ctx']['min_length']} are needed", None
    if isinstance(fault.cause, ValueError):
        return printable(str(fault.cause), limit=400), None
    return _wrong_value(node, list(fault.branches))


def _of_a_suite(fault: Fault, root: Node) -> str | None:
    """How to get rid of a suite's value that excludes one of the user's."""
    for key in fault.keys:
        node = root.find(key)
        if node and node.at.suite:
            return f"{dotted(key)} is of {node.at.suite}; write another, or null"
    return None


def _unknown_key(path: KeyPath) -> Said:
    near, remark = nearest_keys(path), remark_on(path)
    if near:
        meant = listed([f"`{key}`" for key in near]) + (f" ({remark})" if remark else "")
        return f"unknown key; did you mean {meant}?", near[0]
    if remark:
        return f"unknown key; {remark}", None
    return f"unknown key; known here: {', '.join(keys_in(path[:-1]))}", None


def _missing(path: KeyPath) -> str:
    """The key's own docstring says what is missing."""
    *above, last = path
    sections = [branch.section for branch in branches_at(tuple(above)) if branch.section]
    text = " ".join((sections[0].model_fields[str(last)].description or "").split())
    return f"missing; {text[:1].lower()}{text[1:].rstrip('.')}"


def _wrong_value(node: Node, branches: list[Branch]) -> Said:
    words = in_words(branches)
    if node.plain and not node.text:
        if len(branches) == 1 and branches[0].is_bare_section:
            return "the section is empty; remove the line, or give it keys", None
        return f"no value is given; write {words}", None
    if node.value == "" and any(branch.type is str for branch in branches):
        return "the text is empty", None
    advice, hint = _advice(node, branches)
    return f"{_shown(node)} is not {words}{advice}", hint


def _shown(node: Node) -> str:
    if isinstance(node.value, dict | list):
        return "a mapping" if isinstance(node.value, dict) else "a list"
    looks_typed = not isinstance(read_scalar(node.text), str)
    return f'`"{printable(node.text)}"`' if looks_typed and not node.plain else f"`{printable(node.text)}`"


def _advice(node: Node, branches: list[Branch]) -> Said:
    """What to write instead, if that can be guessed, and the bare value of it."""
    types = [branch.type for branch in branches]
    only_text = str in types and all(branch.type is str or branch.section for branch in branches)
    if isinstance(node.value, dict | list):  # `prompt: {question}` is a mapping to YAML
        return ("; put it in quotes" if only_text and isinstance(node.value, dict) else ""), None
    bare = read_scalar(node.text)
    if not node.plain and _fits_without_quotes(bare, node.text, branches):
        return "; remove the quotes", node.text
    if only_text and bare is not None and not isinstance(node.value, str):
        return "; put it in quotes", f'"{printable(node.text)}"'
    if [branch.container for branch in branches] == [list] and bare is not None:
        listing = yaml_inline([bare])
        return f"; write `{listing}`", listing
    others = (["true", "false"] if bool in types else []) + (["null"] if branches[0].nullable else [])
    guess = _guess(node.text, options(branches), others=others)
    return (f"; did you mean `{guess}`?", guess) if guess else ("", None)


def _fits_without_quotes(bare: Scalar, text: str, branches: list[Branch]) -> bool:
    types = [branch.type for branch in branches]
    is_number = type(bare) in (int, float) and (int in types or float in types)
    is_switch = type(bare) is bool and bool in types
    return is_number or is_switch or (not isinstance(bare, str) and text in options(branches))


def _guess(text: str, words: list[str], *, others: list[str]) -> str | None:
    """The nearest of the words, or of what other tools call them; `others` only by another name."""
    plain = text.lower()
    if OTHER_WORDS.get(plain) in [*words, *others]:
        return OTHER_WORDS[plain]
    by_letters = {word.lower(): word for word in words}
    near = get_close_matches(plain, by_letters, 1, 0.5)
    return by_letters[near[0]] if near else None
