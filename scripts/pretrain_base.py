#!/usr/bin/env python3
"""Pretrains the bundled base model: a Llama of 5.9 M parameters over a byte-level BPE of 4,096 entries.

    python scripts/pretrain_base.py prepare --root TEXTS --out SHARDS   texts -> tokenizer, packed token shards (CPU)
    python scripts/pretrain_base.py train --data SHARDS --out MODEL     shards -> Hugging Face model folder (one GPU)

TEXTS/corpus/NAME.txt holds the documents of each name in SOURCES, TEXTS/corpus/heldout/NAME.txt those of each name in
HELD_OUT, one after the other with <|endoftext|> between them. The bundled weights are `train --lr 4e-3` on one H200;
the model card beside them says what the texts were. To try the whole path on a CPU with a few kilobytes of text:
`train --batch 2 --steps 20`.

Shapes: B windows, T = WINDOW tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import lzma
import math
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface, GenerationConfig, LlamaConfig, LlamaForCausalLM

END, PAD, USER, ASSISTANT = SPECIALS = ["<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>"]  # ids 0, 1, 2, 3
VOCABULARY, WINDOW = 4096, 512
SOURCES = {  # name -> share of its documents that is kept
    "synthetic_stories": 1.0,
    "synthetic_prompted": 1.0,
    "tinystories": 1.0,
    "tinystories_recased": 1.0,
    "modern_misc": 1.0,
    "books_children": 1.0,
    "books_novels": 0.5,
}
HELD_OUT = [f"{name}.val" for name in SOURCES] + ["wikitext2.valid", "ptb.valid"]
WORDS = (  # single digits; otherwise what Llama 3 does
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ ('<|assistant|>' if m['role'] == 'assistant' else '<|user|>') + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
REQUEST = re.compile(
    r"(Write|Describe|Explain|Summari[sz]e|Identify|Create|Tell|Give|List|Define|Compare|Rewrite|Paraphrase)\b"
)
CHECKPOINT_EVERY_S = 90
DEADLINE_EVERY = 20  # steps between two looks at the clock, each of which waits for the device


# ---- texts -> shards


def read_documents(path: Path) -> list[str]:
    """The documents of a file, without the white space around them."""
    return [doc.strip() for doc in path.read_text(encoding="utf-8").split(END) if doc.strip()]


def as_turns(doc: str, rng: random.Random) -> str:
    """Half of the documents that open with a question or request of one line become two turns."""
    ask, _, answer = doc.partition("\n\n")
    asks = "\n" not in ask and len(ask) < 400 and (ask.endswith("?") or REQUEST.match(ask))
    if answer and asks and rng.random() < 0.5:
        return USER + ask + ASSISTANT + answer
    return doc


def training_documents(root: Path, seed: int) -> dict[str, list[str]]:
    """Source -> the documents that are kept."""
    rng, documents = random.Random(seed), {}
    for name, share in SOURCES.items():
        kept = [doc for doc in read_documents(root / "corpus" / f"{name}.txt") if rng.random() < share]
        documents[name] = [as_turns(doc, rng) for doc in kept] if name == "synthetic_prompted" else kept
    return documents


def train_tokenizer(documents: dict[str, list[str]], out: Path) -> Tokenizer:
    """A byte-level BPE learned from the documents without their turn tokens; written to `out` with its settings."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    plain = (doc.replace(USER, "").replace(ASSISTANT, "\n\n") for docs in documents.values() for doc in docs)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(plain, trainer)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": WINDOW,
        "bos_token": END,
        "eos_token": END,
        "pad_token": PAD,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return tokenizer


def encode(tokenizer: Tokenizer, docs: list[str]) -> np.ndarray:
    """One stream of ids in which every document has an <|endoftext|> before and after it."""
    groups = (tokenizer.encode_batch_fast(docs[i : i + 256]) for i in range(0, len(docs), 256))
    pieces = [np.array([*each.ids, 0], np.uint16) for group in groups for each in group]
    return np.concatenate([np.zeros(1, np.uint16), *pieces])


