"""Write tests/fixtures/pyreft_goldens.{safetensors,json}: what the PyPI release of pyreft computes on small inputs.

pyreft 0.1.0 pins transformers 4.45.1, which does not go with a current torch. It runs on 4.57.6, so an older release
brings the dependencies, in an environment of its own:

    python3 -m venv peer
    peer/bin/pip install torch==2.13.0
    peer/bin/pip install transformers==4.57.6 datasets==3.6.0 huggingface_hub==0.36.0 tokenizers==0.22.2 \\
        pyvene==0.1.8 pyreft==0.0.7
    peer/bin/pip install --no-deps pyreft==0.1.0
    peer/bin/python scripts/make_goldens.py

Tensors, as pyreft has them, are named CLASS/…: R [d, r] (`rotate_layer.weight`), W2 [r, d] (`proj_layer.weight`),
W [r, d] and b [r] (`learned_source`), h and y [B, P, d], output and dropped (the output with dropout 0.5) [B, P, d],
and the gradients of ½ Σ (output − y)² with respect to R (as if it were free), W2, W, b and h.
"""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import pyreft
import torch
from safetensors.torch import save_file
from torch.nn.utils import parametrize

BATCH, POSITIONS, WIDTH, RANK, SEED, DROPOUT = 2, 5, 24, 3, 20240404, 0.5
CLASSES = ("Loreft", "Noreft", "Direft", "Nodireft", "Consreft", "Lobireft")
EXPRESSIONS = ("f1", "l1", "f3", "l3", "f1+l1", "f3+l1", "f1+l3", "f3+l3", "f7+l7", "f11+l11")
LENGTHS = (*range(1, 17), 21, 22, 23, 40)


def build(name, dropout):
    """The intervention of a class, the same weights for every dropout."""
    torch.manual_seed(SEED)
    return getattr(pyreft, f"{name}Intervention")(
        embed_dim=WIDTH, low_rank_dimension=RANK, dtype=torch.float32, add_bias=False, act_fn=None, dropout=dropout
    )


def weights(intervention):
    """R or W2, W and b, by name; inside parametrize.cached() R is one tensor."""
    found = {}
    if hasattr(intervention, "rotate_layer"):
        found["R"] = intervention.rotate_layer.weight
    else:
        found["W2"] = intervention.proj_layer.weight
    source = intervention.learned_source
    if isinstance(source, torch.nn.Linear):
        return found | {"W": source.weight, "b": source.bias}
    return found | {"b": source}


def golden(name, h, y):
    """Inputs, weights, output and gradients of one class."""
    intervention = build(name, 0.0)
    h = h.clone().requires_grad_()
    with parametrize.cached():
        inputs = weights(intervention) | {"h": h}
        output = intervention(h)
        gradients = torch.autograd.grad((output - y).square().sum() / 2, list(inputs.values()))
    dropping = build(name, DROPOUT)
    torch.manual_seed(SEED + 1)
    tensors = inputs | {"y": y, "output": output, "dropped": dropping(h)}
    tensors |= {f"gradient_{key}": gradient for key, gradient in zip(inputs, gradients, strict=True)}
    return {f"{name}/{key}": tensor.detach().clone().contiguous() for key, tensor in tensors.items()}


def locations():
    """get_intervention_locations of two interventions, for every expression, prompt length and tying."""
    return [
        {
            "positions": expression,
            "prompt_length": length,
            "share_weights": share,
            "locations": pyreft.get_intervention_locations(
                last_position=length, positions=expression, num_interventions=2, share_weights=share
            ),
        }
        for expression in EXPRESSIONS
        for length in LENGTHS
        for share in (True, False)
    ]


def main():
    """Write the two files."""
    generator = torch.Generator().manual_seed(SEED)
    h = torch.randn(BATCH, POSITIONS, WIDTH, generator=generator)
    y = torch.randn(BATCH, POSITIONS, WIDTH, generator=generator)
    tensors = {}
    for name in CLASSES:
        tensors |= golden(name, h, y)
    folder = Path(__file__).parents[1] / "tests" / "fixtures"
    save_file(tensors, folder / "pyreft_goldens.safetensors")
    facts = {
        "versions": {name: version(name) for name in ("pyreft", "pyvene", "torch", "transformers")}
        | {"python": platform.python_version()},
        "seed": SEED,
        "dropout": DROPOUT,
        "classes": CLASSES,
    }
    head = json.dumps(facts, indent=1)[:-2]
    rows = ",\n".join("  " + json.dumps(row) for row in locations())
    (folder / "pyreft_goldens.json").write_text(f'{head},\n "locations": [\n{rows}\n ]\n}}\n')


if __name__ == "__main__":
    main()
