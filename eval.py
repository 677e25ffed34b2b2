"""Evaluation: the metrics of GLUE (Table 1) and of the E2E challenge (Table 2), and beam search.

GLUE (appendix B.1): accuracy, Matthews correlation for CoLA, Pearson correlation for STS-B.
E2E (appendix B.2): to four decimals the numbers of the challenge's own script
(github.com/tuetschek/e2e-metrics): BLEU and NIST as in its module "pymteval", METEOR 1.5, ROUGE-L
and CIDEr as in Microsoft COCO's caption evaluation, over the tokens of the Stanford tokenizer.

    python eval.py                      nano/gpt2 before fine-tuning, ten MRs
    python eval.py runs/gpt2-medium-e2e-molex-s0 [--beams 4]     a finished run again, or otherwise
    python eval.py gpt2-medium --task e2e --prompt TEXT          a model's answer to a text
    python eval.py --predictions FILE --references FILE [--json]        score any system's output
"""

import support.interrupts  # noqa: F401  (first: the others take seconds)

# isort: split
import math
from argparse import Namespace
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import (
    GLUE,
    MR,
    TASKS,
    Example,
    Tokenizer,
    alpaca_prompt,
    by_length,
    collate,
    data_files,
    e2e_prompt,
    encode_glue,
    encode_prompt,
    group_references,
    read_e2e,
    read_examples,
    read_glue,
)
from lora import adapt, merge, trainable, trained_tensors
from model import Cache, Transformer, load
from molex import MoLEx, MoLExConfig, upcycle
from support.cli import command_line, pick_device, progress_bar
from support.files import InputError, fill, locate, locked
from support.runs import RunFolder, is_run
from support.scoring import clean, meteor, mteval_tokens, ptb_tokenize, read_outputs, sacrebleu
from support.settings import Settings, before_tuning, evaluated_again, parse_eval, read_settings
from support.tables import print_scores

Texts = list[str]
References = list[list[str]]  # one or more for each prediction
Scores = dict[str, float]
Splits = dict[str, list[Example]]  # name of a dev split -> its examples


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


def glue_scores(task: str, predictions: dict[str, list[float]], dev: Splits) -> Scores:
    """The task's metric over all dev splits (Table 1: "overall"), and over each of several."""
    name = GLUE[task].metric
    metric = METRICS[name]
    labels = {split: [e.label for e in examples] for split, examples in dev.items()}
    answers = sum(predictions.values(), [])
    scores = {name: metric(answers, sum(labels.values(), []))}
    if len(dev) > 1:
        for split in dev:
            key = f"{name}_{split.removeprefix('dev_')}"
            scores[key] = metric(predictions[split], labels[split])
    return scores


def _ngrams(tokens: Texts, max_n: int) -> Counter:
    """How often each n-gram, n = 1 ... `max_n`, occurs."""
    counts = Counter()
    for n in range(1, max_n + 1):
        counts.update(zip(*(tokens[i:] for i in range(n)), strict=False))
    return counts


def bleu(predictions: Texts, references: References) -> float:
    """Corpus BLEU (Papineni et al., 2002) up to 4-grams, with sacrebleu's counts; 1 is best.

    pymteval gives a prediction of m tokens m - n + 1 n-grams even where that is negative; sacrebleu
    then says 0. This shows only if predictions have fewer than three tokens.
    """
    score = sacrebleu().corpus_score(predictions, [*zip_longest(*references)])
    length = sum(len(mteval_tokens(p)) for p in predictions)
    precisions = []
    for n, count in enumerate(score.counts):
        total = max(length - n * len(predictions), 1e-9)
        precisions.append(max(count, 1e-15) / total)
    brevity = math.exp(min(1 - score.ref_len / length, 0))
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
        words = 0  # of all its references
        most = Counter()  # of each n-gram, in one reference
        for reference in group:
            reference_tokens = mteval_tokens(reference)
            counts = _ngrams(reference_tokens, 5)
            most |= counts
            reference_counts.update(counts)
            words += len(reference_tokens)
        reference_counts[()] += words  # what comes before a unigram: the empty n-gram
        reference_length += words / len(group)
        tokens = mteval_tokens(prediction)  # an n-gram matches as often as one reference has it
        matches.update(_ngrams(tokens, 5) & most)
        length += len(tokens)
    score = 0.0
    for ngram, count in matches.items():
        total = length - (len(ngram) - 1) * len(predictions)  # may be negative, see bleu()
        information = math.log2(reference_counts[ngram[:-1]] / reference_counts[ngram])
        score += count * information / total if total else 0.0  # pymteval divides by zero
    beta = -math.log(0.5) / math.log(1.5) ** 2
    short = math.log(min(length / reference_length, 1.0))
    return score * math.exp(-beta * short**2)


