"""The house: what stands where, and that a fork's first steps in it do not stumble."""

import ast
import inspect
import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
from conftest import call, run_main

import eval as evaluation
import train
from data import GLUE, SENTENCES, GlueTask
from model import load
from molex import GATES, LOG_AFFINITIES, VOTES, WEIGHTS, MoLEx, MoLExConfig, upcycle
from support import runs, settings
from support.checkpoints import FAMILIES, our_config
from support.files import InputError
from support.settings import PAPER, Settings, setting
from support.tables import paper

ROOT = Path(__file__).parents[1]
SIX = ("model", "lora", "molex", "data", "eval", "train")
COLA = "--model nano/roberta --task cola --max-steps 2 --dev-limit 40"


def imported(source: str) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(alias.name for alias in node.names)}
    return {name.partition(".")[0] for name in found}


def test_support_imports_none_of_the_six():
    files = sorted((ROOT / "support").glob("*.py"))
    assert len(files) > 10
    for file in files:
        assert not imported(file.read_text("utf-8")) & {*SIX}, file.name


@pytest.mark.parametrize(
    "planted", ["import train", "from data import GLUE", "def f():\n    from eval import bleu"]
)
def test_a_planted_import_would_be_found(planted):
    source = (ROOT / "support/tables.py").read_text("utf-8")
    assert imported(f"{source}\n{planted}\n") & {*SIX}


def test_the_readme_says_how_long_the_six_are():
    text = (ROOT / "README.md").read_text("utf-8")
    said = dict(re.findall(r"\| `(\w+)\.py` \| (\d+) \|", text))
    assert said == {n: str(len((ROOT / f"{n}.py").read_text("utf-8").splitlines())) for n in SIX}


def test_the_readme_has_the_code_of_mix():
    text = (ROOT / "README.md").read_text("utf-8")
    (code,) = [x for x in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "log_a" in x]

    def statements(text: str) -> list[str]:
        return [line.partition("  # ")[0].strip() for line in text.splitlines()]

    body = statements(inspect.getsource(MoLEx.mix))
    found = [body.index(line) for line in statements(code)]
    assert found == sorted(found) and len(found) == 12


# ------------------------------------------------------------------------- a fork adds a setting


def with_field(cls: type, default: object) -> type:
    """The class as a fork has it that added a setting."""
    body = {"__annotations__": {"temperature": type(default)}}
    body["temperature"] = setting(default, "of a fork", below=10)
    return dataclass(frozen=True)(type(cls.__name__, (cls,), body))


@pytest.fixture
def fork(monkeypatch):
    """fork(cls): from now on Settings, or MoLExConfig, has one setting more."""

    def add(cls: type) -> None:
        forked = with_field(cls, 1.0)
        for module in (settings, runs, train, evaluation):
            if hasattr(module, cls.__name__):
                monkeypatch.setattr(module, cls.__name__, forked)

    return add


@pytest.mark.parametrize("cls", [Settings, MoLExConfig])
def test_runs_from_before_a_setting_are_read_and_kept(cls, fork, failure, tmp_path, capsys):
    out = f"--out {tmp_path}"
    run_main(COLA, out)
    folder = tmp_path / "nano-roberta-cola-molex-s0"
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    capsys.readouterr()
    fork(cls)
    run_main(COLA, out)
    assert f"{folder}: finished before, kept" in capsys.readouterr().out
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    s = evaluation.read_run(folder)[0]
    assert (s if cls is Settings else s.molex).temperature == 1.0
    error = failure(run_main, COLA, out, "--temperature 2")
    assert "holds a run with another temperature;" in error


@pytest.mark.parametrize("cls", [Settings, MoLExConfig])
def test_an_unfinished_run_from_before_a_setting_goes_on(cls, fork, monkeypatch, tmp_path, capsys):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(train, "dev_scores", killed)
        with pytest.raises(KeyboardInterrupt):
            run_main(COLA, f"--out {tmp_path}")
    folder = tmp_path / "nano-roberta-cola-molex-s0"
    assert (folder / "last.pt").exists() and not (folder / "scores.json").exists()
    fork(cls)
    run_main(COLA, f"--out {tmp_path}")
    assert f"{folder}: resumed" in capsys.readouterr().out
    assert (folder / "scores.json").exists()


