"""Names of what is bundled, and the errors for names that are not."""

import subprocess
import sys

import pytest

from reft_cli.bundled import is_bundled, locate, names
from reft_cli.errors import DataError, ModelError

MODELS = ("bundled:tiny-llama",)


def test_models_are_listed():
    assert names("model") == MODELS
    assert set(MODELS) <= set(names())


def test_every_name_leads_to_something():
    assert all(locate(name).exists() for name in names())
    assert all(is_bundled(name) for name in names())
    assert not is_bundled("meta-llama/Llama-3.2-1B")


def test_a_model_is_a_folder_with_weights():
    assert (locate("bundled:tiny-llama", kind="model") / "model.safetensors").is_file()


def test_a_misspelt_model_names_the_nearest():
    with pytest.raises(ModelError, match="`bundled:tinylama` is no bundled model; did you mean `bundled:tiny-llama`"):
        locate("bundled:tinylama", kind="model")


def test_unknown_names_list_what_there_is():
    with pytest.raises(DataError, match="`bundled:zzz` is no bundled data set; there are: "):
        locate("bundled:zzz", kind="data")


def test_a_model_is_not_data():
    with pytest.raises(DataError, match="`bundled:tiny-llama` is no bundled data set"):
        locate("bundled:tiny-llama", kind="data")


def test_without_a_kind_the_nearest_name_decides():
    with pytest.raises(ModelError):
        locate("bundled:tiny-lama")


def test_importing_needs_no_torch():
    code = "import sys, reft_cli.bundled; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