def rouge_l(predictions: Texts, references: References) -> float:
    """Mean ROUGE-L (Lin, 2004) in 0..1, COCO's variant: beta = 1.2, PTB tokens. Precision and
    recall are each the best over the references, perhaps of different ones."""
    predictions, references = ptb_tokenize(predictions, references)
    from pycocoevalcap.rouge.rouge import my_lcs  # the longest common subsequence, as in COCO

    beta_squared, total = 1.2**2, 0.0
    for prediction, group in zip(predictions, references, strict=True):
        precision = recall = 0.0
        tokens = prediction.split(" ")
        for reference in group:
            reference_tokens = reference.split(" ")
            common = my_lcs(reference_tokens, tokens)
            precision = max(precision, common / len(tokens))
            recall = max(recall, common / len(reference_tokens))
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

    def tf_idf(ngrams):
        """The vector, its squared norm for each n, and the number of bigrams."""
        vector, squares, bigrams = {}, Counter(), 0
        for ngram, count in ngrams.items():
            weight = count * math.log(len(counts) / max(items[ngram], 1))
            vector[ngram] = weight
            squares[len(ngram)] += weight**2
            if len(ngram) == 2:
                bigrams += count
        return vector, squares, bigrams

    total = 0.0
    for prediction, group in zip(predictions, counts, strict=True):
        vector, squares, length = tf_idf(_ngrams(prediction.split(), 4))
        for reference, reference_squares, reference_length in map(tf_idf, group):
            cosine = 0.0
            for ngram, weight in vector.items():
                other = reference.get(ngram, 0.0)
                if other:
                    norms = squares[len(ngram)] * reference_squares[len(ngram)]
                    cosine += min(weight, other) * other / math.sqrt(norms)
            penalty = math.exp(-((length - reference_length) ** 2) / (2 * 6.0**2))
            total += 10 * penalty * cosine / 4 / len(group)
    return total / len(predictions)


def e2e_scores(predictions: Texts, references: References) -> Scores:
    """All five metrics. Item i is one prediction and its one or more references."""
    if not predictions or len(predictions) != len(references) or not all(references):
        what = f"{len(predictions)} predictions and {len(references)} groups"
        raise InputError(f"give one prediction for each group of references, but there are {what}")
    scores = {}
    for metric in progress_bar((bleu, nist, meteor, rouge_l, cider), "metrics", leave=False):
        scores[metric.__name__] = metric(predictions, references)
    return scores


@torch.no_grad()
def classify(model: Transformer, examples: list[Example], batch_size: int) -> list[float]:
    """The most likely class of each example, or its score. The model is in evaluation mode."""
    order, answers = [], []
    for indices in by_length(examples, batch_size, "  dev"):
        batch = collate([examples[i] for i in indices]).to(model.device)
        with model.autocast():
            logits = model(batch.ids, batch.mask).float()
        answers.append(logits[:, 0] if logits.shape[1] == 1 else logits.argmax(-1))
        order += indices
    back = torch.tensor(order).argsort()
    return torch.cat(answers).cpu()[back].tolist()  # one transfer for all


