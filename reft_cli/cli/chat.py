"""`reft infer --chat`: a conversation, line by line. Answers go to stdout, all else to stderr."""

from __future__ import annotations

import contextlib
import sys
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from reft_cli.cli import console
from reft_cli.cli.infer import write_stream
from reft_cli.errors import DataError, SpecError

if TYPE_CHECKING:
    from reft_cli.runs import Session

COMMANDS = {
    "/reset": "forget the conversation so far",
    "/base": "answer without the intervention; once more: with it",
    "/set": "change a setting: /set temperature 0.7; without a name: show them",
    "/help": "this list",
    "/quit": "leave (or Ctrl-D)",
}


class Chat:
    """One conversation. It has a memory if the run's template is a chat template; else every line is a new prompt."""

    def __init__(self, session: Session, *, settings: dict[str, Any], base: bool) -> None:
        self.session, self.settings, self.base = session, settings, base
        self.messages: list[dict[str, str]] = []
        self.remembers = session.text.template.prompt_fields == ("messages",)

    def run(self) -> None:
        """Read and answer lines until /quit or the end of stdin."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() line editing
        kind = "a conversation" if self.remembers else "every line is a prompt of its own"
        console.say(f"{kind}; /help tells the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        while (line := self._read()) is not None:
            if line.startswith("/"):
                if line.split()[0] == "/quit":
                    return
                self.obey(line)
            elif line:
                self.reply(line)

    def _read(self) -> str | None:
        """The next line; None at the end."""
        try:
            if sys.stdin.isatty() and sys.stdout.isatty():
                return input("> ").strip()
            if sys.stdin.isatty():
                sys.stderr.write("> ")
                sys.stderr.flush()
            return (sys.stdin.readline() or _end()).strip()
        except EOFError:
            if sys.stdin.isatty():
                console.complain("")  # the line that Ctrl-D left open
            return None

    def reply(self, line: str) -> None:
        """Answer a line on stdout; Ctrl-C ends the answer, not the conversation."""
        try:
            turn = {"role": "user", "content": line}
            row = {"messages": [*self.messages, turn]} if self.remembers else self.session.fields_of(line)
            pieces = self.session.stream(row, settings=self.settings, base=self.base)
        except (DataError, SpecError) as error:
            console.complain(str(error))
            return
        try:
            text = write_stream(pieces)
        except KeyboardInterrupt:
            console.result("")
            pieces.close()
            return
        if self.remembers:
            self.messages += [turn, {"role": "assistant", "content": text.strip()}]

    def obey(self, line: str) -> None:
        """Carry out a line that begins with a slash."""
        name, *words = line.split()
        if name == "/reset":
            self.messages = []
            console.complain("forgotten")
        elif name == "/base":
            self.base = not self.base
            console.complain("the base model answers" if self.base else "the run answers")
        elif name == "/set":
            self._set(words)
        elif name == "/help":
            for command, meaning in COMMANDS.items():
                console.complain(f"{command:<8} {meaning}")
        else:
            near = get_close_matches(name, COMMANDS, n=1)
            console.complain(f"no command {name}; " + (f"did you mean {near[0]}?" if near else "/help lists them"))

    def _set(self, words: list[str]) -> None:
        from reft_cli.spec.schema import GenerationSpec

        known = [*(key for key in GenerationSpec.model_fields if key != "batch_size"), "seed"]
        if not words:
            stored = self.session.checkpoint.manifest.generation | self.settings
            console.complain("\n".join(f"{key:<20} {stored.get(key, 0)}" for key in known))
        elif words[0] not in known:
            near = get_close_matches(words[0], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            console.complain(f"no setting {words[0]}; {hint}")
        elif len(words) == 1:
            console.complain(f"write /set {words[0]} VALUE")
        else:
            self._change(words[0], " ".join(words[1:]))

    def _change(self, name: str, text: str) -> None:
        from pydantic import ValidationError

        from reft_cli.spec.scalars import read_scalar
        from reft_cli.spec.schema import GenerationSpec, TrainSpec

        value: Any = [text] if name == "stop" else read_scalar(text)
        section = TrainSpec if name == "seed" else GenerationSpec
        try:
            self.settings[name] = getattr(section.model_validate({name: value}), name)
        except ValidationError as error:
            console.complain(f"{name}: {error.errors()[0]['msg']}")
            return
        console.complain(f"{name} is {self.settings[name]}")


def _end() -> str:
    raise EOFError
