"""The scheduler: every feature against each request alone, the book-keeping against a naive one."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from instructcore.config import OptimConfig
from instructcore.errors import UserError
from instructcore.generate import Generator, score
from instructcore.model import GPT, ModelConfig
from instructcore.scheduler import Request, SamplingParams, Scheduler, _Pages
from instructcore.tokenizer import Tokenizer
from instructcore.train import AdamW, mix

TOKENIZER = Tokenizer.bytes()
FREE = SamplingParams(max_tokens=12, seed=3, ignore_eos=True)


def tiny(context: int = 96) -> GPT:
    """Weights wide enough for the next token to depend on the last ones."""
    shape = {"layers": 2, "heads": 4, "kv_heads": 2, "width": 64, "mlp_width": 96}
    model = GPT(ModelConfig(vocab_size=259, context=context, **shape))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.08)
    return model


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny()


def text_of(length: int, seed: int = 7) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


def finish(scheduler: Scheduler) -> None:
    while scheduler.busy:
        scheduler.step()


def alone(model: GPT, prompt: list[int], params: SamplingParams, sample: int = 0):
    """The `sample`-th response to a prompt, from a scheduler that has seen nothing else."""
    seed = mix(params.seed, sample) if sample else params.seed
    return Generator(model, TOKENIZER).generate([prompt], replace(params, n=1, seed=seed))[0]


def assert_same(ours, theirs) -> None:
    """Equal responses; log-probabilities but for the order of a matrix product's sums."""
    assert ours.token_ids == theirs.token_ids
    assert (ours.text, ours.finish_reason) == (theirs.text, theirs.finish_reason)
    for name in ("logprobs", "sampled_logprobs"):
        a, b = (torch.tensor(getattr(c, name)) for c in (ours, theirs))
        assert torch.allclose(a, b, atol=1e-4)


def assert_empty(scheduler: Scheduler) -> None:
    """No page is lost, and none is held."""
    pages, stats = scheduler._pages, scheduler.stats()
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    assert set(pages.holders) == {0}
    assert Counter([*pages.free, *pages.idle]) == Counter(range(len(pages.holders)))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
def test_samples_of_a_prompt_share_its_prefill(model, length):
    prompt, params = text_of(length), replace(FREE, n=5)
    scheduler = Scheduler(model, TOKENIZER)
    requests = scheduler.add(prompt, params)
    scheduler.step()
    stats = scheduler.stats()
    assert stats.tokens_fed == length and stats.running == 5  # each has its first token
    assert stats.blocks_used == length // 16 + 5 * (length % 16 > 0)
    finish(scheduler)
    assert scheduler.stats().tokens_fed == length
    for i, request in enumerate(requests):
        assert request.index == i
        assert_same(request.completion, alone(model, prompt, params, i))
    assert len({tuple(r.token_ids) for r in requests}) == 5
    assert_empty(scheduler)


def test_samples_that_do_not_fit_at_once(model):
    params = replace(FREE, n=7)
    scheduler = Scheduler(model, TOKENIZER, max_batch=3)
    requests = scheduler.add(text_of(37), params)
    finish(scheduler)
    # Of each later three the first finds two whole pages, and the others share what it is fed.
    assert scheduler.stats()[6:8] == (37 + 5 + 5, 2 * 32)
    for i, request in enumerate(requests):
        assert_same(request.completion, alone(model, text_of(37), params, i))


def test_prefix_cache(model):
    scheduler, prompt = Scheduler(model, TOKENIZER), text_of(48)

    def run(ids: list[int]) -> tuple[Request, int, int]:
        before = scheduler.stats()
        (request,) = scheduler.add(ids, FREE)
        finish(scheduler)
        after = scheduler.stats()
        assert_same(request.completion, alone(model, ids, FREE))
        return request, after.cache_hits - before.cache_hits, after.tokens_fed - before.tokens_fed

    first, hits, fed = run(prompt)
    assert (hits, fed) == (0, 48)
    assert run(prompt)[1:] == (32, 16)  # never all of it: the last token has to be fed
    assert run(prompt + [1])[1:] == (48, 1)
    assert run(prompt[:40])[1:] == (32, 8)
    assert run([prompt[0] ^ 1, *prompt[1:]])[1:] == (0, 48)  # equal pages after another one
    # A conversation goes on: of its 48 + 12 tokens all but the last were fed, 3 whole pages.
    assert run(prompt + first.token_ids + [5])[1:] == (48, 13)
    assert_empty(scheduler)


