#!/usr/bin/env python3
"""Measures what the bundled reviews take, without reft: the yardsticks that stand in their data card.

    python scripts/measure_reviews.py

majority          the label that training has most often
words, word pairs logistic regression on counts of words, or of words and pairs of neighbours
frozen model      greedy answer of the base model to PROMPT, and the likelier one of the two answers
linear probe      logistic regression on the base model's hidden state at the last prompt token, at each depth
All regressions are fitted on `train` with scikit-learn's default penalty; nothing is chosen by looking at `test`.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModelForCausalLM, AutoTokenizer

from reft_cli.bundled import locate

SPLITS = ("train", "validation", "test", "hard")
PROMPT = "Review: {}\nSentiment:"
Texts = dict[str, list[str]]
Labels = dict[str, np.ndarray]


def read(column: str) -> dict[str, list[str]]:
    """Split -> one column of its rows."""
    files = {split: locate(f"bundled:reviews/{split}").read_text(encoding="utf-8") for split in SPLITS}
    return {split: [json.loads(line)[column] for line in text.splitlines()] for split, text in files.items()}


def show(name: str, scores: dict[str, float]) -> None:
    """One row of the table."""
    print(f"| {name} | " + " | ".join(f"{scores[split]:.3f}" for split in SPLITS) + " |", flush=True)


def bag_of_words(texts: Texts, labels: Labels, *, longest: int) -> dict[str, float]:
    """Accuracy of a logistic regression on counts of runs of up to `longest` words."""
    model = make_pipeline(CountVectorizer(ngram_range=(1, longest)), LogisticRegression(max_iter=5000))
    model.fit(texts["train"], labels["train"])
    return {split: model.score(texts[split], labels[split]) for split in SPLITS}


class Frozen:
    """The bundled model, asked about one text at a time."""

    def __init__(self) -> None:
        folder = locate("bundled:tiny-llama")
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()

    def ids(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer(text).input_ids

    @torch.no_grad()
    def states(self, text: str) -> np.ndarray:
        """Hidden states at the last prompt token: embedding and blocks, [7, hidden size]."""
        ids = torch.tensor([self.ids(PROMPT.format(text))])
        hidden = self.model(input_ids=ids, output_hidden_states=True).hidden_states
        return torch.stack([state[0, -1] for state in hidden]).numpy()

    @torch.no_grad()
    def answers(self, text: str) -> tuple[str | None, str]:
        """(the label that is the greedy answer, if one is; the likelier label); both with the end token."""
        prompt, exact, score = self.ids(PROMPT.format(text)), None, {}
        for label in ("positive", "negative"):
            answer = [*self.ids(f" {label}"), self.tokenizer.eos_token_id]
            logits = self.model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            score[label] = logits.log_softmax(-1)[range(len(answer)), answer].sum().item()
            exact = label if logits.argmax(-1).tolist() == answer else exact
        return exact, max(score, key=score.__getitem__)


def main() -> None:
    """Print the table."""
    texts = read("text")
    labels = {split: np.array(column) for split, column in read("label").items()}
    print("| | " + " | ".join(SPLITS) + " |\n" + "|---" * (1 + len(SPLITS)) + "|")
    names, counts = np.unique(labels["train"], return_counts=True)
    majority = names[counts.argmax()]
    show("majority", {split: float((labels[split] == majority).mean()) for split in SPLITS})
    show("words", bag_of_words(texts, labels, longest=1))
    show("words and word pairs", bag_of_words(texts, labels, longest=2))
    frozen = Frozen()
    answers = {split: [frozen.answers(text) for text in texts[split]] for split in SPLITS}
    for name, which in (("frozen, greedy answer", 0), ("frozen, likelier answer", 1)):
        given = {split: np.array([str(pair[which]) for pair in answers[split]]) for split in SPLITS}
        show(name, {split: float((given[split] == labels[split]).mean()) for split in SPLITS})
    states = {split: np.stack([frozen.states(text) for text in texts[split]]) for split in SPLITS}
    for depth in range(states["train"].shape[1]):
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
        probe.fit(states["train"][:, depth], labels["train"])
        show(f"probe, depth {depth}", {split: probe.score(states[split][:, depth], labels[split]) for split in SPLITS})


if __name__ == "__main__":
    main()
