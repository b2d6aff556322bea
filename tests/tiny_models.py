"""Tiny random models of every family and small tokenizers, all built in memory from a seed."""

from __future__ import annotations

from functools import cache

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from reft_cli.models.loading import BaseModel, shape_hash

VOCAB = 300
COMMON = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA_LIKE = COMMON | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
BERT_LIKE = COMMON | {"intermediate_size": 48, "max_position_embeddings": 128}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}

DECODERS: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", LLAMA_LIKE),
    "mistral": ("Mistral", LLAMA_LIKE | {"sliding_window": 6}),
    "qwen2": ("Qwen2", LLAMA_LIKE),
    "qwen3": ("Qwen3", LLAMA_LIKE | {"head_dim": 8}),
    "gemma2": ("Gemma2", LLAMA_LIKE | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3Text", LLAMA_LIKE | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", LLAMA_LIKE),
    "gpt2": ("GPT2", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("GPTNeoX", COMMON | {"intermediate_size": 48, "max_position_embeddings": 128}),
    "opt": ("OPT", COMMON | {"ffn_dim": 48, "max_position_embeddings": 128, "word_embed_proj_dim": 32}),
    "mixtral": ("Mixtral", LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3Moe",
        LLAMA_LIKE | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
}
ENCODERS: dict[str, tuple[str, dict]] = {
    "bert": ("Bert", BERT_LIKE),
    "roberta": ("Roberta", BERT_LIKE | {"max_position_embeddings": 130}),
    "deberta_v2": (
        "DebertaV2",
        BERT_LIKE | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    ),
}


def config_of(family: str) -> transformers.PretrainedConfig:
    """The configuration of a tiny model; every dropout is off, as `reft` loads models."""
    name, values = (DECODERS | ENCODERS)[family]
    config = getattr(transformers, f"{name}Config")(**values, **TOKENS)
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


@cache
def decoder(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family))
    return model.eval().requires_grad_(False)


@cache
def encoder(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = config_of(family)
    config.num_labels = 3
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    model.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(f"{model.base_model_prefix}."))
    return model


def base_of(family: str) -> BaseModel:
    """A tiny frozen base model; encoders carry a head of three classes."""
    model = decoder(family) if family in DECODERS else encoder(family)
    return BaseModel(model, f"tiny-{family}", None, shape_hash(model))


def byte_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """Bytes as tokens: ids 0 <eos>, 1 <pad>, then the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, "<pad>": 1} | {letter: index + 2 for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<eos> $A", pair="<eos> $A <eos> $B", special_tokens=[("<eos>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<eos>", pad_token="<pad>")