def test_a_change_of_weights_needs_no_call():
    model = tiny()
    scheduler, prompt = Scheduler(model, TOKENIZER), text_of(40)
    optimizer = AdamW(model, OptimConfig(lr=0.05))

    def update() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(0.05)
        optimizer.zero_grad()

    scheduler.add(prompt, FREE)
    finish(scheduler)
    update()
    (request,) = scheduler.add(prompt, FREE)
    finish(scheduler)
    assert scheduler.stats().cache_hits == 0
    assert_same(request.completion, alone(model, prompt, FREE))
    # One that runs while they change leaves nothing for those after it.
    changed = replace(FREE, seed=8, max_tokens=40)
    (early,) = scheduler.add(text_of(20, 1), changed)
    scheduler.step()
    update()
    (late,) = scheduler.add(text_of(20, 2), FREE)
    finish(scheduler)
    assert_same(late.completion, alone(model, text_of(20, 2), FREE))
    before = scheduler.stats().cache_hits
    (again,) = scheduler.add(early.ids, replace(FREE, max_tokens=4))
    finish(scheduler)
    assert scheduler.stats().cache_hits == before
    assert_same(again.completion, alone(model, early.ids, replace(FREE, max_tokens=4)))


def test_pages_against_a_naive_book():
    """Random sequences grow, end and begin anew; pages hold what the book says they hold."""
    rng, size, pages = random.Random(0), 2, _Pages(40)
    holds: dict[int, tuple[int, ...]] = {}  # page: the whole text up to its end
    running: list[list] = []  # [text, pages, node, whole]
    found_any = evicted = 0
    for _ in range(10000):
        action = rng.random()
        if action < 0.002:
            pages.forget()
            holds = {}
            for sequence in running:
                sequence[2] = None
        elif action < 0.2 or not running:
            text = [rng.randint(0, 1) for _ in range(rng.randint(0, 8))]
            parts = [tuple(text[i : i + size]) for i in range(0, len(text) - size + 1, size)]
            found, node = pages.find(parts)
            for i, page in enumerate(found):
                assert holds[page] == tuple(text[: (i + 1) * size])
            found_any += len(found)
            pages.share(found)
            running.append([text[: len(found) * size], found, node, len(found)])
        elif action < 0.82:
            sequence = rng.choice(running)
            text, held, node, whole = sequence
            if len(text) == len(held) * size:
                if not pages.available:
                    continue
                evicted += not pages.free
                held.append(pages.take())
                holds.pop(held[-1], None)
            text.append(rng.randint(0, 1))
            if len(text) % size == 0 and node is not None:
                known, _ = pages.find(tuple(text[i : i + size]) for i in range(0, len(text), size))
                sequence[2] = pages.remember(held[whole], node, tuple(text[-size:]))
                sequence[3] += 1
                if len(known) * size < len(text):
                    holds[held[whole]] = tuple(text)
        else:
            pages.release(running.pop(rng.randrange(len(running)))[1])
        held_by = Counter(page for _, held, *_ in running for page in held)
        assert [held_by[page] for page in range(40)] == pages.holders
        everywhere = Counter([*pages.free, *pages.idle, *held_by])
        assert everywhere == Counter(range(40))
    assert found_any > 300 and evicted > 100


def test_the_oldest_page_goes_first():
    pages = _Pages(4)
    for text in (1, 2):
        held = [pages.take(), pages.take()]
        node = pages.remember(held[0], 0, (text, 0))
        pages.remember(held[1], node, (text, 1))
        pages.release(held)
    assert [len(pages.find([(t, 0), (t, 1)])[0]) for t in (1, 2)] == [2, 2]
    pages.take()  # the end of the older text, which is of no use without its beginning
    assert [len(pages.find([(t, 0), (t, 1)])[0]) for t in (1, 2)] == [1, 2]
    pages.share(pages.find([(1, 0)])[0])
    pages.take()
    assert [len(pages.find([(t, 0), (t, 1)])[0]) for t in (1, 2)] == [1, 1]


