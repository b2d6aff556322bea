"""The bundled model is whole: it loads, its tokenizer gives text back, and it speaks something like English."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reft_cli.bundled import locate

FOLDER = locate("bundled:tiny-llama")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "text", ["Not a dull moment.", "naïve café – 10 % off!\n\n\tcode()", "雪が降る 🙂", " two  spaces "]
)
def test_the_tokenizer_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_tokenizer_adds_nothing(tokenizer):
    assert tokenizer("").input_ids == []
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)


def test_chat_turns_are_single_tokens(tokenizer):
    turns = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text).input_ids
    assert text == "<|user|>Hi<|assistant|>" and (ids[0], ids[-1]) == (2, 3)


def test_size_and_shape_are_those_of_the_card(model):
    assert model.num_parameters() == 5_868_800
    assert f"{model.num_parameters():,} parameters" in (FOLDER / "README.md").read_text()
    assert (FOLDER / "model.safetensors").stat().st_size == 11_743_656


def test_english_is_likelier_than_its_words_shuffled(model, tokenizer):
    def loss(text: str) -> float:
        ids = tokenizer(text, return_tensors="pt").input_ids
        return model(input_ids=ids, labels=ids).loss.item()

    with torch.no_grad():
        assert loss("The old man walked slowly down to the sea.") < 0.75 * loss(
            "sea the down man slowly. old to The walked"
        )