def compress(ids: np.ndarray) -> bytes:
    """The ids as LZMA of their little-endian 16-bit numbers."""
    settings = {"preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 27, "lp": 1, "pb": 1, "lc": 3}
    return lzma.compress(ids.tobytes(), filters=[{"id": lzma.FILTER_LZMA2, **settings}])


def prepare(args: argparse.Namespace) -> None:
    """Write tokenizer.json, one NAME.xz a source and held-out text, and their sizes as shards.json."""
    args.out.mkdir(parents=True, exist_ok=True)
    documents = training_documents(args.root, args.seed)
    tokenizer = train_tokenizer(documents, args.out)
    documents |= {name: read_documents(args.root / "corpus/heldout" / f"{name}.txt") for name in HELD_OUT}

    def pack(name: str) -> tuple[str, dict[str, int]]:
        docs = documents[name]
        ids = encode(tokenizer, docs)
        (args.out / f"{name}.xz").write_bytes(compress(ids))
        return name, {"docs": len(docs), "bytes": sum(len(doc.encode()) for doc in docs), "tokens": len(ids)}

    largest_first = sorted(documents, key=lambda name: -len(documents[name]))
    with ThreadPoolExecutor(2) as pool:
        table = dict(pool.map(pack, largest_first))
    (args.out / "shards.json").write_text(json.dumps(table, indent=1))


# ---- shards -> model


def load_shards(data: Path) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, int]]]:
    """The training stream, and name -> (ids, bytes of text) of the held-out texts."""
    table = json.loads((data / "shards.json").read_text())
    with ThreadPoolExecutor() as pool:
        raw = pool.map(lambda name: lzma.decompress((data / f"{name}.xz").read_bytes()), table)
        ids = {name: np.frombuffer(blob, np.int16) for name, blob in zip(table, raw, strict=True)}
    held_out = {name: (ids.pop(name), table[name]["bytes"]) for name in HELD_OUT}
    for name, (stream, _) in held_out.items():
        if len(stream) <= WINDOW:
            sys.exit(f"{data / name}.xz: {len(stream)} tokens; a window takes {WINDOW + 1}")
    return np.concatenate(list(ids.values())), held_out


def windows(stream: Tensor, size: int) -> Iterator[Tensor]:
    """Batches [B, T + 1]; every pass over the stream has a new random offset and order."""
    if len(stream) < (size + 1) * WINDOW + 1:
        sys.exit(f"{len(stream)} training tokens are too few for batches of {size} windows of {WINDOW}")
    while True:
        offset = int(torch.randint(WINDOW, (1,)))
        starts = torch.arange(offset, len(stream) - WINDOW - 1, WINDOW, device=stream.device)
        starts = starts[torch.randperm(len(starts), device=stream.device)]
        for i in range(0, len(starts) - size + 1, size):
            yield stream[starts[i : i + size, None] + torch.arange(WINDOW + 1, device=stream.device)].long()


def causal_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Plain causal attention; under torch.compile transformers' own "sdpa" builds a mask and loses the fast kernel."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling).transpose(1, 2), None


def build_model() -> LlamaForCausalLM:
    """The model with fresh weights."""
    AttentionInterface.register("causal", causal_attention)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        head_dim=32,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        attn_implementation="causal",
    )
    return LlamaForCausalLM(config)


def window_loss(model: LlamaForCausalLM, window: Tensor, device: str) -> Tensor:
    """Mean loss of predicting each next token of [B, T + 1]; matrix products and residual stream in bfloat16."""
    with torch.autocast(device, torch.bfloat16):
        embedded = model.model.embed_tokens(window[:, :-1]).to(torch.bfloat16)  # [B, T, D]
        hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state  # [B, T, D]
        logits = model.lm_head(hidden)  # [B, T, vocabulary]
    return cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, ids: np.ndarray, nbytes: int) -> tuple[float, float]:
    """(nats a token, bits a byte) over windows that do not overlap."""
    stream = torch.from_numpy(ids.astype(np.int64)).to(model.device)
    count, total = (len(stream) - 1) // WINDOW, 0.0
    x, y = stream[: count * WINDOW].view(count, WINDOW), stream[1 : count * WINDOW + 1].view(count, WINDOW)
    for i in range(0, count, 64):
        logits = model(input_ids=x[i : i + 64], use_cache=False).logits.float().flatten(0, 1)
        total += cross_entropy(logits, y[i : i + 64].flatten(), reduction="sum").item()
    nats = total / (count * WINDOW)
    return round(nats, 4), round(nats / math.log(2) * len(stream) / nbytes, 4)


