"""Command lines of people who know other programs: one line says what to type here."""

from pathlib import Path

import pytest

from reft_cli.cli import habits
from reft_cli.cli.app import app

CASES = {
    "train": "Missing argument 'SPEC'; `reft init` writes one",
    "eval": "Missing argument 'RUN'; `reft runs ls` lists the runs",
    "train c.yaml lr=1e-3": "keys are set by --set train.learning_rate=1e-3",
    "train c.yaml train.epochs=2 batch_size=4": "--set train.epochs=2 --set train.global_batch_size=4",
    "check c.yaml zork=1": "keys are set by --set zork=1",
    "train --learning_rate 1e-3 c.yaml": "No such option: --learning_rate; here it is --set train.learning_rate=VALUE",
    "train c.yaml --train.lr=1": "here it is --set train.learning_rate=VALUE",
    "train c.yaml --warmup_steps=1": "--set train.warmup_ratio=VALUE (a share of the steps)",
    "train c.yaml --optim adamw": "there is one optimizer, AdamW",
    "train c.yaml --max_steps 3": "No such option: --max_steps; here it is --max-steps",
    "train c.yaml --zork": "No such option: --zork; any key of the spec is set by --set KEY=VALUE",
    "train --config c.yaml": "here it is reft train SPEC, without a flag",
    "train c.yaml --resume_from_checkpoint x": "here it is --resume",
    "check -c c.yaml": "here it is reft check SPEC, without a flag",
    "infer runs/s hello you": "did you mean --prompt 'hello you'?",
    "eval runs/s rows.jsonl": "did you mean --data rows.jsonl?",
    "infer runs/s --num_beams 4": "here it is --set generation.beams=VALUE",
    "infer runs/s --max_tokens 4": "here it is --max-new-tokens",
    "eval runs/s --max_new_tokens 4": "here it is --set generation.max_new_tokens=VALUE",
    "infer --adapter runs/s": "here it is reft infer RUN, without a flag",
    "infer runs/s --input_file x": "here it is --input FILE",
    "generate runs/s": "No such command 'generate'; here it is `reft infer RUN --prompt TEXT`",
    "runs list": "here it is `reft runs ls`",
    "c.yaml": "a spec is trained by `reft train c.yaml`",
    "runs/s": "for a run there are `reft eval runs/s` and `reft infer runs/s --prompt TEXT`",
    "docter": "No such command 'docter'. Did you mean 'doctor'?",
    "eval runs/s --zork 3": "No such option: --zork; see reft eval -h",
    "init sft": "Invalid value for 'TASK': 'sft' is not one of 'causal_lm', 'preference'",
    "infer runs/s --input": "Option '--input' requires an argument",
}


@pytest.mark.parametrize("words", CASES)
def test_one_line_says_what_to_type(reft, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    Path("runs/s").mkdir(parents=True)
    done = reft(*words.split())
    assert done.code == 2 and done.out == "" and done.err.count("\n") == 1
    assert CASES[words] in done.err and "Value error" not in done.err


def test_what_is_named_exists(reft):
    """Commands and flags that the advice names, and none of the words that it is for."""
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    names |= {group.typer_instance.info.name for group in app.registered_groups}
    assert not names & {*habits.COMMANDS["reft"]}
    for command, flags in habits.FLAGS.items():
        shown = reft(command, "-h").out
        for meant in flags.values():
            flag = meant.split()[0]
            assert flag == "reft" or flag in shown
        assert not [name for name in flags if f"--{name.replace('_', '-')} " in shown]
