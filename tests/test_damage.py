"""Damaged files: every file that the project reads, damaged in every way that we could think of, is
read all the same or refused with an InputError in one line. And hostile text.

pytest tests/test_damage.py
pytest tests/test_damage.py --damage 10000     that many damaged copies of each file, not a few
"""

import io
import json
import math
import random
import re
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
import torch
from conftest import need_shared, tiny
from safetensors.torch import load_file
from tokenizers import Regex, models
from tokenizers import Tokenizer as Reference
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.processors import TemplateProcessing

import eval as evaluation
import train
from data import TASKS, Tokenizer, encode_glue, encode_pairs, read_alpaca, read_e2e, read_glue
from lora import add_lora, load_lora, save_lora
from model import Config, load
from molex import MoLExConfig
from support.files import InputError
from support.runs import RunFolder
from support.scoring import read_outputs
from support.tokenizers import byte_symbols

sys.path.append(str(Path(__file__).parents[1] / "experiments"))
from figure2_routes import read_routes

CPU = torch.device("cpu")
IDS = torch.arange(3, 15)[None]

# --------------------------------------------------------------------------------------- the damage


def spot(data: bytes, rng: random.Random) -> int:
    """A place in the file, more often near its start, where binary formats say what they hold."""
    return int(len(data) * rng.random() ** 3)


def flip(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 8))):
        out[spot(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(out)


def delete(data: bytes, rng: random.Random) -> bytes:
    start = spot(data, rng)
    return data[:start] + data[start + rng.choice((1, 2, 10, 100, 1000)) :]


def double(data: bytes, rng: random.Random) -> bytes:
    start = spot(data, rng)
    end = start + rng.choice((1, 2, 10, 100, 1000))
    return data[:end] + data[start:end] + data[end:]


def encoding(data: bytes, rng: random.Random) -> bytes:
    text = data.decode("utf-8", errors="replace")
    how = rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "byte", "surrogate"))
    if how == "byte":
        return insert(data, rng, bytes([rng.randrange(128, 256)]))
    if how == "surrogate":
        return insert(data, rng, "\ud83d".encode("utf-8", "surrogatepass"))
    return text.encode(how, errors="replace")


def insert(data: bytes, rng: random.Random, what: bytes) -> bytes:
    start = spot(data, rng)
    return data[:start] + what + data[start:]


def nul(data: bytes, rng: random.Random) -> bytes:
    return insert(data, rng, bytes(rng.choice((1, 2, 64))))


HUGE = (b"1e999", b"-1", b"0", b"9" * 30, b"9" * 5000, b"-1e308", b"NaN", b"-Infinity", b"1e-400",
        b"4294967296", b"1000000", b"2.5")  # fmt: skip


def huge(data: bytes, rng: random.Random) -> bytes:
    """Another number where one stands; in binary files eight bytes of ones."""
    numbers = [*re.finditer(rb"\d+(\.\d+)?(e[-+]?\d+)?", data[:20_000])]
    if not numbers or b"\0" in data:
        start = spot(data, rng)
        return data[:start] + b"\xff" * 8 + data[start + 8 :]
    match = rng.choice(numbers)
    return data[: match.start()] + rng.choice(HUGE) + data[match.end() :]


OTHER = (None, True, False, 0, -1, 1, 7, 10**30, 0.5, -2.5, math.nan, math.inf, "", "x", "\ud800",
         "\0", [], {}, [[]], [None], ["x"], {"x": {}}, [1, 2], "4", [{}])  # fmt: skip


def places(value: object) -> list[tuple[object, object]]:
    """Every (container, key) in a JSON value; of long containers some."""
    found, items = [], []
    if isinstance(value, dict):
        items = [*value.items()]
    elif isinstance(value, list):
        items = [*enumerate(value)]
    for key, inner in items[:40] + items[-5:]:
        found += [(value, key), *places(inner)]
    return found


