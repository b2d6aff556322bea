"""Says that a model comes from the hub first: that takes minutes, or a minute of tries where there is no network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reft_cli import bundled
from reft_cli.cli import console

if TYPE_CHECKING:
    from reft_cli.spec.schema import ModelSpec


def tell_of_fetching(model: ModelSpec) -> None:
    """A line on stderr if the model is neither local nor in the hub's cache, and the hub may be asked."""
    if bundled.is_bundled(model.name) or Path(model.name).expanduser().exists():
        return
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        there = try_to_load_from_cache(model.name, "config.json", revision=model.revision)
    except HFValidationError:  # a path; that it does not exist is said by whoever loads it
        return
    if not isinstance(there, str) and not constants.HF_HUB_OFFLINE:
        console.say(f"fetching {model.name} from the hub")
