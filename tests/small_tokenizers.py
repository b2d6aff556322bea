"""Fast tokenizers of every kind, trained in memory on a few sentences."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The film was good, and the food was not bad.",
    "Below is an instruction that describes a task. Write a response.\n\n### Response:\n",
    "Question: is the answer yes or no?\nAnswer: yes",
    "  two  spaces   and\ttabs: the quick brown fox jumps over 7 lazy dogs ",
    "naïve café ünïcode über straße Ångström 日本語 привет 🙂🙃",
] * 3
SPECIAL = ["<s>", "</s>", "<pad>", "[CLS]", "[SEP]", "[UNK]", "<user>", "<bot>"]
CHAT = (
    "{% for m in messages %}<{{ 'bot' if m['role'] == 'assistant' else m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def wrapped(backend: Tokenizer, **names: str | None) -> PreTrainedTokenizerFast:
    given = {"eos_token": "</s>", "pad_token": "<pad>", "bos_token": "<s>"} | names
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **given)


def template(*, single: str, pair: str) -> processors.TemplateProcessing:
    tokens = [(name, index) for index, name in enumerate(SPECIAL) if name in single + pair]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens)


@cache
def byte_level(
    *, trim: bool = False, prefix_space: bool = False, words: bool = True, bos: bool = False, chat: bool = False
) -> PreTrainedTokenizerFast:
    """GPT-2's and Llama 3's kind. `words=False`: merges cross spaces, so that many tokens span prompt and answer."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=words)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    parts = [processors.ByteLevel(trim_offsets=trim)]
    if bos:
        parts.append(template(single="<s> $A", pair="<s> $A <s> $B"))
    backend.post_processor = processors.Sequence(parts)
    tokenizer = wrapped(backend)
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer


@cache
def word_piece() -> PreTrainedTokenizerFast:
    """BERT's kind: lower case, spaces dropped, [CLS] and [SEP] around, token types."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = template(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1")
    tokenizer = wrapped(backend, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", bos_token=None)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


@cache
def unigram(*, eos_after: bool = False) -> PreTrainedTokenizerFast:
    """T5's kind: pieces of words after `▁`; `eos_after`: the tokenizer ends every text itself."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=250, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    if eos_after:
        backend.post_processor = template(single="$A </s>", pair="$A </s> $B </s>")
    return wrapped(backend, unk_token="[UNK]")


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama 2's kind: a normalizer writes `▁` for spaces, no pre-tokenizer, bytes for what is unknown, BOS in front."""
    backend = Tokenizer(models.BPE(unk_token="[UNK]", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=560, special_tokens=SPECIAL + bytes_, show_progress=False)
    backend.train_from_iterator([line.replace(" ", "▁") for line in CORPUS[:4]], trainer)
    backend.post_processor = template(single="<s> $A", pair="<s> $A $B")
    return wrapped(backend, unk_token="[UNK]")


KINDS = {
    "byte-level": lambda: byte_level(),
    "byte-level, trimmed offsets": lambda: byte_level(trim=True),
    "byte-level, merges over spaces": lambda: byte_level(words=False),
    "byte-level, merges over spaces, trimmed": lambda: byte_level(words=False, trim=True),
    "byte-level, prefix space, bos": lambda: byte_level(prefix_space=True, trim=True, bos=True),
    "word pieces": word_piece,
    "unigram": unigram,
    "unigram, ends its texts": lambda: unigram(eos_after=True),
    "byte fallback": byte_fallback,
}
