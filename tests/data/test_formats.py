"""Columns to fields: what is recognised, and the errors that say what to map."""

import pytest

from reft_cli.data.formats import COLUMNS, FORMATS, choose_format, format_from_dict
from reft_cli.errors import DataError

PLACE = "data/train.jsonl:1"


def choose(*columns, **given):
    return choose_format(columns, where=PLACE, **given)


def refused(*columns, **given):
    with pytest.raises(DataError) as caught:
        choose(*columns, **given)
    problem = caught.value.problems[0]
    return str(problem) + (f"\n  {problem.hint}" if problem.hint else "")


def wrong(name, row, **columns):
    with pytest.raises(DataError) as caught:
        choose_format([*columns.values(), *row], where=PLACE, requested=name, mapping=columns).fields_of(
            row, where="a.jsonl:7"
        )
    return str(caught.value)


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (("prompt", "completion"), "completion"),
        (("instruction", "input", "output", "answer"), "alpaca"),
        (("instruction", "output"), "alpaca"),
        (("messages", "id"), "messages"),
        (("text", "label", "label_name"), "text"),
        (("text", "text_pair", "label"), "pair"),
        (("sentence1", "sentence2", "label"), "pair"),
    ],
)
def test_auto_knows_exact_names(columns, name):
    assert choose(*columns).name == name


def test_rows_to_be_answered_need_no_answer():
    assert choose("prompt", with_answer=False).name == "completion"
    assert choose("instruction", "input", with_answer=False).name == "alpaca"
    assert choose("sentence1", "sentence2", with_answer=False).name == "pair"
    assert FORMATS["completion"].fields_of({"prompt": "a"}, where=PLACE, with_answer=False) == {"prompt": "a"}


def test_a_mapping_gives_columns_the_names_of_the_format():
    chosen = choose("question", "final", "extra", mapping={"prompt": "question", "completion": "final"})
    fields = chosen.fields_of({"question": "2+2", "final": 4, "extra": None}, where=PLACE)
    assert chosen.name == "completion"
    assert fields == {"question": "2+2", "final": 4, "extra": None, "prompt": "2+2", "completion": 4}


def test_a_mapped_name_hides_the_column_of_that_name():
    chosen = choose("prompt", "question", "completion", mapping={"prompt": "question"})
    row = {"prompt": "no", "question": "yes", "completion": "x"}
    assert chosen.fields_of(row, where=PLACE)["prompt"] == "yes"


def test_glue_pairs_are_renamed():
    row = {"sentence1": "a", "sentence2": "b", "label": 1}
    fields = choose(*row).fields_of(row, where=PLACE)
    assert (fields["text"], fields["text_pair"], fields["label"]) == ("a", "b", 1)


def test_a_template_that_names_all_columns_needs_no_format():
    chosen = choose("question", "final", any_columns=True, mapping={"q": "question"})
    assert chosen.name == "columns"
    assert chosen.fields_of({"question": "x", "final": None}, where=PLACE)["q"] == "x"


def test_formats_are_plain_values_in_a_checkpoint():
    for chosen in (*FORMATS.values(), COLUMNS, choose("a", "b", mapping={"prompt": "a", "completion": "b"})):
        assert format_from_dict(chosen.to_dict()) == chosen


def test_missing_columns_are_named_with_the_mapping_to_write():
    assert refused("question", "answer", requested="alpaca") == (
        "data/train.jsonl:1: format `alpaca` needs columns instruction, output; found question, answer.\n"
        "  Map them: columns: {instruction: question, output: answer}"
    )
    assert refused("instruction", "response", requested="alpaca").endswith("columns: {output: response}")
    assert refused("foo", requested="messages").endswith("columns: {messages: …}")
    assert refused("question", "answer", "final") == (
        "data/train.jsonl:1: no format fits columns question, answer, final; formats need "
        "completion: prompt, completion · alpaca: instruction, output · messages: messages · text: text, label · "
        "pair: text, text_pair, label.\n  Map them: columns: {prompt: question, completion: answer}"
    )
    assert refused("conversations").endswith("columns: {messages: conversations}")
    assert refused("premise", "hypothesis", "label").endswith("columns: {text: premise, text_pair: hypothesis}")
    assert refused("sentence", "label").endswith("columns: {text: sentence}")


def test_more_than_one_format():
    assert refused("prompt", "completion", "messages") == (
        "data/train.jsonl:1: columns prompt, completion, messages fit formats `completion` and `messages`; "
        "write one as data.format"
    )


def test_wrong_mappings():
    assert refused("question", "answer", mapping={"prompt": "qestion", "completion": "answer"}) == (
        "data/train.jsonl:1: no column `qestion` (data.columns.prompt); found question, answer; "
        "did you mean `question`?"
    )
    assert refused("question", "answer", requested="completion", mapping={"promt": "question"}) == (
        "data.columns: `promt` is not a name of the format; those are prompt, completion; did you mean `prompt`?"
    )
    assert refused("question", mapping={"zzz": "question"}) == (
        "data.columns: `zzz` is not a name of the format; those are prompt, completion, instruction, output, input, "
        "messages, role, content, text, label, text_pair"
    )


def test_rows_that_do_not_fit():
    assert wrong("completion", {"prompt": "x"}, completion="answer") == (
        "a.jsonl:7: no column `answer`; the row has prompt"
    )
    assert wrong("completion", {"prompt": None, "completion": ""}) == "a.jsonl:7: column `prompt` is null"
    assert wrong("completion", {"prompt": ["x"], "completion": ""}) == (
        "a.jsonl:7: column `prompt` holds a list, not text"
    )
    assert wrong("text", {"text": "\ud83d", "label": 1}) == (
        "a.jsonl:7: column `text` holds half of a surrogate pair, which is no Unicode text"
    )


def test_numbers_and_truth_values_are_text_too():
    row = {"prompt": 18.0, "completion": True}
    assert choose(*row).fields_of(row, where=PLACE) == row


def test_messages_are_checked():
    chat = [{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": "yes", "weight": 1}]
    fields = FORMATS["messages"].fields_of({"messages": chat}, where=PLACE)
    assert fields["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes", "weight": 1},
    ]
    whole = "a.jsonl:7: column `messages` has to be a list of messages, {role: …, content: …}"
    assert wrong("messages", {"messages": "hi"}) == whole
    assert wrong("messages", {"messages": []}) == whole
    assert wrong("messages", {"messages": [{"from": "human", "value": "hi"}]}) == (
        "a.jsonl:7: message 1 of `messages` needs texts role and content; it has from, value; "
        "write data.columns: {role: from, content: value}"
    )
    assert wrong("messages", {"messages": [*chat[:1], {"role": "assistant", "content": None}]}) == (
        "a.jsonl:7: message 2 of `messages`: content is null"
    )
    assert wrong("messages", {"messages": [{"role": "user", "content": "\ud83d"}]}) == (
        "a.jsonl:7: message 1 of `messages`: content holds half of a surrogate pair, which is no Unicode text"
    )
    assert wrong("messages", {"messages": [*chat, "x"]}) == (
        "a.jsonl:7: message 3 of `messages` needs texts role and content; it has no object"
    )


def test_other_names_inside_messages_are_mapped_with_their_roles():
    mapping = {"messages": "conversations", "role": "from", "content": "value"}
    chosen = choose("conversations", mapping=mapping)
    row = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}
    assert chosen.fields_of(row, where=PLACE)["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
    ]
