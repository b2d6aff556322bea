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

    def answers(self, prompts, *, settings, models=("run",), samples=1, raw=False):
        self.calls.append({"prompts": list(prompts), "settings": settings, "models": list(models), "raw": raw})
        for prompt in prompts:
            text = prompt if isinstance(prompt, str) else prompt["text"]
            texts = {"run": text.upper(), "base": text[::-1]}
            yield {
                model: [Answer(f" {texts[model] + '!' * sample}\n", len(text), True) for sample in range(samples)]
                for model in models
            }

    def why_slow(self, settings):
        return "there is no model"

    def stream(self, prompt, *, settings, base=False, raw=False):
        model = "base" if base else "run"
        yield from next(self.answers([prompt], settings=settings, models=[model], raw=raw))[model][0].text
