"""The quickstart's data: facts read back, nothing held out in training, a fair gold rule."""

from __future__ import annotations

import json
import re
import time
from collections import Counter

import pytest

from instructcore import quickstart_data as q
from instructcore.data import read_demonstrations, read_prompts
from instructcore.tokenizer import Tokenizer

TRAINING = ("pretrain", "demonstrations", "preference_prompts", "ppo_prompts")


@pytest.fixture(scope="module")
def data():
    return q.build(0)


def task(family: str, language: str, answer) -> dict:
    return {"family": family, "language": language, "answer": answer}


def right_answers(rows, seed="right"):
    maker = q._Maker(seed, held_out=False)
    return [maker.say(row["task"]["answer"], row["task"]["language"]) for row in rows]


def mean_gold(rows, responses, ended=True):
    return sum(
        q.gold(row["task"], response, ended) for row, response in zip(rows, responses, strict=True)
    ) / len(rows)


# ---- The world


def test_lexicon_is_aligned():
    words = q.world().words
    counts = {kind: len(forms) for kind, forms in words.items()}
    assert counts == {
        "category": 8,
        "noun": 80,
        "adjective": 24,
        "name": 24,
        "place": 24,
        "action": 40,
        "verb": 6,
    }
    for language in q.LANGUAGES:
        forms = [form[language] for kind in words.values() for form in kind.values()]
        assert len(set(forms)) == len(forms)
        assert all(q._in_language(form, language) for form in forms)
    assert set(q.world().category) == set(words["noun"])
    assert set(q.world().category.values()) == set(words["category"])


def test_articles():
    articles = q.world().articles
    assert len(articles) == 48
    assert q.world().titles["artificial intelligence"]["zh"] == "人工智能"
    told = Counter()
    for article in articles.values():
        assert set(article) == set(q.LANGUAGES)
        for language, sentences in article.items():
            assert 2 <= len(sentences) <= 5
            assert all(q._in_language(sentence, language) for sentence in sentences)
            told.update(sentences)
    assert max(told.values()) == 1  # else a sentence would belong to two titles


def test_facts_read_back():
    maker = q._Maker("facts", held_out=False)
    texts = q.world().texts["facts"]
    for kind, form in texts.items():
        for language in q.LANGUAGES:
            for _ in range(30):
                words = (maker.pick(tuple(q.world().words[slot])) for slot in form["slots"])
                fact = (kind, *words)
                assert q.read(q.world().say(fact, language)) == (language, fact)
    assert q.read("小明在公园跑步。") == ("zh", ("does", "Ming", "park", "runs"))
    assert q.read("All cats are animals.") == ("en", ("isa", "cats", "animals"))
    assert q.read("工具让工作更快。") == ("zh", ("trait", "tools"))
    assert q.read("It learns from many examples.") == ("en", ("told", "artificial intelligence"))
    for nonsense in (
        "",
        "小明公园跑步",
        "Ming park runs.",
        "Ming runs at the park",
        "公园在小明跑步。",
    ):
        assert q.read(nonsense) is None


# ---- The files


def test_build_is_a_function_of_the_seed(data):
    start = time.process_time()
    again = q.build(0)
    assert time.process_time() - start < 6  # 2 s; the stage has 8
    assert again == data
    other = q.build(1)
    for name in (*TRAINING, "eval_prompts"):
        assert getattr(other, name) != getattr(data, name)


def test_sizes_and_balance(data):
    assert 300_000 < sum(len(row["text"].encode()) for row in data.pretrain) < 2_000_000
    assert len(data.preference_prompts) >= 900
    assert len(data.ppo_prompts) >= 2000
    assert len(data.eval_prompts) >= 512
    for name in (*TRAINING[1:], "eval_prompts"):
        rows = [row["task"] for row in getattr(data, name) if row["task"]["content"]]
        counts = Counter((row["family"], row["language"]) for row in rows)
        assert set(counts) == {(f, language) for f in q.FAMILIES for language in q.LANGUAGES}
        assert len(set(counts.values())) == 1
    assert len({row["prompt"] for row in data.eval_prompts}) == len(data.eval_prompts)


