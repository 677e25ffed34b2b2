"""experiments/table13_lm_eval.py against the harness's own Hugging Face model.

    pip install -r requirements-dev.txt -r requirements-lm-eval.txt

Without lm_eval all but the first test skip.
"""

import json
import random
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import printed_by
from safetensors.torch import save_file
from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import train
from data import group_references, read_e2e
from eval import build, load_run
from experiments import table13_lm_eval as table13
from support.files import InputError

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
NANO = ROOT / "nano" / "gpt2"
needs_harness = pytest.mark.skipif(
    table13.MISSING is not None, reason="needs lm_eval: pip install -r requirements-lm-eval.txt"
)


def test_says_how_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # what is not installed cannot be imported
    monkeypatch.setattr(sys, "argv", ["table13_lm_eval.py"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(table13.__file__, run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "pip install -r requirements-lm-eval.txt" in error


# -------------------------------------------------------------- against the harness's own HF model


def instances(kind: str, arguments: list[tuple]) -> list:
    return [
        table13.Instance(request_type=kind, doc={}, arguments=a, idx=i)
        for i, a in enumerate(arguments)
    ]


def with_tokenizer(source: Path, folder: Path, digits: bool, leading: bool) -> Path:
    """A copy of a checkpoint of vocab.json and merges.txt with the tokenizer.json that transformers
    wants: words cut as GPT-2 does, or with all digits apart; with the bos token first, or not."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(source / name)
    bpe = BPE(models.BPE.from_file(str(source / "vocab.json"), str(source / "merges.txt")))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    apart = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([apart, words]) if digits else words
    bpe.decoder = decoders.ByteLevel()
    config = json.loads((source / "config.json").read_text())
    bos, eos = (bpe.id_to_token(config[f"{name}_token_id"]) for name in ("bos", "eos"))
    if leading:  # as in Llama 3's, where a second step does nothing here
        template = processors.TemplateProcessing(
            f"{bos} $A", special_tokens=[(bos, config["bos_token_id"])]
        )
        bpe.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=False), template]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos)
    tokenizer.save_pretrained(folder)
    return folder


def pair(folder: Path) -> tuple:
    """Our model and the harness's own over one folder."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    theirs = huggingface.HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=8)
    return table13.HarnessModel(str(folder), CPU), theirs


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "leading bos"])
def nano(request, tmp_path_factory) -> tuple:
    folder = tmp_path_factory.mktemp("nano") / "gpt2"
    return pair(with_tokenizer(NANO, folder, digits=False, leading=request.param))


ODD = [
    "Café Sicilia, naïve €5 🍕👩‍👩‍👧 e\u0301 中文 हिन्दी \u00a0½ ² ٣٤",
    "def f(x):\n\tif x >= 10:\n        return x ** 2  # 1234567 at 9.30pm",
    "It's we'LL they've I'd; don't,   two  spaces \n\n\n and lines ...",
]
KNOWN = [
    ("1, 2, 3, 4, 5, 6, 7, 8,", " 9"),
    ("The capital of France is", " Paris"),
    ("a b c d e f", " g"),
    ("Monday, Tuesday,", " Wednesday"),
]


def mixed_requests(count: int) -> list[tuple[str, str]]:
    """(context, continuation) pairs of every kind that the harness may send.

    Numbered, so that no text comes up twice, cut at different places: with its cache of logits, the
    Hugging Face model of lm_eval 0.4.13 then reads one's log-likelihoods at the other's places.
    """
    rng = random.Random(0)
    sentences = [ref for _, ref in read_e2e(Path("nano/e2e"), "test")]
    requests = list(KNOWN)
    while len(requests) < count:
        words = rng.choice(sentences).split()[:12]
        half = rng.randrange(1, len(words))
        first, rest = " ".join(words[:half]), " ".join(words[half:])
        odd = rng.choice(ODD)
        cut = rng.randrange(1, len(odd) - 8)  # also within a word, between a letter and its accent
        kinds = [
            (first, " " + rest),
            (first + "  ", rest),  # trailing spaces
            (first + "\n\n", rest),
            (words[0], " " + " ".join(words[1:] + odd.split()[:4])),  # a long continuation
            (odd[:cut], odd[cut:]),
        ]
        n = len(requests)
        requests += [(f"{n + k}. {context}", rest) for k, (context, rest) in enumerate(kinds)]
        requests += [("", f"{n + 5}. {first}")]  # no context
        requests += [(f"{n + 6}. {first}?\nAnswer:", f" {letter}") for letter in "ABCD"]
    return requests[:count]


def compare(ours, theirs, requests: list[tuple[str, str]]) -> float:
    """The largest difference between log-likelihoods; what is greedy has to be equal."""
    batch = instances("loglikelihood", requests)
    a, b = (model.loglikelihood(batch, disable_tqdm=True) for model in (ours, theirs))
    assert [greedy for _, greedy in a] == [greedy for _, greedy in b]
    assert {greedy for _, greedy in a} == {False, True}
    return max(abs(x - y) for (x, _), (y, _) in zip(a, b, strict=True))


@needs_harness
def test_smollm2_equals_hugging_face(smollm2, tmp_path):
    ours, theirs = pair(with_tokenizer(smollm2, tmp_path / "smollm2", digits=True, leading=False))
    assert compare(ours, theirs, mixed_requests(240)) < 1e-3


@needs_harness
def test_nano_equals_hugging_face(nano):
    """Also where the context is cut from the left, or the continuation fills the model."""
    ours, theirs = nano
    text = " ".join(ref for _, ref in read_e2e(Path("nano/e2e"), "test")[:30])
    ids = ours.tokenizer.encode(text)
    assert len(ids) > 2 * ours.limit
    full = ours.tokenizer.decode(ids[1 : ours.limit + 1])
    long = [(text, " The"), (text, " It is a pub."), (text[:40], full), (text, full)]
    assert len(ours._encode_pair(text, full)[1]) == ours.limit
    begun = text[-400:-30]
    asked = instances("generate_until", [(begun, {"max_gen_toks": 3, "until": []})])
    likely = theirs.generate_until(asked, disable_tqdm=True)[0]
    requests = [*mixed_requests(80), *long, (begun, likely), (begun, " the"), (begun, " pub")]
    assert compare(ours, theirs, requests) < 1e-3


@needs_harness
def test_rolling_equals_hugging_face(nano):
    ours, theirs = nano
    refs = [ref for _, ref in read_e2e(Path("nano/e2e"), "test")]
    texts = [(refs[0],), (" ".join(refs[:30]),), (ODD[0],), (" ".join(refs[30:70]),)]
    assert len(ours.tok_encode(texts[3][0])) > 2 * ours.limit  # three windows
    batch = instances("loglikelihood_rolling", texts)
    a, b = (model.loglikelihood_rolling(batch, disable_tqdm=True) for model in nano)
    assert a == pytest.approx(b, abs=1e-2, rel=1e-6)


@needs_harness
def test_generation_equals_hugging_face(nano):
    refs = [ref for _, ref in read_e2e(Path("nano/e2e"), "test")]
    contexts = [refs[0], refs[5][:30], ODD[0], "The pub", " ".join(refs[:30])]
    requests = [(c, {"max_gen_toks": 32, "do_sample": False, "until": []}) for c in contexts]
    requests += [(c, {"max_gen_toks": 20, "until": [" the", "."]}) for c in contexts]
    batch = instances("generate_until", requests)
    ours, theirs = (model.generate_until(batch, disable_tqdm=True) for model in nano)
    assert ours == theirs
    assert all(" the" not in text and "." not in text for text in ours[5:])
    assert any(len(cut) < len(text) for text, cut in zip(ours[:5], ours[5:], strict=True))


# ------------------------------------------------------------------------------------------- MoLEx


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with batch routing whose LoRA and gate are random, so that both matter."""
    folder = tmp_path_factory.mktemp("run")
    s = train.parse(["--model", "nano/gpt2"])[1][0]
    assert s.molex.route == "batch"
    (folder / "config.json").write_text(json.dumps(s.as_json()))
    model, _ = build(s, CPU)
    torch.manual_seed(0)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    save_file(
        {n: 0.1 * torch.randn_like(p) for n, p in trained.items()}, folder / "adapter.safetensors"
    )
    return folder


@needs_harness
def test_molex_request_is_scored_as_if_alone(run):
    """A batch of 16 gives what the run, with its batch routing and LoRA as it is, gives to each
    request alone when its context votes."""
    text = "The Velvet Pear is an Italian pub in the city centre."
    requests = mixed_requests(60) + [(text[:k], text[k:]) for k in (3, 15, 26)]
    model, _, _ = load_run(run, CPU)
    ours = table13.HarnessModel(str(run), CPU, batch_size=16)
    found = ours.loglikelihood(instances("loglikelihood", requests), disable_tqdm=True)
    for (context, continuation), (total, greedy) in zip(requests, found, strict=True):
        c, answer = [0], ours.tok_encode(continuation)
        if context:
            c, answer = ours._encode_pair(context, continuation)
        ids = torch.tensor([c + answer])
        with torch.no_grad():
            logits = model(ids, prompt=torch.arange(ids.shape[1])[None] < len(c))
        log_p = logits[0, len(c) - 1 : -1].log_softmax(-1)
        assert total == pytest.approx(log_p[range(len(answer)), answer].sum().item(), abs=1e-3)
        assert greedy == (log_p.argmax(-1).tolist() == answer)
    assert (
        (model.layers.routes.counts > 0).sum(1) > 1
    ).any()  # the requests did not all route alike


# ------------------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def manager():
    """The harness's list of tasks, which takes seconds to read."""
    return table13.TaskManager()


@pytest.fixture
def call(manager, monkeypatch):
    """call(*flags): the table that the script prints, as rows of cells."""
    monkeypatch.setattr(table13, "TaskManager", lambda: manager)
    return lambda *flags: [line.split() for line in printed_by(table13, *flags)]


@needs_harness
def test_small_form(call):
    _, row = call()
    assert row[:2] == ["e2e_choice", "nano/gpt2"] and row[-2:] == ["-", "-"]
    questions = table13.e2e_choice()["test"]
    _, groups = group_references(read_e2e(Path("nano/e2e"), "test"))
    for question, group in zip(questions, groups, strict=True):
        assert question["choices"][question["answer"]] == group[1]
        assert not {*question["choices"]} & {group[0]} and len({*question["choices"]}) == 4
    # what the harness counts, counted by hand
    model, right = table13.HarnessModel("nano/gpt2", CPU), [0, 0]
    for q in questions:
        asked = [(q["text"], " " + choice) for choice in q["choices"]]
        found = model.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
        plain = [total for total, _ in found]
        normed = [x / len(choice) for x, choice in zip(plain, q["choices"], strict=True)]
        for k, scores in enumerate((plain, normed)):
            right[k] += max(range(4), key=scores.__getitem__) == q["answer"]
    assert [row[2], row[4]] == [f"{100 * n / len(questions):.2f}" for n in right]
    assert float(row[2]) > 45  # chance is 25


@needs_harness
def test_group_is_one_row(call, manager, monkeypatch, tmp_path):
    """As MMLU, a group of 57 tasks, and AGIEval English, where one asks for written answers."""
    _, alone = call("--limit", "8")
    choose = {k: v for k, v in table13.E2E_CHOICE.items() if k not in ("custom_dataset", "task")}
    files = dict(data_files={"test": str(tmp_path / "test.jsonl")}, cache_dir=str(tmp_path / "c"))
    choose |= dict(validation_split=None, dataset_path="json", dataset_kwargs=files)
    write = {k: v for k, v in choose.items() if k != "doc_to_choice"} | dict(
        output_type="generate_until",
        generation_kwargs={"max_gen_toks": 4, "until": ["."]},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    aggregate = [{"metric": "acc", "weight_by_size": True}]
    configs = [
        dict(group="both", task=["choose", "write"], aggregate_metric_list=aggregate),
        dict(task="choose", **choose),
        dict(task="write", **write),
    ]
    for i, config in enumerate(configs):  # YAML includes JSON
        (tmp_path / f"{i}.yaml").write_text(json.dumps(config))
    table13.e2e_choice()["test"].to_json(tmp_path / "test.jsonl")
    own = type(manager)(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(table13, "TaskManager", lambda: own)
    _, row = call("nano/gpt2", "--tasks", "both", "--limit", "8")
    assert row == ["both", *alone[1:4], "-", "-", "-"]


@needs_harness
def test_papers_numbers_stand_beside_ours(run, call, monkeypatch):
    names = ("acc,none", "acc_stderr,none", "acc_norm,none")
    asked = {}

    def harness(model, tasks, **settings):  # its data sets are on the hub
        asked.update(tasks=tasks, **settings)
        assert type(model.model.layers).__name__ == "MoLEx"
        return {"results": {t: dict(zip(names, (0.3, 0.01, 0.4), strict=True)) for t in tasks}}

    monkeypatch.setattr(table13, "simple_evaluate", harness)
    rows = call(str(run), "--limit", "7")
    assert asked["tasks"] == ["mmlu", "agieval_en", "hellaswag", "arc_challenge"]
    assert (asked["limit"], asked["num_fewshot"]) == (7, None)
    ours = [str(run), "30.00", "1.00", "40.00"]
    assert rows[1:] == [
        ["mmlu", *ours, "30.42", "31.51"],
        ["agieval_en", *ours, "19.16", "19.81"],
        ["hellaswag", *ours, "47.14", "48.23"],
        ["arc_challenge", *ours, "36.69", "37.80"],
    ]


@needs_harness
@pytest.mark.parametrize(
    "argv, message",
    [
        ("--tasks hellaswag hellasmag", "the harness has no task hellasmag"),
        ("--tasks ai2_arc", "the harness has no task ai2_arc"),  # a tag: it has no score of its own
        ("--limit 0", "--limit: 0 is less than 1"),
        ("--num-fewshot -1", "--num-fewshot: -1 is less than 0"),
        ("--batch-size 0", "--batch-size: 0 is less than 1"),
        ("--device nowhere", "--device nowhere cannot be used"),
        ("nano/roberta --tasks e2e_choice", "does not predict the next token"),
    ],
)
def test_bad_input(call, argv, message):
    with pytest.raises(InputError, match=message):
        call(*argv.split())


@needs_harness
def test_data_that_cannot_be_fetched(call, monkeypatch):
    def harness(*_, **__):
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(table13, "simple_evaluate", harness)
    with pytest.raises(InputError, match="data cannot be fetched: Couldn't reach the hub$"):
        call("nano/gpt2")


@needs_harness
@pytest.mark.parametrize(
    "kind, arguments, message",
    [
        ("loglikelihood", ("  ", "x"), "needs a context"),
        ("loglikelihood", ("a", "word " * 300), "a continuation of 1 to 256"),
        ("generate_until", ("a", {"do_sample": True, "temperature": 1.0}), "only greedy"),
        ("generate_until", ("a", {"max_gen_toks": 256}), "within 256 tokens"),
    ],
)
def test_requests_that_cannot_be_met(kind, arguments, message):
    model = table13.HarnessModel("nano/gpt2", CPU)
    with pytest.raises(InputError, match=message):
        getattr(model, kind)(instances(kind, [arguments]), disable_tqdm=True)
