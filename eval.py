"""Evaluation: the metrics of GLUE (Table 1) and of the E2E challenge (Table 2), and beam search.

GLUE (appendix B.1): accuracy, Matthews correlation for CoLA, Pearson correlation for STS-B.
E2E (appendix B.2): to four decimals the numbers of the challenge's own script
(github.com/tuetschek/e2e-metrics): BLEU and NIST as in its module "pymteval", METEOR 1.5, ROUGE-L
and CIDEr as in Microsoft COCO's caption evaluation, over the tokens of the Stanford tokenizer.

    python eval.py runs/gpt2-medium-e2e-molex-s0        evaluate a finished run again
    python eval.py --predictions FILE --references FILE [--json]        score any system's output
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from torch import Tensor
from tqdm import tqdm

from data import (
    GLUE,
    TASKS,
    Example,
    Tokenizer,
    collate,
    e2e_prompt,
    encode_glue,
    encode_prompt,
    group_references,
    read_e2e,
    read_examples,
    read_glue,
)
from lora import adapt, merge, task_head, trained_tensors
from model import Cache, Transformer, load
from molex import MoLEx, MoLExConfig, upcycle
from support.cli import Parser, command_line, pick_device
from support.files import InputError, fill, locate
from support.runs import RunFolder, is_run
from support.scoring import (
    References,
    Texts,
    clean,
    meteor_score,
    ptb_tokenize,
    read_outputs,
    sacrebleu,
)
from support.settings import Settings, read_settings

# ----------------------------------------------------------------------------------- GLUE's metrics


def accuracy(predictions: list[float], labels: list[float]) -> float:
    """The share of predictions that equal their label."""
    return sum(p == y for p, y in zip(predictions, labels, strict=True)) / len(labels)


def pearson(predictions: list[float], labels: list[float]) -> float:
    """Pearson correlation; 0 if either side is constant, where it is not defined. For two classes,
    0 and 1, it is the Matthews correlation (as in scikit-learn)."""
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(np.corrcoef(predictions, labels)[0, 1])


METRICS = {"accuracy": accuracy, "matthews": pearson, "pearson": pearson}


def glue_scores(
    task: str, predictions: dict[str, list[float]], dev: dict[str, list[Example]]
) -> dict[str, float]:
    """The task's metric over all dev splits (Table 1: "overall"), and over each of several."""
    name = GLUE[task].metric
    metric = METRICS[name]
    labels = {split: [e.label for e in examples] for split, examples in dev.items()}
    scores = {name: metric(sum(predictions.values(), []), sum(labels.values(), []))}
    if len(dev) > 1:
        for split in dev:
            scores[split.replace("dev", name)] = metric(predictions[split], labels[split])
    return scores


# ------------------------------------------------------------------------------------ E2E's metrics

_tokenize_13a = Tokenizer13a()


def _mteval_tokens(text: str) -> list[str]:
    """Lower-cased tokens of mteval-v13a; an empty text is one empty token, as in pymteval."""
    return _tokenize_13a(text.lower()).split() or [""]


def _ngrams(tokens: list[str], max_n: int) -> Counter:
    """How often each n-gram, n = 1 ... `max_n`, occurs."""
    found = Counter()
    for n in range(1, max_n + 1):
        for i in range(len(tokens) - n + 1):
            found[tuple(tokens[i : i + n])] += 1
    return found


def bleu(predictions: Texts, references: References) -> float:
    """Corpus BLEU (Papineni et al., 2002) up to 4-grams, with sacrebleu's counts; 1 is best.

    pymteval gives a prediction of m tokens m - n + 1 n-grams even where that is negative; sacrebleu
    then says 0. This shows only if predictions have fewer than three tokens.
    """
    counts = sacrebleu().corpus_score(predictions, [*zip_longest(*references)])
    length = sum(len(_mteval_tokens(p)) for p in predictions)
    precisions = []
    for n, count in enumerate(counts.counts):
        total = max(length - n * len(predictions), 1e-9)
        precisions.append(max(count, 1e-15) / total)
    brevity = math.exp(min(1 - counts.ref_len / length, 0))
    return math.prod(precisions) ** (1 / 4) * brevity


