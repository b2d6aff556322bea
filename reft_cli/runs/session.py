"""A trained run, loaded and ready to answer."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import torch

from reft_cli.checkpoint import BaseIdentity, Checkpoint, Manifest, read_checkpoint
from reft_cli.data.batch import build_batch, micro_batches
from reft_cli.data.encode import Example
from reft_cli.data.fitting import check_fits
from reft_cli.data.templates import TextTemplate
from reft_cli.errors import SpecError
from reft_cli.generation.decode import Decoder
from reft_cli.generation.settings import Answer, Request
from reft_cli.kinds import WRITING
from reft_cli.models.intervened import IntervenedModel
from reft_cli.models.loading import BaseSource, load_tokenizer
from reft_cli.parallel.collective import size
from reft_cli.runfolder import Found, find
from reft_cli.runs.assemble import build_from_checkpoint, load_base, merge_generation, token_budget
from reft_cli.runs.texts import TextSide, text_side_of
from reft_cli.spec.quoting import printable
from reft_cli.tasks.objectives import predict

Fields = Mapping[str, Any]
Model = Literal["run", "base"]
MEMBERS: dict[Model, int] = {"base": 0, "run": 1}  # of a session's stack


@dataclass(frozen=True, kw_only=True)
class BasePlace:
    """Where the base model of a run lies now, and how it is loaded here; the rest is as its checkpoint has it."""

    model: str | None = None
    """Its hub id or folder, if it has moved."""
    device: str = "auto"
    device_map: str | None = None
    """As in the spec, as is `max_memory`."""
    max_memory: Mapping[str, str] | None = None
    trust_remote_code: bool = False

    def source(self, base: BaseIdentity) -> BaseSource:
        """Where a checkpoint's base comes from."""
        return BaseSource(
            name=self.model or base.name,
            revision=None if self.model else base.commit,
            dtype=base.dtype,
            quantization=base.quantization,
            device=self.device,
            device_map=self.device_map,
            max_memory=self.max_memory,
            trust_remote_code=self.trust_remote_code,
        )


OWN_PLACE = BasePlace()  # what the checkpoint calls it, on the fastest device