def test_nothing_held_out_in_training(data):
    for name in TRAINING[1:]:
        for row in getattr(data, name):
            assert not row["task"]["held_out"]
            assert not any(q.held_out(content) for content in row["task"]["content"])
    for row in data.eval_prompts:
        assert row["task"]["held_out"]
        assert row["task"]["content"]
        assert all(q.held_out(content) for content in row["task"]["content"])
    asked = {row["prompt"] for row in data.eval_prompts}
    assert not asked & {row["prompt"] for name in TRAINING[1:] for row in getattr(data, name)}


def test_no_training_text_says_what_is_held_out(data):
    """Not by the records' own account: every fact and program in the text itself is looked up."""
    text = "\n".join(
        row.get(field, "") for name in TRAINING for row in getattr(data, name)
        for field in ("text", "prompt", "response")
    )  # fmt: skip
    found = Counter()
    for patterns in q._grammar()[1].values():
        for kind, pattern in patterns:
            if kind not in q.COMPOSED:
                continue
            for sentence in {match[0] for match in pattern.finditer(text)}:
                _, fact = q.read(sentence)
                assert not q.held_out(fact), sentence
                found[kind] += 1
    assert min(found[kind] for kind in q.COMPOSED) > 3000
    programs = set(re.findall(r"return (.*)", text))
    assert len(programs) > 400  # of the 2 x 5 x 5 x 10 that can be asked for
    held = {row["task"]["answer"] for row in data.eval_prompts if row["task"]["family"] == "code"}
    assert len(held) > 30 and not held & programs


def test_one_in_ten_is_held_out():
    words = q.world().words
    facts = [
        ("there", adjective, noun, place)
        for adjective in words["adjective"]
        for noun in words["noun"]
        for place in words["place"]
    ]
    share = sum(map(q.held_out, facts)) / len(facts)
    assert share == pytest.approx(0.1, abs=0.01)


def test_words_all_occur_in_training(data):
    text = "\n".join(row["text"] for row in data.pretrain)
    for kind, forms in q.world().words.items():
        for form in forms.values():
            assert form["zh"] in text and form["en"] in text, (kind, form)


def test_demonstrations_are_of_mixed_quality(data):
    rows = data.demonstrations
    shares = Counter(row["quality"] for row in rows)
    golds = {quality: [] for quality in q.QUALITIES}
    for row in rows:
        golds[row["quality"]].append(q.gold(row["task"], row["response"]))
    for quality, share in q.QUALITIES.items():
        assert shares[quality] / len(rows) == pytest.approx(share, abs=0.02)
    mean = {quality: sum(g) / len(g) for quality, g in golds.items()}
    assert set(golds["right"]) == {1.0}
    assert set(golds["filler"]) == {0.8}
    assert set(golds["evasive"]) == {0.0}
    assert mean["wrong"] < 0.05
    assert mean["other language"] < 0.6 and mean["rambling"] < 0.5


def test_samples_show_the_article_on_artificial_intelligence(data):
    assert data.samples[0]["prompt"] == "写一篇关于人工智能的文章。"
    assert not data.samples[0]["task"]["held_out"]
    assert {row["task"]["family"] for row in data.samples[2:]} == set(q.FAMILIES)
    assert all(row["task"]["held_out"] for row in data.samples[2:])
    assert right_answers(data.samples[:1]) == ["人工智能让电脑学会思考。它从很多例子里学习。"]


def test_written_files_are_read_by_the_pipeline(data, tmp_path):
    paths = q.write(tmp_path, seed=0)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths.values()}
    assert len(read_demonstrations([paths["demonstrations"]])) == len(data.demonstrations)
    prompts = read_prompts([paths["eval_prompts"]])
    assert [prompt.text for prompt in prompts] == [row["prompt"] for row in data.eval_prompts]
    responses = right_answers(data.eval_prompts)
    records = [prompt.record for prompt in prompts]
    assert q.judge([p.text for p in prompts], responses, records) == [1.0] * len(prompts)
    first = json.loads(paths["pretrain"].read_text(encoding="utf-8").splitlines()[0])
    assert first == data.pretrain[0]


