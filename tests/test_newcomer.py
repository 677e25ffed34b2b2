"""What somebody sees who runs this for the first time.

pytest tests/test_newcomer.py
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import call, meteor, run_main
from transformers import GPT2LMHeadModel

import eval as evaluation
import train
from data import TASKS, Tokenizer, read_e2e
from eval import generate
from model import load
from molex import MoLExConfig
from support import tables
from support.cli import command_line
from support.settings import OF_EVALUATION, SEARCH, parse_command

FLAGS = "--max-steps 3 --train-limit 24 --dev-limit 8 --test-limit 3 --beams 2 --max-new-tokens 8"
ROOT = Path(__file__).parents[1]
TOKENIZER = Tokenizer.load("nano/gpt2", load("nano/gpt2").config)
COLA = "--model nano/roberta --task cola --max-steps 2 --train-limit 32 --dev-limit 10"


def parsed(*flags: str) -> list:
    return parse_command(MoLExConfig, TASKS, " ".join(flags).split())[1]


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setattr(evaluation, "meteor", meteor)


# --------------------------------------------------------------------------- what a run tells


def test_a_run_tells_what_it_is(tmp_path, capsys):
    run_main("--compare", FLAGS, f"--out {tmp_path}")
    said, bars = capsys.readouterr()
    name = "nano-gpt2-e2e-molex-s0"
    assert f"{name}: nano/gpt2, 2,160,904 parameters, 17,416 trained" in said
    assert "e2e from nano/e2e: 24 training examples, 8 of dev" in said
    assert f"steps 1 to 3 on cpu in float32, written to {tmp_path / name}" in said
    assert "the rate rises for 50 steps: it never is --lr 0.01" in said
    assert f"{name}, epoch 1: train loss" in said
    assert f"{name} says:" in said
    below = said.partition("seconds per step")[2]
    for line in ("p: how often chance alone", "the train loss that epochs show is label-smoothed",
                 "--train-limit: only the first 24 of the train set",
                 "--test-limit: only the first 3 of the test set"):  # fmt: skip
        assert below.count(line) == 1
    assert not bars  # no terminal, no bars


@pytest.mark.parametrize("precision", ["bf16", "float32"])
@pytest.mark.parametrize("flags", ["fpu avx2 avx512f", "fpu avx512_bf16", "fp asimd bf16"])
def test_bf16_without_instructions_for_it_is_said(precision, flags, tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n", "utf-8")
    has = tables.cpu_has_bf16(cpuinfo)
    assert has == ("bf16" in flags) and tables.cpu_has_bf16(tmp_path / "of another system")
    monkeypatch.setattr(tables, "cpu_has_bf16", lambda: has)
    model = load("nano/gpt2")
    model.precision = precision
    said = tables.opening(parsed(FLAGS)[0], tmp_path, model, 0, dict(train=1, dev=1), (0, 9))
    assert ("this processor has no bf16 instructions" in said) == (precision == "bf16" and not has)


def test_an_epoch_that_is_not_whole_is_said(tmp_path, capsys):
    run_main(COLA, "--max-steps 1", f"--out {tmp_path}")
    said = capsys.readouterr().out
    assert "--max-steps: 1 steps; 2 are an epoch" in said
    run_main(COLA, f"--out {tmp_path / 'whole'}")
    assert "are an epoch" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train_limit", "dev_limit"])
def test_limits_limit_what_is_read(name):
    (s,) = parsed("--model nano/roberta --task cola --no-molex", f"--{name.replace('_', '-')} 7")
    model, tokenizer = train.prepare(s, train.pick_device("cpu"))
    examples, dev = train.read_data(s, tokenizer, model.config.max_positions)
    sizes = dict(train_limit=len(examples), dev_limit=len(dev["dev"]))
    assert sizes == dict(train_limit=1600, dev_limit=300) | {name: 7}


def test_a_dev_limit_holds_for_the_evaluation(tmp_path):
    run_main(COLA, f"--out {tmp_path}")
    table = tmp_path / "nano-roberta-cola-molex-s0/predictions.tsv"
    assert len(table.read_text().splitlines()) == 11


# -------------------------------------------------------------------- flags that mean nothing


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--no-molex --top-k 2", "--top-k has no effect here: it is MoLEx's"),
        ("--no-molex --gate-lr 0.1", "--gate-lr has no effect here: it is MoLEx's"),
        ("--tune full --lora-r 64", "--lora-r has no effect here: --tune full has no LoRA"),
        ("--model nano/roberta --task mrpc --test-limit 9", "--test-limit has no effect here"),
        ("--model nano/roberta --task mrpc --beams 9", "--beams has no effect here"),
        (
            "--gate-weight straight-through --top-k 2",
            "--gate-weight has no effect here: with K > 1",
        ),
        ("--proj-dim 64", "--proj-dim has no effect here: only a cosine gate has a projection"),
        ("--seeds 0 0", "a seed is given twice: that is one run"),
        ("--resume", "--resume is not needed: the same command goes on"),
    ],
)
def test_what_means_nothing_is_said(flags, said, capsys):
    runs = parsed(flags)
    assert said in capsys.readouterr().out
    assert len({s.seed for s in runs}) == 1


@pytest.mark.parametrize("flags", ["--compare --top-k 2", "--gate cosine --proj-dim 64",
                                   "--lora-r 8", "--test-limit 9 --beams 3"])  # fmt: skip
def test_what_means_something_is_not_said(flags, capsys):
    parsed(flags)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, error",
    [
        ("--beam 3", "unrecognized arguments: --beam 3; is --beams meant?"),
        ("--load-ballance 0", "--load-balance meant?"),
        ("--zzz", "unrecognized arguments: --zzz$"),
        ("--beams 5000", "beams cannot be 5000: it is 1 or more, less than 4097"),
        ("--lr -1", r"lr cannot be -1.0: it is 0 or more$"),
        (
            "--model nano/roberta --task mrpc --alpha 0 --learn-alpha",
            r"0 and 1 \(or --no-learn-alpha\)",
        ),
    ],
)
def test_what_is_wrong_is_named_with_what_is_right(flags, error, failure):
    assert re.search(error, failure(parsed, flags))


# ------------------------------------------------------------------------------------- --help


def help_of(capsys, flags: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        parsed("--help", flags)
    assert stopped.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_has_the_values_that_this_command_would_use(capsys):
    said = help_of(capsys, "--model nano/roberta --task mrpc")
    assert "linear warm-up and decay (0.003)" in said and "over all processes (16)" in said
    said = help_of(capsys, "--model nano/gpt2 --lr 7")
    assert "linear warm-up and decay (7.0)" in said and "over all processes (8)" in said
    assert "decoding and evaluation:" in said and "the LoRA:" in said
    said = help_of(capsys, "--model no/such")
    assert "linear warm-up and decay (0.0002)" in said  # Table 6's
    assert "In brackets are the defaults: model 'no/such' is neither a folder" in said


# ------------------------------------------------------------------------------------ eval.py


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    with mock.patch.object(evaluation, "meteor", meteor):
        run_main("--model nano/gpt2", FLAGS, f"--out {out}")
    return out / "nano-gpt2-e2e-molex-s0"


def test_a_run_is_decoded_again_into_a_folder_of_its_own(run, capsys):
    before = {f.name: f.read_bytes() for f in run.iterdir() if f.is_file()}
    call(evaluation, run, "--beams", "1", "--test-limit", "2")
    said = capsys.readouterr().out
    again = run / "beams-1-test-limit-2"
    assert f"with other settings than the run's; see {again}" in said and "BLEU" in said
    assert len((again / "predictions.tsv").read_text().splitlines()) == 3
    assert {f.name: f.read_bytes() for f in run.iterdir() if f.is_file()} == before


def test_a_run_is_evaluated_on_other_data(run, tmp_path, capsys):
    """Only what is scored has to be there, under whatever path: no training set, and no dev set, so
    no dev loss either. Of two folders of one name each has a place of its own."""
    lines = (ROOT / "nano/e2e/testset_w_refs.csv").read_text().splitlines(keepends=True)
    for parent in ("a" * 150, "b" * 150):
        folder = tmp_path / parent / "official"
        folder.mkdir(parents=True)
        (folder / "testset_w_refs.csv").write_text("".join(lines[:3]))
        call(evaluation, run, "--data", folder, "--beams", 1)
        assert "dev loss" not in capsys.readouterr().out
    found = sorted(run.glob("beams-1-data-official-*"))
    assert len(found) == 2
    assert all("dev_loss" not in json.loads((f / "scores.json").read_text()) for f in found)


def test_a_run_is_not_evaluated_with_other_settings_of_training(run, failure):
    for flag in (
        "--lr 1",
        "--task mrpc",
        "--compare",
        "--seeds 1",
        "--top-k 2",
        "--no-learn-alpha",
    ):
        error = failure(call, evaluation, run, *flag.split())
        said = f"{flag.split()[0].replace('no-', '')} changes nothing here"
        assert f"{said}; a run can be evaluated again with --beam-rule" in error


@pytest.mark.parametrize("flag", ["--lr 1", "--borrow-size own", "--tune lora", "--epochs 2"])
def test_a_model_is_not_evaluated_with_settings_of_training(flag, failure):
    error = failure(call, evaluation, "nano/gpt2", *flag.split(), "--test-limit", 2, "--beams", 1)
    said = f"{flag.split()[0]} changes nothing here"
    assert f"{said}; a model is evaluated as it is with --beam-rule" in error


def test_a_value_that_is_zero_counts(run, capsys):
    call(evaluation, "--no-repeat-ngram", "0", "--test-limit", "2", run)
    assert "no-repeat-ngram-0-test-limit-2" in capsys.readouterr().out


def test_precision_is_that_of_the_evaluation(run, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluation, "evaluate_e2e", lambda model, *_: seen.append(model.bf16) or {})
    for precision in ("bf16", "float32"):
        call(evaluation, run, "--precision", precision)
    assert seen == [True, False]


def test_a_prompt_is_put_into_the_form_of_the_run(run, capsys, failure):
    said = []
    for prompt in ("name[Aromi], eatType[pub]", "name : Aromi | Type : pub"):
        call(evaluation, run, "--beams", "1", "--prompt", prompt)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert "malformed MR 'name[Aromi'" in failure(call, evaluation, run, "--prompt", "name[Aromi")
    assert "none of them is empty" in failure(call, evaluation, "nano/gpt2", "--prompt", "")


@pytest.mark.parametrize("text", ["The pub", "Citation [3] says", "name[Aromi", ": [a], b"])
def test_a_model_before_fine_tuning_goes_on_with_a_text(text, capsys):
    theirs, ids = GPT2LMHeadModel.from_pretrained("nano/gpt2"), TOKENIZER.encode(text)
    with torch.no_grad():
        for _ in range(6):  # greedily
            ids.append(theirs(torch.tensor([ids])).logits[0, -1].argmax().item())
    answer = TOKENIZER.decode(ids[-6:]).strip()
    flags = "--beams 1 --max-new-tokens 6 --no-repeat-ngram 0 --length-penalty 0".split()
    call(evaluation, "nano/gpt2", *flags, "--prompt", text)
    assert capsys.readouterr().out.strip() == answer


@pytest.mark.parametrize("text", ["name[Aromi], eatType[pub]", "name : Aromi | Type : pub"])
def test_a_model_before_fine_tuning_answers_an_mr_as_it_is_scored(text, capsys):
    (answer,) = generate(load("nano/gpt2"), TOKENIZER, ["name : Aromi | Type : pub"], beams=2)
    call(evaluation, "nano/gpt2", "--beams", 2, "--prompt", text)
    assert capsys.readouterr().out.strip() == answer


def test_help_is_of_what_evaluation_heeds(capsys):
    with pytest.raises(SystemExit) as end:
        call(evaluation, "--help")
    said = capsys.readouterr().out
    flags = {*re.findall(r"^  (--[\w-]+)", said, re.M)}
    assert end.value.code == 0 and {"--beams", "--precision", "--prompt", "--data"} < flags
    assert not {"--lr", "--fresh", "--compare", "--init-from", "--alpha"} & flags
    for flag in flags - {"--help", "--prompt", "--predictions", "--references", "--json"}:
        assert flag[2:].replace("-", "_") in {
            *SEARCH,
            *OF_EVALUATION,
            *"model task out seeds device max_length".split(),
        }


@pytest.mark.parametrize("flag", ["--beams 3", "--test-limit 3", "--max-new-tokens 9"])
def test_a_classifier_is_not_scored_with_what_is_of_texts(flag, tmp_path, failure):
    run_main(COLA, "--no-molex", f"--out {tmp_path}")
    for what in (tmp_path / "nano-roberta-cola-lora-s0", "nano/roberta"):
        error = failure(call, evaluation, what, "--task", "cola", *flag.split())
        assert f"{flag.split()[0]} changes nothing here" in error and "--dev-limit" in error


def test_e2e_is_not_scored_on_the_dev_set(run, failure):
    for what in (run, "nano/gpt2"):
        error = failure(call, evaluation, what, "--dev-limit", 4)
        assert "--dev-limit changes nothing here" in error and "--test-limit" in error


def test_what_another_evaluation_notes_is_its_own(tmp_path):
    run_main(COLA, "--no-molex", f"--out {tmp_path}")
    run = tmp_path / "nano-roberta-cola-lora-s0"
    call(evaluation, run, "--dev-limit", 20)
    of_run, other = (
        json.loads((p / "scores.json").read_text()) for p in (run, run / "dev-limit-20")
    )
    assert of_run["examples"] == dict(train=32, dev=10) and "examples" not in other


def test_a_pipe_that_is_not_our_outputs_is_no_quiet_end():
    def main():
        raise BrokenPipeError("of another process")

    with pytest.raises(BrokenPipeError, match="of another process"):
        command_line(main)


def test_output_that_is_no_longer_read_is_no_error():
    command = "python eval.py nano/gpt2 --beams 1 --max-new-tokens 1 --prompt name[A] | true"
    path = dict(os.environ, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=path, cwd=ROOT)
    assert done.stderr == ""


def test_a_prompt_is_answered_in_the_precision_asked_for(run, monkeypatch):
    seen = []
    monkeypatch.setattr(
        evaluation, "generate", lambda model, *_, **__: seen.append(model.bf16) or [""]
    )
    for what in (run, "nano/gpt2"):
        for precision in ("bf16", "float32"):
            call(evaluation, what, "--prompt", "name[A]", "--precision", precision)
    assert seen == [True, False] * 2


@pytest.mark.parametrize(
    "flags",
    ["--test-limit 1", "--data x", "--eval-batch 2", "--seeds 5", "--out x", "--resume"]
    + ["--max-length 5", "--init-from x", "--compare"],
)
def test_what_changes_nothing_of_an_answer_is_refused(run, flags, failure):
    for what in (run, "nano/gpt2"):
        error = failure(call, evaluation, what, "--prompt", "name[A]", *flags.split())
        assert f"{flags.split()[0]} changes nothing of an answer; a prompt can come with" in error


def test_a_prompt_has_no_scores(run, failure):
    error = failure(call, evaluation, run, "--prompt", "name[A]", "--json")
    assert "--json prints scores, of which a prompt has none" in error


@pytest.mark.parametrize("flag", ["--compare", "--resume", "--fresh"])
def test_a_model_is_not_evaluated_with_what_is_about_runs(flag, failure):
    assert f"{flag} changes nothing here" in failure(call, evaluation, "nano/gpt2", flag)


@pytest.mark.parametrize(
    "flags",
    ["--lr 1", "--data x", "--model nano/gpt2", "--beams 2", "--seeds 1", "--no-molex", "nano/gpt2"]
    + ["--device cpu", ("--prompt", "")],
)
def test_predictions_are_scored_alone(flags, tmp_path, failure):
    (tmp_path / "a.txt").write_text("one\n", encoding="utf-8")
    files = ["--predictions", tmp_path / "a.txt", "--references", tmp_path / "a.txt"]
    flags = flags.split() if isinstance(flags, str) else flags
    error = failure(call, evaluation, *files, *flags)
    assert "give --predictions FILE and --references FILE, and nothing else" in error


def test_two_models_are_one_too_many(failure):
    error = failure(call, evaluation, "nano/gpt2", "--model", "gpt2")
    assert "give one model, nano/gpt2 or --model gpt2" in error


@pytest.mark.parametrize("flags", [["--task", "glue"], ["--task", "cola", "--seeds", "0", "1"]])
def test_a_model_is_evaluated_on_one_task(flags, failure):
    assert "give one --task" in failure(call, evaluation, "nano/roberta", *flags)


def test_a_classifier_answers_no_text(failure):
    flags = ["nano/roberta", "--task", "cola", "--prompt", "x"]
    assert "a classifier answers no --prompt" in failure(call, evaluation, *flags)


def test_a_run_with_other_data(run, tmp_path, capsys):
    splits = {"trainset.csv": "train", "devset.csv": "dev", "testset_w_refs.csv": "dev"}
    for name, split in splits.items():
        lines = [f'"{mr}","{ref}"' for mr, ref in read_e2e("nano/e2e", split)[:9]]
        (tmp_path / name).write_text("\n".join(["mr,ref", *lines]) + "\n")
    call(evaluation, run, "--data", tmp_path)
    assert "with other settings than the run's" in capsys.readouterr().out


def test_a_model_before_fine_tuning(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    call(evaluation, "nano/gpt2", "--test-limit", "2", "--max-new-tokens", "6", "--beams", "2")
    said = capsys.readouterr().out
    assert "output:" in said and "BLEU" in said
    (folder,) = (tmp_path / "runs").iterdir()
    assert len((folder / "predictions.tsv").read_text().splitlines()) == 3
    call(evaluation, "nano/roberta", "--task", "cola", "--dev-limit", "12")
    assert "CoLA matthews" in capsys.readouterr().out


def test_an_answer_to_a_text(run, capsys):
    call(evaluation, run, "--prompt", "name : Ember Hall | food : Thai")
    assert len(capsys.readouterr().out.split()) > 2


def test_scores_are_in_the_units_of_the_table(run, capsys):
    call(evaluation, run)
    said = capsys.readouterr().out.split()
    scores = evaluation.RunFolder(run).read_scores(["bleu"])
    assert said[said.index("BLEU") + 1] == f"{100 * scores['bleu']:.2f}"


@pytest.mark.parametrize("flags", [["--predictions", "x"], ["run", "--predictions", "x",
                                   "--references", "y"]])  # fmt: skip
def test_outputs_are_scored_alone(flags, failure):
    assert "and nothing else" in failure(call, evaluation, *flags)
