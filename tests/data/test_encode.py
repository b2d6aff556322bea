"""Rows to examples: ids, ends, labels, what happens to long rows, and the errors."""

import copy
import datetime
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from reft_cli.data.encode import encode_examples, encode_prompts, fingerprint
from reft_cli.data.formats import choose_format
from reft_cli.data.records import Rows
from reft_cli.data.templates import Inline, choose_template
from reft_cli.errors import DataError, ReftError, SpecError
from reft_cli.positions import Positions
from small_tokenizers import byte_level, unigram, word_piece, wrapped

EOS = 1


def numbered(rows, name="train.jsonl"):
    count = range(1, len(rows) + 1)
    return Rows(name, list(rows), list(count), list(count))


def prepared(rows, *, tokenizer=None, template=None, kind="causal_lm", requested="auto", mapping=None):
    tokenizer = tokenizer or byte_level(chat=True)
    columns = list(rows[0])
    chosen = choose_format(
        columns, where="train.jsonl:1", requested=requested, mapping=mapping, any_columns=isinstance(template, tuple)
    )
    template = Inline(*template) if isinstance(template, tuple) else template
    made = choose_template(template, data_format=chosen, task_kind=kind, columns=columns, tokenizer=tokenizer)
    return {"tokenizer": tokenizer, "data_format": chosen, "template": made, "task_kind": kind}


def encode(rows, *, tokenizer=None, template=None, kind="causal_lm", positions="f3+l3", max_length=512, **given):
    plan = prepared(rows, tokenizer=tokenizer, template=template, kind=kind)
    return encode_examples(numbered(rows), positions=Positions.parse(positions), max_length=max_length, **plan, **given)


def asked(*pairs):
    return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]


def error_of(rows, **given):
    with pytest.raises(ReftError) as caught:
        encode(rows, **given)
    problem = caught.value.problems[0]
    return str(problem) + (f"\n  {problem.hint}" if problem.hint else "")


def answer_of(example, tokenizer=None):
    return (tokenizer or byte_level()).decode(example.input_ids[example.prompt_length :])


def test_an_example_is_prompt_answer_and_end():
    (example,) = encode(asked(("The film was", " good"))).examples
    tokens = byte_level()("The film was good")["input_ids"]
    assert example.input_ids == [*tokens, EOS]
    assert example.prompt_length == len(byte_level()("The film was")["input_ids"])
    assert answer_of(example) == " good</s>"
    assert (example.prompt, example.completion, example.row, example.label) == ("The film was", " good", 1, None)
    assert example.learned == len(tokens) - example.prompt_length + 1


def test_the_beginning_of_sequence_is_the_prompts():
    tokenizer = byte_level(bos=True)
    (example,) = encode(asked(("The film was", " good")), tokenizer=tokenizer).examples
    assert example.input_ids == [*tokenizer("The film was good")["input_ids"], EOS]
    assert example.input_ids[: example.prompt_length] == tokenizer("The film was")["input_ids"]


def test_an_end_that_the_tokenizer_appends_is_not_doubled():
    tokenizer = unigram(eos_after=True)
    with_end = encode(asked(("is the answer", " yes")), tokenizer=tokenizer).examples[0]
    without = encode(asked(("is the answer", " yes")), tokenizer=tokenizer, append_eos=False).examples[0]
    assert with_end.input_ids == tokenizer("is the answer yes")["input_ids"]
    assert without.input_ids == with_end.input_ids[:-1]


def test_the_end_is_appended_once():
    assert answer_of(encode(asked(("a", " b</s>"))).examples[0]) == " b</s>"
    assert answer_of(encode(asked(("a", " b")), append_eos=False).examples[0]) == " b"


def test_pad_and_end_may_be_one_token():
    tokenizer = wrapped(byte_level().backend_tokenizer, pad_token="</s>")
    assert answer_of(encode(asked(("a</s>b", " c")), tokenizer=tokenizer).examples[0]) == " c</s>"


def test_a_tokenizer_without_an_end_is_an_error_unless_none_is_wanted():
    tokenizer = wrapped(byte_level().backend_tokenizer, eos_token=None)
    assert error_of(asked(("a", " b")), tokenizer=tokenizer) == (
        "data.append_eos: the tokenizer has no end-of-sequence token to append; write false"
    )
    assert encode(asked(("a", " b")), tokenizer=tokenizer, append_eos=False).examples


