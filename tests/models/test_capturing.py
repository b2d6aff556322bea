"""Reasons why a pass cannot be recorded. Recording itself is tested on a GPU, by what is recorded."""

from __future__ import annotations

from reft_cli.models.capturing import first_reason


def test_the_reason_is_the_error_that_began_it():
    try:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
    except RuntimeError as error:
        assert first_reason(error) == "operation not permitted when stream is capturing"
    assert first_reason(RuntimeError("alone")) == "alone"