def test_preemption(model):
    """Pages for one sequence as long as the context; seven that together need far more."""
    prompts = [text_of(10 + i, i) for i in range(7)]
    params = [replace(FREE, seed=i, max_tokens=60 + i, presence_penalty=i % 2) for i in range(7)]
    scheduler = Scheduler(model, TOKENIZER, cache_bytes=1, block_size=4)
    requests = [scheduler.add(*pair)[0] for pair in zip(prompts, params, strict=True)]
    oldest_done = []
    while scheduler.busy:
        oldest_done += [r for r, piece in scheduler.step() if piece.completion]
    assert scheduler.stats().preemptions > 5
    assert oldest_done[0] is requests[0]
    for prompt, request, p in zip(prompts, requests, params, strict=True):
        assert_same(request.completion, alone(model, prompt, p))
    assert_empty(scheduler)
    # While a prompt is fed in pieces, and with scores of the prompt.
    scheduler = Scheduler(model, TOKENIZER, cache_bytes=1, block_size=4, prefill_tokens=5)
    params = [replace(p, prompt_logprobs=True) for p in params]
    requests = [scheduler.add(*pair)[0] for pair in zip(prompts, params, strict=True)]
    finish(scheduler)
    assert scheduler.stats().preemptions > 2
    for prompt, request, p in zip(prompts, requests, params, strict=True):
        assert_same(request.completion, alone(model, prompt, p))
        assert len(request.completion.prompt_logprobs) == len(prompt)
    assert_empty(scheduler)


def test_a_long_prompt_is_fed_beside_the_others(model):
    scheduler = Scheduler(model, TOKENIZER, prefill_tokens=7)
    (first,) = scheduler.add(text_of(5), replace(FREE, max_tokens=30))
    scheduler.step()
    (long,) = scheduler.add(text_of(60, 1), FREE)
    for i in range(8):  # 8 pieces of 7 and one of 4
        fed = scheduler.stats().tokens_fed
        assert [r for r, _ in scheduler.step()] == [first]
        assert scheduler.stats().tokens_fed - fed == 7 and len(first.token_ids) == i + 2
    assert [r for r, _ in scheduler.step()] == [first, long]
    finish(scheduler)
    assert_same(long.completion, alone(model, text_of(60, 1), FREE))


def test_abort_frees_at_once(model):
    scheduler = Scheduler(model, TOKENIZER, max_batch=4, prefill_tokens=16)
    running = scheduler.add(text_of(10), replace(FREE, n=3, max_tokens=40))
    (partial,) = scheduler.add(text_of(50, 1), FREE)
    (waiting,) = scheduler.add(text_of(9, 2), FREE)
    scheduler.step()
    assert scheduler.stats()[:2] == (4, 1) and not partial.token_ids
    for request in (waiting, partial, running[1]):
        blocks, used = len(request.blocks), scheduler.stats().blocks_used
        scheduler.abort(request)
        scheduler.abort(request)  # again is nothing
        assert scheduler.stats().blocks_used == used - blocks
        assert request.completion is None
    assert scheduler.stats()[:2] == (2, 0)
    finish(scheduler)
    for i in (0, 2):
        expected = alone(model, text_of(10), replace(FREE, max_tokens=40), i)
        assert_same(running[i].completion, expected)
    scheduler.abort(running[0])
    assert_empty(scheduler)
    # A stream that is closed leaves nothing behind.
    generator = Generator(model, TOKENIZER)
    stream = generator.stream(text_of(30), FREE)
    next(stream)
    stream.close()
    assert not generator.scheduler.busy
    assert_empty(generator.scheduler)


def test_interleaved_streams(model):
    generator = Generator(model, TOKENIZER)
    pairs = [(text_of(20, i), replace(FREE, seed=i, max_tokens=10 + 5 * i)) for i in range(3)]
    streams = [generator.follow([ids], params) for ids, params in pairs]
    texts, done = [""] * 3, [None] * 3
    while not all(done):
        for i, stream in enumerate(streams):
            for piece in next(stream, ()):
                texts[i] += piece.text
                done[i] = piece.completion
    for (ids, params), text, completion in zip(pairs, texts, done, strict=True):
        assert text == completion.text
        assert_same(completion, alone(model, ids, params))
    assert not any([*stream] for stream in streams)
    assert not model._freezes and not model._casts


