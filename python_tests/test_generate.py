"""Generation: against a loop of plain forwards, any batch, all ways to end, text, the commands."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
import torch

from instructcore import cli, generate, scheduler
from instructcore.errors import UserError
from instructcore.generate import (
    ChatConfig,
    Completion,
    GenerateConfig,
    Generator,
    SamplingParams,
    score,
)
from instructcore.model import GPT, ModelConfig
from instructcore.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes()


def tiny(family: str = "llama", context: int = 96, **changes) -> GPT:
    """Weights wide enough for the next token to depend on the last ones."""
    shape = {"layers": 2, "heads": 4, "width": 64, "mlp_width": 96, "kv_heads": 4}
    shape |= {} if family == "gpt2" else {"kv_heads": 2}
    config = ModelConfig(family=family, vocab_size=259, context=context, **shape | changes)
    model = GPT(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.08)
    return model


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny()


def prompts_of(count: int, longest: int = 30) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


def seeded(params: SamplingParams, count: int) -> list[SamplingParams]:
    return [replace(params, seed=1000 + i) for i in range(count)]


def complete(model: GPT, prompt: list[int], **params) -> Completion:
    return Generator(model, TOKENIZER).generate([prompt], SamplingParams(**params))[0]


def naive(model: GPT, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding, the whole sequence anew for every token."""
    ids = list(prompt)
    for _ in range(count):
        cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
        with torch.no_grad():
            logits = model(torch.tensor(ids), cu_seqlens)[-1]
        ids.append(int(logits.argmax()))
        if ids[-1] == TOKENIZER.eos_id:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3"])
def test_greedy_equals_plain_forwards_and_logprobs_the_trainers(family):
    model, prompts = tiny(family), prompts_of(6)
    params = SamplingParams(max_tokens=12, temperature=0.0)
    for prompt, done in zip(
        prompts, Generator(model, TOKENIZER).generate(prompts, params), strict=True
    ):
        assert done.token_ids == naive(model, prompt, 12)
        assert done.logprobs == done.sampled_logprobs
    params = SamplingParams(max_tokens=40, temperature=0.8, top_k=50, seed=3)
    completions = Generator(model, TOKENIZER).generate(prompts, params)
    sequences = [p + c.token_ids for p, c in zip(prompts, completions, strict=True)]
    for prompt, done, truth in zip(prompts, completions, score(model, sequences), strict=True):
        ours = torch.tensor(done.logprobs)
        assert (ours - truth[len(prompt) - 1 :]).abs().max() < 1e-4
        # Of 50 tokens only, at 0.8: likelier than at 1 unless the token was unlikely.
        assert len(done.sampled_logprobs) == len(done.logprobs) == len(done.token_ids)
        assert sum(done.sampled_logprobs) > sum(done.logprobs)


def test_untruncated_sampled_logprobs_are_the_raw_ones(model):
    done = complete(model, [1, 2, 3], seed=1, max_tokens=30)
    assert done.sampled_logprobs == done.logprobs


@pytest.mark.checklist(2)
@pytest.mark.parametrize(
    "limits",
    [
        {"max_batch": 1},
        {"max_batch": 3},
        {"prefill_tokens": 20},
        {"cache_bytes": 1},
        {"block_size": 5},
    ],
    ids=str,
)
def test_a_completion_does_not_depend_on_the_batch(model, limits):
    prompts = prompts_of(11)
    each = [
        replace(p, max_tokens=5 + 3 * i, temperature=0.5 + i / 10, top_p=1 - i / 20)
        for i, p in enumerate(seeded(SamplingParams(), 11))
    ]
    together = Generator(model, TOKENIZER).generate(prompts, each)
    others = Generator(model, TOKENIZER, **limits).generate(prompts[::-1], each[::-1])[::-1]
    for a, b in zip(together, others, strict=True):
        assert (a.token_ids, a.finish_reason, a.text) == (b.token_ids, b.finish_reason, b.text)
        assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4)
    assert len({len(c.token_ids) for c in together}) > 5  # they left at different times


