"""The verbs: train, check, evaluate, open a run. The only place that unpacks a spec; the command line calls these."""

from reft_cli.runs.check import CheckReport, check
from reft_cli.runs.evaluate import evaluate
from reft_cli.runs.harness import evaluate_tasks
from reft_cli.runs.results import EvalReport
from reft_cli.runs.session import BasePlace, Session, open_run
from reft_cli.runs.train import TrainResult, train

__all__ = [
    "BasePlace",
    "CheckReport",
    "EvalReport",
    "Session",
    "TrainResult",
    "check",
    "evaluate",
    "evaluate_tasks",
    "open_run",
    "train",
]
