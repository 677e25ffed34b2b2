"""Table 13: MMLU, AGIEval English, HellaSwag and ARC-Challenge, in lm-evaluation-harness.

Appendix E.3 fine-tunes Llama-3.2-1B on Alpaca and reports accuracy (%):

            MMLU   AGIEval English   HellaSwag   ARC-Challenge
    LoRA    30.42            19.16       47.14           36.69
    MoLEx   31.51            19.81       48.23           37.80

EleutherAI's harness (Gao et al., 2021) owns the questions, their wording and the scoring. All it
asks of a model is how likely a continuation of a context is, and what comes next: `HarnessModel`.

    pip install -r requirements-lm-eval.txt
    python experiments/table13_lm_eval.py                          small: nano/gpt2, no download
    python experiments/table13_lm_eval.py runs/LORA runs/MOLEX     full: the four benchmarks
    python experiments/table13_lm_eval.py runs/MOLEX --tasks hellaswag --limit 100

The small form has a task of its own, e2e_choice, made of nano/e2e: a description of a restaurant,
and which of four others is of the same one? Chance is 25%.

Where the paper is silent:

- Prompts, number of shots, which accuracy: whatever the harness has by default, which is no shots
  in these four. Both its accuracies are shown: `acc` takes the answer of highest log-likelihood,
  `acc_norm` of highest log-likelihood per character.
- Routing: only the context of a request votes, as in training, and each request as if it were
  alone. A batch of one is routed as route="sequence" would, so that is what a model with
  route="batch" is set to. Then requests can share a batch, and no answer depends on what else is
  asked; all answers to one question are read by the same layers, because they share the context.
- Precision: float32 on every device, so that rounding to bfloat16 does not settle close calls.
"""

import logging
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import Example, collate, group_references, read_e2e
from eval import beam_search, load_model
from lora import merge
from model import ClassificationHead
from molex import MoLEx
from support import settings
from support.cli import Parser, at_least, command_line, pick_device
from support.files import InputError, reason

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:  # main says so; --help works
    MISSING, Instance, TemplateLM = error.name, None, object
else:
    MISSING = None

PAPER = settings.PAPER["table13"]