def other_type(data: bytes, rng: random.Random) -> bytes:
    """Another value, name or nesting somewhere in a JSON file, or on a line of a JSONL file."""
    if rng.random() < 0.05:
        depth = rng.choice((900, 100_000))
        return b'{"a":' * depth + b"1" + b"}" * depth if rng.random() < 0.5 else b"[" * depth
    try:
        value, dump = json.loads(data), json.dumps
    except json.JSONDecodeError:
        value = [json.loads(line) for line in data.splitlines() if line.strip()]
        dump = lambda rows: "\n".join(map(json.dumps, rows))  # noqa: E731
    found = places(value)
    container, key = rng.choice(found) if found else (value, None)
    if rng.random() < 0.1:
        value = rng.choice(OTHER)
        dump = json.dumps
    elif isinstance(container, dict) and rng.random() < 0.2:
        container[key + "x"] = container.pop(key)
    elif rng.random() < 0.1:
        del container[key]
    else:
        container[key] = rng.choice(OTHER)
    return dump(value).encode()


KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bits flipped": flip,
    "cut short": lambda data, rng: data[: rng.randrange(len(data))],
    "a piece deleted": delete,
    "a piece doubled": double,
    "another encoding": encoding,
    "NUL bytes": nul,
    "other numbers": huge,
    "empty": lambda data, rng: rng.choice((b"", b"\n", b" \r\n\t", b"\0", b"\xef\xbb\xbf")),
    "JSON of another type": other_type,
}

# ---------------------------------------------------------------------------------------- the files

