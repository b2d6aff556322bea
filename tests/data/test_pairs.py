"""Rows with a chosen and a rejected answer as pairs of sequences."""

import pytest

from reft_cli.data.cache import cached
from reft_cli.data.encode import encode_examples, encode_prompts
from reft_cli.data.formats import choose_format
from reft_cli.data.records import Rows
from reft_cli.data.templates import Inline, choose_template
from reft_cli.errors import DataError, ReftError
from reft_cli.positions import Positions
from small_tokenizers import byte_level, word_piece

EOS = 1
ROWS = [
    {"prompt": "The film was", "chosen": " good", "rejected": " not bad at all"},
    {"prompt": "And the food", "chosen": " was", "rejected": " is"},
]
TEMPLATE = Inline("Q: {prompt}\nA:", "{chosen}")


def plan(rows, *, kind="preference", template=None, mapping=None, tokenizer=None, requested="preference"):
    tokenizer = tokenizer or byte_level(chat=True)
    columns = list(rows[0])
    chosen = choose_format(columns, where="p.jsonl:1", requested=requested, mapping=mapping)
    made = choose_template(template, data_format=chosen, task_kind=kind, columns=columns, tokenizer=tokenizer)
    return {"tokenizer": tokenizer, "data_format": chosen, "template": made, "task_kind": kind}


def encode(rows, *, positions="f1+l1", max_length=200, on_overflow="error", append_eos=True, **how):
    count = list(range(1, len(rows) + 1))
    return encode_examples(
        Rows("p.jsonl", rows, count, count),
        positions=Positions.parse(positions),
        max_length=max_length,
        on_overflow=on_overflow,
        append_eos=append_eos,
        **plan(rows, **how),
    )


def text_of(example, tokenizer=None):
    return (tokenizer or byte_level(chat=True)).decode(example.input_ids)


@pytest.mark.parametrize("kind", ["preference", "reward"])
@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_both_answers_follow_the_same_prompt(kind, template):
    found = encode(ROWS, kind=kind, template=template).examples
    for pair, row in zip(found, ROWS, strict=True):
        prompt = row["prompt"] if template is None else f"Q: {row['prompt']}\nA:"
        assert text_of(pair) == f"{prompt}{row['chosen']}</s>"
        assert text_of(pair.rejected) == f"{prompt}{row['rejected']}</s>"
        assert pair.prompt == pair.rejected.prompt == prompt
        assert (pair.completion, pair.rejected.completion) == (row["chosen"], row["rejected"])
        assert pair.prompt_length == pair.rejected.prompt_length
        labels = (1, 0) if kind == "reward" else (None, None)
        assert (pair.label, pair.rejected.label) == labels


def test_the_templates_of_chats_and_columns_of_other_names_are_swapped_too():
    other = [{"q": row["prompt"], "win": row["chosen"], "lose": row["rejected"]} for row in ROWS]
    mapping = {"prompt": "q", "chosen": "win", "rejected": "lose"}
    for template in ("chat", Inline("{q} ->", "{win}")):
        for pair, row in zip(encode(other, template=template, mapping=mapping).examples, ROWS, strict=True):
            assert row["chosen"] in text_of(pair) and row["rejected"] not in text_of(pair)
            assert row["rejected"] in text_of(pair.rejected) and row["chosen"] not in text_of(pair.rejected)


def test_an_encoder_reads_its_own_last_token():
    tokenizer = word_piece()
    rows = [{"prompt": "good film", "chosen": "good", "rejected": "bad"}]
    (pair,) = encode(rows, kind="reward", tokenizer=tokenizer, template=Inline("{prompt} ", "{chosen}")).examples
    whole = tokenizer("good film good")["input_ids"]
    assert pair.input_ids == whole and pair.rejected.input_ids[-1] == whole[-1]


def test_a_reward_is_asked_for_a_prompt_with_its_answer():
    made = plan(ROWS, kind="reward", template=TEMPLATE)
    format_ = made.pop("data_format")
    (asked,) = encode_prompts([{"prompt": "The film was", "chosen": " good"}], **made)
    assert asked.input_ids == encode(ROWS, kind="reward", template=TEMPLATE).examples[0].input_ids
    assert format_.name == "preference"
    with pytest.raises(DataError, match="prompt 1: no column `chosen`"):
        encode_prompts([{"prompt": "a"}], **made)