def test_bias_and_allowed_tokens(model):
    prompt, greedy = text_of(8), replace(FREE, temperature=0.0)
    with torch.no_grad():
        logits = model(torch.tensor(prompt), torch.tensor([0, 8], dtype=torch.int32))[-1]
    order = logits.argsort(descending=True).tolist()
    raw = logits.log_softmax(-1)
    gap = float(logits[order[0]] - logits[order[9]])
    for bias, want in (
        ({order[9]: gap + 0.01}, order[9]),
        ({order[9]: gap - 0.01}, order[0]),
        ({order[0]: -100.0, order[1]: -100.0}, order[2]),
        ({id: 5.0 for id in range(259)}, order[0]),
    ):
        done = alone(model, prompt, replace(greedy, logit_bias=bias))
        assert done.token_ids[0] == want
        assert math.isclose(done.logprobs[0], raw[want], abs_tol=1e-4)  # raw: without the bias
    few = (order[3], order[7], order[8])
    done = alone(model, prompt, replace(FREE, allowed_token_ids=few, max_tokens=40))
    assert set(done.token_ids) == set(few)
    renormalised = logits[list(few)].log_softmax(-1)[few.index(done.token_ids[0])]
    assert math.isclose(done.sampled_logprobs[0], renormalised, abs_tol=1e-4)
    # Rows have their own, in whichever slot they run; min_tokens ends when it should.
    each = [
        FREE,
        replace(FREE, allowed_token_ids=few),
        replace(FREE, logit_bias={3: 100.0}),
        replace(FREE, min_tokens=6, stop_token_ids=tuple(range(0, 259, 2)), max_tokens=40),
        replace(FREE, min_tokens=3, allowed_token_ids=few, stop_token_ids=few[:2], max_tokens=60),
        replace(FREE, frequency_penalty=2.0, allowed_token_ids=few),
    ] * 2
    each = [replace(p, max_tokens=p.max_tokens + i) for i, p in enumerate(each)]
    prompts = [text_of(5 + i, i) for i in range(len(each))]
    done = Generator(model, TOKENIZER, max_batch=5).generate(prompts, each)
    for ids, params, completion in zip(prompts, each, done, strict=True):
        assert_same(completion, alone(model, ids, params))
    assert set(done[2].token_ids) == {3}
    assert done[3].finish_reason == "stop" and all(id % 2 for id in done[3].token_ids[:6])
    assert done[4].finish_reason == "stop" and set(done[4].token_ids[:3]) == {few[2]}


@pytest.mark.parametrize("chunk", [5, 16, 512])
def test_logprobs_of_likeliest_tokens_and_of_the_prompt(model, chunk):
    prompt = text_of(41)
    params = replace(FREE, prompt_logprobs=True, top_logprobs=4, n=3)
    generator = Generator(model, TOKENIZER, prefill_tokens=chunk)
    generator.generate([prompt])  # what it leaves in the cache must not shorten the scores
    others = [replace(FREE, top_logprobs=20), FREE]
    done = generator.generate([prompt, prompt[:9], prompt], [params, *others])
    assert [len(c.top_logprobs or ()) for c in done] == [12, 12, 12, 12, 0]
    assert done[3].prompt_logprobs is done[4].prompt_logprobs is None
    for ids, completion in zip([prompt] * 3 + [prompt[:9]], done, strict=False):
        whole = ids + completion.token_ids
        with torch.no_grad():
            starts = torch.tensor([0, len(whole)], dtype=torch.int32)
            truth = model(torch.tensor(whole), starts).log_softmax(-1)[:-1]
        tops = completion.top_logprobs
        if completion.prompt_logprobs is not None:
            assert completion.prompt_logprobs[0] is completion.prompt_top_logprobs[0] is None
            expected = score(model, [ids])[0]
            ours = torch.tensor(completion.prompt_logprobs[1:])
            assert torch.allclose(ours, expected, atol=1e-4)
            tops = completion.prompt_top_logprobs[1:] + tops
        count = 4 if completion.prompt_logprobs else 20
        for top, row in zip(tops, truth[-len(tops) :], strict=True):
            best = row.topk(count)
            assert list(top) == best.indices.tolist()
            assert torch.allclose(torch.tensor([*top.values()]), best.values, atol=1e-4)
        for id, logprob, top in zip(
            completion.token_ids, completion.logprobs, completion.top_logprobs, strict=True
        ):
            assert top.get(id, logprob) == logprob  # one number, whoever tells it
    # Scores alone, of a text that fills the context, too.
    for ids in (prompt, text_of(96, 1), [7]):
        params = SamplingParams(max_tokens=0, prompt_logprobs=True)
        (echo,) = generator.generate([ids], params)
        assert (echo.token_ids, echo.text, echo.finish_reason) == ([], "", "length")
        ours, expected = torch.tensor(echo.prompt_logprobs[1:]), score(model, [ids])[0]
        assert torch.allclose(ours, expected, atol=1e-4)
    assert_empty(generator.scheduler)


