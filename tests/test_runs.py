"""Runs: what they are made of, who may write to them, and how they end.

pytest tests/test_runs.py
"""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import call, meteor, run_main
from safetensors.torch import load_file, save_file

import eval as evaluation
import train
from molex import MoLEx, MoLExConfig
from support.files import InputError, locked
from support.runs import RunFolder
from support.settings import Settings

ROOT = Path(__file__).parents[1]
LINES = {"trainset.csv": 21, "devset.csv": 9, "testset_w_refs.csv": 5}
FLAGS = "--task e2e --no-molex --data data --max-steps 1 --beams 1 --max-new-tokens 4 --model model"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The working directory, with a small model and small data of a test's own."""
    shutil.copytree(ROOT / "nano/gpt2", tmp_path / "model")
    (tmp_path / "data").mkdir()
    for name, count in LINES.items():
        lines = (ROOT / "nano/e2e" / name).read_text().splitlines(keepends=True)
        (tmp_path / "data" / name).write_text("".join(lines[:count]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "meteor", meteor)
    return tmp_path


def other_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({n: 1.5 * w for n, w in load_file(file).items()}, file, metadata={"format": "pt"})


def other_test_set(folder: Path) -> None:
    file = folder.parent / "data/testset_w_refs.csv"
    file.write_text(file.read_text().replace(" is ", " is not "))


def other_words(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"add_prefix_space": true}')


@pytest.mark.parametrize("change, name", [(other_weights, "model.safetensors"),
                                          (other_words, "tokenizer_config.json"),
                                          (other_test_set, "testset_w_refs.csv")])  # fmt: skip
def test_a_finished_run_is_kept_only_for_the_files_it_was_made_of(home, failure, change, name):
    run_main(FLAGS)
    run_main(FLAGS)  # kept
    scores = home / "runs/model-e2e-lora-s0/scores.json"
    before = scores.read_bytes()
    change(home / "model")
    said = f"was made of another {name}"
    assert said in failure(run_main, FLAGS)
    error = failure(call, evaluation, scores.parent)
    assert said in error and "train.py --fresh" in error
    assert scores.read_bytes() == before
    run_main(FLAGS, "--fresh")
    assert scores.read_bytes() != before


def test_a_finished_run_is_kept_only_for_the_run_it_started_from(home, failure):
    run_main(FLAGS)
    first = "runs/model-e2e-lora-s0"
    again = f"{FLAGS} --init-from {first}"
    run_main(again)
    run_main(again)  # kept
    file = home / first / "adapter.safetensors"
    save_file({n: 1.5 * w for n, w in load_file(file).items()}, file, metadata={"format": "pt"})
    assert f"started from {first}, which has changed" in failure(run_main, again)
    run_main(again, "--fresh")


def test_a_run_knows_where_its_checkpoint_was(home, failure, monkeypatch):
    """The same relative name may be another checkpoint in another folder."""
    run_main(FLAGS)
    elsewhere = home / "elsewhere"
    elsewhere.mkdir()
    for name in ("model", "data"):
        shutil.copytree(home / name, elsewhere / name)
    other_weights(elsewhere / "model")
    monkeypatch.chdir(elsewhere)
    for flags in ([], ["--prompt", "name[A]"]):
        error = failure(call, evaluation, home / "runs/model-e2e-lora-s0", *flags)
        assert f"another model.safetensors (the checkpoint was {home / 'model'})" in error


@pytest.mark.parametrize("flags", [[], ["--prompt", "name[A]"], ["--beams", "2"]], ids=str)
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_a_file_that_is_gone_is_another_checkpoint(home, failure, name, flags):
    (home / "model" / name).write_text('{"eos_token_id": [0, 5]}')
    run_main(FLAGS)
    (home / "model" / name).unlink()
    error = failure(call, evaluation, home / "runs/model-e2e-lora-s0", *flags)
    assert f"was made of another {name}" in error


def test_files_beside_a_checkpoint_that_nobody_reads(home, capsys):
    run_main(FLAGS)
    scores = home / "runs/model-e2e-lora-s0/scores.json"
    before = scores.read_bytes()
    shutil.copy(home / "model/model.safetensors", home / "model/model.fp16.safetensors")
    (home / "model/pytorch_model.bin").symlink_to("nowhere")
    (home / "model/x.safetensors.d").mkdir()
    run_main(FLAGS)  # kept
    assert scores.read_bytes() == before
    call(evaluation, scores.parent, "--prompt", "name[A]")


def test_samples_that_have_gone_cost_no_table(home, capsys):
    run_main(FLAGS)
    (home / "runs/model-e2e-lora-s0/samples.txt").unlink()
    capsys.readouterr()
    run_main(FLAGS)
    said = capsys.readouterr().out
    assert "samples.txt cannot be read: " in said and "BLEU" in said


def test_other_beams_are_no_leave_for_other_data(home, failure):
    run_main(FLAGS)
    run = home / "runs/model-e2e-lora-s0"
    shutil.copytree(home / "data", home / "others")
    other_test_set(home / "model")
    error = failure(call, evaluation, run, "--beams", "2")
    assert "was made of another testset_w_refs.csv" in error
    call(evaluation, run, "--beams", "2", "--data", "others")


@pytest.mark.parametrize("unfinished", [False, True])
def test_an_older_run_has_noted_files_that_nobody_reads(home, failure, unfinished):
    shutil.copy(home / "model/model.safetensors", home / "model/pytorch_model.bin")
    run_main(FLAGS)
    run = home / "runs/model-e2e-lora-s0"
    known = json.loads((run / "origin.json").read_text())
    known["files"]["pytorch_model.bin"] = known["files"]["model.safetensors"]
    (run / "origin.json").write_text(json.dumps(known))
    if unfinished:
        last = torch.load(run / "last.pt")
        torch.save(last | {"origin": known}, run / "last.pt")
        (run / "scores.json").unlink()
    run_main(FLAGS)
    call(evaluation, run, "--prompt", "name[A]")
    (home / "model/pytorch_model.bin").unlink()
    assert "another pytorch_model.bin" in failure(call, evaluation, run, "--prompt", "name[A]")


def test_an_index_with_a_name_that_no_file_can_have(home, failure):
    run_main(FLAGS)
    (home / "model/model.safetensors").unlink()
    index = {"weight_map": {"wte.weight": 300 * "a" + ".safetensors"}}
    (home / "model/model.safetensors.index.json").write_text(json.dumps(index))
    error = failure(call, evaluation, home / "runs/model-e2e-lora-s0")
    assert "was made of another model.safetensors" in error


class Fork(MoLEx):
    """With the weights of MoLEx it does something else."""


def test_a_forks_run_is_not_taken_for_another(home, failure, monkeypatch):
    flags = FLAGS.replace("--no-molex", "")
    prepare = train.prepare

    def forked(s, device):
        model, tokenizer = prepare(s, device)
        model.layers.__class__ = Fork
        return model, tokenizer

    run = home / "runs/model-e2e-molex-s0"
    with monkeypatch.context() as patch:
        patch.setattr(train, "prepare", forked)
        assert "is a run of Fork, not of MoLEx" in failure(run_main, flags)  # it is trained
    before = sorted(run.iterdir())
    for more in ([], ["--prompt", "name[A]"], ["--beams", "2"]):
        error = failure(call, evaluation, run, *more)
        assert f"{run} is a run of Fork, not of MoLEx; the script that trained it" in error
    assert "is a run of Fork" in failure(run_main, f"{flags} --init-from {run} --out other")
    assert sorted(run.iterdir()) == before
    s = evaluation.read_settings(run, MoLExConfig)
    assert RunFolder(run).best(s, "Fork")
    assert "with another class of layers (Fork)" in failure(run_main, flags)
    known = json.loads((run / "origin.json").read_text())
    del known["layers"]  # an older run's
    (run / "origin.json").write_text(json.dumps(known))
    call(evaluation, run)


def test_a_file_of_weights_that_comes_first_is_another_checkpoint(home, failure):
    """The shards of an index, too: what read_weights reads is what is compared."""
    tensors = load_file(home / "model/model.safetensors")
    (home / "model/model.safetensors").unlink()
    for name in ("a.safetensors", "b.safetensors"):
        save_file(tensors, home / "model" / name, metadata={"format": "pt"})
    index = home / "model/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "a.safetensors")}))
    run_main(FLAGS)
    run = home / "runs/model-e2e-lora-s0"
    files = json.loads((run / "origin.json").read_text())["files"]
    assert {"a.safetensors", index.name} < files.keys() and "b.safetensors" not in files
    save_file(tensors, home / "model/model.safetensors", metadata={"format": "pt"})
    error = failure(call, evaluation, run, "--prompt", "name[A]")
    assert "was made of another model.safetensors" in error


@pytest.mark.parametrize("changed", ["a", "b"])
def test_shards_of_one_name_in_two_folders(home, failure, changed):
    tensors, shards = load_file(home / "model/model.safetensors"), {"a": {}, "b": {}}
    (home / "model/model.safetensors").unlink()
    for n, (name, w) in enumerate(tensors.items()):
        shards["ab"[n % 2]][name] = w
    for part, held in shards.items():
        (home / "model" / part).mkdir()
        save_file(held, home / "model" / part / "w.safetensors", metadata={"format": "pt"})
    index = {name: f"{part}/w.safetensors" for part, held in shards.items() for name in held}
    file = home / "model/model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": index}))
    run_main(FLAGS)
    held = {n: 1.5 * w for n, w in shards[changed].items()}
    save_file(held, home / "model" / changed / "w.safetensors", metadata={"format": "pt"})
    error = failure(call, evaluation, home / "runs/model-e2e-lora-s0")
    assert f"was made of another {changed}/w.safetensors" in error


