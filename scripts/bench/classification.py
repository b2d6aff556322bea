#!/usr/bin/env python3
"""LoReFT with a trained head beside a linear probe and the majority class, on JSONL classification data.

    classification.py --train TRAIN.jsonl --validation VALIDATION.jsonl --output RESULTS.json
                      [--model bundled:tiny-llama] [--rows 4000] [--epochs 5] [--seeds 0 1 2] [--set KEY=VALUE ...]

Rows have `text`, or `sentence1` and `sentence2`, and `label`. The probe is scikit-learn's logistic regression on the
frozen model's last hidden state at the last token, the very state that the head reads; its C is chosen by three-fold
cross-validation on the training rows. Scores are accuracies on the validation rows, which nothing was chosen on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from reft_cli import runs
from reft_cli.data.batch import build_batch, micro_batches
from reft_cli.data.encode import Encoded
from reft_cli.environment import git_state, versions
from reft_cli.models.loading import load_tokenizer
from reft_cli.runs.assemble import base_source, load_base
from reft_cli.runs.texts import load_training_data
from reft_cli.spec.load import LoadedSpec, load_spec
from reft_cli.training.observer import NullObserver

SPEC = """\
model: {{name: "{model}"}}
task: {{kind: classification}}
data:
  train: {{path: "{train}", limit: {rows}}}
  validation: "{validation}"
  test: "{validation}"
  on_overflow: truncate_prompt
intervention: {{method: loreft, positions: prompt, rank: 4}}
train: {{epochs: {epochs}, learning_rate: 2.0e-3, warmup_ratio: 0.1, global_batch_size: 32}}
evaluation: {{every: never}}
"""


@torch.inference_mode()
def last_states(model: torch.nn.Module, encoded: Encoded, pad_token_id: int) -> np.ndarray:
    """The last hidden state at the last token of every row, [rows, D]."""
    found: dict[int, np.ndarray] = {}
    device = next(model.parameters()).device
    for chosen in micro_batches(encoded.examples, token_budget=8192, rows=None, padded=True):
        batch = build_batch(chosen, groups=(), layout="padded", pad_token_id=pad_token_id).to(device)
        states = model.base_model(**batch.inputs).last_hidden_state.float()  # [B, T, D]
        for example, row in zip(chosen, states, strict=True):
            found[id(example)] = row[len(example.input_ids) - 1].cpu().numpy()
    return np.stack([found[id(example)] for example in encoded.examples])


def probe(loaded: LoadedSpec) -> dict[str, float]:
    """Accuracies of the linear probe and of the majority class."""
    source = base_source(loaded.spec.model)
    data = load_training_data(loaded.spec, load_tokenizer(source))
    assert data.validation is not None
    model = load_base(source, data.text, seed=0).model
    pad = data.text.tokenizer.pad_token_id
    inside, outside = (last_states(model, each, pad) for each in (data.train, data.validation))
    seen, unseen = ([each.label for each in part.examples] for part in (data.train, data.validation))
    classifier = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=np.logspace(-4, 1, 6), cv=3, max_iter=2000))
    classifier.fit(inside, seen)
    majority = Counter(seen).most_common(1)[0][0]
    return {"probe": float(classifier.score(outside, unseen)), "majority": float(np.mean(np.array(unseen) == majority))}


def main() -> None:
    """Run the comparison and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--model", default="bundled:tiny-llama")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "classification.yaml"
        path.write_text(
            SPEC.format(**{key: getattr(args, key) for key in ("model", "train", "rows", "validation", "epochs")})
        )
        result = probe(load_spec(path, overrides=args.set)) | {"loreft": [], "seconds": []}
        for seed in args.seeds:
            loaded = load_spec(path, overrides=[*args.set, f"train.seed={seed}"])
            started = time.perf_counter()
            trained = runs.train(loaded, output=Path(folder) / f"seed_{seed}", observer=NullObserver())
            result["seconds"].append(round(time.perf_counter() - started, 1))
            report = runs.evaluate(trained.run, checkpoint="last", observer=NullObserver())
            result["loreft"].append(report.metrics["accuracy"])
    result |= {"loreft_mean": statistics.mean(result["loreft"]), "data": args.train.name, "set": args.set}
    result |= {"versions": versions(), "git": git_state(Path.cwd())}
    result["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    text = json.dumps(result, indent=2)
    if args.output:
        args.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