def test_prompts_and_responses_are_short(data):
    """Under the quickstart's tokenizer, in which every word of the lexicon is one token."""
    tokenizer = Tokenizer.train((row["text"] for row in data.vocabulary), 2048)
    for forms in q.world().words.values():
        for form in forms.values():
            assert len(tokenizer.encode(form["zh"])) == 1
            assert len(tokenizer.encode(" " + form["en"])) == form["en"].count(" ") + 1
    rows = data.demonstrations
    prompts = tokenizer.encode_batch([row["prompt"] for row in rows])
    responses = tokenizer.encode_batch([row["response"] for row in rows])
    assert max(map(len, prompts)) <= 40
    right = [len(r) for r, row in zip(responses, rows, strict=True) if row["quality"] == "right"]
    assert max(right) <= 40
    assert max(map(len, responses)) <= 100


# ---- The gold rule


RUNS = [[("does", "Ming", "park", "runs")]]
ARTICLE = [
    [("there", "red", "apples", "park")],
    [("isa", "apples", "fruits")],
    [("trait", "fruits"), ("holds", None, "likes", "red", "apples")],
]
WHOLE = "公园有红色的苹果。苹果是水果。小美喜欢红色的苹果。"


@pytest.mark.parametrize(
    ("asked", "response", "ended", "expected"),
    [
        # right, in its language, tidy
        (task("summary", "zh", RUNS), "小明在公园跑步。", True, 1.0),
        (task("summary", "zh", RUNS), "小明在公园跑步。", False, 0.8),
        (task("summary", "zh", RUNS), "好的!小明在公园跑步。", True, 0.8),
        (task("summary", "zh", RUNS), "Ming runs at the park.", True, 0.8),
        (task("summary", "zh", RUNS), "Sure! 小明在公园跑步。", True, 0.6),
        # one word of three wrong: (2 - 1) / 3; two: nothing
        (task("summary", "zh", RUNS), "小明在学校跑步。", True, 0.6 / 3 + 0.4),
        (task("summary", "zh", RUNS), "小红在学校跑步。", True, 0.0),
        # a second fact halves it, and is untidy; so does the same again
        (task("summary", "en", RUNS), "Ming runs at the park. Li is at the zoo.", True, 0.5),
        (task("summary", "en", RUNS), "Ming runs at the park. Ming runs at the park.", True, 0.5),
        # translation: the other language is the task
        (task("translation", "en", RUNS), "Ming runs at the park.", True, 1.0),
        (task("translation", "en", RUNS), "小明在公园跑步。", True, 0.0),
        # articles: three sentences, the last one free to differ
        (task("article", "zh", ARTICLE), WHOLE, True, 1.0),
        (task("article", "zh", ARTICLE), WHOLE.replace("小美", "小明"), True, 1.0),
        (task("article", "zh", ARTICLE), "公园有红色的苹果。苹果是水果。水果对身体好。", True, 1.0),
        (task("article", "zh", ARTICLE), "公园有红色的苹果。苹果是水果。", True, 0.4 + 0.2),
        (task("article", "zh", ARTICLE), "公园有红色的苹果。苹果是动物。", True, 0.2 + 0.2),
        # code: run on eight inputs
        (task("code", "en", "(x + y) * 3"), "def f(x, y): return (x + y) * 3", True, 1.0),
        (task("code", "en", "(x + y) * 3"), "def f(x, y): return 3*y + 3*x", True, 1.0),
        (task("code", "en", "(x + y) * 3"), "def f(x, y): return x + y * 3", True, 0.0),
        (task("code", "en", "x + y"), "Sure!\ndef f(x, y): return x + y", True, 0.8),
        (task("code", "zh", "x + y"), "Sure!\ndef f(x, y): return x + y", True, 0.6),
        (task("code", "zh", "x + y"), "def f(x, y): return x + y # 好", True, 0.8),
        # max(x, y) is x in 5 of the 8 inputs: 2 * 5 / 8 - 1
        (task("code", "en", "max(x, y)"), "def f(x, y): return x", True, 0.6 * 0.25 + 0.4),
    ],
)
def test_gold_known_values(asked, response, ended, expected):
    assert q.gold(asked, response, ended) == pytest.approx(expected)