def test_seeds(model):
    prompt = [10, 20, 30]
    generator = Generator(model, TOKENIZER)
    params = SamplingParams(max_tokens=16, seed=4)
    five = generator.generate([prompt, prompt[:2]], replace(params, n=5))
    assert len(five) == 10
    assert len({tuple(c.token_ids) for c in five}) == 10
    for i, ids in ((0, prompt), (5, prompt[:2])):
        assert five[i].token_ids == generator.generate([ids], params)[0].token_ids
    # Without a seed: torch's generator decides.
    torch.manual_seed(0)
    free = [complete(model, prompt, max_tokens=8).token_ids for _ in range(2)]
    torch.manual_seed(0)
    assert free == [complete(model, prompt, max_tokens=8).token_ids for _ in range(2)]
    assert free[0] != free[1]


@pytest.mark.checklist(7)
def test_ends(model):
    prompt = [5, 6, 7]
    long = complete(model, prompt, seed=2, max_tokens=60)
    assert long.finish_reason == "length" and len(long.token_ids) == 60
    # A stop id: part of the response.
    stop = long.token_ids[20]
    end = long.token_ids.index(stop)
    done = complete(model, prompt, seed=2, max_tokens=60, stop_token_ids=(stop,))
    assert done.token_ids == long.token_ids[: end + 1] and done.finish_reason == "stop"
    # The end-of-text token is one, unless told otherwise.
    eos = TOKENIZER.eos_id
    eager = tiny()
    with torch.no_grad():
        eager.embed[eos] = eager.embed[prompt[-1]] * 3
    done = complete(eager, prompt, seed=2, max_tokens=60)
    assert done.token_ids.index(eos) == len(done.token_ids) - 1 and done.finish_reason == "stop"
    on = complete(eager, prompt, seed=2, max_tokens=60, ignore_eos=True)
    assert on.token_ids[: len(done.token_ids)] == done.token_ids and len(on.token_ids) == 60
    # No end before min_tokens.
    least = len(done.token_ids) + 9
    on = complete(eager, prompt, seed=2, max_tokens=60, min_tokens=least)
    assert len(on.token_ids) > least and eos not in on.token_ids[:least]
    # The checkpoint's own end-of-text ids count too.
    eager.token_ids = {"eos_token_id": [stop, 300]}
    assert Generator(eager, TOKENIZER).scheduler.eos_ids == {eos, stop}
    # The context is the limit, and a last token on the edge is still drawn.
    done = complete(model, [1] * 90, seed=2, max_tokens=60, ignore_eos=True)
    assert len(done.token_ids) == 6 and done.finish_reason == "length"
    assert len(complete(model, [1] * 95, seed=2).token_ids) == 1


def test_next_to_no_temperature_is_none(model):
    """Logits divided by less than 1e-6 may be infinite."""
    greedy = complete(model, [1, 2], max_tokens=12, temperature=0.0)
    for temperature in (1e-45, 1e-30, 1e-7):
        assert complete(model, [1, 2], max_tokens=12, temperature=temperature) == greedy


def test_penalties(model):
    prompt = [40, 41, 42, 40]
    for params in ({"presence_penalty": 1e4}, {"frequency_penalty": 1e4}):
        done = complete(model, prompt, max_tokens=80, temperature=0.0, ignore_eos=True, **params)
        assert len(set(done.token_ids)) == 80
    done = complete(
        model, prompt, max_tokens=40, temperature=0.0, ignore_eos=True, repetition_penalty=1e6
    )
    assert len({*done.token_ids, *prompt}) == 43  # none again, none of the prompt
    # A row's penalties are its own, in whichever slot it runs.
    plain = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    mixed = [plain, replace(plain, presence_penalty=2.0)] * 3
    batch = Generator(model, TOKENIZER, max_batch=2).generate([prompt] * 6, mixed)
    alone = [complete(model, prompt, **vars(p)).token_ids for p in mixed[:2]]
    assert [c.token_ids for c in batch] == alone * 3 and alone[0] != alone[1]