def test_a_thousand_random_requests_leave_nothing(model, full):
    rng = random.Random(1)
    scheduler = Scheduler(
        model, TOKENIZER, max_batch=24, prefill_tokens=64, cache_bytes=1 << 18, block_size=8
    )
    texts = [text_of(90, i) for i in range(6)]
    left, live, kept = 5000 if full else 1000, [], []
    while left or scheduler.busy:
        if left and len(live) < 60:
            ids = rng.choice(texts)[: rng.randint(1, 80)]
            params = SamplingParams(
                max_tokens=rng.randint(1, 14),
                temperature=rng.choice([0.0, 0.7, 1.0]),
                top_p=rng.choice([1.0, 0.9]),
                seed=rng.randrange(1 << 40),
                n=rng.choice([1, 1, 1, 2, 4]),
                presence_penalty=rng.choice([0.0] * 8 + [1.0]),
                min_tokens=rng.choice([0] * 8 + [3]),
                logit_bias=rng.choice([{}] * 8 + [{65: 4.0}]),
                prompt_logprobs=rng.random() < 0.05,
                top_logprobs=rng.choice([0] * 8 + [2]),
            )
            new = scheduler.add(ids, params)
            left -= min(left, len(new))
            live += new
            if rng.random() < 0.05:
                kept.append(new)
        if live and rng.random() < 0.1:
            scheduler.abort(live.pop(rng.randrange(len(live))))
        if rng.random() < 0.5:
            done = {r for r, piece in scheduler.step() if piece.completion}
            live = [r for r in live if r not in done]
    stats = scheduler.stats()
    assert stats.preemptions > 0 and stats.cache_hits > 1000
    assert_empty(scheduler)
    for requests in kept:
        for i, request in enumerate(requests):
            if request.completion:
                assert_same(request.completion, alone(model, request.prompt, request.params, i))


def test_rejects(model):
    scheduler = Scheduler(model, TOKENIZER)
    for params, message in (
        ({"logit_bias": {259: 1.0}}, r"logit_bias must be in 0 \.\. 258"),
        ({"allowed_token_ids": (-1,)}, r"allowed_token_ids must be in 0 \.\. 258"),
        ({"allowed_token_ids": ()}, "allowed_token_ids must leave a token to draw"),
        (
            {"allowed_token_ids": (9,), "stop_token_ids": (9,), "min_tokens": 1},
            "allowed_token_ids must leave a token to draw",
        ),
    ):
        with pytest.raises(UserError, match=message):
            scheduler.add([1], SamplingParams(**params))
    whole = {"stop_token_ids": tuple(range(259)), "min_tokens": 1}
    with pytest.raises(UserError, match="min_tokens and allowed_token_ids must leave a token"):
        scheduler.add([1], SamplingParams(**whole))
    for params, message in (
        ({"logit_bias": {1: math.inf}}, "logit_bias must be finite"),
        ({"top_logprobs": 21}, r"top_logprobs must be in 0 \.\. 20, got 21"),
        ({"max_tokens": 0}, r"--max-tokens must be in \[1, inf\), or 0 with prompt_logprobs"),
    ):
        with pytest.raises(UserError, match=message):
            SamplingParams(**params)
    with pytest.raises(UserError, match="no longer than the context of 96 tokens, got 97"):
        scheduler.add([1] * 97, SamplingParams(max_tokens=0, prompt_logprobs=True))
    assert not scheduler.busy and scheduler.stats().blocks_used == 0