def test_right_answers_score_one(data):
    for name in ("eval_prompts", "ppo_prompts", "preference_prompts"):
        rows = getattr(data, name)
        assert mean_gold(rows, right_answers(rows)) == 1.0
    rows = data.eval_prompts
    assert mean_gold(rows, right_answers(rows), ended=False) == pytest.approx(0.8)


def test_degenerate_answers_score_low(data):
    rows = data.eval_prompts
    right = right_answers(rows)
    small = r"[。.!,()]|\b(There|are|at|the|is|All|I|too|Hello|def|return)\b|[在有是的我也]|你好"
    words = [re.sub(small, " ", r) for r in right]
    shuffled = right[7:] + right[:7]
    degenerate = {
        "empty": [""] * len(rows),
        "blank": [" \n"] * len(rows),
        "prompt": [row["prompt"] for row in rows],
        "prompt twice": [row["prompt"] * 2 for row in rows],
        "endless": [r * 8 for r in right],
        "endless with spaces": [" ".join([r] * 8) for r in right],
        "endless lines": ["\n".join([r] * 8) for r in right],
        "bare words": words,
        "words of the prompt": [" ".join(reversed(row["prompt"].split())) for row in rows],
        "another's answer": shuffled,
    }
    for name, responses in degenerate.items():
        for family in q.FAMILIES:
            some = [i for i, row in enumerate(rows) if row["task"]["family"] == family]
            score = mean_gold([rows[i] for i in some], [responses[i] for i in some], ended=False)
            assert score <= 0.3, (name, family, score)


def test_a_shot_in_every_direction_scores_low(data):
    """Naming both candidates is worth less than naming the right one, and than a fair guess."""
    asked = task("chat", "en", [[("where", "Ming", "park")]])
    both = "Ming is at the park. Ming is at the zoo."
    assert q.gold(asked, both) == pytest.approx(0.5)
    three = both + " Ming is at the bank."
    assert q.gold(asked, three) == pytest.approx(0.4)


def test_best_constant_answer_is_poor(data):
    """No answer fits all: every demonstration is tried on a few, the best on all."""
    rows = data.eval_prompts
    candidates = {row["response"] for row in data.demonstrations} | {"def f(x, y): return x"}
    few = rows[::20]
    scores = {text: mean_gold(few, [text] * len(few)) for text in sorted(candidates)}
    best = sorted(candidates, key=lambda text: -scores[text])[:100]
    assert max(mean_gold(rows, [text] * len(rows)) for text in best) <= 0.2


# ---- Code is never trusted


@pytest.mark.parametrize(
    "source",
    [
        "__import__('os').system('true')",
        "x.__class__",
        "x ** y",
        "9 ** 9 ** 9",
        "[x for x in y]",
        "(x, y)",
        "max(*x)",
        "lambda x: x",
        "x if x else y",
        "x, y), (x",
        "x + ",
        "max",
        "max(max, min)",
        "3(x)",
        "open",
        "x\n+ y",
        "(" * 40 + "x" + ")" * 39,
    ],
)
def test_sandbox_refuses(source):
    assert q.run_expression(source) is None
    assert q.gold(task("code", "en", "x + y"), f"def f(x, y): return {source}") == 0.0


def test_sandbox_runs():
    assert q.run_expression("x + y") == [x + y for x, y in q._INPUTS]
    assert q.run_expression("max(x, -y) * (3 - 1)") == [max(x, -y) * 2 for x, y in q._INPUTS]
    huge = "*".join(["9" * 30] * 2)
    assert q.run_expression(huge) == [int("9" * 30) ** 2] * len(q._INPUTS)


def test_sandbox_is_fast():
    start = time.process_time()
    for i in range(1000):
        assert q.run_expression(f"x * {i} + {i}")[0] == 4 * i
    assert time.process_time() - start < 1.5


def test_sandbox_is_another_process():
    q.run_expression("x")
    child = q._child()
    assert child.poll() is None
    limits = open(f"/proc/{child.pid}/limits").read()
    assert re.search(r"Max address space\s+268435456\s", limits)
    assert re.search(r"Max file size\s+0\s", limits)