MERGES = ["Ġ t", "h e", "i n", "Ġt he", "Ġ a", "o u", "1 2"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {
    "gpt2": ByteLevel(add_prefix_space=False),
    "digits": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "llama3": Sequence(
        [Split(Regex(LLAMA3), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    ),
}
CSV = 'mr,ref\n"name[A], food[b]","A, a ""b"" place."\nname[C],C’s café\nname[D],D is 5 of 5\n'
ROWS = [dict(instruction=f"Say {i}.", input="now" * (i % 2), output=f"{i}") for i in range(6)]
GLUE_ROWS = {
    "CoLA": "".join(f"gj04\t{i % 2}\t\tThe {i}th café closed.\n" for i in range(6)),
    "STS-B": "score\tsentence1\tsentence2\n" + "".join(f"{i}.25\tA {i}\tB\n" for i in range(5)),
    "MRPC": 'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t2\t3\tA "b".\tB.\n0\t2\t3\tC\tD\n',
}


def write_tokenizer(folder: Path, words: str | None = None) -> None:
    """vocab.json and merges.txt of a small byte-level BPE, or tokenizer.json."""
    symbols = ["<s>", "</s>", *byte_symbols(), *(m.replace(" ", "") for m in MERGES)]
    vocab = {s: i for i, s in enumerate(symbols)}
    if words is None:
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", "utf-8")
        return
    bpe = Reference(models.BPE(vocab, [tuple(m.split()) for m in MERGES]))
    bpe.pre_tokenizer, bpe.decoder = WORDS[words], ByteLevelDecoder()
    bpe.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    bpe.save(str(folder / "tokenizer.json"))


def settings(folder: Path) -> train.Settings:
    """A run of one step over the files beside it."""
    return train.Settings(
        model=str(folder / "model"), task="e2e", data=str(folder / "e2e"), seed=0,
        molex=MoLExConfig(layers=(0, 1)), epochs=1, batch_size=4, eval_batch=4, max_length=64,
        lora_r=2, max_new_tokens=4, beams=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with one of every file that the project reads, sound and small."""
    root = tmp_path_factory.mktemp("files")
    for name in ("gpt2", "roberta", "llama"):
        tiny(name, vocab_size=270).save_pretrained(root / name)
    tiny("llama").save_pretrained(root / "sharded", max_shard_size="60KB")
    (root / "bin").mkdir()
    shutil.copy(root / "gpt2" / "config.json", root / "bin")
    torch.save(load_file(root / "gpt2" / "model.safetensors"), root / "bin" / "pytorch_model.bin")
    write_tokenizer(root / "gpt2")
    write_tokenizer(root / "llama", "llama3")
    write_tokenizer(root / "roberta", "gpt2")
    for name, targets in (("roberta", "qkvo"), ("gpt2", "qv")):
        save_lora(add_lora(load(root / name), 2, 4, targets=tuple(targets)), root / f"{name}-lora")
    layer = "roberta.encoder.layer.{}.attention.self.{}.lora_{}"
    torch.save({layer.format(i, p, x): torch.ones((2, 32) if x == "A" else (32, 2))
                for i in range(3) for p in ("query", "value") for x in "AB"},
               root / "lora.bin")  # fmt: skip
    (root / "e2e").mkdir()
    for name in ("trainset", "devset", "testset_w_refs"):
        (root / "e2e" / f"{name}.csv").write_text(CSV, "utf-8")
    for name, text in GLUE_ROWS.items():
        (root / "glue" / name).mkdir(parents=True)
        (root / "glue" / name / "train.tsv").write_text(text, "utf-8")
    (root / "alpaca.json").write_text(json.dumps(ROWS, indent=1))
    (root / "alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (root / "outputs.txt").write_text("A b place.\nC’s café\nD\n", "utf-8")
    (root / "outputs.tsv").write_text("MR\toutput\nname[C]\tC’s\nname[A], food[b]\tA\n", "utf-8")
    (root / "refs.txt").write_text("A, a b.\nA b\n\nC’s\n\nD is 5 of 5\n", "utf-8")
    (root / "refs.csv").write_text(CSV.replace("name[D]", "name[C]"), "utf-8")
    run = root / "run"
    shutil.copytree(root / "gpt2", root / "model")
    train.train(settings(root), run, CPU)
    scores = dict(epoch=1, step=1, dev_loss=2.5, seconds_per_step=0.1, bleu=0.5, nist=3.25,
                  meteor=0.25, rouge_l=0.5, cider=1.5, trainable=64)  # fmt: skip
    (run / "scores.json").write_text(json.dumps(scores, indent=2))
    (run / "routes.json").write_text(json.dumps([[50.0, 50, 0], [0, 100, 0], [0, 25.5, 74.5]]))
    (run / "predictions.tsv").write_text("MR\toutput\n" + "name[A]\tA b place.\n" * 3)
    (run / "references.txt").write_text("A b place.\nA place.\n\n" * 3)
    return root


@torch.no_grad()
def use(folder: Path, head: str | int = "lm") -> None:
    """Load a model and let it see some tokens."""
    load(folder, head)(IDS)


def use_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder, Config.load(folder))
    ids = tokenizer.encode("The 12 cafés in the\tSouth\x00  don't 🍕\n")
    tokenizer.decode([*tokenizer.start, *ids])
    load(folder)(torch.tensor([[*tokenizer.start, *ids, 0]][:50]))


def use_lora(root: Path, name: str) -> None:
    with torch.no_grad():
        load_lora(load(root / name), root / f"{name}-lora")(IDS)


def use_loralib(root: Path) -> None:
    model = add_lora(load(root / "roberta"), 2, 16)
    train.start_from(model, root / "lora.bin")
    model(IDS)


def use_run(root: Path) -> None:
    model, tokenizer, _ = evaluation.load_run(root / "run", CPU)
    with torch.no_grad():
        model(torch.tensor([tokenizer.encode("name : A")]))


def use_log(run: RunFolder) -> None:
    run.best_of(run.read_log())


def use_report(root: Path) -> None:
    """The table, and the predictions that a comparison would read."""
    s = settings(root)
    (root / s.name).mkdir()
    shutil.copy(root / "run" / "scores.json", root / s.name)
    train.report([s], root, TASKS)
    RunFolder(root / "run").outputs()


def use_alpaca(path: Path, root: Path) -> None:
    tokenizer = Tokenizer.load(root / "gpt2", Config.load(root / "gpt2"))
    for split in ("train", "dev"):
        encode_pairs(tokenizer, read_alpaca(path, split), 500, task="alpaca")


READERS: dict[str, Callable[[Path], object]] = {
    "gpt2/config.json": lambda root: use(root / "gpt2"),
    "roberta/config.json": lambda root: (use(root / "roberta"), use(root / "roberta", 2)),
    "llama/config.json": lambda root: use(root / "llama"),
    "gpt2/model.safetensors": lambda root: use(root / "gpt2"),
    "sharded/model.safetensors.index.json": lambda root: use(root / "sharded"),
    "bin/pytorch_model.bin": lambda root: use(root / "bin"),
    "gpt2/vocab.json": lambda root: use_tokenizer(root / "gpt2"),
    "gpt2/merges.txt": lambda root: use_tokenizer(root / "gpt2"),
    "llama/tokenizer.json": lambda root: use_tokenizer(root / "llama"),
    "roberta/tokenizer.json": lambda root: use_tokenizer(root / "roberta"),
    "roberta-lora/adapter_config.json": lambda root: use_lora(root, "roberta"),
    "roberta-lora/adapter_model.safetensors": lambda root: use_lora(root, "roberta"),
    "gpt2-lora/adapter_model.safetensors": lambda root: use_lora(root, "gpt2"),
    "lora.bin": use_loralib,
    "run/config.json": use_run,
    "run/adapter.safetensors": use_run,
    "run/metrics.jsonl": lambda root: use_log(RunFolder(root / "run")),
    "run/last.pt": lambda root: train.train(settings(root), root / "run", CPU),
    "run/scores.json": use_report,
    "run/references.txt": lambda root: RunFolder(root / "run").outputs(),
    "run/predictions.tsv": lambda root: RunFolder(root / "run").outputs(),
    "run/routes.json": lambda root: read_routes(root / "run"),
    "e2e/trainset.csv": lambda root: read_e2e(root / "e2e", "train"),
    "glue/CoLA/train.tsv": lambda root: read_glue(root / "glue", "cola", "train"),
    "glue/STS-B/train.tsv": lambda root: read_glue(root / "glue", "stsb", "train"),
    "glue/MRPC/train.tsv": lambda root: read_glue(root / "glue", "mrpc", "train"),
    "alpaca.json": lambda root: use_alpaca(root / "alpaca.json", root),
    "alpaca.jsonl": lambda root: use_alpaca(root / "alpaca.jsonl", root),
    "outputs.txt": lambda root: read_outputs(root / "outputs.txt", root / "refs.txt"),
    "refs.txt": lambda root: read_outputs(root / "outputs.txt", root / "refs.txt"),
    "outputs.tsv": lambda root: read_outputs(root / "outputs.tsv", root / "refs.csv"),
    "refs.csv": lambda root: read_outputs(root / "outputs.tsv", root / "refs.csv"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(files, tmp_path, name, request):
    root = tmp_path / "files"
    shutil.copytree(files, root)
    text = (root / "run" / "config.json").read_text()
    (root / "run" / "config.json").write_text(text.replace(str(files), str(root)))
    state = torch.load(root / "run" / "last.pt", weights_only=True)
    state["origin"]["settings"] |= dict(model=str(root / "model"), data=str(root / "e2e"))
    torch.save(state, root / "run" / "last.pt")
    sound, read = (root / name).read_bytes(), READERS[name]
    read_quietly(read, root)
    kinds = [k for k in KINDS if "json" in name or k != "JSON of another type"]
    if name.endswith("merges.txt"):
        kinds.remove("other numbers")
    failures, outcomes = [], Counter()
    for i in range(request.config.getoption("--damage")):
        kind = kinds[i % len(kinds)]
        damaged = KINDS[kind](sound, random.Random(f"{name} {i}"))
        shutil.rmtree(root / settings(root).name, ignore_errors=True)
        (root / name).write_bytes(damaged)
        started = time.perf_counter()
        try:
            read_quietly(read, root)
            outcomes[kind, "read"] += 1
        except InputError as error:
            outcomes[kind, "refused"] += 1
            if not re.fullmatch(r"[^\x00-\x1f\x7f-\x9f]{10,1000}", str(error)):
                failures.append(f"{kind} {i}: a message like {str(error)[:2000]!r}")
        except Exception as error:
            failures.append(f"{kind} {i}: {type(error).__name__}: {str(error)[:200]}")
        if (took := time.perf_counter() - started) > 60:
            failures.append(f"{kind} {i}: took {took:.0f} s")
    for kind in kinds:
        print(
            f"{name:42}{kind:22}{outcomes[kind, 'read']:>7} read"
            f"{outcomes[kind, 'refused']:>7} refused"
        )
    assert not failures, f"{len(failures)} of them: " + "\n".join(failures[:20])


def test_a_run_whose_settings_lack_one_is_evaluated_or_refused_in_one_line(
    files, tmp_path, monkeypatch
):
    """What a run's settings lack takes its default, as those of an older version do; only what has
    none is asked for."""
    seen = {}

    def stands_in(model, tokenizer, s, folder):
        seen.update(vars(s))
        return {}

    monkeypatch.setattr(evaluation, "evaluate_e2e", stands_in)
    monkeypatch.setattr("support.runs.plot_routes", lambda *_: None)
    root = tmp_path / "files"
    shutil.copytree(files, root)
    path = root / "run" / "config.json"
    config = json.loads(path.read_text().replace(str(files), str(root)))
    defaults = {f.name: f.default for f in fields(train.Settings) if f.default is not MISSING}
    refused = set()
    for name in config:
        path.write_text(json.dumps({n: v for n, v in config.items() if n != name}))
        if name.startswith("lora_"):  # what was trained has another shape by default
            continue
        try:
            evaluation.evaluate_run(root / "run", CPU)
            assert name == "differs" or seen[name] == defaults[name]
        except InputError as error:
            assert str(error).endswith(f"config.json lacks {name}")
            refused.add(name)
    assert refused == {"model", "task", "data", "seed", "molex"}
    path.write_text(json.dumps(config | dict(beam_rule="both")))
    with pytest.raises(InputError, match="beam-rule is 'both', not transformers or lora"):
        evaluation.evaluate_run(root / "run", CPU)


def read_quietly(read: Callable[[Path], object], root: Path) -> None:
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        read(root)


# ------------------------------------------------------------------------------------- hostile text

SPECIAL = ["<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>", "<|begin_of_text|>",
           "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|im_start|>", "<|im_end|>",
           "[CLS]", "[SEP]", "<0x0A>"]  # fmt: skip
HOSTILE = {
    "special tokens": " ".join(SPECIAL) + "".join(SPECIAL),
    "empty": "",
    "white space": " \t \n\r\n \u00a0\u2003\u2028\u2029\u3000\u0085 ",
    "control characters": "".join(map(chr, [*range(1, 32), *range(127, 160)])) + "a\x07b\x1b[31mc",
    "NUL": "\0a\0\0b\0",
    "a long word": "abcdefghi" * 11_112,
    "a long line of spaces": "a" + " " * 100_000 + "b",
    "right to left": "שלום \u202eabc\u202c مرحبا \u200f12\u200e",
    "joiners": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇳🇱 e\u0301\u0323 \u200d\u200b\ufeff क्षि",
    "odd planes": "\U00010000 \U000e0041 \U0010ffff \ufffe \ue000 \ufffd",
    "separators": "a ||| b\tc,\"d\" 'e' [f] {g} \\n %s {} &lt;b&gt; <i> \x1c",
}
SURROGATES = "half \ud83d of a \udc00 pair \ud800\ud800"


def random_text(rng: random.Random) -> str:
    """Up to 40 characters, of all planes and of those that tokenizers treat in their own ways."""
    pools = (
        " ",
        " \t\n\r\u00a0\u3000",
        "abcDEF",
        "0123456789",
        "'sdmtvrel",
        "!?.,-_#<|>[]",
        "éßñçÅ",
        "שלוםمرحبا",
        "中文かな",
        "🍕👩\u200d👧🏽\ufe0f",
        "\u0301\u0323\u200b½²Ⅷ٣",
    )
    out = []
    for _ in range(rng.randrange(1, 41)):
        if rng.random() < 0.15:
            code = rng.randrange(rng.choice((0x80, 0x800, 0x10000, 0x110000)))
            out.append(chr(code) if not 0xD800 <= code < 0xE000 else "\ufffd")
        else:
            out.append(rng.choice(rng.choice(pools)))
    return "".join(out)


@pytest.fixture(params=["gpt2", "nano/gpt2", "nano/roberta", "llama3", "smollm2"])
def pair(request, tmp_path) -> tuple[Tokenizer, Reference, bool]:
    """A tokenizer, the same by `tokenizers`, and whether it has a symbol for every byte."""
    name, kind = request.param, "gpt2"
    config = Config.load(Path(__file__).parents[1] / "nano/gpt2")
    if name == "llama3":
        write_tokenizer(tmp_path, "llama3")
        bpe = Reference.from_file(str(tmp_path / "tokenizer.json"))
        bpe.post_processor = ByteLevelProcessor(trim_offsets=False)
        bpe.encode_special_tokens = True
        return Tokenizer.load(tmp_path, config), bpe, True
    folder = Path(__file__).parents[1] / name
    if name == "gpt2":
        folder, config = need_shared("models/gpt2-tokenizer"), replace(config, vocab_size=50257)
    if name == "smollm2":
        folder, kind = request.getfixturevalue("smollm2"), "digits"
        config = Config.load(folder)
    vocab, merges = (str(folder / file) for file in ("vocab.json", "merges.txt"))
    bpe = Reference(models.BPE.from_file(vocab, merges))
    bpe.pre_tokenizer, bpe.decoder, bpe.encode_special_tokens = (
        WORDS[kind],
        ByteLevelDecoder(),
        True,
    )
    return Tokenizer.load(folder, config), bpe, name != "smollm2"


def test_any_text_is_encoded_as_by_tokenizers_and_nothing_is_lost(pair):
    ours, theirs, whole = pair
    rng = random.Random(0)
    texts = [*HOSTILE.values(), *SPECIAL, *(random_text(rng) for _ in range(10_000))]
    for text, encoded in zip(texts, theirs.encode_batch(texts), strict=True):
        ids = ours.encode(text)
        assert ids == encoded.ids, text[:200]
        back = ours.decode(ids)
        assert back == (text if whole else theirs.decode(encoded.ids)), text[:200]


def test_half_of_a_surrogate_pair_becomes_the_replacement_character(pair):
    ours, _, _ = pair
    assert ours.decode(ours.encode(SURROGATES)) == re.sub("[\ud800-\udfff]", "\ufffd", SURROGATES)


def test_a_line_of_spaces_however_long_is_encoded(pair):
    """Whether the engine of regular expressions counts its steps, as some do, or not."""
    text = " " * 300_000 + "a"
    assert pair[0].decode(pair[0].encode(text)) == text


TEXTS = [*HOSTILE.values(), SURROGATES]


@pytest.mark.parametrize("name", ["gpt2", "roberta", "llama"])
def test_hostile_text_is_trained_on_and_answered(files, name):
    """Every text in one batch: as the answer in a decoder, as one of two texts in an encoder."""
    root = files / name
    tokenizer = Tokenizer.load(root, Config.load(root))
    model = add_lora(load(root, head=2 if name == "roberta" else "lm", dropout=0.0), 2, 4)
    if name == "roberta":
        rows = [((text, "A pub."), i % 2) for i, text in enumerate(TEXTS)]
        examples = encode_glue(tokenizer, rows, 60)
    elif name == "gpt2":
        examples = encode_pairs(tokenizer, [("name : A", text) for text in TEXTS], 60)
    else:
        examples = encode_pairs(tokenizer, [("Say it.", text) for text in TEXTS], 60, task="alpaca")
    assert len(examples) == len(TEXTS)
    s = train.Settings("m", "e2e", None, 0, None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = [train.train_step(model, optimizer, examples, s).item() for _ in range(8)]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    if name == "roberta":
        assert set(evaluation.classify(model, examples, 4)) <= {0, 1}
        return
    ids = [[*tokenizer.encode(text), tokenizer.eos][:40] for text in TEXTS]
    answers = evaluation.generate(model, tokenizer, ids, 4, beams=3, max_new_tokens=8)
    assert len(answers) == len(TEXTS) and all(isinstance(a, str) for a in answers)
    for answer in answers:
        answer.encode("utf-8")


def test_hostile_text_is_scored_by_all_metrics():
    """Equal to its only reference, or without a word in common."""
    best = evaluation.e2e_scores(TEXTS, [[text] for text in TEXTS])
    short = [text for text in TEXTS if len(text) < 1000]  # METEOR takes its time for long words
    worst = evaluation.e2e_scores(short, [["zzyzx"] for _ in short])
    backwards = evaluation.e2e_scores(["zzyzx"] * len(short), [[text, ""] for text in short])
    for scores in (best, worst, backwards):
        assert set(scores) == {"bleu", "nist", "meteor", "rouge_l", "cider"}
        assert all(math.isfinite(x) and x >= 0 for x in scores.values())
    assert best["bleu"] > 0.99 and all(best[name] > worst[name] for name in best)
