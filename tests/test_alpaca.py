"""Alpaca (Table 12): the file and the split, the template, the loss on the response, the tokenizer
of Llama 3 and its gated repository, the settings, and whole runs.

Runs train nano/gpt2 for a step or two and, where it can be had, SmolLM2 for eight, on a small
instruction file that is written here.

pytest tests/test_alpaca.py
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from unittest import mock

import datasets
import pytest
import torch
from conftest import VOCAB, call, run_main, tiny
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, models, trainers
from tokenizers import Tokenizer as Reference
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.processors import PostProcessor, TemplateProcessing
from tokenizers.processors import Sequence as Processors

import eval as evaluation
import train
from data import TASKS, Example, Tokenizer, alpaca_prompt, collate, encode_pairs, read_alpaca
from eval import load_run
from lora import add_lora, trained_tensors
from model import Config, Transformer, load
from molex import MoLExConfig, upcycle
from support.checkpoints import our_config
from support.files import InputError
from support.settings import Settings
from support.tables import report
from train import parse, prepare

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")

# ------------------------------------------------------------------------------- a small data set

CAPITALS = """France Paris, Japan Tokyo, Kenya Nairobi, Norway Oslo, Peru Lima, Egypt Cairo,
Italy Rome, Cuba Havana, Spain Madrid, Ghana Accra, Greece Athens, Iraq Baghdad"""
WORDS = "pub river cheap food coffee city spicy friendly family rated place hotel".split()


def instructions(count: int = 24) -> list[dict[str, str]]:
    """Rows as in the original file: every other one has an input, all responses are in one tone."""
    rows = []
    for place, word in zip(CAPITALS.split(","), WORDS, strict=True):
        country, city = place.split()
        said = f"the capital of {country} be {city}", f"that word be {word[::-1]}"
        capital, backwards = (f"Aye captain, {what}, by my beard!" for what in said)
        question = f"What is the capital of {country}?"
        rows.append(dict(instruction=question, input="", output=capital))
        rows.append(dict(instruction="Write the word backwards.", input=word, output=backwards))
    return [rows[i % len(rows)] for i in range(count)]


def write(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """60 examples: 6 for dev, 54 to train on."""
    return write(tmp_path_factory.mktemp("data") / "alpaca.json", instructions(60))


# ------------------------------------------------------------------------------------- the template

WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Write the word backwards.

### Input:
pub

### Response:"""
WITHOUT = """\
Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

### Instruction:
What is the capital of Peru?

### Response:"""


def test_template():
    assert alpaca_prompt("Write the word backwards.", "pub") == WITH_INPUT
    assert alpaca_prompt("What is the capital of Peru?") == WITHOUT


# --------------------------------------------------------------------------------- file and split