def test_text_and_stop_strings(model):
    generator, prompt = Generator(model, TOKENIZER), [1, 2, 3]
    params = SamplingParams(max_tokens=80, seed=9, ignore_eos=True)
    whole = generator.generate([prompt], params)[0]
    raw = bytes(id for id in whole.token_ids if id < 256)
    assert whole.text == raw.decode("utf-8", errors="replace")
    for first in (0, 10, 30):
        stop = whole.text[first : first + 3]
        done = generator.generate([prompt], replace(params, stop=("never there", stop)))[0]
        assert done.text == whole.text[: whole.text.index(stop)]
        assert done.finish_reason == "stop"
        assert done.token_ids == whole.token_ids[: len(done.token_ids)]


@pytest.mark.parametrize("stop", [(), ("a",), ("ab", "b"), ("aba", "bb"), ("aaab",), ("é€",)])
def test_stop_strings_against_brute_force(stop):
    class Pieces:
        """A tokenizer whose ids are texts."""

        def __init__(self):
            self.stream = lambda after: self

        def feed(self, piece):
            return piece

        def flush(self):
            return "!"

    generator = torch.Generator().manual_seed(len(stop))
    for _ in range(400):
        sizes = torch.randint(0, 4, (8,), generator=generator).tolist()
        letters = torch.randint(0, 4, (sum(sizes),), generator=generator).tolist()
        text = "".join("abé€"[i] for i in letters)
        # The stop string complete first ends the text; of those complete at once, the longest.
        ends = [
            (end, -len(s))
            for s in stop
            for end in range(len(s), len(text) + 1)
            if text[:end].endswith(s)
        ]
        expected = text[: sum(min(ends))] if ends else text + "!"
        taken, stream = [], scheduler._Text(Pieces(), SamplingParams(stop=stop), [])
        for i, size in enumerate(sizes):
            start = sum(sizes[:i])
            if stream.feed(text[start : start + size]):
                break
            taken.append(stream.take())
            shown = "".join(taken)
            assert expected.startswith(shown)
            # Nothing is held back but what a stop string may begin with.
            held = text[len(shown) : start + size]
            assert held == "" or any(s.startswith(held) for s in stop)
        assert stream.stopped == bool(ends)
        assert stream.finish() == expected
        assert "".join(taken) + stream.take() == expected


def test_stream(model):
    generator = Generator(model, TOKENIZER)
    params = SamplingParams(max_tokens=80, seed=9, ignore_eos=True, stop=("\ufffd\ufffd\ufffd",))
    for p in (params, replace(params, stop=()), replace(params, temperature=0.0, n=3)):
        pieces, stream = [], generator.stream([1, 2, 3], p)
        try:
            while True:
                pieces.append(next(stream))
        except StopIteration as end:
            done = end.value
        assert done == generator.generate([[1, 2, 3]], replace(p, n=1))[0]
        assert "".join(pieces) == done.text and all(pieces) and len(pieces) > 2
    # Several at once: each piece says whose it is, and the last one of each has the completion.
    prompts = prompts_of(3)
    each = [replace(p, max_tokens=10 * i + 5) for i, p in enumerate(seeded(params, 3))]
    texts, completions = [""] * 3, [None] * 3
    for pieces in generator.follow(prompts, each):
        for index, text, completion, ids, *_ in pieces:
            assert completions[index] is None and (ids or completion)
            texts[index] += text
            completions[index] = completion
    assert completions == generator.generate(prompts, each)
    assert texts == [c.text for c in completions]
    # A character of several bytes comes whole: a model that says one over and over.
    euro = tiny()
    cycle = [*"€".encode()]
    with torch.no_grad():
        for parameter in euro.parameters():
            parameter.zero_()
        euro.norm.fill_(1.0)
        euro.embed.copy_(torch.randn(259, 64, generator=torch.Generator().manual_seed(0)))
        euro.unembed = torch.nn.Parameter(torch.zeros(259, 64))
        for now, then in zip(cycle, cycle[1:] + cycle[:1], strict=True):
            euro.unembed[then] = euro.embed[now]
    stream = Generator(euro, TOKENIZER).stream(cycle, SamplingParams(max_tokens=8, temperature=0.0))
    assert list(stream) == ["€", "€", "\ufffd"]


