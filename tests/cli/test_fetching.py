"""Whether a model has to come from the hub is said before anyone waits for it."""

import pytest

from reft_cli.cli import console
from reft_cli.cli.fetching import tell_of_fetching
from reft_cli.spec.schema import ModelSpec


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache that holds `org/here`, and a hub that may be asked."""
    console.reset([])
    snapshot = tmp_path / "models--org--here" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--org--here" / "refs").mkdir()
    (tmp_path / "models--org--here" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path


def test_a_model_that_is_not_here_is_fetched(hub, capsys):
    tell_of_fetching(ModelSpec(name="org/there"))
    assert capsys.readouterr().err == "fetching org/there from the hub\n"


@pytest.mark.parametrize("name", ["org/here", "bundled:tiny-llama", ".", "./none/of/these", "/none"])
def test_others_are_not(hub, capsys, name):
    tell_of_fetching(ModelSpec(name=name))
    assert capsys.readouterr().err == ""


def test_nothing_is_fetched_offline(hub, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tell_of_fetching(ModelSpec(name="org/there"))
    assert capsys.readouterr().err == ""