def nist(predictions: Texts, references: References) -> float:
    """NIST (Doddington, 2002) up to 5-grams; 0 is worst, there is no maximum.

    Sum over n of the information of the matched n-grams, log2(count of its first n-1 words / count
    of the n-gram) over all references, divided by the number of n-grams predicted; times a brevity
    factor that is 1/2 where the output is 2/3 as long as the average reference.
    """
    reference_counts, matches = Counter(), Counter()
    length, reference_length = 0, 0.0
    for prediction, group in zip(predictions, references, strict=True):
        tokens = _mteval_tokens(prediction)
        group_tokens = [_mteval_tokens(r) for r in group]
        most = Counter()  # of each n-gram, in one reference
        for counts in (_ngrams(t, 5) for t in group_tokens):
            most |= counts
            reference_counts.update(counts)
        matches.update(_ngrams(tokens, 5) & most)
        words = sum(len(t) for t in group_tokens)
        reference_counts[()] += words  # what comes before a unigram: the empty n-gram
        length += len(tokens)
        reference_length += words / len(group)
    score = 0.0
    for ngram, count in matches.items():
        total = length - (len(ngram) - 1) * len(predictions)  # may be negative, see bleu()
        information = math.log2(reference_counts[ngram[:-1]] / reference_counts[ngram])
        score += count * information / total if total else 0.0  # pymteval divides by zero
    beta = -math.log(0.5) / math.log(1.5) ** 2
    return score * math.exp(-beta * math.log(min(length / reference_length, 1.0)) ** 2)


def _longest_common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            above = row[j]
            row[j] = diagonal + 1 if x == y else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def rouge_l(predictions: Texts, references: References) -> float:
    """Mean ROUGE-L (Lin, 2004) in 0..1, COCO's variant: beta = 1.2, PTB tokens. Precision and
    recall are each the best over the references, perhaps of different ones."""
    beta_squared, total = 1.2**2, 0.0
    for prediction, group in zip(*ptb_tokenize(predictions, references), strict=True):
        tokens = prediction.split(" ")
        group_tokens = [r.split(" ") for r in group]
        common = [_longest_common(tokens, r) for r in group_tokens]
        precision = max(common) / len(tokens)
        recall = max(c / len(r) for c, r in zip(common, group_tokens, strict=True))
        if recall:
            total += (1 + beta_squared) * precision * recall / (recall + beta_squared * precision)
    return total / len(predictions)


def cider(predictions: Texts, references: References) -> float:
    """Mean CIDEr (Vedantam et al., 2015) in 0..10, COCO's variant (CIDEr-D), over PTB tokens.

    For n = 1 ... 4: the cosine of TF-IDF vectors, the prediction's entries clipped to the
    reference's, times exp(-difference in length^2 / (2 * 6^2)). IDF counts in how many items'
    references an n-gram occurs, so a single item scores 0.
    """
    predictions, references = ptb_tokenize(predictions, references)
    # any white space splits here, as in COCO, also the no-break space within "1 1/2"
    counts = [[_ngrams(r.split(), 4) for r in group] for group in references]
    items = Counter()  # in how many items' references an n-gram occurs
    for group in counts:
        items.update(set().union(*group))

    def tf_idf(ngrams: Counter) -> tuple[dict, Counter, int]:
        """The vector, its squared norm for each n, and the number of bigrams."""
        vector, squares, bigrams = {}, Counter(), 0
        for ngram, count in ngrams.items():
            vector[ngram] = count * math.log(len(counts) / max(items[ngram], 1))
            squares[len(ngram)] += vector[ngram] ** 2
            bigrams += count if len(ngram) == 2 else 0
        return vector, squares, bigrams

    total = 0.0
    for prediction, group in zip(predictions, counts, strict=True):
        vector, squares, length = tf_idf(_ngrams(prediction.split(), 4))
        for reference, reference_squares, reference_length in map(tf_idf, group):
            cosine = 0.0
            for ngram, weight in vector.items():
                other = reference.get(ngram, 0.0)
                if other:
                    n = len(ngram)
                    cosine += (
                        min(weight, other) * other / math.sqrt(squares[n] * reference_squares[n])
                    )
            penalty = math.exp(-((length - reference_length) ** 2) / (2 * 6.0**2))
            total += 10 * penalty * cosine / 4 / len(group)
    return total / len(predictions)


def meteor(predictions: Texts, references: References) -> float:
    """METEOR 1.5 (Denkowski & Lavie, 2014) in 0..1 over PTB tokens, by its own Java program."""
    return meteor_score(*ptb_tokenize(predictions, references))


