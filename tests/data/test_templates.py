"""Templates: what they write, what they refuse, and that a checkpoint can hold them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_cli.data.formats import FORMATS, choose_format
from reft_cli.data.templates import (
    BareTemplate,
    Inline,
    TextTemplate,
    choose_template,
    placeholders,
    template_from_dict,
)
from reft_cli.errors import DataError, ReftError, SpecError
from small_tokenizers import CHAT, byte_level

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
PLACE = "train.jsonl:3"


def choose(given=None, *, name="completion", kind="causal_lm", columns=None, chat=True, mapping=None):
    given = Inline(*given) if isinstance(given, tuple) else given
    columns = list(columns or FORMATS[name].needed)
    chosen = choose_format(columns, where=PLACE, requested=name, mapping=mapping)
    return choose_template(given, data_format=chosen, task_kind=kind, columns=columns, tokenizer=byte_level(chat=chat))


def refused(*given, **settings):
    with pytest.raises(ReftError) as caught:
        choose(*given, **settings)
    return caught.value


def written(template, **fields):
    return template.render_prompt(fields, where=PLACE), template.render_completion(fields, where=PLACE)


def test_the_format_decides_without_a_template():
    assert choose().name == "plain"
    assert choose(name="alpaca").name == "alpaca"
    assert choose(name="messages").name == "chat"
    assert choose(name="text", kind="classification") == BareTemplate()
    assert choose(name="pair", kind="regression") == BareTemplate(pair=True)


def test_alpaca_is_the_text_of_the_paper():
    template = choose(name="alpaca")
    assert written(template, instruction="Add.", input="1 2", output="3") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
        "3",
    )
    without = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert written(template, instruction="Add.", input="", output="3")[0] == without
    assert written(template, instruction="Add.", input=None, output="3")[0] == without
    assert written(template, instruction="Add.", output="3")[0] == without
    assert template.prompt_fields == ("instruction",)
    assert choose("alpaca").render_prompt({"prompt": "Add."}) == without


def test_plain_is_the_columns_themselves():
    assert written(choose("plain"), prompt="a", completion=" b") == ("a", " b")
    assert written(choose("plain", name="text"), text="a", label=1) == ("a", "1")
    alpaca = choose("plain", name="alpaca")
    assert written(alpaca, instruction="a", input="b", output="c") == ("a\n\nb", "c")
    assert written(alpaca, instruction="a", input="", output="c") == ("a", "c")


def test_chat_splits_a_conversation_before_its_last_answer():
    template = choose(name="messages")
    assert written(template, messages=TALK) == ("<user>hi<bot>", "hello</s>")
    more = [*TALK, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "bye"}]
    assert written(template, messages=more) == ("<user>hi<bot>hello</s><user>and?<bot>", "bye</s>")
    assert template.render_prompt({"messages": TALK[:1]}) == "<user>hi<bot>"
    assert not template.special_tokens


def test_chat_makes_one_turn_of_other_formats():
    assert written(choose("chat"), prompt="hi", completion="hello") == ("<user>hi<bot>", "hello</s>")
    alpaca = choose("chat", name="alpaca")
    assert written(alpaca, instruction="a", input="b", output="c") == ("<user>a\n\nb<bot>", "c</s>")
    assert written(alpaca, instruction="a", output="c") == ("<user>a<bot>", "c</s>")
    assert choose("chat", name="text", kind="classification").render_prompt({"text": "x"}) == "<user>x<bot>"


def test_a_chat_template_that_writes_its_bos_gets_the_token():
    template = template_from_dict(choose(name="messages").to_dict() | {"source": "{{ bos_token }}" + CHAT})
    assert template.render_prompt({"messages": TALK}) == "<s><user>hi<bot>"


def test_inline_templates_use_any_column_mapped_names_first():
    template = choose(
        ("Q: {prompt} {hint} {{x}}\nA:", " {completion}"),
        columns=["prompt", "question", "completion", "hint"],
        mapping={"prompt": "question"},
    )
    fields = {"prompt": "mapped", "hint": 7, "completion": True}
    assert written(template, **fields) == ("Q: mapped 7 {x}\nA:", " true")
    assert template.prompt_fields == ("prompt", "hint")
    assert choose(("{prompt}!", None)).completion == "{completion}"
    assert choose(("{text}!", None), name="text").completion == "{label}"


@pytest.mark.parametrize(
    "template",
    [
        choose(),
        choose(name="alpaca"),
        choose(name="messages"),
        choose("chat", name="alpaca"),
        choose(name="pair", kind="classification"),
        choose(("{prompt}!", None)),
    ],
    ids=lambda template: template.name,
)
def test_templates_are_plain_values_in_a_checkpoint(template):
    assert template_from_dict(json.loads(json.dumps(template.to_dict()))) == template


def test_one_typed_text_fills_the_prompt():
    assert choose().fields_from_text("x") == {"prompt": "x"}
    assert choose(name="alpaca").fields_from_text("x") == {"instruction": "x"}
    assert choose("chat", name="alpaca").fields_from_text("x") == {"instruction": "x"}
    assert choose(name="text", kind="classification").fields_from_text("x") == {"text": "x"}
    chat = choose(name="messages")
    assert chat.render_prompt(chat.fields_from_text("x")) == "<user>x<bot>"


@given(st.text(), st.text())
def test_columns_are_never_read_as_templates(value, literal):
    escaped = literal.replace("{", "{{").replace("}", "}}")
    template = TextTemplate(escaped + "{a}", "")
    assert template.render_prompt({"a": value}) == literal + value
    assert placeholders(template.prompt) == ("a",)


@pytest.mark.parametrize("text", ["{a.__class__}", "{a[0]}", "{a!r}", "{a:>9}", "{}", "{ }", '{"x": 1}', "{a:{b}}"])
def test_a_placeholder_is_a_name_and_nothing_else(text):
    error = refused((text, None))
    assert isinstance(error, SpecError)
    reason = "is not the plain name of a column; write {{ and }} for braces that are text"
    assert str(error) == f"data.template.prompt: `{text}` {reason}"


def test_braces_that_are_text_may_hold_other_text_than_a_column():
    template = choose(("{{x}} {{ {prompt} }} {{{prompt}}}", "{completion}"))
    assert template.render_prompt({"prompt": "p"}) == "{x} { p } {p}"


def test_errors_of_the_spec_name_the_key():
    assert str(refused(("Q: {qestion}", "{answer}"), columns=["prompt", "completion"])) == (
        "data.template.prompt: `{qestion}` is no column; there are prompt, completion"
    )
    assert str(refused(("{prompt}", "{complation}"))) == (
        "data.template.completion: `{complation}` is no column; there are prompt, completion; "
        "did you mean `{completion}`?"
    )
    assert str(refused(("Q: {{ prompt }}", None))) == (
        "data.template.prompt: `{{ prompt }}` stands for the text `{ prompt }`; for the column write `{prompt}`"
    )
    assert str(refused(("{prompt", None))) == (
        "data.template.prompt: expected '}' before end of string; write {{ and }} for braces that are text"
    )
    assert str(refused("alpacca")) == (
        "data.template: `alpacca` is not a template; did you mean `alpaca`? there are alpaca, plain, chat, or a mapping"
    )
    assert str(refused("Q: {prompt}")) == (
        "data.template: `Q: {prompt}` is not a template; a text goes into a mapping: "
        "template: {prompt: 'Q: {prompt}', completion: …}"
    )
    assert str(refused("chat", chat=False)) == (
        "data.template: the tokenizer of the model has no chat template; use plain, alpaca, or "
        "{prompt: …, completion: …}"
    )
    assert str(refused(("{messages}", None), name="messages")) == (
        "data.template.completion: missing; the format has no answer of its own to put here"
    )


def test_errors_of_tasks_and_formats():
    assert str(refused(kind="classification")) == (
        "task.kind classification needs format text (text, label) or pair (text, text_pair, label), "
        "the rows have format completion; map them, for example columns: {text: prompt, label: …}"
    )
    assert str(refused(name="text")) == (
        "task.kind causal_lm cannot tell prompt and answer apart in format text; write both: "
        'data.template: {prompt: "{text}\\nAnswer:", completion: " {label}"}'
    )
    assert str(refused("plain", name="pair")) == (
        "template `plain` cannot tell prompt and answer apart in format pair; write both: "
        'data.template: {prompt: "{text} {text_pair}\\nAnswer:", completion: " {label}"}'
    )
    assert str(refused("alpaca", name="messages")) == (
        "template `alpaca` does not fit format messages; write data.template: chat"
    )


def error_of(action, *arguments, **given):
    with pytest.raises(DataError) as caught:
        action(*arguments, **given)
    return str(caught.value)


def test_errors_of_rows_name_the_place():
    template = choose(("{prompt} {hint}", None), columns=["prompt", "completion", "hint"])
    assert error_of(template.render_prompt, {"prompt": "x"}, where=PLACE) == (
        "train.jsonl:3: no column `hint`, which the template uses; there are prompt"
    )
    assert error_of(template.render_prompt, {"prompt": "x", "hint": None}, where=PLACE) == (
        "train.jsonl:3: column `hint` is null"
    )
    assert error_of(template.fields_from_text, "x") == (
        "the template's prompt needs the columns prompt, hint; give rows in a file: --input FILE.jsonl"
    )
    assert error_of(choose(("Hello:", None)).fields_from_text, "x") == (
        "the template's prompt has no {column} that a text could go into"
    )


def test_errors_of_conversations_name_the_place():
    template = choose(name="messages")
    assert error_of(template.render_completion, {"messages": TALK[:1]}, where=PLACE) == (
        "train.jsonl:3: the last message is of `user`; it has to be the assistant's answer"
    )
    assert error_of(template.render_prompt, {"prompt": "x"}, where=PLACE) == (
        "train.jsonl:3: no messages; there are prompt"
    )
    stored = template.to_dict()
    strict = template_from_dict(stored | {"source": "{{ raise_exception('roles must alternate') }}"})
    assert error_of(strict.render_prompt, {"messages": TALK}, where=PLACE) == (
        "train.jsonl:3: the chat template refuses the conversation: roles must alternate"
    )
    counting = template_from_dict(stored | {"source": "{{ messages|length }} {{ messages[0].content }}"})
    assert error_of(counting.render_completion, {"messages": TALK}, where=PLACE) == (
        "train.jsonl:3: the chat template writes the conversation differently once it is answered, so that no prompt "
        "can be cut off; use an inline data.template"
    )


def test_a_chat_template_cannot_reach_out_of_its_sandbox():
    template = template_from_dict(choose(name="messages").to_dict() | {"source": "{{ ''.__class__.__mro__ }}"})
    assert "refuses the conversation" in error_of(template.render_prompt, {"messages": TALK})


def test_a_reference_and_texts_that_are_written_differently():
    made = choose(
        ("{prompt}", "{completion}", "{gold}", {"####": "so it is", "x": ""}), columns=["prompt", "completion", "gold"]
    )
    row = {"prompt": "#### x", "completion": "1x\n#### 2", "gold": 3}
    assert made.render_prompt(row) == "#### x"
    assert made.render_completion(row) == "1\nso it is 2"
    assert made.render_reference(row) == "3"
    assert made.render_reference(row | {"gold": None}) is None  # then the completion is compared
    assert template_from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert choose(("{prompt}", None)).render_reference(row) is None
    with pytest.raises(DataError, match=r"^row: no column `gold`"):
        made.render_reference({"prompt": "a", "completion": "b"})


def test_text_before_a_prompt_is_literal():
    made = TextTemplate("{a}", "{b}", "short {a}").after("{x} }\n")
    assert made.render_prompt({"a": "1", "input": "2"}) == "{x} }\n1"
    assert made.render_prompt({"a": "1"}) == "{x} }\nshort 1"


def test_a_template_of_an_older_checkpoint():
    made = template_from_dict(
        {"kind": "text", "name": "inline", "prompt": "{a}", "completion": "", "prompt_without_input": None}
    )
    assert (made.reference, made.replace) == (None, {})
