"""`evaluate`: scores of a run on a split, beside those of its base model if asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from reft_cli.data.encode import Example
from reft_cli.data.fitting import check_fits
from reft_cli.data.records import NoSuchFile, Rows, Source, read_rows
from reft_cli.environment import versions
from reft_cli.errors import DataError, SpecError
from reft_cli.evaluation.answers import answer_all, answer_store
from reft_cli.evaluation.evaluate import Evaluation, Evaluator
from reft_cli.generation.decode import requests_of
from reft_cli.generation.settings import Decoding
from reft_cli.parallel.collective import from_first, is_first, joined
from reft_cli.runs.assemble import evaluator_of, merge_generation
from reft_cli.runs.execution import choose_reading
from reft_cli.runs.results import PASSES, Base, EvalReport, changed_settings, keep, kept_apart, result_name, scored_as
from reft_cli.runs.resuming import begun_with
from reft_cli.runs.session import OWN_PLACE, BasePlace, Session, open_run
from reft_cli.runs.sources import names_a_split, rows_of
from reft_cli.runs.texts import without_answers
from reft_cli.tasks.preferences import task_of
from reft_cli.training.observer import EvaluationRecord, NullObserver, Observer


def evaluate(
    run: Path,
    *,
    checkpoint: str | None = None,
    data: str | None = None,
    split: str = "test",
    limit: int | None = None,
    batch_size: int | None = None,
    base: Base = "none",
    loss: bool = False,
    generation: dict[str, Any] | None = None,
    place: BasePlace = OWN_PLACE,
    observer: Observer,
) -> EvalReport:
    """Score a run on `data` (a file, folder, hub id or bundled name), or on a split of its own spec.

    `loss`: read the loss also where it is no part of the score, which is where answers are generated.
    The result and every row's prediction are kept in the run's eval/ folder, named by data, step, what was left out,
    and how else than in the run's spec answers were decoded.
    Each process that a launcher started scores its share; the first one writes and tells the observer.
    """
    with joined(device=place.device), open_run(run, checkpoint=checkpoint, place=place) as session:
        observer = observer if is_first() else NullObserver()
        rows = _rows(session, data, split, limit)
        encoded = session.text.encode(rows, tell=partial(observer.on_message, "debug"))
        overrides = (generation or {}) | ({} if batch_size is None else {"batch_size": batch_size})
        decoding, size = merge_generation(session.checkpoint.manifest.generation, overrides)
        evaluator = _evaluator(session, decoding, batch_size=size, loss=loss)
        step = session.checkpoint.manifest.step
        own, _ = merge_generation(session.checkpoint.manifest.generation, {})
        changed = changed_settings(own, decoding) if evaluator.generates else []
        name = result_name(scored_as(data, split, encoded.name), step, base=base, limit=limit, changed=changed)
        name = from_first(partial(kept_apart, session.found.run, name, encoded.name))
        started = time.perf_counter()
        results = _score(session, encoded.examples, evaluator, base=base, name=name, observer=observer)
        seconds = time.perf_counter() - started
        for note in _notes(results.get("run", results.get("base")), longest=decoding.max_new_tokens):
            observer.on_message("info", note)
        report = EvalReport(
            run=run,
            checkpoint=session.found.checkpoint,
            data=encoded.name,
            rows=len(encoded.examples),
            metric=evaluator.metric,
            metrics=results["run"].metrics if "run" in results else {},
            base_metrics=results["base"].metrics if "base" in results else {},
            seconds=round(seconds, 3),
            path=None,
        )
        if session.found.run is not None:
            facts = _facts(session, evaluator)
            report = from_first(partial(keep, session.found.run, report, results, name=name, facts=facts))
    observer.on_evaluation(EvaluationRecord(step, encoded.name, report.metrics, seconds, best=False))
    observer.on_end("finished")
    return report


def _evaluator(session: Session, decoding: Decoding, *, batch_size: int | None, loss: bool) -> Evaluator:
    evaluator = evaluator_of(
        session.text,
        model=session.model,
        metric=session.checkpoint.manifest.text.metric,
        decoding=decoding,
        batch_size=batch_size,
    )
    if evaluator.generates and not loss:
        return replace(evaluator, reads_loss=False)
    run, text = session.found.run, session.text
    task = task_of(text.kind, beta=text.beta)
    layout, shared = choose_reading(session.model, task, {} if run is None else run.read())
    return replace(evaluator, layout=layout, shared=shared)


def _facts(session: Session, evaluator: Evaluator) -> dict[str, Any]:
    """How answers came about, for the result file."""
    generation = asdict(evaluator.decoding) | {"batch_size": evaluator.batch_size}
    facts = {"generation": generation, "device": str(session.model.device)}
    if evaluator.generates:
        facts["decoded_by"] = session.decoder.why_not_slots(evaluator.decoding) or "slots"
    return facts


def _notes(result: Evaluation | None, *, longest: int) -> list[str]:
    """What makes scores of most answers meaningless: nothing to compare, or no end."""
    samples = result.samples if result is not None else []
    empty = sum(sample.get("answer") == "" for sample in samples)
    cut = sum(sample.get("finished") is False for sample in samples)
    return [
        f"{text} in {count:,} of {len(samples):,} answers"
        for count, text in (
            (empty, "task.extraction found nothing"),
            (cut, f"generation.max_new_tokens {longest} was reached before the end"),
        )
        if 2 * count > len(samples)
    ]


def _score(
    session: Session, examples: Sequence[Example], evaluator: Evaluator, *, base: Base, name: str, observer: Observer
) -> dict[str, Evaluation]:
    """The evaluations that `base` asks for, by the names run and base."""
    passes, prompts = PASSES[base], without_answers(examples)
    if evaluator.generates:
        check_fits(examples, session.model.base_model, name="row", new_tokens=evaluator.new_tokens)
        return _generate_and_score(session, examples, prompts, evaluator, passes=passes, name=name, observer=observer)
    total = len(passes) * len(examples)
    observer.on_start(total, 0, {"verb": "evaluating", "unit": "row"})
    results: dict[str, Evaluation] = {}
    for which in passes:
        before = len(results) * len(examples)
        results[which] = evaluator.run(
            session.model,
            examples,
            prompts=prompts,
            edited=which == "run",
            on_progress=lambda done, _, before=before: observer.on_progress(before + done, total),  # type: ignore[misc]
        )
    return results


def _generate_and_score(
    session: Session,
    examples: Sequence[Example],
    prompts: Sequence[Example],
    evaluator: Evaluator,
    *,
    passes: list[str],
    name: str,
    observer: Observer,
) -> dict[str, Evaluation]:
    """One batch of all models' answers; with a run folder they are kept as they come."""
    run = session.found.run
    requests = [each for which in passes for each in requests_of(prompts, member=int(which == "run"))]
    path = None if run is None else run.evaluation(name, suffix=".partial.jsonl")
    with answer_store(path, settings=_settings_digest(session, evaluator)) as store:
        done = 0 if store is None else sum(store.key(each) in store.known for each in requests)
        observer.on_start(len(requests), done, {"verb": "evaluating", "unit": "row"})
        reason = session.decoder.why_not_slots(evaluator.decoding)
        if reason is not None:
            observer.on_message("debug", f"decoding by transformers' generate: {reason}")
        answers = answer_all(
            session.decoder,
            requests,
            decoding=evaluator.decoding,
            batch_size=evaluator.batch_size,
            store=store,
            on_progress=lambda done: observer.on_progress(done, len(requests)),
        )
        parts = {which: answers[index * len(prompts) :][: len(prompts)] for index, which in enumerate(passes)}
        return {
            which: evaluator.run(session.model, examples, prompts=prompts, edited=which == "run", answers=parts[which])
            for which in passes
        }


def _settings_digest(session: Session, evaluator: Evaluator) -> str:
    """Of everything that decides an answer to a prompt."""
    manifest, model = session.checkpoint.manifest, session.model.base_model
    facts = [manifest.sha256.manifest, asdict(evaluator.decoding), str(model.dtype), model.device.type, versions()]
    return json.dumps(facts, sort_keys=True)


def _rows(session: Session, data: str | None, split: str, limit: int | None) -> Rows:
    if data is None:
        if session.found.run is None:
            raise SpecError(f"{session.found.checkpoint} lies in no run folder, so its data are not known; give --data")
        spec = begun_with(session.found.run)
        try:
            return rows_of(spec, split, limit=limit)
        except NoSuchFile as error:
            hint = "Paths of a run's spec count from where it was trained; go there, or give --data"
            raise DataError(replace(error.problems[0], hint=hint)) from error
    return read_rows(Source(path=data, split=None if names_a_split(data) else split, limit=limit))