def test_a_runs_files_have_the_same_permissions(home):
    old = os.umask(0o027)
    try:
        run_main(FLAGS)
    finally:
        os.umask(old)
    files = [file for file in (home / "runs/model-e2e-lora-s0").iterdir() if file.is_file()]
    assert len(files) > 8
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o640}


def test_a_run_in_use_is_told_before_its_data_are_read(home, failure):
    (home / "data/trainset.csv").write_text("mr,ref\nnonsense,nonsense\n")
    with locked(home / "runs/model-e2e-lora-s0"):
        assert "is in use by process" in failure(run_main, FLAGS)
    assert "malformed MR" in failure(run_main, FLAGS)
    assert not (home / "runs").exists()  # nothing is left of it


def test_a_folder_with_something_in_it_stays(tmp_path):
    with locked(tmp_path / "run"):
        (tmp_path / "run/file").touch()
    assert (tmp_path / "run/file").exists() and not [*tmp_path.glob(".*")]


@pytest.mark.parametrize("name", [".", ".."])
def test_a_run_of_the_checkpoint_in_this_folder_has_a_name(home, monkeypatch, name):
    (home / "model/below").mkdir()
    monkeypatch.chdir(home / "model" if name == "." else home / "model/below")
    s = Settings(model=name, task="e2e", data=None, seed=0, molex=None)
    assert s.name == "model-e2e-lora-s0"