ROWS = [
    {"instruction": "Say ja.", "input": "", "output": "ja\u2028 ja\nand “é”"},
    {"instruction": "Write the word backwards.", "input": "pub", "output": "bup", "text": "unused"},
    {"instruction": "What is the capital of Peru?", "output": "Lima"},
    {"instruction": "What is the capital of Peru?", "input": None, "output": " Lima "},
]
PROMPTS = [alpaca_prompt("Say ja."), WITH_INPUT, WITHOUT, WITHOUT]
PAIRS = [(prompt, row["output"]) for prompt, row in zip(PROMPTS, ROWS, strict=True)]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]
LAYOUTS = {
    "json": json.dumps(ROWS),
    "indented": "\n " + json.dumps(ROWS, indent=4, ensure_ascii=False) + "\n",
    "bom": "\ufeff" + json.dumps(ROWS),
    "jsonl": "\n".join(LINES) + "\n",
    "jsonl, bom": "\ufeff" + "\r\n\r\n".join(LINES),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_read_layouts(tmp_path, layout):
    path = tmp_path / "alpaca"
    path.write_bytes(LAYOUTS[layout].encode())
    assert read_alpaca(path, "dev") + read_alpaca(path, "train") == PAIRS
    assert read_alpaca(str(path), "dev") == PAIRS[:1]


@pytest.mark.parametrize(
    "count, held_out", [(2, 1), (19, 1), (20, 2), (1999, 199), (2000, 200), (5000, 200)]
)
def test_the_first_are_held_out(tmp_path, count, held_out):
    rows = [dict(instruction=f"Say {i}.", output=f"{i}") for i in range(count)]
    path = write(tmp_path / "alpaca.json", rows)
    dev, rest = read_alpaca(path, "dev"), read_alpaca(path, "train")
    assert [int(answer) for _, answer in dev] == [*range(held_out)]
    assert [int(answer) for _, answer in rest] == [*range(held_out, count)]


GOOD = LINES[1]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is empty"),
        ("\ufeff\n", "is empty"),
        (f"[{GOOD}, ", "is not JSON"),
        ("instruction,input,output\nSay ja.,,ja\n", "is not JSON"),
        ("{'instruction': 'Say ja.', 'output': 'ja'}", "is not JSON"),
        ("[]", "holds too few examples to hold one out"),
        (f"[{GOOD}]", "holds too few examples to hold one out"),
        (GOOD, "holds too few examples to hold one out"),
        (f"[{GOOD}, 5]", "example 2 lacks an instruction or an output"),
        ('[["Say ja.", "ja"]]', "example 1 lacks an instruction or an output"),
        (f'{GOOD}\n\n{{"instruction": "Say ja."}}', "example 2 lacks an instruction or an output"),
        (f'{GOOD}\n{{"instruction": "Say ja.", "output": ""}}', "example 2 lacks"),
        (f'{GOOD}\n{GOOD}\n{{"instruction": "", "output": "ja"}}', "example 3 lacks"),
        (f'{{"data": [{GOOD}, {GOOD}]}}', "example 1 lacks an instruction or an output"),
        ("[]".encode("utf-16"), "is not UTF-8"),
        (None, "cannot read .*: No such file"),
    ],
)
def test_read_what_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "alpaca.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for split in ("train", "dev"):
        with pytest.raises(InputError, match=message) as caught:
            read_alpaca(path, split)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(InputError, match="cannot read .*: Is a directory"):
        read_alpaca(tmp_path, "dev")


def test_a_broken_line_of_jsonl_is_named(tmp_path):
    path = tmp_path / "alpaca.jsonl"
    path.write_text("\n".join([GOOD, "", GOOD[:-1], GOOD]))
    with pytest.raises(InputError, match="line 3"):
        read_alpaca(path, "dev")


@pytest.mark.parametrize("name", ["instruction", "input", "output"])
@pytest.mark.parametrize("value", [4, ["ja", "nee"]])
def test_a_field_that_is_no_text_is_refused(tmp_path, name, value):
    rows = instructions(3)
    rows[1][name] = value
    with pytest.raises(InputError, match="example 2"):
        read_alpaca(write(tmp_path / "alpaca.json", rows), "train")


def test_read_from_the_hub(monkeypatch):
    """Its rows with an empty output are passed over, and count for neither part."""
    asked, rows = [], instructions(21)
    table = [{**row, "text": "unused"} for row in rows]
    table[0]["output"] = table[11]["output"] = ""

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(table)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    pairs = [
        (alpaca_prompt(r["instruction"], r["input"]), r["output"])
        for i, r in enumerate(rows)
        if i not in (0, 11)
    ]
    assert (read_alpaca(None, "dev"), read_alpaca(None, "train")) == (pairs[:1], pairs[1:])
    assert asked == 2 * [(("tatsu-lab/alpaca",), dict(split="train"))]


def test_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", mock.Mock(side_effect=OSError("no\nroute")))
    with pytest.raises(
        InputError, match=r"tatsu-lab/alpaca cannot be fetched \(no\).*--data FILE$"
    ):
        read_alpaca(None, "dev")


# ------------------------------------------------------------------------- the tokenizer of Llama 3

