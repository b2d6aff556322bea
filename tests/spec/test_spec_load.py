"""load_spec as a whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from reft_cli.errors import SpecError
from reft_cli.spec.load import Origin, load_spec
from reft_cli.spec.schema import Spec

QUICKSTART = """\
# reft train configs/quickstart.yaml
model: bundled:tiny-llama
intervention: {method: loreft, layers: all, positions: f3+l3, rank: 4}
task: {kind: causal_lm, metric: exact_match}
data: {train: bundled:reviews/train, validation: bundled:reviews/validation, test: bundled:reviews/test}
train: {epochs: 3, learning_rate: 2e-3, global_batch_size: 32}
"""


def test_the_spec_of_the_design(tmp_path):
    path = tmp_path / "quickstart.yaml"
    path.write_text(QUICKSTART)
    loaded = load_spec(path)
    assert loaded.spec.model.name == "bundled:tiny-llama"
    assert loaded.spec.train.learning_rate == 2e-3
    assert loaded.spec.train.epochs == 3.0
    assert loaded.spec.data.test == "bundled:reviews/test"
    assert (loaded.path, loaded.text) == (path, QUICKSTART)
    assert loaded.origins["train", "epochs"] == Origin(str(path), 6, 9)
    assert loaded.origins["train",] == Origin(str(path), 6, 1)
    assert ("train", "seed") not in loaded.origins


def test_a_path_may_be_a_string(tmp_path):
    (tmp_path / "a.yaml").write_text("model: m\n")
    assert load_spec(str(tmp_path / "a.yaml")).path == tmp_path / "a.yaml"


def test_loading_imports_no_torch():
    code = (
        "import sys; import reft_cli.spec, reft_cli.spec.load; "
        "print({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_wrong_value_hides_no_conflict(tmp_path):
    """pydantic alone would be silent about rank until dropout is mended."""
    path = Path(tmp_path / "a.yaml")
    path.write_text("model: m\nintervention: {method: red, rank: 2, dropout: 7}\n")
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    assert [problem.key for problem in caught.value.problems] == ["intervention.rank", "intervention.dropout"]


def test_a_wrong_value_makes_no_conflict(tmp_path):
    """The method is misspelt: whether it takes a rank is not known, and metric may fit the kind that was meant."""
    path = tmp_path / "a.yaml"
    path.write_text("model: m\nintervention: {method: rde, rank: 2}\ntask: {kind: regresion, metric: pearson}\n")
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    assert [problem.key for problem in caught.value.problems] == ["intervention.method", "task.kind"]


def test_defaults_that_depend_on_the_method():
    assert Spec(model="m").intervention.rank == 4
    assert Spec(model="m", intervention={"rank": None}).intervention.rank == 4
    assert Spec(model="m", intervention={"method": "red"}).intervention.component == "mlp_output"
    assert Spec(model="m", task={"kind": "classification"}).task.metric == "accuracy"
