"""Curves of a run in the terminal and as a picture."""

import importlib.util
import sys
from types import ModuleType

import pytest

from reft_cli.cli.curves import curves_of, drawn, write_picture
from reft_cli.errors import SpecError
from reft_cli.runfolder import RunFolder

installed = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """./runs/a and ./runs/b, of forty steps each, and ./runs/empty."""
    monkeypatch.chdir(tmp_path)
    for name, start in (("a", 2.0), ("b", 3.0), ("empty", None)):
        run = RunFolder.create(f"runs/{name}")
        run.begin(command=["reft", "train", "spec.yaml"], facts={})
        for step in range(1, 41 if start else 1):
            run.append_metrics({"step": step, "loss": start / step, "learning_rate": 0.1})
        for step in (20, 40) if start else ():
            run.append_metrics({"step": step, "validation_exact_match": step / 50, "validation_loss": None})
        run.finish("done", exit_code=0, reason="finished")
    return tmp_path / "runs"


def test_curves_are_the_loss_and_then_the_validation_scores(runs):
    found = curves_of(RunFolder(runs / "a"))
    assert list(found) == ["loss", "validation exact_match"]
    assert found["loss"][:2] == [(1, 2.0), (2, 1.0)] and len(found["loss"]) == 40
    assert found["validation exact_match"] == [(20, 0.4), (40, 0.8)]
    assert curves_of(RunFolder(runs / "empty")) == {}


def test_a_step_that_was_done_twice_counts_once(runs):
    run = RunFolder(runs / "a")
    run.append_metrics({"step": 40, "loss": 9.0})
    assert curves_of(run)["loss"][-1] == (40, 9.0) and len(curves_of(run)["loss"]) == 40


def test_a_curve_in_characters():
    lines = drawn("loss", [(step, float(10 - step)) for step in range(1, 6)], height=5, width=5)
    assert lines == ["loss", "9 | •", "  |  •", "  |   •", "  |    •", "5 |     •", "    step 1 to 5"]


def test_a_long_curve_has_the_mean_of_each_column():
    lines = drawn("x", [(step, step % 2) for step in range(1, 1001)], height=4, width=10)
    assert [len(line) for line in lines[1:5]] == [3, 3, 14, 3] or "••••••••••" in "".join(lines)
    assert all(len(line) <= 14 for line in lines[1:5]) and lines[-1].strip() == "step 1 to 1,000"


def test_a_flat_curve_and_one_point():
    assert drawn("x", [(1, 0.5), (2, 0.5)], height=3)[3] == "0.5 | ••"
    assert drawn("x", [(7, 0.5)], height=2)[1:] == ["0.5 |", "0.5 | •", "      step 7"]


def test_where_there_is_no_dot_there_is_a_star(monkeypatch):
    class Ascii:
        encoding = "ascii"

    monkeypatch.setattr(sys, "stdout", Ascii())
    assert "*" in "".join(drawn("x", [(1, 0.5), (2, 0.7)]))


def test_a_run_is_shown_with_its_curves(reft, runs):
    out = reft("runs", "show", "runs/a").out
    assert "\nloss\n   2 | •" in out and "step 1 to 40" in out
    assert "\nvalidation exact_match\n" in out
    assert "step 1" not in reft("runs", "show", "runs/empty").out
    assert "loss\n" not in reft("runs", "show", "runs/a", "--json").out


@pytest.fixture
def canvas(monkeypatch):
    """A stand-in for matplotlib that writes down what is drawn."""
    drawn_lines = []

    class Axes:
        def __init__(self, *place):
            self.place = place

        def plot(self, steps, values, *, label, **style):
            drawn_lines.append((self.place, label, len(steps)))

        def __getattr__(self, name):
            return lambda *args, **kwargs: drawn_lines.append((name, *args)) if name == "set_title" else None

    class Figure:
        def __init__(self, **size):
            pass

        def add_subplot(self, *place):
            return Axes(*place)

        def savefig(self, path, **how):
            path.write_text("picture")

    module = ModuleType("matplotlib.figure")
    module.Figure = Figure
    monkeypatch.setitem(sys.modules, "matplotlib", ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    return drawn_lines


def test_a_picture_has_a_panel_a_curve_and_a_line_a_run(reft, runs, canvas):
    done = reft("runs", "plot", "runs/a", "runs/b")
    assert done.out == "curves.png\n" and (runs.parent / "curves.png").exists()
    assert canvas == [
        ((1, 2, 1), "runs/a", 40),
        ((1, 2, 1), "runs/b", 40),
        ("set_title", "loss"),
        ((1, 2, 2), "runs/a", 2),
        ((1, 2, 2), "runs/b", 2),
        ("set_title", "validation exact_match"),
    ]


def test_a_lone_run_keeps_its_picture_and_curves_can_be_chosen(reft, runs, canvas):
    found = reft("runs", "plot", "runs/a", "--metric", "validation_exact_match", "--json").json
    assert found["path"] == "runs/a/curves.png" and (runs / "a/curves.png").exists()
    assert found["curves"] == {"runs/a": {"validation exact_match": [[20, 0.4], [40, 0.8]]}}
    assert reft("runs", "plot", "runs/a", "-o", "x.svg").out == "x.svg\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("runs/a -o x.gif", "--output x.gif: the name has to end in .png, .svg, .pdf"),
        ("runs/a -o none/x.png", "--output none/x.png: cannot be written (no such file or directory)"),
        ("runs/a --metric bleu", "--metric bleu: a run has no such curve; it has loss, validation exact_match"),
        ("runs/empty", "runs/empty has no step in its metrics.jsonl yet; there is nothing to plot"),
    ],
)
def test_pictures_that_cannot_be(reft, runs, canvas, words, message):
    done = reft("runs", "plot", *words.split())
    assert done.code == 2 and message in done.err


def test_without_matplotlib_there_is_the_command_to_install_it(runs, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpecError) as missing:
        write_picture(tmp_path / "x.png", {"a": {"loss": [(1, 2.0)]}})
    assert str(missing.value) == "reft runs plot needs matplotlib: pip install 'reft[plot]'"


@installed
@pytest.mark.parametrize(("name", "first"), [("x.png", b"\x89PNG"), ("x.svg", b"<?xml"), ("x.pdf", b"%PDF")])
def test_real_pictures(reft, runs, name, first):
    assert reft("runs", "plot", "runs/a", "runs/b", "-o", name).code == 0
    assert (runs.parent / name).read_bytes().startswith(first)