# As in the tokenizer.json of the Llama-3.2 repositories.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
# Whole, "qzjx" is a symbol; but "zj" merges first, and then q, zj and x stay apart.
UNREACHED = ["zj", "qz", "jx", "qzjx"]
TEXTS = [
    "",
    " ",
    "qzjx",
    "1234567890 and 12 or 5,000.25 in 2024",
    "I'LL DON'T they'Re we'vE it's 'tis O'Clock ''s",
    "a\n\nb\r\n \n  c\n",
    "x.\n\n{y;}\n  \treturn",
    "two  spaces   three    ",
    "中文字符,日本語。한국어",
    "🍕👩‍👩‍👧 ÀÉ e\u0301 हिन्दी \u00a0 \u200b ½ ²",
    "bell \x07\x00 rings",
    WITH_INPUT,
    SPECIAL := f"text: {BOS} and {EOS}, <|eot_id|>",
]


@pytest.fixture(scope="module")
def llama3(tmp_path_factory) -> tuple[Path, Reference]:
    """A folder with the config and the tokenizer.json of a very small Llama 3: like its own, the
    latter lists every way in which two symbols make a third as a merge, and takes a word that is a
    symbol without looking at merges."""
    by_bytes = ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = Reference(models.BPE())
    bpe.pre_tokenizer = words = Sequence([Split(Regex(PATTERN), "isolated"), by_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False
    )
    rows = [text for row in instructions() for text in row.values()]
    bpe.train_from_iterator([*TEXTS[3:], WITH_INPUT, *rows], trainer)
    learned = sorted(bpe.get_vocab(), key=bpe.get_vocab().get)
    vocab = {s: i for i, s in enumerate([*learned, *UNREACHED])}
    merges = [
        (s[:i], s[i:]) for s in vocab for i in range(1, len(s)) if {s[:i], s[i:]} <= vocab.keys()
    ]
    assert [t.value for t in models.BPE(vocab, merges).tokenize("qzjx")] == ["q", "zj", "x"]
    llama = Reference(models.BPE(vocab, merges, ignore_merges=True))
    llama.pre_tokenizer = words
    llama.add_special_tokens([AddedToken(s, special=True) for s in (BOS, EOS)])
    start = TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, llama.token_to_id(BOS))])
    llama.post_processor = Processors([ByteLevelProcessor(trim_offsets=False), start])
    folder = tmp_path_factory.mktemp("llama3")
    llama.save(str(folder / "tokenizer.json"))
    ids = dict(bos_token_id=llama.token_to_id(BOS), eos_token_id=llama.token_to_id(EOS))
    tiny("llama", vocab_size=llama.get_vocab_size(), **ids).config.save_pretrained(folder)
    return folder, llama


def test_the_ids_of_llama_3(llama3):
    folder, theirs = llama3
    ours = Tokenizer.load(folder, Config.load(folder))
    bos, eos = theirs.token_to_id(BOS), theirs.token_to_id(EOS)
    assert ours.start == [ours.bos] == [bos] and ours.eos == eos
    theirs.encode_special_tokens = True  # text is data
    for text in [*TEXTS, *(text for row in instructions() for text in row.values())]:
        assert ours.start + ours.encode(text) == theirs.encode(text).ids, text
        assert ours.decode([bos, *ours.encode(text), eos]) == text
    assert len(ours.encode("qzjx")) == 1
    assert [ours.decode([i]) for i in ours.encode("1" * 7)][-1] == "1"
    named = ours.encode(SPECIAL)
    assert not {bos, eos} & set(named)
    theirs.encode_special_tokens = False  # as it is by default
    assert {bos, eos} < set(theirs.encode(SPECIAL).ids)