def e2e_scores(predictions: Texts, references: References) -> dict[str, float]:
    """All five metrics. Item i is one prediction and its one or more references."""
    if not predictions or len(predictions) != len(references) or not all(references):
        what = f"{len(predictions)} predictions and {len(references)} groups"
        raise InputError(f"give one prediction for each group of references, but there are {what}")
    scores = {}
    for metric in tqdm((bleu, nist, meteor, rouge_l, cider), "metrics", leave=False):
        scores[metric.__name__] = metric(predictions, references)
    return scores


# ----------------------------------------------------------------------------------------- dev sets


def by_length(examples: list, batch_size: int, what: str) -> Iterator[list[int]]:
    """Batches of the examples' indices, of like length together, with a progress bar."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    with tqdm(total=len(order), desc=what, leave=False) as bar:
        for i in range(0, len(order), batch_size):
            yield order[i : i + batch_size]
            bar.update(len(order[i : i + batch_size]))


@torch.no_grad()
def classify(model: Transformer, examples: list[Example], batch_size: int) -> list[float]:
    """The most likely class of each example, or its score. The model is in evaluation mode."""
    order, found = [], []
    for indices in by_length(examples, batch_size, "  dev"):
        batch = collate([examples[i] for i in indices]).to(model.device)
        with model.autocast():
            logits = model(batch.ids, batch.mask).float()
        found.append(logits[:, 0] if logits.shape[1] == 1 else logits.argmax(-1))
        order += indices
    answers = dict(zip(order, torch.cat(found).tolist(), strict=True))  # one transfer for all
    return [answers[i] for i in range(len(examples))]


@torch.no_grad()
def dev_loss(model: Transformer, examples: list[Example], batch_size: int) -> float:
    """Mean loss of an answer's token in nats, unsmoothed: the log of the perplexity (Table 12)."""
    total = torch.zeros((), device=model.device)
    for indices in by_length(examples, batch_size, "  dev"):
        total += model.loss(collate([examples[i] for i in indices]))
    return total.item() / sum(e.targets for e in examples)


def dev_scores(
    model: Transformer, task: str, dev: dict[str, list[Example]], batch_size: int
) -> dict[str, float]:
    """What an epoch is judged by: the task's metric in GLUE, otherwise the loss."""
    training = model.training
    model.eval()
    if task in GLUE:
        found = {split: classify(model, examples, batch_size) for split, examples in dev.items()}
        scores = glue_scores(task, found, dev)
    else:
        scores = {"dev_loss": dev_loss(model, dev["dev"], batch_size)}
    model.train(training)
    return scores


# -------------------------------------------------------------------------------------- beam search


def ban_repeats(log_p: Tensor, answers: Tensor, n: int) -> Tensor:
    """Forbid every token that would complete an n-gram that the answer already holds. Only the
    answer counts, as in the LoRA code: what the prompt says may be said again.
    log_p (R, V), answers (R, s) -> log_p with minus infinity where forbidden."""
    s = answers.shape[1]
    if not n or s < n:
        return log_p
    grams = answers.unfold(1, n, 1)  # (R, s - n + 1, n)
    begun = answers[:, None, s - n + 1 :]  # the last n - 1 tokens
    again = (grams[..., :-1] == begun).all(-1)
    ban = torch.where(again, -math.inf, math.inf)
    return log_p.scatter_reduce(1, grams[..., -1], ban, "amin")