def save(model: LlamaForCausalLM, args: argparse.Namespace) -> LlamaForCausalLM:
    """Write the weights in bfloat16 with the tokenizer beside them; return the model that was written."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=1)
    half.save_pretrained(args.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(args.data / name, args.out)
    return half


def learning_rate(progress: float, peak: float) -> float:
    """Warm-up over 1.5 % of the run, then a cosine from the peak to a hundredth of it."""
    return peak * min(1.0, progress / 0.015 + 0.01) * (0.01 + 0.495 * (1 + math.cos(math.pi * progress)))


def build_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW that decays matrices and nothing else."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def optimize(
    model: nn.Module,
    next_loss: Callable[[], Tensor],
    *,
    args: argparse.Namespace,
    on_checkpoint: Callable[[int, float], None],
) -> tuple[int, float]:
    """Train until the clock or --steps runs out; (steps, seconds).

    The schedule runs on the clock, or on --steps, so that it always ends by the deadline.
    """
    optimizer = build_optimizer(model)
    next_loss().backward()  # compiles, before the clock starts
    optimizer.zero_grad()
    step, recent = 0, []
    begun = saved = time.time()
    while True:
        if step % DEADLINE_EVERY == 0:
            if recent:
                recent[-1].item()  # waits for the device
            elapsed = time.time() - begun
            progress = step / args.steps if args.steps else elapsed / args.max_seconds
            if progress >= 1 or elapsed >= args.max_seconds:
                return step, elapsed
        if step and step % 500 == 0:
            print(f"step {step}  {elapsed:.1f} s  loss {torch.stack(recent).mean().item():.4f}", flush=True)
            recent.clear()
            if time.time() - saved > CHECKPOINT_EVERY_S:
                on_checkpoint(step, elapsed)
                saved = time.time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.lr)
        loss = next_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.detach())
        step += 1


def train(args: argparse.Namespace) -> None:
    """Train from fresh weights and write the model folder; prints the held-out losses of the bfloat16 weights."""
    begun, device = time.time(), "cuda" if torch.cuda.is_available() else "cpu"
    stream, held_out = load_shards(args.data)
    torch.manual_seed(args.seed)
    model = build_model().to(device)
    loss_of = torch.compile(window_loss, dynamic=False) if device == "cuda" else window_loss
    draw = windows(torch.from_numpy(stream).to(device), args.batch)

    def checkpoint(step: int, seconds: float) -> None:
        half = save(model, args)
        losses = {name: held_out_loss(half, ids, nbytes) for name, (ids, nbytes) in held_out.items()}
        tokens = step * args.batch * WINDOW
        print(json.dumps({"step": step, "tokens": tokens, "s": round(seconds, 1), "heldout": losses}), flush=True)

    set_up = time.time() - begun
    print(
        f"{model.num_parameters()} parameters, {len(stream)} tokens, lr {args.lr}, set up in {set_up:.1f} s", flush=True
    )
    steps, seconds = optimize(model, lambda: loss_of(model, next(draw), device), args=args, on_checkpoint=checkpoint)
    checkpoint(steps, seconds)


def main() -> None:
    """Run `prepare` or `train`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("prepare", help="texts -> tokenizer and token shards")
    one.add_argument("--root", type=Path, required=True, help="folder that holds corpus/")
    one.set_defaults(run=prepare)
    two = verbs.add_parser("train", help="shards -> model folder")
    two.add_argument("--data", type=Path, required=True, help="what prepare wrote")
    two.add_argument("--batch", type=int, default=256, help=f"sequences of {WINDOW} tokens a step")
    two.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    two.add_argument("--max-seconds", type=float, default=480, help="training time; the schedule ends there")
    two.add_argument("--steps", type=int, default=0, help="run the schedule over so many steps, not over the clock")
    two.set_defaults(run=train)
    for verb in (one, two):
        verb.add_argument("--out", type=Path, required=True, help="folder to write")
        verb.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