# ------------------------------------------------------------------------------------- Ctrl-C


def interrupted(argv: list[str], delay: float, times: int) -> tuple[int, str]:
    """The exit code and the messages of a command that is sent SIGINT `times` times, beginning
    `delay` seconds after its first import, which says what Ctrl-C does."""
    command = [sys.executable, "-X", "importtime", *argv]
    # a background job's SIGINT may be switched off
    start = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    process = subprocess.Popen(command, stdout=-3, stderr=-1, text=True, **start)
    assert any("support.interrupts" in line for line in process.stderr)
    time.sleep(delay)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    lines = [x for x in process.stderr.read().splitlines() if not x.startswith("import time:")]
    return process.wait(120), "\n".join(lines)


@pytest.mark.parametrize("script, delay", [("train.py", 0.0), ("eval.py", 0.5)])
def test_ctrl_c_during_the_imports_is_one_line(home, script, delay):
    code, said = interrupted([str(ROOT / script), *FLAGS.split()], delay, 1)
    assert (code, said.split()) == (130, ["interrupted"])


@pytest.mark.parametrize("delay", [1.0, 4.0, 7.0])
def test_five_times_ctrl_c_is_one_line(home, delay):
    argv = [str(ROOT / "train.py"), *FLAGS.split(), "--max-steps", "100000", "--epochs", "90000"]
    code, said = interrupted(argv, delay, 5)
    assert code == 130 and said.count("interrupted") == 1 and "Traceback" not in said
    assert not [*home.rglob("*.tmp")]


def test_who_imports_a_script_keeps_their_own_handlers():
    code = "import signal, train; print(signal.getsignal(signal.SIGINT))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "function end" not in done.stdout


def test_a_lock_is_refused_in_one_line(tmp_path):
    with locked(tmp_path / "run"), pytest.raises(InputError, match="in use by process"):
        with locked(tmp_path / "run"):
            pass