class Beams:
    """The answers to P prompts under way: of each its `beams` open and its best finished ones.

    rule "transformers": of 2 x beams continuations those that end are finished, the best others go
    on; a prompt is done when its best open beam, scored at its present length, is no better than
    its worst finished one. rule "lora", as in the public LoRA code: of `beams` continuations those
    that end keep their place, dead, so that fewer go on; a prompt is done when none is left.
    """

    def __init__(self, P: int, beams: int, longest: int, penalty: float, rule: str, device) -> None:
        self.beams, self.longest, self.penalty, self.rule = beams, longest, penalty, rule
        self.ids = torch.zeros(P, beams, 0, dtype=torch.long, device=device)
        self.score = torch.full((P, beams), -math.inf, device=device)
        self.score[:, 0] = 0.0  # all beams start alike: let one of them spread
        self.done_ids = torch.zeros(P, beams, longest, dtype=torch.long, device=device)
        self.done_score = torch.full((P, beams), -math.inf, device=device)
        self.done_length = torch.zeros(P, beams, dtype=torch.long, device=device)

    def step(self, log_p: Tensor, eos: int) -> tuple[Tensor, Tensor]:
        """Go on by one token, log_p (P * beams, V). Returns from which beam each open one has come,
        (P, beams), and which prompts go on, (P,) bool."""
        V = log_p.shape[-1]
        total = (self.score.flatten()[:, None] + log_p).view(len(self.score), -1)
        count = self.beams if self.rule == "lora" else 2 * self.beams
        score, index = total.topk(count)  # even if half of 2 x beams end, enough can go on
        beam, token = index // V, index % V
        before = take(self.ids, beam)
        ids = torch.cat([before, token[..., None]], dim=-1)  # (P, count, s)
        s = ids.shape[-1]
        ends = (token == eos) | (s == self.longest)
        self.finish(ids[:, : self.beams], score[:, : self.beams], ends[:, : self.beams], eos)
        self.score, keep = score.masked_fill(ends, -math.inf).topk(self.beams)
        self.ids = take(ids, keep)
        worst = -math.inf if self.rule == "lora" else self.done_score[:, -1]
        return beam.gather(1, keep), self.score[:, 0] / s**self.penalty > worst

    def finish(self, ids: Tensor, score: Tensor, ends: Tensor, eos: int) -> None:
        """Of these answers those that end, and of earlier ones, keep the best `beams`."""
        s = ids.shape[-1]
        score = (score / s**self.penalty).masked_fill(~ends, -math.inf)
        length = s - (ids[..., -1] == eos).long()  # the end token is left out
        padded = F.pad(ids, (0, self.longest - s))
        self.done_score, best = torch.cat([self.done_score, score], dim=1).topk(self.beams)
        self.done_ids = take(torch.cat([self.done_ids, padded], dim=1), best)
        self.done_length = torch.cat([self.done_length, length], dim=1).gather(1, best)

    def best(self, row: int) -> list[int]:
        return self.done_ids[row, 0, : self.done_length[row, 0]].tolist()

    def select(self, rows: Tensor) -> None:
        """Keep these prompts."""
        for name in ("ids", "score", "done_ids", "done_score", "done_length"):
            setattr(self, name, getattr(self, name)[rows])


def take(x: Tensor, index: Tensor) -> Tensor:
    """Of x (P, n, s) those of index (P, m): (P, m, s)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


@torch.no_grad()
def beam_search(
    model: Transformer,
    prompts: list[list[int]],
    eos: int,
    beams: int = 10,
    length_penalty: float = 0.9,
    no_repeat_ngram: int = 4,
    max_new_tokens: int = 64,
    beam_rule: str = "transformers",
) -> list[list[int]]:
    """The best answer to each prompt (token ids in and out, without the end token).

    An answer of s tokens scores its log-probability over s ** length_penalty. The defaults are
    Table 6's; `beam_rule`: see `Beams`. no_repeat_ngram=0 allows every repetition.

    The prompts go through the model once, padded on the left. After that the beams of a prompt are
    tokens side by side, and a mask says which earlier tokens each one continues: when beams are
    reordered the mask changes, and no keys and values are moved.
    """
    if beam_rule not in ("transformers", "lora"):
        raise InputError(f"beam_rule is {beam_rule!r}, not transformers or lora")
    device, longest = model.device, max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    state = Beams(len(prompts), beams, max_new_tokens, length_penalty, beam_rule, device)
    cache = Cache()
    h = model.hidden(ids, real, cache=cache)[:, -1].repeat_interleave(beams, dim=0)
    sees = real.bool()[:, None].expand(-1, beams, -1)  # (P, beams, S)
    itself = torch.eye(beams, dtype=torch.bool, device=device)
    waiting = list(range(len(prompts)))  # which prompt each row of the state answers
    answers: list[list[int]] = [[] for _ in prompts]
    while waiting:
        log_p = model.logits(h).float()
        if beam_rule == "lora":  # the others share the probability of banned tokens
            log_p = ban_repeats(log_p, state.ids.flatten(0, 1), no_repeat_ngram).log_softmax(-1)
        else:
            log_p = ban_repeats(log_p.log_softmax(-1), state.ids.flatten(0, 1), no_repeat_ngram)
        beam, going = state.step(log_p, eos)
        going = going.tolist()  # the only values that the CPU reads in a step
        for row, prompt in enumerate(waiting):
            if not going[row]:
                answers[prompt] = state.best(row)
        waiting = [prompt for prompt, goes in zip(waiting, going, strict=True) if goes]
        if waiting:
            rows = torch.tensor([row for row, goes in enumerate(going) if goes], device=device)
            if len(rows) < len(going):
                state.select(rows)
                cache.select(rows)
            sees = take(sees[rows], beam[rows])
            sees = torch.cat([sees, itself.expand(len(rows), -1, -1)], dim=-1)
            h = model.hidden(state.ids[..., -1], cache=cache, sees=sees).flatten(0, 1)
    return answers


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[str] | list[list[int]],
    batch_size: int = 16,
    **search: float,
) -> list[str]:
    """The model's answer to each prompt, a text as in E2E or token ids; see `beam_search`."""
    ids = [encode_prompt(tokenizer, p) if isinstance(p, str) else p for p in prompts]
    answers = [""] * len(ids)
    with model.autocast():
        for indices in by_length(ids, batch_size, "beam search"):
            found = beam_search(model, [ids[i] for i in indices], tokenizer.eos, **search)
            for i, answer in zip(indices, found, strict=True):
                answers[i] = tokenizer.decode(answer).strip()
    return answers


