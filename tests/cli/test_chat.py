"""`reft infer --chat`: a conversation with and without a memory, and the commands in it."""

import io
import sys

import pytest
from stand_ins import FakeSession, Terminal

from reft_cli.data.templates import ChatTemplate


@pytest.fixture
def session(monkeypatch):
    fake = FakeSession()
    monkeypatch.setattr("reft_cli.runs.open_run", lambda run, **flags: fake)
    return fake


@pytest.fixture
def talk(reft, session, monkeypatch):
    """Sends lines to the chat."""

    def send(*lines, flags=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return reft("infer", "runs/s", "--chat", *flags)

    return send


def test_every_line_is_answered(talk, session):
    done = talk("good", "", "bad")
    assert (done.code, done.out) == (0, "GOOD\nBAD\n")
    assert "every line is a prompt of its own" in done.err
    assert session.calls[1]["prompts"] == [{"text": "bad"}]


def test_quit_leaves(talk):
    assert talk("/quit", "good").out == ""


def test_base_switches_back_and_forth(talk):
    assert talk("good", "/base", "good", "/base", "good").out == "GOOD\ndoog\nGOOD\n"
    assert talk("good", flags=["--base"]).out == "doog\n"


def test_settings_are_changed_and_shown(talk, session):
    done = talk("/set temperature 0.7", "/set seed 3", "/set stop END", "good", "/set")
    assert session.calls[0]["settings"] == {"temperature": 0.7, "seed": 3, "stop": ["END"]}
    assert "temperature is 0.7" in done.err and "temperature          0.7" in done.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/set temprature 1", "no setting temprature; did you mean temperature?"),
        ("/set xyz 1", "no setting xyz; there are max_new_tokens"),
        ("/set temperature hot", "temperature: Input should be a valid number"),
        ("/set temperature -1", "temperature: Input should be greater than or equal to 0"),
        ("/set temperature", "write /set temperature VALUE"),
        ("/rset", "no command /rset; did you mean /reset?"),
        ("/xyz", "no command /xyz; /help lists them"),
        ("/help", "/quit    leave (or Ctrl-D)"),
    ],
)
def test_what_a_command_says(talk, session, line, said):
    done = talk(line)
    assert done.code == 0 and done.out == "" and said in done.err and not session.calls


def test_a_chat_template_remembers(talk, session, monkeypatch):
    session.text.template = ChatTemplate(source="", tokens={})
    told = []

    def stream(self, row, **how):
        told.append([message["content"] for message in row["messages"]])
        yield f" answer {len(told)}"

    monkeypatch.setattr(FakeSession, "stream", stream)
    done = talk("one", "two", "/reset", "three")
    assert told == [["one"], ["one", "answer 1", "two"], ["three"]]
    assert "a conversation;" in done.err and "forgotten" in done.err


def test_ctrl_c_ends_the_answer_and_not_the_chat(talk, session, monkeypatch):
    told = []

    def stream(self, row, **how):
        told.append(row["text"])
        yield "begun "
        if row["text"] == "long":
            raise KeyboardInterrupt
        yield "and done"

    monkeypatch.setattr(FakeSession, "stream", stream)
    done = talk("long", "short")
    assert done.code == 0 and done.out == "begun\nbegun and done\n" and told == ["long", "short"]


def test_a_template_with_two_columns_is_explained(talk, session):
    session.text.template = type(session.text.template)(name="inline", prompt="{a} {b}", completion="{c}")
    done = talk("hello")
    assert done.code == 0 and "columns a, b" in done.err


def test_a_terminal_gets_a_prompt(reft, session, monkeypatch):
    asked = iter(["good", EOFError()])

    def answer(prompt):
        assert prompt == "> "
        line = next(asked)
        if isinstance(line, Exception):
            raise line
        return line

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(sys, "stdin", Terminal())
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    assert reft("infer", "runs/s", "--chat").code == 0
    assert screen.getvalue() == "GOOD\n"


def test_the_prompt_stays_out_of_a_piped_stdout(reft, session, monkeypatch):
    terminal = Terminal("good\n")
    monkeypatch.setattr(sys, "stdin", terminal)
    done = reft("infer", "runs/s", "--chat")
    assert done.out == "GOOD\n" and done.err.endswith("> > \n")