@dataclass(frozen=True)
class Session:
    """A base model with a checkpoint's intervention on it, in eval mode. As a context manager it owns the hooks."""

    found: Found
    checkpoint: Checkpoint
    model: IntervenedModel
    text: TextSide

    def __enter__(self) -> Self:
        """Put the hooks on."""
        self.model.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the hooks off."""
        self.model.__exit__(None, None, None)

    @cached_property
    def decoder(self) -> Decoder:
        """What answers: member 1 is the checkpoint, 0 its base."""
        return Decoder.of(self.model, self.model.groups, tokenizer=self.text.tokenizer)

    def fields_of(self, prompt: str) -> Fields:
        """One typed prompt as the columns that the template asks for."""
        return self.text.template.fields_from_text(prompt)

    def answer(
        self, prompts: Sequence[str | Fields], *, settings: Mapping[str, Any], base: bool = False, raw: bool = False
    ) -> list[Answer]:
        """Answers in the order of the prompts. `base`: without the intervention; the rest is as in `answers`."""
        which: Model = "base" if base else "run"
        return [each[which][0] for each in self.answers(prompts, settings=settings, models=[which], raw=raw)]

    def answers(
        self,
        prompts: Sequence[str | Fields],
        *,
        settings: Mapping[str, Any],
        models: Sequence[Model] = ("run",),
        samples: int = 1,
        raw: bool = False,
    ) -> Iterator[dict[Model, list[Answer]]]:
        """For each prompt, in order and as soon as they are known, the answers of each model; all decode in one batch.

        `settings` are keys of the spec's `generation` and `seed`; `samples`: how many answers of each model, without
        sampling the best beams; `raw`: prompts are used as they are. A classifier answers with the name of the class, a
        regression with the number. SpecError: several samples of what always answers the same.
        """
        self._check_samples(samples, settings)
        examples = self._encode(prompts, raw=raw)
        if not self.text.writes:
            columns = [self._predict(examples, base=model == "base") for model in models]
            return (
                {model: [each] for model, each in zip(models, row, strict=True)} for row in zip(*columns, strict=True)
            )
        decoding, batch_size = merge_generation(self.checkpoint.manifest.generation, settings)
        check_fits(examples, self.model.base_model, name="prompt", new_tokens=decoding.max_new_tokens)
        requests = [
            Request(each.input_ids, MEMBERS[model], sample)
            for each in examples
            for model in models
            for sample in range(samples)
        ]
        found = self.decoder.in_order(requests, decoding=decoding, batch_size=batch_size)
        of_a_model = map(list, zip(*[found] * samples, strict=True))
        return (dict(zip(models, row, strict=True)) for row in zip(*[of_a_model] * len(models), strict=True))

    def _check_samples(self, samples: int, settings: Mapping[str, Any]) -> None:
        decoding, _ = merge_generation(self.checkpoint.manifest.generation, settings)
        if samples == 1 or (self.text.writes and decoding.temperature > 0):
            return
        beams = decoding.beams if self.text.writes else 1
        if beams == 1:
            raise SpecError(f"--samples {samples}: without a --temperature above 0 they would all be the same")
        if samples > beams:
            raise SpecError(f"--samples {samples}: a search with {beams} beams has no more answers")

    def stream(
        self, prompt: str | Fields, *, settings: Mapping[str, Any], base: bool = False, raw: bool = False
    ) -> Generator[str, None, None]:
        """Pieces of one answer as they are decoded; joined, they are the answer. Beams come as one piece at the end.

        Closing it stops the decoding.
        """
        decoding, _ = merge_generation(self.checkpoint.manifest.generation, settings)
        prompts = self._encode([prompt], raw=raw)
        check_fits(prompts, self.model.base_model, name="prompt", new_tokens=decoding.max_new_tokens)
        if not self.text.writes:
            return (answer.text for answer in self._predict(prompts, base=base))
        return self.decoder.stream(Request(prompts[0].input_ids, int(not base)), decoding=decoding)

    def why_slow(self, settings: Mapping[str, Any]) -> str | None:
        """Why answers with these settings go through transformers' `generate`; None if they come from our slots."""
        if not self.text.writes:
            return None
        return self.decoder.why_not_slots(merge_generation(self.checkpoint.manifest.generation, settings)[0])

    def _encode(self, prompts: Sequence[str | Fields], *, raw: bool) -> list[Example]:
        if raw:
            plain = replace(self.text, template=TextTemplate(name="raw", prompt="{prompt}", completion="{completion}"))
            return plain.prompts([{"prompt": each} for each in prompts])
        return self.text.prompts([self.fields_of(each) if isinstance(each, str) else each for each in prompts])

    def _predict(self, examples: Sequence[Example], *, base: bool) -> list[Answer]:
        check_fits(examples, self.model.base_model, name="prompt")
        groups, device = self.model.groups, self.model.device
        texts: dict[int, str] = {}
        for chosen in micro_batches(examples, token_budget=2 * token_budget(device), rows=None, padded=True):
            pad = self.text.tokenizer.pad_token_id or 0
            batch = build_batch(chosen, groups=groups, layout="padded", pad_token_id=pad).to(device)
            with torch.inference_mode(), self.model.editing(None if base else batch.rows):
                outputs = predict(self.model, batch).tolist()  # [B, C]
            texts.update({id(example): self._verdict(values) for example, values in zip(chosen, outputs, strict=True)})
        return [Answer(text=texts[id(example)], tokens=0, finished=True) for example in examples]

    def _verdict(self, values: list[float]) -> str:
        """A head's numbers in words: the likeliest class, or the number."""
        if self.text.kind in ("regression", "reward"):
            return f"{values[0]:.4f}"
        return (self.text.labels or ())[max(range(len(values)), key=values.__getitem__)]


def open_run(run: Path, *, checkpoint: str | None = None, place: BasePlace = OWN_PLACE) -> Session:
    """Load a run or a checkpoint folder with nothing but its path.

    SpecError: a device map that there is not, or beside what excludes it. CheckpointError: there is none, it is
    damaged, or the base is another one. ModelError: the base cannot be loaded.
    """
    found = find(run, checkpoint=checkpoint)
    stored = read_checkpoint(found.checkpoint)
    _check_map(place, stored.manifest)
    source = place.source(stored.manifest.base)
    text = text_side_of(stored.manifest, tokenizer=load_tokenizer(source))
    loaded = load_base(source, text, seed=0)
    return Session(found, stored, build_from_checkpoint(loaded, stored), text)


def _check_map(place: BasePlace, manifest: Manifest) -> None:
    """SpecError: no such map, or something that excludes it."""
    quantization, kind = manifest.base.quantization, manifest.text.kind
    if place.device_map is None:
        return
    if place.device_map != "auto":
        raise SpecError(f"--device-map {printable(place.device_map)}: the only one is auto")
    if place.device not in ("auto", "cuda", "cpu"):
        raise SpecError(f"--device-map auto: --device {printable(place.device)} is one device; leave out one of them")
    if quantization is not None:
        raise SpecError(f"--device-map auto: a base in {quantization} is not laid out over devices; leave it out")
    if kind not in WRITING:
        raise SpecError(f"--device-map auto: the head of a {kind} run lies on one device; leave it out")
    if size() > 1:
        raise SpecError(f"--device-map auto: one process takes all devices, and there are {size()}")