# ------------------------------------------------------------------------------ the model of a run


def build(s: Settings, device: torch.device) -> tuple[Transformer, Tokenizer]:
    """A run's model before training (pretrained, with LoRA and MoLEx), and its tokenizer."""
    model = load(s.model, head=TASKS[s.task].head, dropout=s.dropout)
    model.precision = s.precision
    adapt(model, s.tune, s.lora_r, s.lora_alpha, s.lora_dropout)
    if s.molex:
        upcycle(model, s.molex)
    return model.to(device), Tokenizer.load(s.model, model.config)


def read_run(folder: Path) -> tuple[Settings, dict[str, Tensor]]:
    """Settings of a run, and what its best epoch has trained. Raises InputError if it has none."""
    s = read_settings(folder, MoLExConfig)
    if s.task not in TASKS:
        raise InputError(f"{folder / 'config.json'}: there is no task {s.task!r}")
    return s, RunFolder(folder).best()


def load_run(folder: Path, device: torch.device) -> tuple[Transformer, Tokenizer, Settings]:
    """The best epoch of a run, its tokenizer and its settings. Raises InputError if it has none."""
    s, tensors = read_run(folder)
    model, tokenizer = build(s, device)
    fill(trained_tensors(model), tensors, f"{folder / 'adapter.safetensors'} does not fit: it")
    return model.eval(), tokenizer, s


def load_model(
    name: str | Path, device: torch.device, head: str = "lm"
) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a run's best epoch, or pretrained ones of a folder or the hub."""
    if is_run(locate(name)):
        return load_run(locate(name), device)[:2]
    model = load(name, head=head).to(device)
    return model, Tokenizer.load(name, model.config)


# -------------------------------------------------------------------------------- evaluating a run


def evaluate_run(folder: Path, device: torch.device) -> dict[str, float]:
    """Score a run's best epoch on the dev set of GLUE or Alpaca or the test set of E2E. What is
    found goes to the run's folder (support/runs.py); an unfinished run's to one within it."""
    model, tokenizer, s = load_run(folder, device)
    run = RunFolder(folder, TASKS[s.task].metric)
    log = run.read_log()
    scores = dict(run.best_of(log))
    del scores["curve"]
    trained = trained_tensors(model).items()
    scores["trainable"] = sum(p.numel() for name, p in trained if name not in task_head(model))
    if s.task == "e2e":
        merge(model)  # elsewhere what was measured in training is measured again to the bit
    model.cast_frozen()
    evaluate = {"e2e": evaluate_e2e, "alpaca": evaluate_alpaca}.get(s.task, evaluate_glue)
    with run.evaluating(s) as out:
        scores.update(evaluate(model, tokenizer, s, out))
        if s.task == "alpaca":
            scores.update({f"{n}_ppl": math.exp(scores[f"{n}_loss"]) for n in ("train", "dev")})
        shares = model.layers.routes.shares() if isinstance(model.layers, MoLEx) else None
        out.write_scores(scores, log, shares)
    return scores


