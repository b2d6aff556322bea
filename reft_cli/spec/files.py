"""Spec files as text; what cannot be read is one line that says what to do."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from reft_cli.errors import SpecError
from reft_cli.spec.quoting import listed
from reft_cli.spec.yaml_tree import Origin

LARGEST_FILE = 256 * 1024  # bytes


def read_text(path: Path) -> str:
    """The text of a spec file, without byte order mark. SpecError: missing, a folder, not text, not to be read."""
    here = Origin(file=str(path))
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise SpecError(here.problem(_missing(path))) from None
    except IsADirectoryError:
        raise SpecError(here.problem(_folder(path))) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise SpecError(here.problem(f"cannot be read: {reason[:1].lower()}{reason[1:]}")) from None
    if len(content) > LARGEST_FILE:
        raise SpecError(here.problem(f"larger than {LARGEST_FILE // 1024} KiB; this is no spec"))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        byte = content[error.start]
        raise SpecError(
            Origin(str(path), line, column).problem(f"not UTF-8 text (byte 0x{byte:02x}); save the file as UTF-8")
        ) from None


def _missing(path: Path) -> str:
    """What to say about a file that is not there, with its nearest neighbour."""
    if not path.parent.is_dir():
        return f"no such file; there is no folder {path.parent}"
    specs = _specs_in(path.parent)
    near = get_close_matches(path.name, specs, 1, 0.7) or [name for name in specs if Path(name).stem == path.stem]
    return f"no such file; did you mean `{path.parent / near[0]}`?" if near else "no such file"


def _folder(path: Path) -> str:
    if (path / "run.json").is_file():
        return f"a run folder; its spec is `{path / 'spec.yaml'}`"
    specs = _specs_in(path)
    return "a folder; a spec is a file" + (
        f", such as {listed([f'`{path / name}`' for name in specs[:3]])}" if specs else ""
    )


def _specs_in(folder: Path) -> list[str]:
    try:
        return sorted(item.name for item in folder.iterdir() if item.suffix in {".yaml", ".yml"})
    except OSError:
        return []