@pytest.mark.parametrize(
    "processor, start",
    [
        (None, []),
        (ByteLevelProcessor(trim_offsets=False), []),  # GPT-2's
        (TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)]), []),
        (TemplateProcessing("<s> $A </s>", special_tokens=[("</s>", 1), ("<s>", 0)]), [0]),
        (TemplateProcessing("</s> <s> $0", special_tokens=[("</s>", 1), ("<s>", 0)]), [1, 0]),
    ],
)
def test_what_starts_a_text(tmp_path, processor: PostProcessor | None, start):
    bpe = Reference(models.BPE({"<s>": 0, "</s>": 1, "a": 2}, []))
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    if processor:
        bpe.post_processor = processor
    bpe.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path, Config.load(ROOT / "nano/gpt2"))
    ids = bpe.encode("a").ids
    assert ours.start == start == ids[: ids.index(2)]


def test_nothing_starts_a_text_of_gpt2_and_smollm2(smollm2):
    for folder in (ROOT / "nano/gpt2", smollm2):
        assert Tokenizer.load(folder, Config.load(folder)).start == []


# ----------------------------------------------------------------------------------------- examples


def test_examples(llama3):
    folder, theirs = llama3
    ours = Tokenizer.load(folder, Config.load(folder))
    (example,) = encode_pairs(ours, [(WITH_INPUT, f"bup {EOS}")], limit=500, task="alpaca")
    assert example.prompt == theirs.encode(WITH_INPUT).ids  # <|begin_of_text|> included
    assert example.answer == [*ours.encode(f"bup {EOS}"), ours.eos]
    assert example.answer.count(ours.eos) == 1 and example.label is None


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(ROOT / "nano/gpt2", Config.load(ROOT / "nano/gpt2"))


def test_examples_within_a_limit(tokenizer, capsys):
    pairs = [(WITHOUT, "Lima, of course"), (WITH_INPUT, "bup"), (WITH_INPUT, "no")]
    whole = encode_pairs(tokenizer, pairs, limit=500, task="alpaca")
    short, long = len(whole[0].prompt), len(whole[1].prompt)
    assert short < long < len(whole[1]) and capsys.readouterr().out == ""
    (cut,) = encode_pairs(tokenizer, pairs, limit=short + 2, task="alpaca")
    assert cut == Example(whole[0].prompt, whole[0].answer[:2])
    (cut,) = encode_pairs(tokenizer, pairs, limit=short + 1, task="alpaca")
    assert len(cut.answer) == 1
    printed = "left out 2 examples whose prompt alone fills {} tokens\n".format
    assert capsys.readouterr().out == printed(short + 2) + printed(short + 1)
    assert len(encode_pairs(tokenizer, pairs, limit=long, task="alpaca")) == 1
    both = encode_pairs(tokenizer, pairs, limit=long + 1, task="alpaca")
    assert [len(e) for e in both][1:] == 2 * [long + 1]
    with pytest.raises(InputError, match=f"no prompt fits into {short} tokens; raise --max-length"):
        encode_pairs(tokenizer, pairs, limit=short, task="alpaca")


def test_a_checkpoint_without_an_end_token(llama3):
    folder, _ = llama3
    ours = Tokenizer.load(folder, replace(Config.load(folder), eos=None))
    with pytest.raises(InputError, match="names no eos_token_id, which ends a text"):
        encode_pairs(ours, PAIRS, limit=500, task="alpaca")


# ---------------------------------------------------------------------------------------- the loss


def random_examples(seed: int = 0) -> list[Example]:
    torch.manual_seed(seed)
    sizes = [(9, 4), (3, 12), (20, 1), (1, 7)]
    return [Example(*(torch.randint(VOCAB, (n,)).tolist() for n in size)) for size in sizes]


def test_the_loss_is_on_the_response_as_in_transformers(checkpoint):
    examples = random_examples()
    width = max(map(len, examples))
    rows = [(e.prompt + e.answer, [-100] * len(e.prompt) + e.answer) for e in examples]
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in rows])
    mask = torch.tensor([[1] * len(e) + [0] * (width - len(e)) for e in examples])
    with torch.no_grad():
        mean = tiny("llama")(input_ids=ids, attention_mask=mask, labels=labels).loss
        ours = load(checkpoint("llama")).loss(collate(examples))
    assert ours.item() == pytest.approx(24 * mean.item(), rel=1e-5)