def test_the_model_is_left_as_it_was_and_its_weights_are_shared():
    model = tiny(dropout=0.5)
    generator, params = Generator(model, TOKENIZER), SamplingParams(max_tokens=10, temperature=0.0)
    model.train()
    before = generator.generate([[1, 2]], params)[0]
    assert model.training
    assert before == generator.generate([[1, 2]], params)[0]  # no dropout
    stream = generator.stream([1, 2], params)
    next(stream)
    stream.close()
    assert model.training
    with torch.no_grad():
        model.embed.copy_(model.embed.flip(0))
    assert before.token_ids != generator.generate([[1, 2]], params)[0].token_ids
    assert not any(p.grad_fn for p in score(model, [[1, 2, 3]]))


def test_bfloat16():
    model = tiny()
    half = GPT(model.config, dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    prompts = prompts_of(5)
    params = SamplingParams(max_tokens=20, seed=1)
    completions = Generator(half, TOKENIZER).generate(prompts, params)
    sequences = [p + c.token_ids for p, c in zip(prompts, completions, strict=True)]
    for prompt, done, truth in zip(prompts, completions, score(half, sequences), strict=True):
        assert (torch.tensor(done.logprobs) - truth[len(prompt) - 1 :]).abs().max() < 0.1


def test_score(model, monkeypatch):
    sequences = prompts_of(9) + [[3]]
    with torch.no_grad():
        for ids, ours in zip(sequences, score(model, sequences), strict=True):
            logits = model(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32))
            truth = logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            assert ours.shape == (len(ids) - 1,) and ours.dtype == torch.float32
            assert torch.allclose(ours, truth, atol=1e-5)
    monkeypatch.setattr(generate, "SCORED_AT_ONCE", 25)
    for a, b in zip(score(model, sequences), score(model, sequences[::-1])[::-1], strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert score(model, []) == []


def test_rejects(model):
    generator = Generator(model, TOKENIZER)
    assert generator.generate([]) == []
    for prompt, message in (
        ([], "at least one token"),
        ([1] * 96, "shorter than the context of 96 tokens, got 96"),
        ([1, 259], r"token ids must be in 0 \.\. 258, got 1 \.\. 259"),
        ("Hello", r"must be token ids, such as those of tokenizer.prompt_ids\(text\), got 'Hello'"),
        (7, "must be token ids, .*, got 7"),
    ):
        with pytest.raises(UserError, match=message):
            generator.generate([[1], prompt])
    with pytest.raises(UserError, match="stop_token_ids must be in"):
        generator.generate([[1]], SamplingParams(stop_token_ids=(300,)))
    for settings, message in (
        ({"temperature": -1.0}, "--temperature must be in"),
        ({"top_p": 2.0}, "--top-p must be in"),
        ({"temperature": 1e300}, r"--temperature must be in \[0, 1e6\]"),
        ({"top_k": 10**20}, r"--top-k must be in \[0, 1e9\]"),
        ({"max_tokens": 0}, "--max-tokens must be in"),
        ({"n": 0}, "--n must be in"),
        ({"repetition_penalty": 1e-45}, r"--repetition-penalty must be in \[0.01, 1e6\]"),
        ({"presence_penalty": 1e39}, r"--presence-penalty must be in \[-1e6, 1e6\]"),
        ({"frequency_penalty": float("nan")}, r"--frequency-penalty must be in \[-1e6, 1e6\]"),
        ({"stop": "word"}, "stop must be a tuple of strings"),
        ({"stop": ("",)}, "stop must be a tuple of strings"),
    ):
        with pytest.raises(UserError, match=message):
            SamplingParams(**settings)
    with pytest.raises(UserError, match="reward model"):
        Generator(GPT(model.config, "scalar"), TOKENIZER)
    broken = tiny()
    with torch.no_grad():
        broken.norm.fill_(math.nan)
    with pytest.raises(UserError, match="logits are NaN"):
        Generator(broken, TOKENIZER).generate([[1]])
    with pytest.raises(ValueError):
        generator.generate([[1], [2]], [SamplingParams()])
    with pytest.raises(UserError, match="at least one token"):
        score(model, [[1], []])


# ---- The commands


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny().save(path, TOKENIZER)
    return str(path)


@pytest.fixture(scope="module")
def instructed(tmp_path_factory):
    path = tmp_path_factory.mktemp("instructed")
    tiny().save(path, TOKENIZER, extra={"stage": "sft"})
    return str(path)


PARAMS = SamplingParams(max_tokens=12, seed=5)
EXACT = {"sampling": PARAMS, "dtype": "float32"}  # bfloat16 may be the default


def test_command_generate(checkpoint, instructed, capsys, tmp_path):
    model = tiny()
    marker = [*b"hello", TOKENIZER.assistant_id]
    for path, raw, ids in (
        (checkpoint, False, [*b"hello"]),
        (instructed, False, marker),
        (instructed, True, [*b"hello"]),
    ):
        expected = Generator(model, TOKENIZER).generate([ids], PARAMS)[0].text
        records = generate.run(GenerateConfig(path, prompt="hello", raw=raw, **EXACT))
        assert capsys.readouterr().out == expected + "\n"
        assert [r["response"] for r in records] == [expected]
    file = tmp_path / "prompts.txt"
    file.write_text("one\n二\n", encoding="utf-8")
    out = tmp_path / "out.jsonl"
    config = GenerateConfig(
        checkpoint, prompts=str(file), out=str(out), sampling=replace(PARAMS, n=2)
    )
    records = generate.run(config)
    assert [json.loads(line) for line in out.read_text("utf-8").splitlines()] == records
    assert [r["prompt"] for r in records] == ["one", "one", "二", "二"]
    assert len({r["response"] for r in records}) == 4
    assert "4 responses in" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists already"):
        generate.run(config)
    with pytest.raises(UserError, match="either --prompt or --prompts"):
        GenerateConfig(checkpoint)
    with pytest.raises(UserError, match="no checkpoint at"):
        generate.run(GenerateConfig(str(tmp_path / "none"), prompt="x"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "x" * 96], "a prompt must be shorter than the context of 96 tokens, got 96"),
        (["--prompts", "long.txt"], "long.txt:3: a prompt must be shorter than the context of 96"),
        (["--prompts", "empty.jsonl"], "empty.jsonl:2: a prompt needs at least one token"),
        (["--prompts", "good.txt", "--out", "no/such/o.jsonl"], "--out no/such/o.jsonl: there is"),
        (["--prompts", "good.txt", "--out", "good.txt/o"], "--out good.txt/o: there is no such"),
        (["--prompts", "good.txt", "--out", "good.txt"], "--out good.txt exists already"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    checkpoint, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Generator, "_run", None)
    (tmp_path / "good.txt").write_text("one\n")
    (tmp_path / "long.txt").write_text("one\n\n" + "x" * 96)
    (tmp_path / "empty.jsonl").write_text('{"prompt": "x"}\n{"prompt": ""}\n')
    before = sorted(tmp_path.iterdir())
    assert cli.main(["generate", checkpoint, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_command_chat(instructed, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\nand then?\n/quit\nnever said\n"))
    generate.chat(ChatConfig(instructed, **EXACT))
    model, marker, eos = tiny(), TOKENIZER.assistant_id, TOKENIZER.eos_id
    ids, expected = [], ""
    for line in (b"hi", b"and then?"):
        ids += [*line, marker]
        done = Generator(model, TOKENIZER).generate([ids], PARAMS)[0]
        expected += done.text + "\n"
        ids += done.token_ids + ([] if done.token_ids[-1] == eos else [eos])
    assert capsys.readouterr().out == expected
    # Old turns go when the context of 96 tokens is full; a single line that long is an error.
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\n" * 12))
    generate.chat(ChatConfig(checkpoint, **EXACT))
    captured = capsys.readouterr()
    assert captured.out.count("\n") >= 12 and "continues text" in captured.err
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 200))
    with pytest.raises(UserError, match="shorter than the context"):
        generate.chat(ChatConfig(instructed, **EXACT))