@torch.no_grad()
def dev_loss(model: Transformer, examples: list[Example], batch_size: int) -> float:
    """Mean loss of an answer's token in nats, unsmoothed: the log of the perplexity (Table 12)."""
    total = torch.zeros((), device=model.device)
    for indices in by_length(examples, batch_size, "  dev"):
        total += model.loss(collate([examples[i] for i in indices]))
    return total.item() / sum(e.targets for e in examples)


def dev_scores(model: Transformer, task: str, dev: Splits, batch_size: int) -> Scores:
    """What an epoch is judged by: the task's metric in GLUE, otherwise the loss."""
    training = model.training
    model.eval()
    if task in GLUE:
        answers = {split: classify(model, examples, batch_size) for split, examples in dev.items()}
        scores = glue_scores(task, answers, dev)
    else:
        scores = {"dev_loss": dev_loss(model, dev["dev"], batch_size)}
    model.train(training)
    return scores


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
        self.done_ids = self.ids.new_zeros(P, beams, longest)
        self.done_score = self.score.clone()
        self.done_length = self.ids.new_zeros(P, beams)
        self.score[:, 0] = 0.0  # all beams start alike: let one of them spread

    def step(self, log_p: Tensor, eos: Tensor) -> tuple[Tensor, Tensor]:
        """Go on by one token, log_p (P * beams, V). Returns from which beam each open one has come,
        (P, beams), and which prompts go on, (P,) bool."""
        # 1) The best continuations; even if half of 2 x beams end, enough can go on.
        P, n = self.score.shape
        V = log_p.shape[-1]
        total = self.score.view(-1, 1) + log_p
        score, index = total.view(P, -1).topk(n if self.rule == "lora" else 2 * n)
        beam = index // V
        token = index % V
        before = take(self.ids, beam)
        ids = torch.cat([before, token[..., None]], dim=-1)  # (P, n or 2 n, s)
        # 2) Those that end, and those that go on.
        s = ids.shape[-1]
        ends = torch.isin(token, eos) | (s == self.longest)
        self.finish(ids[:, :n], score[:, :n], ends[:, :n], eos)
        self.score, keep = score.masked_fill(ends, -math.inf).topk(n)
        self.ids = take(ids, keep)
        # 3) Which prompts are not done.
        best = self.score[:, 0] / s**self.penalty
        going = best > (-math.inf if self.rule == "lora" else self.done_score[:, -1])
        return beam.gather(1, keep), going

    def finish(self, ids: Tensor, score: Tensor, ends: Tensor, eos: Tensor) -> None:
        """Of these answers those that end, and of earlier ones, keep the best `beams`."""
        s = ids.shape[-1]
        score = (score / s**self.penalty).masked_fill(~ends, -math.inf)
        length = s - torch.isin(ids[..., -1], eos).long()  # the end token is left out
        padded = F.pad(ids, (0, self.longest - s))
        all_scores = torch.cat([self.done_score, score], dim=1)
        self.done_score, best = all_scores.topk(self.beams)
        all_ids = torch.cat([self.done_ids, padded], dim=1)
        self.done_ids = take(all_ids, best)
        all_lengths = torch.cat([self.done_length, length], dim=1)
        self.done_length = all_lengths.gather(1, best)

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
    eos: int | tuple[int, ...],
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
    # 1) The prompts, padded on the left, fill the cache.
    device, longest = model.device, max(map(len, prompts))
    ends = torch.tensor(eos, device=device)
    padded = torch.tensor([[-1] * (longest - len(p)) + p for p in prompts], device=device)
    real = padded >= 0
    state = Beams(len(prompts), beams, max_new_tokens, length_penalty, beam_rule, device)
    cache = Cache()
    h = model.hidden(padded.clamp(min=0), real, cache=cache)[:, -1]
    h = h.repeat_interleave(beams, dim=0)
    sees = real[:, None].expand(-1, beams, -1)  # (P, beams, S)
    itself = torch.eye(beams, dtype=torch.bool, device=device)
    waiting = list(range(len(prompts)))  # which prompt each row of the state answers
    answers: list[list[int]] = [[] for _ in prompts]
    while waiting:
        # 2) The next token of every beam.
        log_p = model.logits(h).float().log_softmax(-1)
        log_p = ban_repeats(log_p, state.ids.flatten(0, 1), no_repeat_ngram)
        if beam_rule == "lora":  # the others share the probability of banned tokens
            log_p = log_p.log_softmax(-1)
        beam, going = state.step(log_p, ends)
        # 3) A prompt that is done has its answer; the others go on.
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
            # 4) The new tokens see what their beams have seen, and themselves.
            sees = take(sees[rows], beam[rows])
            sees = torch.cat([sees, itself.expand(len(rows), -1, -1)], dim=-1)
            h = model.hidden(state.ids[..., -1], cache=cache, sees=sees).flatten(0, 1)
    return answers