def test_a_conversation_is_tokenized_as_its_chat_template_writes_it():
    tokenizer = byte_level(bos=True, chat=True)
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "yes or no?"},
        {"role": "assistant", "content": "yes"},
    ]
    (example,) = encode([{"messages": talk}], tokenizer=tokenizer).examples
    render = {"tokenize": True, "return_dict": False}
    assert example.input_ids == tokenizer.apply_chat_template(talk, **render)
    assert example.input_ids[: example.prompt_length] == tokenizer.apply_chat_template(
        talk[:-1], add_generation_prompt=True, **render
    )
    assert answer_of(example) == "yes</s>"


@pytest.mark.parametrize("make", [byte_level, unigram, word_piece, lambda: byte_level(bos=True)])
@pytest.mark.parametrize("template", [None, ("Q: {prompt}\nA:", " {completion}")])
def test_inference_sees_the_prompt_of_training(make, template):
    rows = asked(("The film was", " good"), ("yes or no? 日本:", " yes"))
    plan = prepared(rows, tokenizer=make(), template=template)
    trained = encode(rows, tokenizer=make(), template=template).examples
    prompts = encode_prompts(rows, tokenizer=make(), template=plan["template"])
    for example, prompt in zip(trained, prompts, strict=True):
        assert prompt.input_ids == example.input_ids[: example.prompt_length]
        assert prompt.prompt_length == len(prompt.input_ids) and prompt.completion == ""
        assert (prompt.prompt, prompt.row) == (example.prompt, example.row)


def test_prompts_of_typed_texts():
    plan = prepared(asked(("a", "b")), template="chat")
    (prompt,) = encode_prompts(
        [plan["template"].fields_from_text("hi")], tokenizer=plan["tokenizer"], template=plan["template"]
    )
    assert plan["tokenizer"].decode(prompt.input_ids) == "<user>hi<bot>"
    with pytest.raises(DataError, match=r"prompt 1: no column `prompt`, which the template uses; there are none"):
        encode_prompts([{}], tokenizer=byte_level(), template=prepared(asked(("a", "b")))["template"])


def test_a_prompt_without_a_token_is_an_error():
    template = prepared(asked(("a", "b")))["template"]
    assert encode_prompts([{"prompt": ""}], tokenizer=byte_level(bos=True), template=template)[0].input_ids == [0]
    with pytest.raises(DataError, match="prompt 2: the prompt is empty and has no token"):
        encode_prompts([{"prompt": "a"}, {"prompt": ""}], tokenizer=byte_level(), template=template)
    assert error_of([*labelled("a"), {"text": "", "label": "b"}], kind="classification") == (
        "train.jsonl:2: the prompt is empty and has no token"
    )


def test_rows_with_a_token_over_the_boundary_are_counted():
    counts = encode(asked(("a", " b"), ("the film was ", "good"), ("a ", "b"))).counts
    assert (counts.spanning.count, counts.spanning.first, counts.differing.count) == (2, 2, 0)
    assert (counts.read, counts.used, counts.dropped.count, counts.cut.count) == (3, 3, 0, 0)


def test_rows_whose_prompt_has_other_tokens_alone_are_counted():
    composed = wrapped(byte_level().backend_tokenizer)
    composed.backend_tokenizer.normalizer = normalizers.NFC()
    counts = encode(asked(("a", " b"), ("cafe", "\u0301 noir")), tokenizer=composed).counts
    assert (counts.differing.count, counts.differing.first, counts.spanning.count) == (1, 2, 0)


def test_answers_with_nothing_to_learn_are_an_error():
    rows = asked(("a", " b"), ("c", ""), ("d", ""))
    assert error_of(rows, append_eos=False) == (
        "train.jsonl: 2 rows have no token to learn from (answer empty, first: row 2). "
        "Training on them gives loss 0 or NaN."
    )
    assert error_of(rows[:2]) == (
        "train.jsonl: 1 row has no token to learn from (answer empty, first: row 2). "
        "Training on them teaches to say nothing."
    )
    assert error_of(asked(("", "b")), append_eos=False) == (
        "train.jsonl: 1 row has no token to learn from (answer empty, first: row 1). "
        "Training on them gives loss 0 or NaN."
    )


