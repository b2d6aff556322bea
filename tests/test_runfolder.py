"""The run folder: what may be begun, resumed and deleted, what a crash leaves, and how a path is understood."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from reft_cli.errors import CheckpointError, SpecError
from reft_cli.runfolder import RunFolder, find, runs_in, step_of

SPEC = "model: bundled:tiny-llama  # as written\n"


def make_run(path: Path, *, steps: tuple[int, ...] = (), status: str = "done") -> RunFolder:
    run = RunFolder.create(path)
    run.begin(command=["/usr/bin/reft", "train"], facts={"base": {"name": "org/model", "commit": "abc"}})
    run.write_spec(
        SPEC, resolved=yaml.safe_dump({"model": {"name": "org/model"}, "intervention": {"method": "loreft"}})
    )
    for step in steps:
        add_checkpoint(run, step)
    if status != "running":
        run.finish(status, exit_code=0, reason="finished")
    return run


def add_checkpoint(run: RunFolder, step: int) -> Path:
    path = run.checkpoint(step)
    path.mkdir(parents=True)
    (path / "reft.json").write_text("{}")
    return path


# ---- create


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    run = RunFolder.create(tmp_path / "runs" / "x")
    assert run.path.is_dir() and not run.exists()


def test_an_empty_folder_is_taken(tmp_path):
    assert RunFolder.create(tmp_path).path == tmp_path


def test_a_finished_run_is_in_the_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/x"))
    with pytest.raises(SpecError) as caught:
        RunFolder.create("runs/x")
    expected = "runs/x exists and has finished. Continue with --resume, start over with --overwrite, or give --name."
    assert str(caught.value) == expected


@pytest.mark.parametrize(("status", "said"), [("running", "is unfinished."), ("failed", "is unfinished (failed).")])
def test_an_unfinished_run_says_so(tmp_path, status, said):
    make_run(tmp_path / "x", status=status)
    with pytest.raises(SpecError, match="Continue with --resume") as caught:
        RunFolder.create(tmp_path / "x")
    assert said in str(caught.value)


def test_a_start_that_was_killed_early_is_no_obstacle(tmp_path):
    run = RunFolder.create(tmp_path / "x")
    (run.path / ".run.json.tmp").write_text("{")
    run.release()
    assert not RunFolder.create(tmp_path / "x").exists()


def test_a_start_that_was_killed_before_its_record_is_no_obstacle(tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("reft_cli.runfolder.write_atomic", killed)
        make_run(tmp_path / "x")
    assert make_run(tmp_path / "x").exists()


def test_a_run_that_was_killed_while_it_was_cleared_is_a_run_still(tmp_path, monkeypatch):
    run = make_run(tmp_path / "x", steps=(5,))
    unlink = Path.unlink

    def killed(self, missing_ok=False):
        unlink(self, missing_ok)
        raise KeyboardInterrupt

    for _ in range(2):  # of spec.yaml and resolved.yaml
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Path, "unlink", killed)
            RunFolder.create(run.path, overwrite=True)
        assert run.exists()
    RunFolder.create(run.path, overwrite=True)
    assert not run.exists()


def test_looking_touches_nothing(tmp_path):
    run = RunFolder(tmp_path / "x")
    run.check(resume=False, overwrite=True)
    with pytest.raises(SpecError, match="nothing to resume"):
        run.check(resume=True, overwrite=False)
    assert not run.path.exists()


def test_resume_keeps_what_is_there(tmp_path):
    make_run(tmp_path / "x", steps=(5,))
    assert RunFolder.create(tmp_path / "x", resume=True).checkpoints()


def test_nothing_to_resume(tmp_path):
    with pytest.raises(SpecError, match="nothing to resume"):
        RunFolder.create(tmp_path / "x", resume=True)
    assert not (tmp_path / "x").exists()


def test_overwrite_empties_a_run(tmp_path):
    run = make_run(tmp_path / "x", steps=(5,))
    run.link("best", run.checkpoint(5))
    RunFolder.create(tmp_path / "x", overwrite=True)
    assert [p.name for p in run.path.iterdir()] == [".lock"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", ["thesis.tex", "run.json"])
def test_what_is_no_run_is_never_deleted(tmp_path, content, overwrite):
    (tmp_path / content).write_text('{"mine": true}')
    with pytest.raises(SpecError, match=r"is not a run .* it is left as it is"):
        RunFolder.create(tmp_path, overwrite=overwrite)
    assert (tmp_path / content).read_text() == '{"mine": true}'


def test_what_is_in_the_way_can_be_asked_beforehand(tmp_path):
    RunFolder(tmp_path / "new").check(resume=False, overwrite=False)
    assert not (tmp_path / "new").exists()
    run = make_run(tmp_path / "x")
    run.check(resume=True, overwrite=False)
    run.check(resume=False, overwrite=True)
    with pytest.raises(SpecError, match="has finished"):
        run.check(resume=False, overwrite=False)


def test_a_file_is_no_run(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(SpecError, match="is not a run"):
        RunFolder.create(tmp_path / "x", overwrite=True)


def test_a_parent_that_is_a_file_is_an_error_in_words(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(SpecError, match="cannot write there: "):
        RunFolder.create(tmp_path / "runs" / "x")


def test_overwriting_through_a_link_does_not_delete_its_target(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("")
    run = make_run(tmp_path / "x")
    (run.path / "link").symlink_to(outside)
    RunFolder.create(run.path, overwrite=True)
    assert (outside / "keep").exists() and not (run.path / "link").exists()


@pytest.mark.skipif(os.name != "posix", reason="locks are POSIX's")
def test_a_folder_that_another_process_writes_is_refused(tmp_path):
    make_run(tmp_path / "x")
    code = (
        "import sys; from reft_cli.runfolder import RunFolder\n"
        "RunFolder.create(sys.argv[1], resume=True); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "x")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        for flags in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(SpecError, match="being written by another process"):
                RunFolder.create(tmp_path / "x", **flags)
        assert RunFolder(tmp_path / "x").is_written()
        other.kill()
    assert not RunFolder(tmp_path / "x").is_written()
    assert RunFolder.create(tmp_path / "x", resume=True).exists()


@pytest.mark.skipif(os.name != "posix", reason="locks are POSIX's")
def test_a_run_that_nobody_writes_any_more_was_killed(tmp_path):
    run = make_run(tmp_path / "x", status="running")
    assert run.status() == "running"
    run.release()
    assert run.status() == "killed"
    assert run.read()["status"] == "running"  # looking changes nothing
    with pytest.raises(SpecError, match=r"exists and is unfinished \(killed\)\. Continue with --resume"):
        RunFolder.create(tmp_path / "x")


# ---- run.json


def test_the_record_tells_status_versions_and_command(tmp_path):
    run = make_run(tmp_path / "x", status="running")
    record = run.read()
    assert record["status"] == "running" and record["name"] == "x" and record["ended"] is None
    assert set(record["versions"]) >= {"python", "torch", "transformers", "reft"}
    assert record["base"] == {"name": "org/model", "commit": "abc"}
    assert record["command"] == ["reft", "train"]
    run.note({"micro_batch_size": 4})
    run.finish("failed", exit_code=6, reason="diverged")
    record = run.read()
    assert (record["status"], record["exit_code"], record["reason"]) == ("failed", 6, "diverged")
    assert record["micro_batch_size"] == 4 and record["ended"] >= record["started"]


def test_a_second_attempt_keeps_the_first(tmp_path):
    run = make_run(tmp_path / "x", status="interrupted")
    run.note({"micro_batch_size": 4})
    run = RunFolder.create(tmp_path / "x", resume=True)
    run.begin(command=["reft", "train", "--resume"], facts={})
    record = run.read()
    assert record["micro_batch_size"] == 4 and record["status"] == "running"
    assert [attempt["status"] for attempt in record["attempts"]] == ["interrupted"]


def test_no_token_and_no_environment_reaches_the_record(tmp_path, monkeypatch):
    monkeypatch.setenv("REFT_SECRET", "swordfish")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    run = RunFolder.create(tmp_path / "x")
    run.begin(command=["reft", "train", "--set", "data.train=https://u:hf_bbbbbbbbbbbb@h"], facts={})
    text = run.record.read_text()
    assert "swordfish" not in text and "aaaa" not in text and "bbbb" not in text and "hf_***" in text


def test_the_commit_of_the_working_directory(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert make_run(Path("a")).read()["git"] is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    Path("file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    state = make_run(Path("b")).read()["git"]
    assert len(state["commit"]) == 40 and state["dirty"] is False
    Path("file").write_text("2")
    assert make_run(Path("c")).read()["git"]["dirty"] is True


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "damaged: not JSON"), ("[]", "not written by reft"), ('{"reft_run": 99}', "newer reft")],
)
def test_a_damaged_record_is_an_error_in_words(tmp_path, text, said):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        RunFolder(tmp_path).read()


# ---- metrics.jsonl


def test_metrics_are_lines_and_non_numbers_are_null(tmp_path):
    run = make_run(tmp_path / "x")
    run.append_metrics({"step": 1, "loss": 0.5})
    run.append_metrics({"step": 2, "loss": float("nan"), "by": {"norm": float("inf")}})
    assert run.metrics.read_text().count("\n") == 2
    assert run.read_metrics()[1] == {"step": 2, "loss": None, "by": {"norm": None}}


def test_a_resumed_run_forgets_the_lines_beyond_its_checkpoint(tmp_path):
    run = make_run(tmp_path / "x")
    for step in range(1, 6):
        run.append_metrics({"step": step})
    with run.metrics.open("a") as file:
        file.write('{"step": 6, "lo')  # torn by a kill
    assert len(run.read_metrics()) == 5
    run.truncate_metrics(after=3)
    run.append_metrics({"step": 4})
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 3, 4]


def test_no_metrics_yet(tmp_path):
    assert make_run(tmp_path / "x").read_metrics() == []


# ---- checkpoints


def test_checkpoints_are_sorted_by_step_and_complete(tmp_path):
    run = make_run(tmp_path / "x", steps=(1_000_000, 20, 300))
    run.checkpoint(400).mkdir()  # no reft.json
    (run.path / "checkpoints" / ".step_000500.1.tmp").mkdir()
    assert [step_of(p) for p in run.checkpoints()] == [20, 300, 1_000_000]
    assert run.checkpoint(20).name == "step_000020"


def test_links_are_relative_and_replaced(tmp_path):
    run = make_run(tmp_path / "x", steps=(1, 2))
    run.link("best", run.checkpoint(1))
    run.link("best", run.checkpoint(2))
    assert os.readlink(run.path / "best") == "checkpoints/step_000002"
    run.path.rename(tmp_path / "moved")
    assert step_of(RunFolder(tmp_path / "moved").linked("best")) == 2


def test_without_symbolic_links_a_text_file_does(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    run = make_run(tmp_path / "x", steps=(1, 2))
    run.link("last", run.checkpoint(1))
    run.link("last", run.checkpoint(2))
    assert (run.path / "last").read_text() == "checkpoints/step_000002\n"
    assert run.linked("last") == run.checkpoint(2)
    assert find(run.path / "last").checkpoint == run.checkpoint(2)


def test_a_link_whose_checkpoint_is_gone_is_none(tmp_path):
    run = make_run(tmp_path / "x", steps=(1,))
    run.link("best", run.checkpoint(9))
    assert run.linked("best") is None and run.linked("last") is None


def test_selection(tmp_path):
    run = make_run(tmp_path / "x", steps=(1, 2, 3))
    assert run.select() == run.checkpoint(3)
    run.link("last", run.checkpoint(2))
    assert run.select() == run.select("last") == run.checkpoint(2)
    run.link("best", run.checkpoint(1))
    assert run.select() == run.select("best") == run.select("1") == run.select("step_000001") == run.checkpoint(1)
    with pytest.raises(CheckpointError, match=r"no checkpoint `7`; there are last and the steps 1, 2, 3"):
        run.select("7")


def test_no_best_is_not_replaced_silently(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint `best`"):
        make_run(tmp_path / "x", steps=(1,)).select("best")


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no checkpoint \(status: failed\)"):
        make_run(tmp_path / "x", status="failed").select()


def test_pruning_keeps_the_newest_the_best_and_the_last(tmp_path):
    run = make_run(tmp_path / "x", steps=(1, 2, 3, 4, 5))
    run.link("best", run.checkpoint(2))
    run.link("last", run.checkpoint(5))
    (run.path / "checkpoints" / ".step_000006.1.tmp").mkdir()
    assert [step_of(p) for p in run.prune(2)] == [1, 3]
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == ["step_000002", "step_000004", "step_000005"]
    assert run.linked("best") == run.checkpoint(2)


@pytest.mark.parametrize("way", ["prune", "forget"])
def test_a_deletion_that_is_killed_leaves_nothing_that_looks_whole(tmp_path, monkeypatch, way):
    run = make_run(tmp_path / "x", steps=(1, 2, 3))
    run.link("last", run.checkpoint(3 if way == "prune" else 1))
    (run.checkpoint(2) / "interventions.safetensors").write_text("")

    def killed(path: Path) -> None:
        (path / "interventions.safetensors").unlink(missing_ok=True)
        raise KeyboardInterrupt

    def delete() -> list[Path]:
        return run.prune(1) if way == "prune" else run.forget(after=1)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("shutil.rmtree", killed)
        delete()
    left = [3] if way == "prune" else [1]
    assert [step_of(p) for p in run.checkpoints()] == left
    assert delete() == []
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == [f"step_{left[0]:06d}"]


# ---- find


@pytest.mark.parametrize("where", ["", "best", "checkpoints/step_000001"])
def test_every_way_of_naming_a_run_tells_run_and_checkpoint(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    run = make_run(Path("runs/x"), steps=(1, 2))
    run.link("best", run.checkpoint(1))
    found = find(Path("runs/x") / where)
    assert found.run is not None and found.run.path == Path("runs/x")
    assert found.checkpoint.resolve() == run.checkpoint(1).resolve()


def test_a_checkpoint_that_was_copied_out_has_no_run(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "reft.json").write_text("{}")
    found = find(tmp_path / "mine")
    assert found.run is None and found.checkpoint == tmp_path / "mine"


def test_which_checkpoint_of_a_run(tmp_path):
    run = make_run(tmp_path / "x", steps=(1, 2))
    assert find(run.path, checkpoint="1").checkpoint == run.checkpoint(1)
    with pytest.raises(SpecError, match="--checkpoint 2 goes with a run folder"):
        find(run.checkpoint(1), checkpoint="2")


def test_a_path_that_leads_nowhere(tmp_path):
    make_run(tmp_path / "quickstart")
    with pytest.raises(CheckpointError, match=r"did you mean .*quickstart"):
        find(tmp_path / "quikstart")
    with pytest.raises(CheckpointError, match="reft runs ls"):
        find(tmp_path / "zzz")
    (tmp_path / "plain").mkdir()
    with pytest.raises(CheckpointError, match=r"neither a run .* nor a checkpoint"):
        find(tmp_path / "plain")


def test_runs_in_a_folder(tmp_path):
    make_run(tmp_path / "b")
    make_run(tmp_path / "a")
    (tmp_path / "c").mkdir()
    assert [run.path.name for run in runs_in(tmp_path)] == ["a", "b"]
    assert runs_in(tmp_path / "missing") == []


# ---- results


def test_evaluations_by_name(tmp_path):
    run = make_run(tmp_path / "x")
    run.evaluation("bundled:reviews/test").write_text(json.dumps({"metrics": {"accuracy": 0.5}}))
    assert run.evaluations() == {"bundled_reviews_test": {"metrics": {"accuracy": 0.5}}}


def test_the_card_tells_model_method_scores_and_spec(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(Path("runs/x"), steps=(4,))
    run.append_metrics({"step": 4, "loss": 1.0})
    run.append_metrics({"step": 4, "validation_exact_match": 0.875})
    run.evaluation("test").write_text(json.dumps({"metrics": {"exact_match": 0.9}}))
    run.note({"trainable": 1000, "base": {"name": "org/model", "commit": "abc", "parameters": 1_000_000}})
    run.write_card()
    card = run.card.read_text()
    assert card.startswith("---\nlibrary_name: reft\n") and "base_model: org/model\n" in card
    for piece in ("| Method | loreft |", "0.875", "0.9", "0.100%", "# as written", "reft infer runs/x"):
        assert piece in card, piece