def generate(
    model: Transformer, tokenizer: Tokenizer, prompts: list, batch_size: int = 16, **search: float
) -> list[str]:
    """A language model's answer to each prompt, text as in E2E or token ids; see `beam_search`."""
    ids = [encode_prompt(tokenizer, p) if isinstance(p, str) else p for p in prompts]
    if isinstance(prompts, str) or not all(ids):
        raise InputError("prompts are a list (one text is [text]), and none of them is empty")
    answers = [""] * len(ids)
    with model.autocast():
        for indices in by_length(ids, batch_size, "beam search"):
            batch = beam_search(model, [ids[i] for i in indices], tokenizer.ends, **search)
            for i, answer in zip(indices, batch, strict=True):
                answers[i] = tokenizer.decode(answer).strip()
    return answers


def build(s: Settings, device: torch.device) -> tuple[Transformer, Tokenizer]:
    """A run's model before training (pretrained, with LoRA and MoLEx), and its tokenizer."""
    head, task = "lm", None
    if s.task in GLUE:
        head, task = max(1, len(GLUE[s.task].labels)), s.task
    model = load(s.model, head=head, dropout=s.dropout, task=task)
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
    return s, RunFolder(folder).best(s)


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


def evaluate_run(folder: Path, device: torch.device, args: Namespace | None = None) -> Scores:
    """Score a run's best epoch on the dev set of GLUE or Alpaca or the test set of E2E. What is
    found goes to the run's folder (support/runs.py); an unfinished run's, and what `args`, a
    command line, change of decoding or data, to one within it."""
    s, again = evaluated_again(folder, args, MoLExConfig)
    model, tokenizer, _ = load_run(folder, device)
    run = RunFolder(folder, TASKS[s.task].metric)
    log = run.read_log()
    scores = run.scores_of(log, s, again) | dict(trainable=trainable(model))
    with run.evaluating(s, lambda: data_files(s.task, s.data), again) as out:
        scores.update(evaluate(model, tokenizer, s, out))
        if s.task == "alpaca":
            scores["train_ppl"] = math.exp(scores["train_loss"])
        shares = model.layers.routes.shares() if isinstance(model.layers, MoLEx) else None
        out.write_scores(scores, log, shares)
    return scores


def evaluate(model: Transformer, tokenizer: Tokenizer, s: Settings, out: RunFolder) -> Scores:
    """The scores of a model, a run's or one before fine-tuning; outputs and samples go to `out`."""
    model.eval().precision = s.precision
    if s.task == "e2e":
        merge(model)  # elsewhere what was measured in training is measured again to the bit
    model.cast_frozen()
    of_task = {"e2e": evaluate_e2e, "alpaca": evaluate_alpaca}.get(s.task, evaluate_glue)
    return of_task(model, tokenizer, s, out)


def evaluate_e2e(model: Transformer, tokenizer: Tokenizer, s: Settings, out: RunFolder) -> dict:
    """Decode the test set."""
    mrs, outputs, references = decode_test(model, tokenizer, s)
    out.write_table(["MR", "output"], zip(mrs, outputs, strict=True))
    out.write_references(references)
    out.write_samples(zip(mrs, outputs, (group[0] for group in references), strict=True))
    return e2e_scores(outputs, references)