LONG = asked(("a", " b"), ("word " * 30 + "end:", " yes"), ("x " * 12 + "end:", " yes"))


def test_long_rows_stop_with_both_remedies():
    sizes = [len(example.input_ids) for example in encode(LONG).examples]
    assert error_of(LONG, max_length=20, positions="f7+l7") == (
        f"train.jsonl: 2 of 3 rows are longer than data.max_length 20 (longest: row 2, {sizes[1]} tokens). "
        f"Nothing was dropped.\n  Set data.max_length: {sizes[1]}, or data.on_overflow: drop, or truncate_prompt "
        "(cuts the middle of the prompt; f7+l7 tokens stay)."
    )
    assert error_of(LONG[:2], max_length=20, positions="all") == (
        f"train.jsonl: 1 of 2 rows is longer than data.max_length 20 (longest: row 2, {sizes[1]} tokens). "
        f"Nothing was dropped.\n  Set data.max_length: {sizes[1]}, or data.on_overflow: drop, or truncate_prompt "
        "(cuts the middle of the prompt; both ends stay)."
    )


def test_long_answers_have_words_of_their_own():
    rows = asked(("a b c d", " yes" * 40))
    size = len(encode(rows).examples[0].input_ids)
    words = (
        f"train.jsonl: 1 of 1 rows is longer than data.max_length 20 (longest: row 1, {size} tokens). "
        f"Nothing was dropped.\n  Set data.max_length: {size}, or data.on_overflow: drop (truncate_prompt does not "
        "help: row 1 has an answer of 41 tokens, which leaves too few for the edited tokens of its prompt)."
    )
    assert error_of(rows, max_length=20) == words
    assert error_of(rows, max_length=20, on_overflow="truncate_prompt") == words


def test_long_rows_can_be_dropped():
    encoded = encode(LONG, max_length=20, on_overflow="drop")
    assert [example.row for example in encoded.examples] == [1]
    assert (encoded.counts.read, encoded.counts.used) == (3, 1)
    assert (encoded.counts.dropped.count, encoded.counts.dropped.first) == (2, 2)
    assert error_of(LONG[1:], max_length=20, on_overflow="drop") == (
        "train.jsonl: every row is longer than data.max_length 20; none is left to use"
    )


def test_the_middle_of_long_prompts_can_be_cut():
    whole = encode(LONG).examples
    encoded = encode(LONG, max_length=20, on_overflow="truncate_prompt", positions="f7+l7")
    assert encoded.counts.cut.count == 2 and encoded.counts.used == 3
    for before, after in zip(whole[1:], encoded.examples[1:], strict=True):
        prompt = before.input_ids[: before.prompt_length]
        assert len(after.input_ids) == 20
        assert after.input_ids[:7] == prompt[:7]
        assert after.input_ids[after.prompt_length - 7 : after.prompt_length] == prompt[-7:]
        assert after.input_ids[after.prompt_length :] == before.input_ids[before.prompt_length :]


def test_the_end_of_long_answers_can_be_cut_as_pyreft_does():
    rows = asked(("a b", " yes" * 5), ("a b", " no" * 40), ("word " * 30, " yes"))
    whole = encode(rows).examples
    encoded = encode(rows, max_length=20, on_overflow="truncate_answer")
    assert [example.row for example in encoded.examples] == [1, 2]
    assert encoded.examples[0] == whole[0]
    cut = encoded.examples[1]
    assert cut.input_ids == whole[1].input_ids[:20] and cut.input_ids[-1] != EOS
    assert (cut.prompt_length, cut.completion) == (whole[1].prompt_length, whole[1].completion)
    assert (encoded.counts.cut.count, encoded.counts.cut.first) == (1, 2)
    assert (encoded.counts.dropped.count, encoded.counts.dropped.first) == (1, 3)  # its prompt alone fills the row
    assert error_of(rows[2:], max_length=20, on_overflow="truncate_answer") == (
        "train.jsonl: every row is longer than data.max_length 20; none is left to use"
    )


