"""Tests of the beam search in eval.py.

Two judges: transformers' own `generate`, token for token, and a slow beam search in plain Python
(one prompt at a time, no cache, lists), which also knows the ban on repeated n-grams in the answer
and MoLEx's routes.

    pytest tests/test_generate.py
"""

import inspect
import math
import random
from collections.abc import Callable

import pytest
import torch
from conftest import family_flags
from test_molex import VOCAB, lora_model, molex_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from data import Tokenizer, e2e_prompt, encode_prompt
from eval import ban_repeats, beam_search, generate
from model import Config, Transformer, load
from support.files import InputError
from support.settings import Settings
from support.tokenizers import BytePairs, byte_symbols

# ------------------------------------------------------------------- against transformers' generate


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Callable[[str], tuple[PreTrainedModel, Transformer]]:
    """pair(family): the same random model twice, theirs and ours. Its end token is 0. Weights of
    0.25 make its mind up enough that answers end at different lengths."""

    def make(family: str) -> tuple[PreTrainedModel, Transformer]:
        torch.manual_seed(1)
        if family == "gpt2":
            theirs = GPT2LMHeadModel(GPT2Config(
                vocab_size=40, n_embd=32, n_layer=3, n_head=4, n_positions=128, bos_token_id=0,
                eos_token_id=0, initializer_range=0.25,
            ))  # fmt: skip
        else:
            theirs = LlamaForCausalLM(LlamaConfig(
                vocab_size=40, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, intermediate_size=64, max_position_embeddings=128,
                bos_token_id=0, eos_token_id=0, initializer_range=0.25,
            ))  # fmt: skip
        folder = tmp_path_factory.mktemp(family)
        theirs.save_pretrained(folder)
        return theirs.eval(), load(str(folder))

    return make


