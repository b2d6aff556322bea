"""What stands in for the real thing in the tests of the commands: a terminal, and a session without a model."""

import io
from dataclasses import dataclass, field
from types import SimpleNamespace

from reft_cli.data.formats import FORMATS
from reft_cli.data.templates import TextTemplate
from reft_cli.generation.settings import Answer


class Terminal(io.StringIO):
    """A stream that says a person reads it."""

    def isatty(self) -> bool:
        return True


@dataclass
class FakeSession:
    """Answers with the text in capitals; the base answers with it reversed."""

    calls: list = field(default_factory=list)
    opened: dict = field(default_factory=dict)
    text: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(
            data_format=FORMATS["text"], template=TextTemplate(name="inline", prompt="{text}", completion="{label}")
        )
    )
    checkpoint: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(manifest=SimpleNamespace(generation={"temperature": 0.0}))
    )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def fields_of(self, prompt):
        return self.text.template.fields_from_text(prompt)

    def answer(self, prompts, *, settings, base=False, raw=False):
        self.calls.append({"prompts": list(prompts), "settings": settings, "base": base, "raw": raw})
        texts = [prompt if isinstance(prompt, str) else prompt["text"] for prompt in prompts]
        return [Answer(f" {text[::-1] if base else text.upper()}\n", len(text), True) for text in texts]

    def stream(self, prompt, *, settings, base=False, raw=False):
        yield from self.answer([prompt], settings=settings, base=base, raw=raw)[0].text
