"""What people type who know other programs, or the option of a key: what does the same here, in one line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

COMMANDS = {  # group -> what others call a command -> what to type here
    "reft": {
        **dict.fromkeys(("finetune", "fine-tune", "fit", "sft", "dpo", "lora", "run"), "reft train SPEC"),
        **dict.fromkeys(("generate", "predict", "inference", "complete", "ask"), "reft infer RUN --prompt TEXT"),
        "chat": "reft infer RUN --chat",
        **dict.fromkeys(("evaluate", "test", "score", "benchmark"), "reft eval RUN"),
        **dict.fromkeys(("validate", "inspect", "preprocess", "lint"), "reft check SPEC"),
        **dict.fromkeys(("new", "config", "configure"), "reft init"),
        **dict.fromkeys(("ls", "list"), "reft runs ls"),
        "show": "reft runs show RUN",
        "plot": "reft runs plot RUN",
        **dict.fromkeys(("diff", "compare"), "reft runs diff A B"),
        **dict.fromkeys(("suites", "recipes"), "reft tasks"),
        **dict.fromkeys(("env", "info"), "reft doctor"),
        "version": "reft --version",
        "help": "reft --help, or reft train --help",
    },
    "runs": {"list": "reft runs ls", "compare": "reft runs diff A B", "view": "reft runs show RUN"},
}
SPEC = dict.fromkeys(("config", "config_file", "cfg", "c", "f", "spec", "yaml"), "reft {command} SPEC, without a flag")
RUN = dict.fromkeys(
    ("model_path", "adapter", "adapters", "adapter_path", "adapter_name_or_path", "run", "ckpt_dir"),
    "reft {command} RUN, without a flag",
)
FLAGS = {  # command -> what others call a flag, as in Python -> what to type here
    "train": SPEC
    | {"resume_from_checkpoint": "--resume", "overwrite_output_dir": "--overwrite"}
    | dict.fromkeys(("nproc_per_node", "num_processes", "num_gpus", "gpus"), "--processes N"),
    "check": SPEC,
    "eval": RUN
    | dict.fromkeys(("dataset", "file", "input", "test_file", "eval_dataset"), "--data FILE")
    | {"num_fewshot": "--few-shot N with --tasks"},
    "infer": RUN
    | dict.fromkeys(("file", "input_file", "dataset", "data", "prompts"), "--input FILE")
    | {"num_return_sequences": "--samples N", "num_samples": "--samples N", "interactive": "--chat"},
}
SPEC_COMMANDS = ("train", "check")  # whose --set takes any key of the spec; others' those of generation
FREE = {"eval": "--data {word}", "infer": "--prompt {word}"}  # what a second bare word was probably meant for


def message_of(error: Any) -> str:  # noqa: ANN401  Typer does not name the types of its errors
    """One line on a command line that Typer refused: what it says, and what to type instead if that is known."""
    said, better = error.format_message().replace("Value error, ", "").rstrip("."), _advice(error)
    if better is not None:
        return f"{re.split(r' [(]Possible|[.]? Did you', said)[0]}; {better}"
    context = getattr(error, "ctx", None)
    if context is None or said.endswith("?"):
        return str(said)
    return f"{said}; see {context.command_path} -h"


def _advice(error: Any) -> str | None:  # noqa: ANN401
    """What to type instead."""
    context, said = getattr(error, "ctx", None), error.format_message()
    name, option = str(getattr(context, "info_name", "")), getattr(error, "option_name", None)
    if command := re.search(r"No such command '(.*?)'", said):
        return _instead_of_command(command[1], group=name)
    if context is None:
        return None
    if option and "No such option" in said:
        return _instead_of_option(option, name, flags=_flags_of(context))
    if words := re.search(r"unexpected extra arguments?(?:\(s\))? \((.*)\)", said):
        return _instead_of_words(words[1], name)
    if "Missing argument" in said:
        return {"SPEC": "`reft init` writes one", "RUN": "`reft runs ls` lists the runs"}.get(said.split("'")[1])
    return None


def _instead_of_command(word: str, *, group: str) -> str | None:
    if group == "reft" and Path(word).is_dir():
        return f"for a run there are `reft eval {shlex.quote(word)}` and `reft infer {shlex.quote(word)} --prompt TEXT`"
    if group == "reft" and (Path(word).suffix in (".yaml", ".yml") or Path(word).is_file()):
        return f"a spec is trained by `reft train {shlex.quote(word)}`"
    known = COMMANDS.get(group, {}).get(word.lower())
    return f"here it is `{known}`" if known else None


def _flags_of(context: Any) -> list[str]:  # noqa: ANN401
    return [flag for parameter in context.command.params for flag in parameter.opts if flag.startswith("--")]


def _instead_of_option(option: str, command: str, *, flags: list[str]) -> str | None:
    name = option.lstrip("-").replace("-", "_")
    if name.lower() in FLAGS.get(command, {}):
        return f"here it is {FLAGS[command][name.lower()].format(command=command)}"
    same = f"--{name.replace('_', '-')}".lower()
    if same in flags:
        return f"here it is {same}"
    if not (option.startswith("--") and "--set" in flags):
        return None
    return _by_key(name, command, flags=flags)


def _by_key(name: str, command: str, *, flags: list[str]) -> str | None:
    """The flag or the key of the spec that a name means."""
    from reft_cli.spec.names import nearest_keys, remark_on

    path = tuple(name.split("."))
    keys = [key for key in nearest_keys(path) if command in SPEC_COMMANDS or key.startswith("generation.")]
    if keys:
        flag = f"--{keys[0].rpartition('.')[2].replace('_', '-')}"
        by_flag = keys[0].startswith("generation.") and flag in flags
        remark = remark_on(path)
        return f"here it is {flag if by_flag else f'--set {keys[0]}=VALUE'}" + (f" ({remark})" if remark else "")
    return remark_on(path) or "any key of the spec is set by --set KEY=VALUE" if command in SPEC_COMMANDS else None


def _instead_of_words(words: str, command: str) -> str | None:
    """For `lr=1e-3` after the spec, or a prompt after the run."""
    pairs = [word.partition("=") for word in words.split()]
    if command in SPEC_COMMANDS and all(sign and re.fullmatch(r"[\w.-]+", key) for key, sign, _ in pairs):
        sets = " ".join(f"--set {_key(key)}={value}" for key, _, value in pairs)
        return f"keys are set by {sets}"
    return f"did you mean {FREE[command].format(word=shlex.quote(words))}?" if command in FREE else None


def _key(given: str) -> str:
    from reft_cli.spec.fields import known_keys
    from reft_cli.spec.names import nearest_keys

    near = () if given in known_keys() else nearest_keys(tuple(given.split(".")))
    return near[0] if near else given