def test_references_and_sources_go_along():
    rows = Rows("x", [{"a": "1", "b": "2"}] * 2, [1, 2], places=["p", "q"], sources=["one", "two"])
    plan = prepared([{"a": "1", "b": "2"}], template=("{a}", "{b}", "<{b}>"))
    found = encode_examples(rows, positions=Positions.parse("l1"), max_length=20, **plan).examples
    assert [(each.reference, each.source) for each in found] == [("<2>", "one"), ("<2>", "two")]


def labelled(*labels):
    return [{"text": f"film {index}", "label": label} for index, label in enumerate(labels)]


def test_classes_are_found_and_numbered():
    encoded = encode(labelled("pos", "neg", "pos"), kind="classification")
    assert encoded.classes == ("neg", "pos")
    assert [example.label for example in encoded.examples] == [1, 0, 1]
    assert encoded.examples[0].prompt_length == len(encoded.examples[0].input_ids)
    assert encode(labelled(10, 2, 1), kind="classification").classes == ("1", "2", "10")
    validation = encode(labelled("neg"), kind="classification", classes=encoded.classes)
    assert validation.examples[0].label == 0


def test_numbers_stand_for_the_names_that_were_given():
    encoded = encode(labelled(1, 0, "bad"), kind="classification", classes=["bad", "good"], classes_given=True)
    assert [example.label for example in encoded.examples] == [1, 0, 0]


def test_an_unknown_label_is_an_error():
    assert error_of(labelled("so-so"), kind="classification", classes=("neg", "pos")) == (
        "train.jsonl:1: label `so-so` is not a class of the training data (neg, pos)"
    )


def test_regression_labels_are_numbers():
    encoded = encode(labelled(1, 2.5, "3.5"), kind="regression")
    assert [example.label for example in encoded.examples] == [1.0, 2.5, 3.5]
    assert encoded.classes is None
    assert error_of(labelled(1.0, "nan"), kind="regression") == (
        "train.jsonl:2: label 'nan' is not a finite number, as task.kind regression needs"
    )
    assert error_of(labelled(1.0, float("nan")), kind="regression") == (
        "train.jsonl:2: column `label` is nan; a missing value has no text"
    )


def test_classifiers_read_pairs_as_their_tokenizer_joins_them():
    rows = [
        {"sentence1": "the film", "sentence2": "was good", "label": 1},
        {"sentence1": "a", "sentence2": "", "label": 0},
    ]
    encoded = encode(rows, kind="classification", tokenizer=word_piece())
    expected = word_piece()(["the film", "a"], ["was good", ""])
    assert [example.input_ids for example in encoded.examples] == expected["input_ids"]
    assert [example.token_types for example in encoded.examples] == expected["token_type_ids"]
    plan = prepared(rows, kind="classification", tokenizer=word_piece())
    fields = [plan["data_format"].fields_of(row, where="x", with_answer=False) for row in rows]
    prompts = encode_prompts(fields, tokenizer=word_piece(), template=plan["template"], task_kind="classification")
    assert [prompt.input_ids for prompt in prompts] == expected["input_ids"]
    assert [prompt.row for prompt in prompts] == [1, 2]


def test_long_texts_of_classifiers_keep_their_special_tokens():
    rows = [{"sentence1": "the film " * 20, "sentence2": "was good " * 20, "label": n} for n in (0, 1)]
    given = {"kind": "classification", "tokenizer": word_piece(), "on_overflow": "truncate_prompt"}
    assert encode(rows, max_length=16, positions="f15", **given).examples[0].input_ids[-1] == 4
    encoded = encode(rows, max_length=16, positions="f1", **given)
    example = encoded.examples[0]
    assert len(example.input_ids) == len(example.token_types) == example.prompt_length == 16
    assert (example.input_ids[0], example.input_ids[-1]) == (3, 4)
    assert set(example.token_types) == {0, 1}