class HarnessModel(TemplateLM):
    """A run, or a pretrained model, as the harness wants it.

    Text becomes tokens as in the harness's own Hugging Face model. TemplateLM, its base class,
    moves a context's trailing spaces to the continuation, encodes both as one string, splits that
    where the context alone ends, and stands the bos token (else eos) in for an empty context; too
    long a context loses its beginning. One thing differs: a text that happens to contain a special
    token's name is just text here.

    name: a run folder, a checkpoint folder or a hub name. Raises InputError if it is none of these,
    or no causal language model.
    """

    def __init__(self, name: str, device: torch.device, batch_size: int = 16) -> None:
        super().__init__()
        self.model, self.tokenizer = load_model(name, device)
        c, layers = self.model.config, self.model.layers
        if c.family == "roberta" or isinstance(self.model.head, ClassificationHead):
            raise InputError(f"{name} does not predict the next token; use a gpt2 or llama model")
        if self.tokenizer.eos is None:
            raise InputError(f"the config.json of {name} names no eos_token_id")
        merge(self.model)
        if isinstance(layers, MoLEx):
            layers.config = replace(layers.config, route="sequence")
        self.limit, self.batch_size, self._device = c.max_positions, batch_size, device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.model.config.bos is None else self.model.config.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        start = [] if add_special_tokens is False else self.tokenizer.start
        return start + self.tokenizer.encode(string)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(anything, context ids, continuation ids) -> (log-likelihood of the continuation, whether
        greedy decoding would write it), in nats.

        Requests that differ in the last token only, as the answers A to D do, are one row of a
        batch. Longest first: what does not fit into memory shows at once. Raises InputError if
        either part is empty, or the continuation longer than the model has positions.
        """
        rows: dict[tuple, list[int]] = defaultdict(list)
        for i, (_, context, answer) in enumerate(requests):
            if not context or not 1 <= len(answer) <= self.limit:
                raise InputError(
                    f"a request of {len(context)} + {len(answer)} tokens: it needs a context, and"
                    f" a continuation of 1 to {self.limit}"
                )
            context = context[-(self.limit + 1 - len(answer)) :]  # its last token is not read
            rows[tuple(context), tuple(answer[:-1])].append(i)
        order = sorted(rows, key=lambda row: len(row[0]) + len(row[1]), reverse=True)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm or None) as bar:
            for at in range(0, len(order), self.batch_size):
                some = order[at : at + self.batch_size]
                examples = [Example(list(row[0]), requests[rows[row][0]][2]) for row in some]
                batch = collate(examples).to(self.device)
                ids, mask, prompt = (x[:, :-1] for x in (batch.ids, batch.mask, batch.prompt))
                h, N = self.model.hidden(ids, mask, prompt), batch.ids.shape[1]
                h = h[batch.where // N, batch.where % N]  # only what predicts a continuation
                log_p = self.model.logits(h).float().log_softmax(-1)  # (M, V)
                pieces = log_p.split([len(answer) + 1 for _, answer in some])
                for row, piece in zip(some, pieces, strict=True):
                    best = piece.argmax(-1).tolist()
                    for i in rows[row]:
                        answer = torch.tensor(requests[i][2], device=self.device)
                        total = piece.gather(1, answer[:, None]).sum().item()
                        results[i] = total, best == requests[i][2]
                    bar.update(len(rows[row]))
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of each whole text, in nats: a window of the model's length at a time,
        every token once. There is no prompt to vote; the one token before a window does."""
        windows = [
            (i, *make_disjoint_window(window))
            for i, request in enumerate(requests)
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.limit, context_len=1
            )
        ]
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm)
        for (i, _, _), (total, _) in zip(windows, found, strict=True):
            totals[i] += total
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What greedy decoding writes after each context, up to the first of the request's stop
        strings: AGIEval's math questions have no answers to choose from. Raises InputError if a
        request asks for samples or leaves no room for a context."""
        groups: dict[int, list[int]] = defaultdict(list)
        settings = [normalize_gen_kwargs(request.args[1]) for request in requests]
        for i, setting in enumerate(settings):
            if setting["do_sample"] or not 0 < setting["max_gen_toks"] < self.limit:
                raise InputError(f"only greedy decoding within {self.limit} tokens, not {setting}")
            groups[setting["max_gen_toks"]].append(i)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="greedy decoding", disable=disable_tqdm or None) as bar:
            for length, group in groups.items():
                prompts = {i: self.tok_encode(requests[i].args[0]) for i in group}
                prompts = {i: ids[length - self.limit :] for i, ids in prompts.items()}
                group = sorted(group, key=lambda i: len(prompts[i]), reverse=True)
                for at in range(0, len(group), self.batch_size):
                    some = group[at : at + self.batch_size]
                    how = dict(beams=1, no_repeat_ngram=0, max_new_tokens=length)
                    ids = [prompts[i] for i in some]
                    found = beam_search(self.model, ids, self.eot_token_id, **how)
                    for i, ids in zip(some, found, strict=True):
                        texts[i] = self.tokenizer.decode(ids)
                        for stop in filter(None, settings[i]["until"]):
                            texts[i] = texts[i].split(stop)[0]
                    bar.update(len(some))
        return texts


def e2e_choice(**_) -> dict[str, Dataset]:
    """The questions of the small form: after the first description of an MR, its second and those
    of the next three MRs. dev serves as examples where --num-fewshot asks for some."""
    splits = {}
    for split in ("dev", "test"):
        _, groups = group_references(read_e2e(Path("nano/e2e"), split))
        questions = []
        for i, group in enumerate(groups):
            choices = [groups[(i + k) % len(groups)][1] for k in range(4)]
            turn = i % 4  # the right answer stands in every place equally often
            choices = choices[-turn:] + choices[:-turn]
            questions.append(dict(text=group[0], choices=choices, answer=turn))
        splits[split] = Dataset.from_list(questions)
    return splits


E2E_CHOICE = dict(
    task="e2e_choice",
    custom_dataset=e2e_choice,
    output_type="multiple_choice",
    test_split="test",
    validation_split="dev",
    doc_to_text="{{text}}",
    doc_to_choice="{{choices}}",
    doc_to_target="{{answer}}",
    metric_list=[{"metric": metric} for metric in ("acc", "acc_norm")],
)


def main() -> None:
    parser = Parser(description="Table 13: models in EleutherAI's lm-evaluation-harness")
    parser.add_argument(
        "models", nargs="*", help="run folders, checkpoint folders or hub names; none: small form"
    )
    parser.add_argument("--tasks", nargs="+", help="names in the harness; default: Table 13's four")
    parser.add_argument("--limit", type=at_least(1), help="first questions of every (sub)task only")
    parser.add_argument("--num-fewshot", type=at_least(0), help="examples before a question")
    parser.add_argument("--batch-size", type=at_least(1), default=16, help="requests at once")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    args = parser.parse_args()
    device = pick_device(args.device)
    if MISSING:
        raise InputError(
            f"lm-evaluation-harness is not installed (there is no {MISSING}):"
            " pip install -r requirements-lm-eval.txt"
        )
    tasks = args.tasks or ([*PAPER] if args.models else ["e2e_choice"])
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager()
    unknown = {*tasks} - {"e2e_choice", *manager.all_groups, *manager.all_subtasks}
    if unknown:
        raise InputError(f"the harness has no task {', no task '.join(sorted(unknown))}")
    specs = [E2E_CHOICE if task == "e2e_choice" else task for task in tasks]

    found: dict[tuple[str, str], dict] = {}
    for name in args.models or ["nano/gpt2"]:
        model = HarnessModel(name, device, args.batch_size)
        try:
            how = dict(limit=args.limit, num_fewshot=args.num_fewshot, log_samples=False)
            results = simple_evaluate(model, tasks=specs, task_manager=manager, **how)["results"]
        except OSError as error:
            raise InputError(f"a task's data cannot be fetched: {reason(error)}") from error
        found |= {(task, name): results[task] for task in tasks}

    width = max(len(name) for name in (*args.models, "nano/gpt2"))
    head = f"{'task':15}{'model':{width}}{'acc':>8}{'± s.e.':>8}{'acc_norm':>10}"
    print(f"{head}{'paper: LoRA':>13}{'MoLEx':>7}")
    for (task, name), scores in found.items():
        keys = [f"{key},none" for key in ("acc", "acc_stderr", "acc_norm")]
        values = [f"{100 * scores[key]:.2f}" if key in scores else "-" for key in keys]
        lora, molex = PAPER.get(task, "--")
        ours = f"{task:15}{name:{width}}{values[0]:>8}{values[1]:>8}{values[2]:>10}"
        print(f"{ours}{lora:>13}{molex:>7}")


if __name__ == "__main__":
    command_line(main)