def evaluate_e2e(model: Transformer, tokenizer: Tokenizer, s: Settings, out: RunFolder) -> dict:
    """Decode the test set."""
    mrs, outputs, references = decode_test(model, tokenizer, s)
    lines = [f"{mr}\t{output}" for mr, output in zip(mrs, outputs, strict=True)]
    out.write_lines("predictions.tsv", ["MR\toutput", *lines])
    out.write_references(references)
    first = [group[0] for group in references]
    out.write_samples([*zip(mrs, outputs, first, strict=True)])
    return e2e_scores(outputs, references)


def evaluate_glue(model: Transformer, tokenizer: Tokenizer, s: Settings, out: RunFolder) -> dict:
    """Classify the dev splits."""
    limit = min(s.max_length, model.config.max_positions)
    names = GLUE[s.task].labels
    dev, found, lines, samples = {}, {}, [], []
    for split in GLUE[s.task].dev:
        rows = read_glue(s.data, s.task, split)
        dev[split] = encode_glue(tokenizer, rows, limit)
        found[split] = classify(model, dev[split], s.eval_batch)
        for i, ((texts, label), answer) in enumerate(zip(rows, found[split], strict=True)):
            right, said = (names[int(y)] if names else f"{y:.3f}" for y in (label, answer))
            lines.append(f"{split}\t{i}\t{right}\t{said}")
            samples.append(("\n".join(texts), said, right))
    out.write_lines("predictions.tsv", ["split\tindex\tlabel\tprediction", *lines])
    out.write_samples(samples)
    return glue_scores(s.task, found, dev)


def evaluate_alpaca(model: Transformer, tokenizer: Tokenizer, s: Settings, out: RunFolder) -> dict:
    """The dev set's loss; and answers to five prompts, to look at."""
    longest = model.config.max_positions
    dev = read_examples(tokenizer, "alpaca", s.data, "dev", min(s.max_length, longest))
    fitting = [e for e in dev if len(e.prompt) + s.max_new_tokens <= longest]
    shown = fitting[:: max(1, len(fitting) // 5)][:5]
    outputs = generate(model, tokenizer, [e.prompt for e in shown], s.eval_batch, **s.search())
    prompts = [tokenizer.decode(e.prompt).partition("### ")[2] for e in shown]
    right = [tokenizer.decode(e.answer).strip() for e in shown]
    out.write_samples([*zip(prompts, outputs, right, strict=True)])
    if isinstance(model.layers, MoLEx):
        model.layers.routes.counts.zero_()  # the routes to look at are those of the whole dev set
    return {"dev_loss": dev_loss(model, dev, s.eval_batch)}


def decode_test(
    model: Transformer, tokenizer: Tokenizer, s: Settings
) -> tuple[Texts, Texts, References]:
    """E2E's test MRs, the model's outputs and the references, each output on one line."""
    mrs, references = group_references(read_e2e(s.data, "test"))
    mrs, references = mrs[: s.test_limit], references[: s.test_limit]
    references = [[clean(r) for r in group] for group in references]
    prompts = [e2e_prompt(mr) for mr in mrs]
    outputs = generate(model, tokenizer, prompts, s.eval_batch, **s.search())
    return mrs, [clean(" ".join(output.split())) for output in outputs], references


def main() -> None:
    parser = Parser(description="Evaluate a run, or score text with the E2E challenge's metrics")
    parser.add_argument("run", type=Path, nargs="?", help="run folder, to evaluate it again")
    parser.add_argument("--predictions", type=Path, help="one per line, or .csv/.tsv: MR, output")
    parser.add_argument("--references", type=Path, help="groups of lines, or .csv/.tsv: mr, ref")
    parser.add_argument("--json", action="store_true", help="also print the scores as JSON, last")
    args = parser.parse_args()
    if args.run:
        scores = evaluate_run(args.run, pick_device())
    elif args.predictions and args.references:
        scores = e2e_scores(*read_outputs(args.predictions, args.references))
    else:
        raise InputError("give a run folder, or both --predictions FILE and --references FILE")
    shown = tuple({name for task in TASKS.values() for name in task.scores})
    for name, value in scores.items():
        if name.startswith(shown):  # also accuracy_matched
            print(f"{name:20}{value:8.4f}")
    if args.json:
        print(json.dumps(scores))


if __name__ == "__main__":
    command_line(main)
