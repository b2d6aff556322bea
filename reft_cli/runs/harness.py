"""`evaluate_tasks`: scores of a run on tasks of lm-evaluation-harness, kept in the harness's own format."""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import partialmethod
from pathlib import Path
from typing import Any

from reft_cli.environment import git_state
from reft_cli.errors import DataError, ReftError, SpecError, first_line
from reft_cli.evaluation.requests import Requests
from reft_cli.runfolder import RunFolder
from reft_cli.runs.assemble import merge_generation
from reft_cli.runs.results import PASSES, Base, EvalReport
from reft_cli.runs.session import OWN_PLACE, BasePlace, Session, open_run
from reft_cli.spec.quoting import printable
from reft_cli.training.observer import EvaluationRecord, Observer
from reft_cli.writing import json_text, write_atomic

NEEDED = "lm_eval"
INSTALL = "--tasks needs lm-eval: pip install 'reft[eval]'"
SILENT = ("alias", "name", "sample_len", "sample_count")  # of a task's results, no scores


def evaluate_tasks(
    run: Path,
    *,
    tasks: Sequence[str],
    folder: Path | None = None,
    few_shot: int | None = None,
    chat: bool = False,
    checkpoint: str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    base: Base = "none",
    place: BasePlace = OWN_PLACE,
    observer: Observer,
) -> EvalReport:
    """Score a run on tasks, groups or patterns such as `mmlu_*`; `folder` holds tasks of the user's own (YAML).

    `few_shot` solved rows before each prompt, `chat`: prompts through the tokenizer's chat template.
    SpecError: lm-eval is missing, or a task is unknown. DataError: its data cannot be had.
    """
    names, manager = _known(tasks, folder)
    with open_run(run, checkpoint=checkpoint, place=place) as session:
        _check_text(session, chat=chat)
        _, size = merge_generation(session.checkpoint.manifest.generation, {"batch_size": batch_size})
        observer.on_start(0, 0, {"verb": "evaluating", "unit": "request"})
        started = time.perf_counter()
        settings = {"num_fewshot": few_shot, "apply_chat_template": chat, "limit": limit, "batch_size": size}
        found = {
            which: _run_tasks(session, names, manager, edited=which == "run", settings=settings, observer=observer)
            for which in PASSES[base]
        }
        seconds = round(time.perf_counter() - started, 3)
        scores = {which: _scores(results) for which, results in found.items()}
        report = EvalReport(
            run=run,
            checkpoint=session.found.checkpoint,
            data=", ".join(names),
            rows=_rows(next(iter(found.values()))),
            metric=next(iter(next(iter(scores.values()))), "none"),
            metrics=scores.get("run", {}),
            base_metrics=scores.get("base", {}),
            seconds=seconds,
            path=None,
        )
        if session.found.run is not None:
            report = _keep(session, session.found.run, report, found, limit)
    observer.on_evaluation(
        EvaluationRecord(session.checkpoint.manifest.step, report.data, report.metrics, seconds, False)
    )
    observer.on_end("finished")
    return report


def _known(tasks: Sequence[str], folder: Path | None) -> tuple[list[str], Any]:
    """(names of tasks, lm-eval's manager of them). SpecError: there is none of a name, or no lm-eval."""
    if importlib.util.find_spec(NEEDED) is None:
        raise SpecError(INSTALL)
    if folder is not None and not folder.is_dir():
        raise SpecError(f"--task-folder {folder}: no such folder")
    from lm_eval.tasks import TaskManager

    with _quiet():
        manager = TaskManager(include_path=str(folder) if folder else None)
    names: list[str] = []
    for task in tasks:
        matched = manager.match_tasks([task])
        if not matched:
            near = get_close_matches(task, manager.all_tasks, n=1)
            meant = f"; did you mean `{near[0]}`?" if near else "; `lm-eval ls tasks` lists them"
            raise SpecError(f"--tasks {printable(task)}: lm-eval has no such task{meant}")
        names += [name for name in matched if name not in names]
    return names, manager


def _check_text(session: Session, *, chat: bool) -> None:
    text = session.text
    if not text.writes:
        raise SpecError(f"--tasks: the run has task.kind {text.kind}, which writes no text for lm-eval")
    if chat and not text.tokenizer.chat_template:
        raise SpecError("--chat: the tokenizer has no chat template")