def their_answers(
    model: PreTrainedModel, prompts: list[list[int]], eos: int, **search: float
) -> list[list[int]]:
    """What transformers answers to prompts padded on the left, up to the end token."""
    N = max(map(len, prompts))
    ids = torch.tensor([[eos] * (N - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (N - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids, attention_mask=mask, pad_token_id=eos, do_sample=False, early_stopping=False, **search
    )[:, N:].tolist()
    return [answer[: answer.index(eos)] if eos in answer else answer for answer in out]


@pytest.mark.parametrize(
    "family, beams, length_penalty, n_prompts",
    [
        ("gpt2", 10, 0.9, 50),
        ("gpt2", 10, 2.0, 12),
        ("gpt2", 10, 0.0, 12),
        ("gpt2", 4, 0.9, 12),
        ("llama", 10, 0.9, 50),
        ("llama", 4, 0.0, 12),
        ("gpt2", 1, 0.9, 12),
    ],
)
def test_beam_search_equals_transformers(pair, family, beams, length_penalty, n_prompts):
    theirs, ours = pair(family)
    dice = random.Random(0)
    prompts = [
        [dice.randrange(1, 40) for _ in range(dice.randrange(1, 20))] for _ in range(n_prompts)
    ]
    expected = their_answers(
        theirs, prompts, 0, num_beams=beams, length_penalty=length_penalty, max_new_tokens=64
    )
    search = (0, beams, length_penalty, 0, 64)
    assert beam_search(ours, prompts, *search) == expected
    assert [beam_search(ours, [p], *search)[0] for p in prompts] == expected
    assert n_prompts < 50 or len({len(answer) for answer in expected}) > 15, "too much alike"


def test_beam_search_equals_transformers_on_smollm2(smollm2):
    """A real pretrained model, on prompts as train.py makes them."""
    ours = load(str(smollm2))
    tokenizer = Tokenizer.load(smollm2, ours.config)
    mrs = [
        "name[The Copper Kettle], eatType[pub], priceRange[more than £30]",
        "name[Tern House], area[riverside]",
        "name[Saffron Street], eatType[coffee shop], food[French], customer rating[3 out of 5]",
        "name[Two Herons], food[Indian], familyFriendly[yes], near[the old mill]",
        "name[Pavilion], priceRange[cheap]",
        "name[The Long Table], food[English], area[city centre], near[Tern House]",
    ]
    prompts = [encode_prompt(tokenizer, e2e_prompt(mr)) for mr in mrs]
    assert len({len(p) for p in prompts}) > 4
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    expected = their_answers(
        theirs, prompts, tokenizer.eos, num_beams=4, length_penalty=0.9, max_new_tokens=24
    )
    del theirs
    search = (tokenizer.eos, 4, 0.9, 0, 24)
    assert beam_search(ours, prompts, *search) == expected
    for i in (1, 3, 4):
        assert beam_search(ours, [prompts[i]], *search) == [expected[i]]


# ----------------------------------------------------------------- against a search in plain Python


def repeats(answer: list[int], n: int) -> bool:
    """Whether the last n tokens have stood in the answer before."""
    grams = [answer[i : i + n] for i in range(len(answer) - n + 1)]
    return len(grams) > 1 and grams[-1] in grams[:-1]


def slow_beam_search(
    log_p: Callable[[list[int]], list[float]],
    beams: int,
    length_penalty: float,
    no_repeat_ngram: int,
    max_new_tokens: int,
    eos: int = 0,
) -> list[int]:
    """Of one prompt; log_p(answer so far) are the log-probabilities of the next token."""
    unfinished, finished = [(0.0, [])], []
    for s in range(1, max_new_tokens + 1):
        grown = [
            (score + p, [*answer, token])
            for score, answer in unfinished
            for token, p in enumerate(log_p(answer))
            if not no_repeat_ngram or not repeats([*answer, token], no_repeat_ngram)
        ]
        grown = sorted(grown, key=lambda beam: -beam[0])[: 2 * beams]
        for score, answer in grown[:beams]:
            if answer[-1] == eos or s == max_new_tokens:
                finished.append((score / s**length_penalty, answer))
        finished = sorted(finished, key=lambda beam: -beam[0])[:beams]
        unfinished = [(score, answer) for score, answer in grown if answer[-1] != eos][:beams]
        if not unfinished:
            break
        if len(finished) == beams and unfinished[0][0] / s**length_penalty <= finished[-1][0]:
            break
    best = finished[0][1]
    return best[:-1] if best[-1] == eos else best


def slow_answers(model: Transformer, batches: list[list[list[int]]], *search: float) -> list:
    """Without a cache. The prompts of one batch are together whenever the model is asked, so that
    they vote as one; only one of them has its answer behind it."""
    out = []
    for prompts in batches:
        for i in range(len(prompts)):

            def log_p(answer: list[int], prompts=prompts, i=i) -> list[float]:
                rows = [p + answer if k == i else p for k, p in enumerate(prompts)]
                N = max(map(len, rows))
                ids = torch.tensor([r + [0] * (N - len(r)) for r in rows])
                mask = torch.tensor([[n < len(r) for n in range(N)] for r in rows])
                given = torch.tensor([[n < len(p) for n in range(N)] for p in prompts])
                with torch.no_grad():
                    logits = model(ids, mask, given)[i, len(rows[i]) - 1]
                return logits.log_softmax(-1).tolist()

            out.append(slow_beam_search(log_p, *search))
    return out


def random_prompts(n: int, seed: int = 0, longest: int = 9) -> list[list[int]]:
    dice = random.Random(seed)
    return [[dice.randrange(1, VOCAB) for _ in range(dice.randint(1, longest))] for _ in range(n)]


@pytest.mark.parametrize("beams, length_penalty, ngram", [(3, 0.9, 4), (4, 2.0, 2), (2, 0.0, 1)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_beam_search_without_repeats_equals_the_slow_one(family, beams, length_penalty, ngram):
    model, prompts = lora_model(family), random_prompts(6)
    search = (beams, length_penalty, ngram, 14)
    expected = slow_answers(model, [[p] for p in prompts], *search)
    assert beam_search(model, prompts, 0, *search) == expected
    free = beam_search(model, prompts, 0, beams, length_penalty, 0, 14)
    assert free != expected, "the ban has changed nothing"


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sequence_routing_answers_the_same_alone_and_in_a_batch(family, top_k):
    model = molex_model(family, route="sequence", top_k=top_k, alpha=0.4)
    model.double()  # in float32 two answers can be a rounding error apart
    prompts, search = random_prompts(8, seed=1), (3, 0.9, 4, 14)
    alone = [beam_search(model, [p], 0, *search)[0] for p in prompts]
    assert beam_search(model, prompts, 0, *search) == alone
    assert slow_answers(model, [[p] for p in prompts[:4]], *search) == alone[:4]
    assert beam_search(lora_model(family), prompts, 0, *search) != alone


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_batch_routing_holds_the_route_of_the_batchs_prompts(family, top_k):
    model = molex_model(family, route="batch", top_k=top_k, alpha=0.4)
    prompts, search = random_prompts(4, seed=3), (3, 0.9, 4, 14)
    together = beam_search(model, prompts, 0, *search)
    assert together == slow_answers(model, [prompts], *search)
    assert together != [beam_search(model, [p], 0, *search)[0] for p in prompts]


# ---------------------------------------------------------------------------------- no n-gram twice


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_ban_repeats_by_its_definition(n):
    banned = allowed = 0
    for s in range(20):
        answers, log_p = torch.randint(3, (20, s)), torch.randn(20, 3)
        got = ban_repeats(log_p.clone(), answers, n)
        for row in range(20):
            for token in range(3):
                if repeats([*answers[row].tolist(), token], n):
                    banned += 1
                    assert got[row, token] == -math.inf
                else:
                    allowed += 1
                    assert got[row, token] == log_p[row, token]
    assert banned > 50 and allowed > 50


def test_the_answer_may_repeat_the_prompt_but_not_itself():
    """A model that counts 0 1 2 3 4 0 1 2 ... on and on, after a prompt that did so, too."""
    config = Config(
        family="gpt2", **family_flags("gpt2"),
        vocab_size=7, n_layer=1, n_head=1, n_kv_head=1, d_model=7, d_head=7, d_ff=7,
        max_positions=64, norm_eps=1e-5, activation="gelu", tied=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.norm.weight.fill_(1.0)
        model.embed.weight.copy_(torch.eye(7))
        model.head.weight.copy_(torch.rand(7, 7))  # the second choices
        for token in range(5):
            model.head.weight[(token + 1) % 5, token] += 5
    prompt = [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    search = (7, 4, 0.9)  # with an end token that no model could write
    assert beam_search(model, [prompt], *search, 0, 20) == [prompt + prompt]
    for n in (2, 3, 4):
        (answer,) = beam_search(model, [prompt], *search, n, 20)
        assert answer[: n + 4] == (prompt + prompt)[: n + 4]  # until the first n-gram comes again
        assert len(answer) == 20
        assert not any(repeats(answer[:end], n) for end in range(21))


# ------------------------------------------------------------------------------------ the procedure


def test_prompts_go_through_once_and_finished_ones_leave(pair):
    _, model = pair("gpt2")
    prompts, beams, shapes = random_prompts(12, seed=4), 5, []
    model.layers.blocks[0].register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    answers = beam_search(model, prompts, 0, beams, no_repeat_ngram=0)
    first, *rest = shapes
    assert first[:2] == (12, max(map(len, prompts)))  # each prompt once, whatever the beams
    assert rest[0][:2] == (12, beams)  # then its beams side by side
    assert all(tokens == beams for _, tokens, _ in rest)
    rows = [n for n, _, _ in rest]
    assert rows == sorted(rows, reverse=True)
    assert len(set(rows)) > 4
    for number, p in enumerate(prompts):  # as many passes as it needs alone, and no more
        shapes.clear()
        assert beam_search(model, [p], 0, beams, no_repeat_ngram=0) == [answers[number]]
        rows[: len(shapes) - 1] = [n - 1 for n in rows[: len(shapes) - 1]]
    assert not any(rows)


def test_the_search_keeps_nothing_for_a_backward_pass():
    model, seen = lora_model("gpt2").train(), []
    model.layers.register_forward_hook(lambda _, args, out: seen.append(out.requires_grad))
    model(torch.tensor([[3, 4]]))
    beam_search(model, random_prompts(2), 0, beams=2, max_new_tokens=3)
    assert seen[0] and len(seen) > 2 and not any(seen[1:])


def test_generate_answers_in_the_order_of_the_prompts_and_without_special_tokens():
    """A vocabulary of the 256 bytes and 100 special tokens, the first of them the end of text."""
    config = Config(
        family="gpt2", **family_flags("gpt2"),
        vocab_size=356, n_layer=2, n_head=2, n_kv_head=2, d_model=32, d_head=16,
        d_ff=32, max_positions=64, norm_eps=1e-5, activation="gelu", tied=False, eos=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config).eval()
    with torch.no_grad():
        model.head.weight *= 10
    spec = dict(model=dict(vocab=byte_symbols(), merges=[]), pre_tokenizer=dict(type="ByteLevel"))
    tokenizer = Tokenizer(config, BytePairs(spec, 356))
    texts = [
        "name : Saffron Street | near : Tern House",
        "pub",
        "price : high",
        "a",
        "food : Thai | Type : pub",
        "b",
    ]
    search = dict(beams=2, length_penalty=1.0, no_repeat_ngram=3, max_new_tokens=12)
    expected, special = [], 0
    for text in texts:
        (answer,) = beam_search(model, [[*text.encode(), 256]], 256, **search)
        special += sum(token > 256 for token in answer)
        expected.append(bytes(token for token in answer if token < 256).decode(errors="replace"))
    assert special > 5 and len(set(expected)) == len(texts)
    for batch_size in (1, 2, 16):
        found = generate(model, tokenizer, texts, batch_size, **search)
        assert found == [text.strip() for text in expected]
    with pytest.raises(InputError, match="one text is"):  # its letters are no prompts
        generate(model, tokenizer, texts[0])
    with pytest.raises(InputError, match="none of them is empty"):
        generate(model, tokenizer, [texts[0], []])


def test_the_defaults_are_table_6s():
    names = inspect.signature(beam_search).parameters
    found = [names[n].default for n in ("beams", "length_penalty", "no_repeat_ngram")]
    assert found == [10, 0.9, 4] and names["beam_rule"].default == "transformers"
    assert names["max_new_tokens"].default == Settings.max_new_tokens