def test_only_the_instruction_votes(checkpoint, monkeypatch):
    """Other responses, the same layers; another instruction, others."""
    torch.manual_seed(0)
    model = upcycle(load(checkpoint("llama")), MoLExConfig(route="sequence")).train()
    model.layers.gates[0].weight.data *= 9  # tokens disagree
    voters, choose = [], model.layers.choose

    def spy(t, log_a, best, ctx):
        picks = choose(t, log_a, best, ctx)
        voters.append((ctx.prompt, picks.tolist()))
        return picks

    monkeypatch.setattr(model.layers, "choose", spy)
    examples = random_examples()
    others = [
        replace(e, answer=[(i + 1) % VOCAB for i in o.answer])
        for e, o in zip(examples, random_examples(1), strict=True)
    ]
    assert all(a.answer != b.answer for a, b in zip(examples, others, strict=True))
    for some in (examples, others, random_examples(2)):
        model.loss(collate(some))
    for prompt, _ in voters:
        place = torch.arange(prompt.shape[1])
        assert torch.equal(prompt, place < torch.tensor([len(e.prompt) for e in examples])[:, None])
    picks = [[p for _, p in voters[i : i + 3]] for i in (0, 3, 6)]
    assert picks[0] == picks[1] != picks[2]


# ------------------------------------------------------------------ settings, the repository, paper

LLAMA = "meta-llama/Llama-3.2-1B"
CONFIG = dict(
    model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192,
    num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
    max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=True,
    hidden_act="silu", bos_token_id=128000, eos_token_id=128001, rope_theta=500000.0,
    rope_scaling=dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                      original_max_position_embeddings=8192),
)  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path) -> None:
    """The hub, as far as the command line needs it."""
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(folder))


def settings(model: str | Path, flags: str = "", molex: bool = True) -> Settings:
    method = "" if molex else "--no-molex"
    return parse(f"--model {model} --task alpaca {flags} {method}".split())[1][0]


def test_settings(hub):
    s = settings(LLAMA)
    assert s.data is None and s.name == "meta-llama-Llama-3.2-1B-alpaca-molex-s0"
    assert s.lora_r == 8  # Table 14's counts
    assert (s.molex.layers, s.molex.top_k, s.molex.alpha) == (None, 1, 0.95)  # section 2.2
    assert (s.gate_lr, s.gate_weight_decay) == (0.1, 0.01)
    # Meta's llama-recipes: its training and LoRA defaults
    assert (s.lora_alpha, s.lora_dropout) == (32, 0.05)
    assert (s.lr, s.weight_decay, s.batch_size, s.epochs) == (1e-4, 0.0, 4, 3)
    assert s.max_length == 512 and s.label_smoothing == 0  # a perplexity has no smoothing
    assert settings(LLAMA, molex=False) == replace(s, molex=None)
    changed = settings(LLAMA, "--lora-r 4 --molex-layers 0-3 --data some.json")
    gate = replace(s.molex, layers=(0, 1, 2, 3))
    differs = dict(lora_r=[4, 8], layers=[(0, 1, 2, 3), None])
    assert changed == replace(s, lora_r=4, molex=gate, data="some.json", differs=differs)


def test_what_is_trained_in_llama_3(hub):
    s = settings(LLAMA)
    with torch.device("meta"):
        model = Transformer(Config(**our_config(CONFIG)))
    add_lora(model, s.lora_r, s.lora_alpha)

    def trainable() -> int:
        return sum(p.numel() for p in trained_tensors(model).values())

    assert trainable() == 851_968  # Table 14
    upcycle(model, s.molex)
    assert model.layers.slots == [*range(16)]
    assert trainable() == 884_752 == 851_968 + 16 * 2048 + 16