def _run_tasks(
    session: Session,
    names: list[str],
    manager: Any,  # noqa: ANN401  lm-eval's TaskManager
    *,
    edited: bool,
    settings: Mapping[str, Any],
    observer: Observer,
) -> dict[str, Any]:
    """lm-eval's results, its samples among them."""
    from datasets.exceptions import DatasetsError
    from lm_eval import simple_evaluate

    from reft_cli.evaluation.lm_eval_model import ReftLM

    with _quiet():
        try:
            manager.load(names)
        except (DatasetsError, OSError, ValueError, RuntimeError, KeyError) as error:
            reason = printable(first_line(error))
            raise DataError(f"--tasks {', '.join(names)}: its data cannot be had: {reason}") from error
        requests = Requests(
            model=session.model,
            decoder=session.decoder,
            groups=session.model.groups,
            tokenizer=session.text.tokenizer,
            batch_size=settings["batch_size"],
            edited=edited,
            on_progress=observer.on_progress,
        )
        with _no_commit_outside_git():
            results: dict[str, Any] = simple_evaluate(
                model=ReftLM(requests),
                model_args={"path": str(session.found.checkpoint)},
                tasks=names,
                device=str(session.model.device),
                task_manager=manager,
                **settings,
            )
    results["config"]["reft"] = _facts(session, requests)
    return results


def _facts(session: Session, requests: Requests) -> dict[str, Any]:
    """What scores depend on besides the task."""
    import lm_eval

    weight, manifest = next(session.model.base_model.parameters()), session.checkpoint.manifest
    return {
        "intervened": requests.edited,
        "requests_without_prompt": requests.unprompted,
        "requests_without_prompt_are": "the base model's, but for edits of all or generated tokens",
        "base": manifest.base.name,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "attention": session.model.base_model.config._attn_implementation,
        "intervention_sha256": manifest.sha256.tensors,
        "lm_eval": lm_eval.__version__,
    }


def _scores(results: Mapping[str, Any]) -> dict[str, float]:
    """`task/metric`, with the filter's name where it is not `none`; standard errors stay in the result file."""
    scores = {}
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, _, chosen = key.partition(",")
            if metric not in SILENT and not metric.endswith("_stderr") and isinstance(value, int | float):
                scores["/".join([task, metric, *([chosen] if chosen not in ("", "none") else [])])] = float(value)
    return scores


def _rows(results: Mapping[str, Any]) -> int:
    return sum(len(samples) for samples in results.get("samples", {}).values())


def _keep(
    session: Session, run: RunFolder, report: EvalReport, found: Mapping[str, dict[str, Any]], limit: int | None
) -> EvalReport:
    """lm-eval's files, written by itself, in a folder of their own; and our short report beside it."""
    from lm_eval.loggers import EvaluationTracker

    step = f"step_{session.checkpoint.manifest.step:06d}"
    name = "-".join(["lm_eval", *([f"first_{limit}"] if limit else []), step])
    files = []
    for which, results in found.items():
        place = run.evaluation(name, suffix="") / ("results.json" if which == "run" else "base.json")
        tracker = EvaluationTracker(output_path=str(place))
        tracker.general_config_tracker.log_experiment_args("reft", results["config"]["model_args"], None, None, False)
        samples = results.pop("samples", {})
        tracker.save_results_aggregated(results=results, samples=samples)
        written = sorted(place.parent.glob(f"{place.stem}_*.json"))
        if not written:
            raise ReftError(f"{place.parent}: lm-eval could not write its results there; see to the disk and try again")
        files.append(str(written[-1].relative_to(run.path)))
        for task, lines in samples.items():
            tracker.save_results_samples(task_name=f"{task}_base" if which == "base" else task, samples=lines)
    path = run.evaluation(f"{name}-{'_'.join(found)}" if "base" in found else name)
    kept = replace(report, path=path)
    facts = {which: results["config"]["reft"] for which, results in found.items()}
    record = kept.to_dict() | {"files": files, "lm_eval": facts}
    write_atomic(path, json_text(record))
    return kept


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, lm-eval and its libraries keep their progress bars and remarks to themselves."""
    from tqdm import tqdm

    logger, bar = logging.getLogger("lm_eval"), tqdm.__init__
    level, before = logger.level, bar
    logger.setLevel(logging.ERROR)
    tqdm.__init__ = partialmethod(bar, disable=True)  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.__init__ = before  # type: ignore[method-assign]
        logger.setLevel(level)


@contextmanager
def _no_commit_outside_git() -> Iterator[None]:
    """Inside, lm-eval asks git for no commit where there is no repository: git would say so on stderr by itself."""
    evaluator = sys.modules.get("lm_eval.evaluator")
    asks = getattr(evaluator, "get_git_commit_hash", None)
    if evaluator is None or asks is None or git_state(Path.cwd()) is not None:
        yield
        return
    evaluator.get_git_commit_hash = lambda: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asks  # type: ignore[attr-defined]