def test_lists_of_answers_are_a_pair_each():
    listed = [
        {"prompt": "a", "chosen": [" b", " c", " d"], "rejected": [" x", " y"]},
        {"prompt": "e", "chosen": [" f"], "rejected": [" z", " w"]},
    ]
    encoded = encode(listed)
    found = [(each.row, each.completion, each.rejected.completion) for each in encoded.examples]
    assert found == [(1, " b", " x"), (1, " c", " y"), (2, " f", " z")]
    assert (encoded.counts.read, encoded.counts.used) == (2, 3)
    other = [{"q": row["prompt"], "win": row["chosen"], "lose": row["rejected"]} for row in listed]
    mapping = {"prompt": "q", "chosen": "win", "rejected": "lose"}
    again = encode(other, template=Inline("{q}", "{win}"), mapping=mapping)
    assert [each.completion for each in again.examples] == [" b", " c", " f"]
    assert [each.rejected.completion for each in again.examples] == [" x", " y", " z"]


def says(role, content):
    return {"role": role, "content": content}


ASKED, OTHER = [says("user", "good film?")], says("assistant", "bad")
TALK = [*ASKED, says("assistant", "was it?"), says("user", "yes")]


@pytest.mark.parametrize("kind", ["preference", "reward"])
@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [*TALK, says("assistant", "good")], "rejected": [*TALK, OTHER]},
        {"prompt": TALK, "chosen": [says("assistant", "good")], "rejected": [OTHER]},
        {"prompt": TALK, "chosen": [*TALK, says("assistant", "good")], "rejected": [*TALK, OTHER]},
        {"prompt": TALK, "chosen": "good", "rejected": "bad"},
    ],
)
def test_conversations_differ_in_their_last_turn(kind, row):
    made = plan([row], kind=kind, requested="preference_messages")
    tokenizer, template = made["tokenizer"], made["template"]
    rows = Rows("p.jsonl", [row], [1], [1])
    (pair,) = encode_examples(rows, positions=Positions.parse("f1+l1"), max_length=200, **made).examples
    for sequence, word in ((pair, "good"), (pair.rejected, "bad")):
        whole = tokenizer.apply_chat_template([*TALK, says("assistant", word)], tokenize=False)
        assert tokenizer.decode(sequence.input_ids).removesuffix("</s>") == whole.removesuffix("</s>")
        assert word in sequence.completion and "yes" in sequence.prompt
    assert pair.prompt_length == pair.rejected.prompt_length
    asked = made["data_format"].fields_of({"prompt": TALK}, where="x", with_answer=False)
    assert template.render_prompt(asked) == pair.prompt
    rated = made["data_format"].fields_of(row, where="x", with_answer=False)
    assert (template.render_prompt(rated), template.render_completion(rated)) == (pair.prompt, pair.completion)


@pytest.mark.parametrize(
    ("row", "how", "message"),
    [
        ({"chosen": [*TALK, OTHER], "rejected": [*ASKED, OTHER]}, {}, "differ before their last message"),
        ({"chosen": TALK, "rejected": TALK}, {}, "the last message is of `user`; it has to be the assistant's answer"),
        ({"chosen": [*ASKED, OTHER], "rejected": 7}, {}, "p.jsonl:1: column `rejected` has to be a list of messages"),
        ({"chosen": [*ASKED, OTHER]}, {}, "needs columns chosen, rejected; found chosen"),
        ({"chosen": [*ASKED, OTHER], "rejected": [*ASKED, OTHER]}, {"template": "plain"}, "does not fit format"),
        ({"prompt": "a", "chosen": [OTHER], "rejected": [OTHER]}, {"requested": "preference"}, "preference_messages"),
        (
            {"chosen": [*ASKED, OTHER], "rejected": [*ASKED, OTHER]},
            {"requested": "preference"},
            "where chosen and rejected are conversations, data.format: preference_messages",
        ),
    ],
)
def test_conversations_that_are_no_pairs(row, how, message):
    with pytest.raises(ReftError) as caught:
        made = plan([row], **{"requested": "preference_messages"} | how)
        encode_examples(Rows("p.jsonl", [row], [1], [1]), positions=Positions.parse("l1"), max_length=200, **made)
    assert message in "; ".join(f"{problem}; {problem.hint}" for problem in caught.value.problems)