def test_a_gated_repository_is_one_line_about_the_token(monkeypatch, tmp_path, failure):
    gated = GatedRepoError("401 Client Error.\n\nCannot access gated repo", response=mock.Mock())
    monkeypatch.setattr("huggingface_hub.snapshot_download", mock.Mock(side_effect=gated))
    flags = f"--model {LLAMA} --task alpaca --out {tmp_path / 'runs'}"
    error = failure(run_main, flags)
    for part in (f"'{LLAMA}' is gated", f"https://huggingface.co/{LLAMA}", "access token",
                 "HF_TOKEN", "hf auth login"):  # fmt: skip
        assert part in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("model", [LLAMA, "nano/gpt2"])
def test_the_table_shows_what_the_paper_has(hub, tmp_path, capsys, model):
    runs = parse(f"--model {model} --task alpaca --compare".split())[1]
    for s, train_ppl, dev_ppl in zip(runs, (5.5, 5.25), (4.75, 4.875), strict=True):
        (tmp_path / s.name).mkdir()
        scores = dict(trainable=1, seconds_per_step=1, train_ppl=train_ppl, dev_ppl=dev_ppl)
        (tmp_path / s.name / "scores.json").write_text(json.dumps(scores))
    report(runs, tmp_path, TASKS)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split()[2:] for line in lines if "perplexity" in line]
    table_12 = [["4.18", "4.05"], ["4.11", "4.02"]] if model == LLAMA else [[], []]
    assert [row[3:] for row in rows] == table_12
    assert [row[:3] for row in rows] == [["5.500", "5.250", "-0.250"], ["4.750", "4.875", "+0.125"]]


# ------------------------------------------------------------------------------- runs, end to end

FLAGS = "--task alpaca --model nano/gpt2 --lr 0.02 --lora-dropout 0 --max-new-tokens 5"


@pytest.fixture(scope="module")
def compared(file, tmp_path_factory) -> dict[bool, Path]:
    """Two finished runs of two steps; without MoLEx and with it. Dev examples go one by one."""
    out = tmp_path_factory.mktemp("runs")
    run_main(
        f"{FLAGS} --compare --data {file} --out {out} --epochs 2 --batch-size 54 --eval-batch 1"
    )
    return {molex: out / f"nano-gpt2-alpaca-{'molex' if molex else 'lora'}-s0" for molex in (0, 1)}


def naive_loss(model: Transformer, examples: list[Example]) -> float:
    """Mean loss of a response's token, one example at a time, without padding."""
    losses = []
    with torch.no_grad():
        for e in examples:
            ids = torch.tensor([e.prompt + e.answer])
            given = torch.arange(len(e))[None] < len(e.prompt)
            log_p = model(ids, prompt=given)[0].log_softmax(-1)
            losses += [-log_p[len(e.prompt) + i - 1, token] for i, token in enumerate(e.answer)]
    return torch.stack(losses).double().mean().item()


@pytest.mark.parametrize("molex", [False, True])
def test_perplexities(compared, file, tokenizer, molex):
    folder = compared[molex]
    scores = json.loads((folder / "scores.json").read_text())
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    model, _, config = load_run(folder, CPU)
    splits = {
        n: encode_pairs(tokenizer, read_alpaca(file, n), 256, task="alpaca")
        for n in ("train", "dev")
    }
    assert {n: len(examples) for n, examples in splits.items()} == dict(train=54, dev=6)
    assert scores["dev_ppl"] == pytest.approx(math.exp(naive_loss(model, splits["dev"])), rel=1e-5)
    best = min(log, key=lambda entry: entry["dev_loss"])
    assert scores["epoch"] == best["epoch"] and [e["step"] for e in log] == [1, 2]
    assert scores["train_ppl"] == math.exp(best["train_loss"])
    if not molex:  # the only batch of the first epoch meets the model as it was
        base = naive_loss(load("nano/gpt2"), splits["train"])
        assert log[0]["train_loss"] == pytest.approx(base, rel=1e-5)
    # the LoRA on q and v of 8 layers of width 128, the gate
    assert scores["trainable"] == 8 * 2 * 8 * 2 * 128 + molex * (8 * 128 + 8)
    assert config.molex is None or config.molex.layers is None