@pytest.mark.parametrize("cls", [Settings, MoLExConfig])
@pytest.mark.parametrize("value", ["10", "-1", "nan"])
def test_a_settings_limits_hold_in_both_classes(cls, value, fork, failure, tmp_path):
    fork(cls)
    error = failure(run_main, COLA, f"--out {tmp_path}", f"--temperature {value}")
    assert f"temperature cannot be {float(value)}" in error
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name, cls", [("lr", Settings), ("proj_dim", MoLExConfig)])
@pytest.mark.parametrize("value", [-1, "much", True])
def test_a_runs_file_is_held_to_the_same_limits(name, cls, value, failure, tmp_path):
    run_main(COLA, f"--out {tmp_path}")
    folder = tmp_path / "nano-roberta-cola-molex-s0"
    config = json.loads((folder / "config.json").read_text())
    (config if cls is Settings else config["molex"])[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    error = failure(call, evaluation, folder)
    assert "config.json" in error and f"{name.replace('_', '-')} cannot be {value!r}" in error


@pytest.mark.parametrize(
    "name, known",
    [("gate", GATES), ("activation", LOG_AFFINITIES), ("vote", VOTES), ("gate_weight", WEIGHTS)],
)
def test_a_name_without_code_behind_it_is_an_error(name, known):
    config = replace(MoLExConfig(), **{name: "nosuch"})
    with pytest.raises(InputError, match=f"is 'nosuch', not {' or '.join(known)}"):
        upcycle(load("nano/gpt2"), config)
    (choices,) = [f.metadata["choices"] for f in fields(MoLExConfig) if f.name == name]
    assert choices == tuple(known)


# ---------------------------------------------------------------------------- a fork adds a task


def test_a_task_of_glue_is_one_line(monkeypatch, tmp_path, capsys):
    """WNLI, which the paper leaves out: it runs, is evaluated, and has no number of the paper's."""
    monkeypatch.setitem(GLUE, "wnli", GlueTask("WNLI", SENTENCES, "label", ("0", "1")))
    (tmp_path / "WNLI").mkdir()
    for split, count in (("train", 40), ("dev", 10)):
        rows = [f"{i}\tThe cup is full of {i}.\tIt is full.\t{i % 2}" for i in range(count)]
        text = "\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n"
        (tmp_path / f"WNLI/{split}.tsv").write_text(text)
    run_main(f"--model nano/roberta --task wnli --compare --max-steps 2 --data {tmp_path}",
             f"--out {tmp_path / 'runs'}")  # fmt: skip
    said = capsys.readouterr().out
    assert "WNLI accuracy" in said and "paper:" not in said and "Not as in" not in said
    assert "settings of presets.new_task in support/paper.toml: the paper has no such run" in said
    folder = tmp_path / "runs/nano-roberta-wnli-molex-s0"
    assert len((folder / "predictions.tsv").read_text().splitlines()) == 11
    call(evaluation, folder)
    assert "accuracy" in capsys.readouterr().out
    s = replace(evaluation.read_run(folder)[0], shape="roberta-base")
    assert paper(s, train.TASKS) == {} and paper(replace(s, task="rte"), train.TASKS)


def test_a_new_task_has_a_value_for_every_column_of_table_5():
    for rows in PAPER["table5"].values():
        columns = {name for name, row in rows.items() if isinstance(row, list)}
        assert columns <= PAPER["presets"]["new_task"].keys()


def test_a_new_task_can_have_settings_of_its_own(monkeypatch):
    monkeypatch.setitem(PAPER["presets"], "wnli", dict(epochs=7, gate="cosine"))
    found = settings.paper_settings("roberta-base", "wnli")[0]
    assert (found["epochs"], found["gate"], found["batch_size"]) == (7, "cosine", 16)
    assert settings.paper_settings("roberta-base", "rte")[0]["epochs"] == 80


def test_glue_stays_the_papers_eight_tasks(monkeypatch):
    monkeypatch.setitem(GLUE, "wnli", GlueTask("WNLI", SENTENCES, "label", ("0", "1")))
    flags = "--model nano/roberta --task glue --no-molex".split()
    found = settings.parse_command(MoLExConfig, train.TASKS, flags)[1]
    assert [s.task for s in found] == PAPER["tasks"] and len(found) == 8


def test_a_family_of_a_forks_own_may_read_more_of_config_json(monkeypatch):
    c = json.loads((ROOT / "nano/gpt2/config.json").read_text("utf-8"))
    monkeypatch.setitem(FAMILIES["gpt2"]["names"], "scale", "embedding_multiplier")
    assert our_config(c | {"embedding_multiplier": 12.0})["scale"] == 12.0
    with pytest.raises(InputError, match="lacks embedding_multiplier"):
        our_config(c)
    monkeypatch.setitem(FAMILIES["gpt2"]["missing"], "scale", 1.0)
    assert our_config(c)["scale"] == 1.0