def test_an_inline_template_may_write_the_text_of_a_classifier():
    rows = [{"title": "Dune", "review": "good", "label": "p"}, {"title": "Up", "review": "bad", "label": "n"}]
    encoded = encode(rows, kind="classification", template=("{title}: {review}", None), tokenizer=word_piece())
    assert encoded.examples[0].input_ids == word_piece()("Dune: good")["input_ids"]
    del rows[1]["label"]
    assert error_of(rows, kind="classification", template=("{title}: {review}", None)) == (
        "train.jsonl:2: no column `label`, which task.kind classification needs; there are title, review"
    )


def test_the_fingerprint_changes_with_everything_that_examples_depend_on():
    rows, other = asked(("a", " b")), asked(("a", " c"))
    plan = prepared(rows)
    del plan["task_kind"]
    base = {"settings": {"max_length": 512}, **plan}
    prints = {
        fingerprint(numbered(rows), **base),
        fingerprint(numbered(other), **base),
        fingerprint(numbered(rows), **base | {"settings": {"max_length": 256}}),
        fingerprint(numbered(rows), **base | {"tokenizer": unigram()}),
        fingerprint(numbered(rows), **base | {"template": prepared(rows, template="chat")["template"]}),
        fingerprint(Rows("train.jsonl", rows, [7]), **base),
        fingerprint(Rows("train.jsonl", rows, [1], sources=["one"]), **base),
        fingerprint(Rows("train.jsonl", rows, [1], sources=["two"]), **base),
    }
    assert len(prints) == 8
    assert fingerprint(numbered(rows, name="other.json"), **base) in prints


def test_a_template_that_writes_the_date_has_a_fingerprint_of_its_day(monkeypatch):
    rows = asked(("a", " b"))
    tokenizer = copy.deepcopy(byte_level(chat=True))
    tokenizer.chat_template = (
        "{{ strftime_now('%d %b') }} {% for message in messages %}{{ message.content }}{% endfor %}"
    )
    plan = prepared(rows, template="chat", tokenizer=tokenizer)
    del plan["task_kind"]
    prints = set()
    for day in (1, 2, 2):

        class Today(datetime.datetime):
            @classmethod
            def now(cls, tz=None, day=day):
                return cls(2026, 1, day)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Today)
        prints.add(fingerprint(numbered(rows), settings={}, **plan))
    assert len(prints) == 2


def test_ten_thousand_rows_take_seconds():
    rows = asked(
        *((f"The film number {n} was not bad, and the food was good.\nAnswer:", " yes") for n in range(10_000))
    )
    start = time.perf_counter()
    encode(rows)
    assert time.perf_counter() - start < 15  # about one second on a quiet machine


def test_errors_of_rows_name_their_line():
    assert error_of([*asked(("a", "b")), {"prompt": "x", "completion": None}]) == (
        "train.jsonl:2: column `completion` is null"
    )


def test_errors_are_of_the_kind_that_decides_the_exit_code():
    with pytest.raises(SpecError):
        encode(asked(("a", " b")), tokenizer=wrapped(byte_level().backend_tokenizer, eos_token=None))
    with pytest.raises(DataError):
        encode(LONG, max_length=20)


values = st.one_of(
    st.text(max_size=5), st.integers(-3, 3), st.floats(), st.booleans(), st.none(), st.just("\ud800"), st.just([1])
)
talks = st.lists(st.dictionaries(st.sampled_from(["role", "content", "x"]), values, max_size=3), max_size=3)
NAMES = [
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "messages",
    "text",
    "label",
    "sentence1",
    "sentence2",
]
TEMPLATES = [None, "plain", "alpaca", "chat", ("{text} {prompt}", "{label}"), ("{prompt}", None)]


@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from(NAMES), st.one_of(values, talks), max_size=6), min_size=1, max_size=4
    ),
    template=st.sampled_from(TEMPLATES),
    kind=st.sampled_from(["causal_lm", "classification", "regression"]),
    on_overflow=st.sampled_from(["error", "drop", "truncate_prompt", "truncate_answer"]),
)
@settings(max_examples=600, deadline=None)
def test_any_rows_give_examples_or_an_error_for_the_user(rows, template, kind, on_overflow):
    try:
        encoded = encode(rows, template=template, kind=kind, max_length=10, on_overflow=on_overflow)
    except ReftError as error:
        assert str(error)
    else:
        assert all(0 < len(example.input_ids) <= 10 for example in encoded.examples)