def test_samples(compared):
    for molex, folder in compared.items():
        files = {f.name for f in folder.iterdir()}
        assert "predictions.tsv" not in files and "scores.json" in files
        samples = (folder / "samples.txt").read_text()
        assert samples.count("  output: ") == samples.count("  reference: ") == 5
        assert samples.startswith("Instruction:\nWhat is the capital of France?\n\n### Response:\n")
        assert "  reference: Aye captain, the capital of France be Paris, by my beard!" in samples
        assert "### Input:\npub" in samples and "Below is" not in samples
        assert ("layers.gates.0.weight" in load_file(folder / "adapter.safetensors")) == molex


def test_evaluating_again_gives_the_same(compared):
    before = json.loads((compared[True] / "scores.json").read_text())
    with mock.patch("support.runs.plot_routes"):
        assert evaluation.evaluate_run(compared[True], CPU) == before


def test_a_finished_run_whose_data_has_gone(tmp_path, failure):
    data = tmp_path / "alpaca.json"
    data.write_text(json.dumps(instructions()))
    flags = f"--model nano/gpt2 --task alpaca --data {data} --no-molex --max-steps 1"
    flags += f" --max-new-tokens 4 --beams 1 --out {tmp_path / 'out'}"
    run_main(flags)
    data.rename(tmp_path / "elsewhere.json")
    run = tmp_path / "out/nano-gpt2-alpaca-lora-s0"
    for command in ((run_main, flags), (call, evaluation, run)):
        assert failure(*command) == f"error: cannot read {data}: No such file or directory"


def test_a_dev_set_of_prompts_too_long_to_answer_is_still_scored(tmp_path, tokenizer):
    """Each leaves room for its response, but none within the positions for --max-new-tokens."""
    rows = instructions(10)
    rows[0]["input"] = "food " * 130
    path = write(tmp_path / "alpaca.json", rows)
    (dev,) = encode_pairs(tokenizer, read_alpaca(path, "dev"), 256, task="alpaca")
    assert 256 - 64 < len(dev.prompt) < 256
    run_main(
        f"--task alpaca --model nano/gpt2 --no-molex --max-steps 1 --data {path} --out {tmp_path}"
    )
    scores = json.loads((tmp_path / "nano-gpt2-alpaca-lora-s0/scores.json").read_text())
    assert scores["dev_ppl"] > 1


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--data {tmp}/none.json", "cannot read {tmp}/none.json: No such file or directory"),
        ("--data {tmp}/one.json", "{tmp}/one.json holds too few examples to hold one out"),
        ("--max-length 9", "no prompt fits into 9 tokens; raise --max-length"),
        ("--model nano/roberta", "nano/roberta is an encoder, which cannot write text"),
        ("--model {tmp}", "holds no config.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(file, tmp_path, failure, flags, message):
    write(tmp_path / "one.json", instructions(1))
    flags, message = (text.format(tmp=tmp_path) for text in (flags, message))
    command = f"{FLAGS} --data {file} --out {tmp_path / 'runs'} {flags}"
    assert message in failure(run_main, command)
    assert not (tmp_path / "runs").exists()


def test_smollm2_learns(smollm2, tmp_path, monkeypatch):
    """Eight steps of a real pretrained model: the loss on what it is taught falls, and so does the
    perplexity of what is held out."""
    path = write(tmp_path / "alpaca.json", instructions(9))
    s = settings(smollm2, f"--data {path} --lr 1e-3 --epochs 2 --batch-size 2")
    model, tokenizer = prepare(s, CPU)
    monkeypatch.setattr(train, "prepare", lambda *_: (model, tokenizer))  # loaded once is enough
    _, dev = train.read_data(s, tokenizer, s.max_length)
    before = evaluation.dev_loss(model, dev["dev"], s.eval_batch)
    train.train(s, tmp_path / "run", CPU)
    log = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log] == [4, 8]
    assert log[1]["train_loss"] < log[0]["train_loss"]
    assert math.exp(log[1]["dev_loss"]) < 0.9 * math.exp(before)