def evaluate_glue(model: Transformer, tokenizer: Tokenizer, s: Settings, out: RunFolder) -> dict:
    """Classify the dev splits."""
    limit = min(s.max_length, model.config.max_positions)
    rows, dev, answers = {}, {}, {}  # of each split
    for split in GLUE[s.task].dev:
        rows[split] = read_glue(s.data, s.task, split)[: s.dev_limit]
        dev[split] = encode_glue(tokenizer, rows[split], limit)
        answers[split] = classify(model, dev[split], s.eval_batch)
    out.write_answers(rows, answers, GLUE[s.task].labels)
    return glue_scores(s.task, answers, dev)


def evaluate_alpaca(model: Transformer, tokenizer: Tokenizer, s: Settings, out: RunFolder) -> dict:
    """The dev set's loss; and answers to five prompts, to look at."""
    room = model.config.max_positions
    dev = read_examples(tokenizer, "alpaca", s.data, "dev", min(s.max_length, room))[: s.dev_limit]
    fitting = [e for e in dev if len(e.prompt) + s.max_new_tokens <= room]
    shown = fitting[:: max(1, len(fitting) // 5)][:5]  # five answers, to look at
    outputs = generate(model, tokenizer, [e.prompt for e in shown], s.eval_batch, **s.search())
    prompts = [tokenizer.decode(e.prompt).partition("### ")[2] for e in shown]
    right = [tokenizer.decode(e.answer).strip() for e in shown]
    out.write_samples(zip(prompts, outputs, right, strict=True))
    if isinstance(model.layers, MoLEx):
        model.layers.routes.counts.zero_()  # the routes to look at are those of the whole dev set
    loss = dev_loss(model, dev, s.eval_batch)
    return {"dev_loss": loss, "dev_ppl": math.exp(loss)}


def decode_test(model: Transformer, tokenizer: Tokenizer, s: Settings) -> tuple:
    """E2E's test MRs, the model's outputs and the references, each output on one line."""
    mrs, references = group_references(read_e2e(s.data, "test"))
    mrs = mrs[: s.test_limit]
    references = [[clean(r) for r in group] for group in references[: s.test_limit]]
    outputs = generate(model, tokenizer, [e2e_prompt(mr) for mr in mrs], s.eval_batch, **s.search())
    return mrs, [clean(" ".join(output.split())) for output in outputs], references


def answer(text: str, model: Transformer, tokenizer: Tokenizer, s: Settings) -> str:
    """The answer to a prompt in the form in which the task is scored. A model before fine-tuning
    goes on with a text that is no MR."""
    form = s.task
    if form == "alpaca":
        text = alpaca_prompt(text)
    elif not s.epochs and not MR.fullmatch(text):
        form = "text"
    elif "[" in text:
        text = e2e_prompt(text)
    model.eval().precision = s.precision
    return generate(model, tokenizer, [encode_prompt(tokenizer, text, form)], **s.search())[0]


def main() -> None:
    args = parse_eval(MoLExConfig, TASKS)
    device, folder = pick_device(args.device), locate(args.run or "nano/gpt2")
    task = "e2e"
    if args.predictions:
        scores = e2e_scores(*read_outputs(args.predictions, args.references))
    elif is_run(folder):
        s = evaluated_again(folder, args, MoLExConfig)[0]
        if args.prompt is not None:
            return print(answer(args.prompt, *load_model(folder, device), s))
        task, scores = s.task, evaluate_run(folder, device, args)
    else:  # a model before fine-tuning
        s = before_tuning(args, MoLExConfig)
        model, tokenizer = build(s, device)
        if args.prompt is not None:
            return print(answer(args.prompt, model, tokenizer, s))
        task, out = s.task, args.out / s.name.replace("-full-s", "-pretrained-s")
        with locked(out):
            scores = evaluate(model, tokenizer, s, RunFolder(out))
        RunFolder(out).print_samples()
    print_scores(task, scores, TASKS, args.json)


if __name__ == "__main__":
    command_line(main)
