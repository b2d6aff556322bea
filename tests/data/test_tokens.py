"""The boundary of prompt and answer is exact, for every kind of tokenizer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_cli.data.tokens import TextTokenizer, text_tokenizer
from reft_cli.errors import ModelError
from small_tokenizers import KINDS, byte_level, unigram, word_piece

LOSSLESS = [name for name in KINDS if name.startswith("byte-level") and "prefix" not in name]
words = st.sampled_from(["The film", " was", "good", " ", "  ", "\n", ":", "yes", "日本", "🙂", "é", "e\u0301", "7"])
texts = st.one_of(st.lists(words, max_size=8).map("".join), st.text(max_size=20))


def ids_of(kind, text):
    return KINDS[kind]()(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=texts, answer=texts)
@settings(max_examples=150, deadline=None)
def test_prompt_and_answer_are_the_ids_of_the_whole_text(kind, prompt, answer):
    (cut,) = text_tokenizer(KINDS[kind]()).cut([prompt], [answer])
    assert cut.ids == ids_of(kind, prompt + answer)
    assert cut.differs == (cut.ids[: cut.boundary] != ids_of(kind, prompt))


@pytest.mark.parametrize("kind", LOSSLESS)
@given(prompt=texts, answer=texts)
@settings(max_examples=300, deadline=None)
def test_the_answer_tokens_spell_the_answer(kind, prompt, answer):
    tokenizer = KINDS[kind]()
    (cut,) = text_tokenizer(tokenizer).cut([prompt], [answer])
    spelled = tokenizer.decode(cut.ids[cut.boundary :])
    assert spelled.endswith(answer)
    assert cut.spans == (spelled != answer)
    if not cut.spans:
        assert tokenizer.decode(cut.ids[: cut.boundary]) == prompt


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "over spaces" not in kind and kind != "byte fallback"])
def test_an_answer_after_a_space_has_an_exact_boundary(kind):
    (cut,) = text_tokenizer(KINDS[kind]()).cut(["Question: is the film good?\nAnswer:"], [" yes"])
    assert not cut.spans and not cut.differs
    assert 0 < cut.boundary < len(cut.ids)


@pytest.mark.parametrize("trim", [False, True])
def test_a_space_at_the_end_of_the_prompt_goes_to_the_answer_and_is_seen(trim):
    tokenizer = byte_level(trim=trim)
    (cut,) = text_tokenizer(tokenizer).cut(["the film was "], ["good"])
    assert cut.spans and cut.differs
    assert tokenizer.decode(cut.ids[cut.boundary :]) == " good"


def test_empty_texts():
    text = text_tokenizer(byte_level())
    empty, prompt, answer = text.cut(["", "the film", ""], ["", "", "good"])
    assert (empty.ids, empty.boundary) == ([], 0)
    assert prompt.boundary == len(prompt.ids) > 0
    assert answer.boundary == 0 and answer.ids


def test_special_tokens_around_texts_are_found():
    assert text_tokenizer(byte_level()).prefix == [] == text_tokenizer(byte_level()).suffix
    assert text_tokenizer(byte_level(bos=True)).prefix == [0]
    bert = text_tokenizer(word_piece())
    assert (bert.prefix, bert.suffix) == ([3], [4])
    assert text_tokenizer(unigram(eos_after=True)).suffix == [1]


def test_the_callers_tokenizer_is_left_alone():
    tokenizer = byte_level(trim=True, bos=True)
    before = tokenizer.backend_tokenizer.to_str()
    TextTokenizer(tokenizer).cut(["the film"], [" was good"])
    assert tokenizer.backend_tokenizer.to_str() == before


def test_truncation_and_padding_of_the_tokenizer_file_are_not_used():
    tokenizer = byte_level(words=False, bos=True)
    tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    try:
        text = TextTokenizer(tokenizer)
        assert len(text.ids(["a b c d e f g"])[0]) > 3
    finally:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()


def test_pairs_keep_the_tokenizers_own_separator():
    ids, types = text_tokenizer(word_piece()).whole(["the film"], ["was good"])
    assert ids == [word_piece()("the film", "was good")["input_ids"]]
    assert types == [word_piece()("the film", "was good")["token_type_ids"]] and set(types[0]) == {0, 1}


def test_a_pair_without_a_separator_stands_on_two_lines():
    ids, types = text_tokenizer(byte_level()).whole(["the film"], ["was good"])
    assert ids == [byte_level()("the film\nwas good")["input_ids"]]
    assert types is None


def test_the_fingerprint_depends_on_the_tokenizer():
    prints = {text_tokenizer(KINDS[kind]()).fingerprint for kind in KINDS if "trimmed" not in kind}
    assert len(prints) == len([kind for kind in KINDS if "trimmed" not in kind])


class Slow:
    name_or_path = "some/model"
    is_fast = False
    eos_token_id = 0

    def __len__(self) -> int:
        return 1


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ModelError) as caught:
        text_tokenizer(Slow())
    assert str(caught.value) == (
        "the tokenizer of some/model is a slow one (Slow) and does not say where tokens lie in a text; "
        "a tokenizer.json is needed"
    )


def test_a_tokenizer_that_changes_texts_itself_is_refused():
    class Shouting:
        name_or_path, is_fast, eos_token_id, split_special_tokens = "some/model", True, 0, False
        backend_tokenizer = byte_level().backend_tokenizer

        def __call__(self, text, *, verbose):
            return byte_level()(text.upper())

    with pytest.raises(ModelError, match=r"some/model \(Shouting\) changes texts outside its tokenizer\.json"):
        TextTokenizer(Shouting())