LONG = [
    {"prompt": "a " * 40, "chosen": " good", "rejected": " bad" * 5},
    {"prompt": "a b", "chosen": " good", "rejected": " bad" * 60},
    {"prompt": "a b", "chosen": " yes", "rejected": " no"},
]


def test_a_pair_is_as_long_as_its_longer_sequence():
    whole = encode(LONG).examples
    limit = 40
    assert [each.longest > limit for each in whole] == [True, True, False]
    assert len(whole[1].input_ids) <= limit < len(whole[1].rejected.input_ids)
    dropped = encode(LONG, max_length=limit, on_overflow="drop")
    assert [each.row for each in dropped.examples] == [3] and dropped.counts.dropped.count == 2
    cut = encode(LONG, max_length=limit, on_overflow="truncate_answer")
    assert [each.row for each in cut.examples] == [2, 3] and cut.counts.dropped.first == 1
    assert cut.examples[0].input_ids == whole[1].input_ids
    assert cut.examples[0].rejected.input_ids == whole[1].rejected.input_ids[:limit]
    with pytest.raises(DataError) as refused:
        encode(LONG, max_length=limit)
    assert "2 of 3 rows are longer than data.max_length 40" in str(refused.value)


def test_a_cut_prompt_is_the_same_for_both_answers():
    whole = encode(LONG).examples[0]
    cut = encode(LONG[::2], max_length=40, on_overflow="truncate_prompt").examples[0]
    assert cut.longest == 40 and cut.prompt_length == cut.rejected.prompt_length
    assert cut.input_ids[: cut.prompt_length] == cut.rejected.input_ids[: cut.prompt_length]
    for before, after in ((whole, cut), (whole.rejected, cut.rejected)):
        assert after.input_ids[after.prompt_length :] == before.input_ids[before.prompt_length :]
    with pytest.raises(DataError) as refused:
        encode(LONG, max_length=40, on_overflow="truncate_prompt")
    assert "row 2 has an answer of 61 tokens, which leaves too few" in refused.value.problems[0].hint


@pytest.mark.parametrize(
    ("rows", "how", "message"),
    [
        (ROWS, {"template": Inline("{prompt}", " {rejected}")}, "the two answers of every row are the same text"),
        ([{"prompt": "a", "chosen": "", "rejected": "b"}], {}, "p.jsonl: 1 row has no token to learn from"),
        ([{"prompt": "a", "chosen": "b", "rejected": ""}], {}, "p.jsonl: 1 row has no token to learn from"),
        ([{"prompt": "a", "chosen": "b"}], {}, "format `preference` needs columns prompt, chosen, rejected; found"),
        ([{"prompt": "a", "win": "b", "lose": "c"}], {}, "Map them: columns: {chosen: win, rejected: lose}"),
        (
            [{"prompt": "a", "chosen": ["b"], "rejected": "c"}],
            {},
            "of the columns chosen and rejected one holds a list",
        ),
        ([{"prompt": "a", "chosen": ["b", None], "rejected": ["c"]}], {}, "p.jsonl:1: column `chosen` holds a list"),
        ([{"prompt": "a", "chosen": [], "rejected": ["c"]}], {}, "p.jsonl:1: column `chosen` holds a list, not text"),
        ([{"prompt": "a", "chosen": "b", "rejected": None}], {}, "p.jsonl:1: column `rejected` is null"),
    ],
)
def test_rows_that_are_no_pairs(rows, how, message):
    with pytest.raises(ReftError) as caught:
        encode(rows, **how)
    problem = caught.value.problems[0]
    assert message in f"{problem}\n{problem.hint}"


@pytest.mark.parametrize("kind", ["preference", "reward"])
def test_pairs_are_kept_with_all_they_are(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("REFT_CACHE", str(tmp_path))
    made = encode(ROWS, kind=kind)
    cached("p.jsonl", key="0" * 64, make=lambda: made, tell=print)
    again = cached("p.jsonl", key="0" * 64, make=lambda: pytest.fail("encoded anew"), tell=print)
    assert again == made and list(again.examples) == list(made.examples)
