"""The loader: what is built ahead is what is built at once, in order, a few at a time, and its thread always ends."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import fields
from typing import Any

import pytest
import torch

from reft_cli.data import loader as module
from reft_cli.data.batch import Batch, build_batch, micro_batches
from reft_cli.data.capacity import fill
from reft_cli.data.examples import Example, Examples
from reft_cli.data.loader import THREAD, GlobalBatch, Loader, dealt
from reft_cli.positions import Positions

GROUPS = Positions.parse("f3+l3").groups(tied=False)


def drawn(count: int) -> list[Example]:
    draw = random.Random(0)
    return [
        Example([draw.randrange(290) for _ in range(draw.randint(9, 60))], draw.randint(1, 8), None, "", "", row)
        for row in range(1, count + 1)
    ]


EXAMPLES = drawn(40)
BATCHES = [list(range(start, start + 8)) for start in range(0, 40, 8)]


def loader(**given: Any) -> Loader:
    settings = {"groups": GROUPS, "layout": "packed", "pad_token_id": 1, "token_budget": 120, "micro_batch_size": None}
    return Loader(EXAMPLES, **settings | {"device": torch.device("cpu")} | given)


def plain(batch: Batch) -> list[Any]:
    """Everything in a batch as Python has it, but where its tokens stand in their columns."""
    values: list[Any] = []
    for each in (getattr(batch, field.name) for field in fields(batch) if field.name != "places"):
        parts = each.items() if isinstance(each, dict) else [("", each)]
        values += [(name, (x.dtype, x.tolist()) if isinstance(x, torch.Tensor) else x) for name, x in parts]
    return values


def same(one: GlobalBatch, other: GlobalBatch) -> bool:
    passes = [[plain(each) for each in batch.passes] for batch in (one, other)]
    return one.indices == other.indices and one.examples == other.examples and passes[0] == passes[1]


def threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith(THREAD)]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("lead", [0, 2, 9])
def test_ahead_gives_what_is_built_at_once_and_what_a_plain_loop_cuts(layout, rows, lead):
    made = loader(layout=layout, micro_batch_size=rows, lead=lead)
    with made.ahead(BATCHES) as stream:
        found = list(stream)
    assert len(found) == len(BATCHES)
    for batch, indices in zip(found, BATCHES, strict=True):
        assert same(batch, made.build(indices))
        examples = [EXAMPLES[index] for index in indices]
        parts = micro_batches(examples, token_budget=120, rows=rows, padded=layout == "padded")
        built = [build_batch(part, groups=GROUPS, layout=layout, pad_token_id=1) for part in parts]
        assert [plain(each) for each in batch.passes] == [plain(each) for each in built]
        assert batch.examples == examples
    assert threads() == []


def test_processes_share_a_batch_and_may_have_none_of_it():
    parts = [loader(process=process, processes=3).build(BATCHES[0]) for process in range(3)]
    tokens = sum(batch.inputs["input_ids"].numel() for part in parts for batch in part.passes)
    assert tokens == (parts[0].examples.lengths - 1).sum() and parts[0].examples == parts[2].examples
    assert loader(process=2, processes=3).build([0, 1]).passes == []


def test_rows_are_dealt_so_that_processes_work_equally():
    assert [dealt(8, process=each, processes=2) for each in (0, 1)] == [[0, 3, 4, 7], [1, 2, 5, 6]]
    shares = [dealt(10, process=each, processes=3) for each in range(3)]
    assert shares == [[0, 5, 6], [1, 4, 7], [2, 3, 8, 9]] and dealt(2, process=2, processes=3) == []
    assert dealt(5, process=0, processes=1) == [0, 1, 2, 3, 4]


def test_no_more_than_the_lead_is_built_ahead():
    pulled: list[int] = []

    def order():
        for number, indices in enumerate(BATCHES):
            pulled.append(number)
            yield indices

    with loader(lead=2).ahead(order()) as stream:
        next(stream)
        time.sleep(0.05)
        assert pulled == [0, 1, 2]
        next(stream)
        assert pulled == [0, 1, 2, 3]


def test_an_error_comes_where_its_batch_is_taken(monkeypatch: pytest.MonkeyPatch):
    real = module.build_batch

    def failing(examples, **given):
        if 17 in examples.rows:
            raise ValueError("row 17 is odd")
        return real(examples, **given)

    monkeypatch.setattr(module, "build_batch", failing)
    taken = []
    with pytest.raises(ValueError, match="row 17 is odd"), loader().ahead(BATCHES) as stream:
        for batch in stream:
            taken.append(batch.indices)
    assert taken == BATCHES[:2]
    assert threads() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, None])
def test_the_thread_ends_however_the_consumer_stops(error, monkeypatch: pytest.MonkeyPatch):
    real = module.build_batch
    monkeypatch.setattr(module, "build_batch", lambda *args, **given: (time.sleep(0.01), real(*args, **given))[1])

    def consume():
        with loader().ahead(BATCHES) as stream:
            next(stream)
            if error is not None:
                raise error

    if error is None:
        consume()
    else:
        with pytest.raises(error):
            consume()
    assert threads() == []


def test_a_lower_budget_holds_for_all_that_comes_after():
    made, small = loader(), loader(token_budget=60)
    with made.ahead(BATCHES) as stream:
        assert same(next(stream), loader().build(BATCHES[0]))
        made.token_budget = 60
        for batch, indices in zip(stream, BATCHES[1:], strict=True):
            assert same(batch, small.build(indices)) and batch.token_budget == 60


def test_each_pass_is_prepared_where_it_is_built():
    def prepare(batch: Batch) -> Batch:
        assert threading.current_thread().name.startswith(THREAD)
        return fill(batch, pad_token_id=1)

    with loader(prepare=prepare).ahead(BATCHES) as stream:
        for batch, indices in zip(stream, BATCHES, strict=True):
            filled = [fill(each, pad_token_id=1) for each in loader().build(indices).passes]
            assert [plain(each) for each in batch.passes] == [plain(each) for each in filled]


@pytest.mark.gpu
def test_passes_are_pinned_for_a_gpu():
    with loader(device=torch.device("cuda", 0)).ahead(BATCHES) as stream:
        for batch, indices in zip(stream, BATCHES, strict=True):
            assert all(each.targets.is_pinned() and each.inputs["input_ids"].is_pinned() for each in batch.passes)
            assert same(batch, loader().build(indices))


def test_places_are_those_of_all_tokens():
    columns = Examples.of(EXAMPLES)
    for batch in loader().build(BATCHES[0]).passes:
        assert columns.tokens[batch.places.numpy()].tolist() == batch.inputs["input_ids"][0].tolist()
