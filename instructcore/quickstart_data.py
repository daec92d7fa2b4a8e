"""The quickstart's data: a small bilingual world, its tasks, and the gold rule that grades them.

The world is a lexicon (nouns, adjectives, names, places, actions, verbs; each word in Chinese and
English), the kinds of fact that its words compose, and 48 short articles in both languages; all of
it is text in `static/quickstart/`. A fact is a tuple `(kind, word, ...)` of English words, and it
reads as one sentence in either language: `("does", "Ming", "park", "runs")` is "Ming runs at the
park." and "小明在公园跑步。". A composed fact is held out if a hash of it says so (one in ten, the
same ones for every seed): no training file states, asks or answers it, in either language, and the
evaluation prompts are made of nothing else. The words themselves all occur in training.

Five families, each asked half in Chinese, half in English:
  article      "Write an article about red apples at the park."   three sentences on the topic
  summary      three short sentences                               one that says it all
  code         "x plus y, then times 3"                            def f(x, y): return (x + y) * 3
  chat         a fact and a question on it, a greeting, small talk one or two sentences
  translation  a sentence                                          the same fact, other language
"""

from __future__ import annotations

import ast
import atexit
import functools
import hashlib
import json
import random
import re
import select
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = ("article", "summary", "code", "chat", "translation")
LANGUAGES = ("zh", "en")
COMPOSED = ("does", "holds", "there")  # the kinds of fact of which one in ten is held out
# What the demonstrations are like, and how often: only preferences tell good from bad.
QUALITIES = {"right": 0.36, "filler": 0.25, "evasive": 0.20, "wrong": 0.04}
QUALITIES |= {"other language": 0.08, "rambling": 0.07}
DIGITS = "23456789"
STATIC = Path(__file__).parent / "static" / "quickstart"

Fact = tuple[str, ...]


# ---- The world: words, sentences, and reading them back


@dataclass(frozen=True)
class World:
    """The bundled text: words, articles, and the forms in which facts are said."""

    words: dict[str, dict[str, dict[str, str]]]  # class -> English form -> language -> form
    category: dict[str, str]  # noun -> category
    titles: dict[str, dict[str, str]]  # English title -> language -> title
    articles: dict[str, dict[str, list[str]]]  # English title -> language -> sentences
    texts: dict[str, Any]  # world.json: forms of facts, prompts, fillers

    def say(self, fact: Fact, language: str, variant: int = 0) -> str:
        """The sentence that states a fact; `variant` chooses between those of a trait."""
        kind, *words = fact
        if kind == "trait":
            return self.texts["traits"][words[0]][language][variant]
        form = self.texts["facts"][kind]
        return self.fill(form[language], language, dict(zip(form["slots"], words, strict=True)))

    def fill(self, template: str, language: str, slots: dict[str, str]) -> str:
        """A template with its slots filled by words (given in English, written in `language`)."""
        return template.format(**{s: self.words[s][w][language] for s, w in slots.items()})


_HAN = re.compile(r"[\u4e00-\u9fff]")
_LATIN = re.compile(r"[A-Za-z]")
_SENTENCE = re.compile(r"[^。!?.!?]+[。!?.!?]*")


def sentences(text: str) -> list[str]:
    """The text cut after each full stop, question mark or exclamation mark."""
    return [s.strip() for s in _SENTENCE.findall(text) if s.strip()]


@functools.cache
def world() -> World:
    """The bundled world, read once."""
    words: dict[str, dict[str, dict[str, str]]] = {}
    category, titles, articles = {}, {}, {}
    for kind, zh, en, group in _table("lexicon.tsv"):
        words.setdefault(kind, {})[en] = {"zh": zh, "en": en}
        if group:
            category[en] = group
    for zh_title, title, zh, en in _table("articles.tsv"):
        titles[title] = {"zh": zh_title, "en": title}
        articles[title] = {"zh": sentences(zh), "en": sentences(en)}
    texts = json.loads((STATIC / "world.json").read_text(encoding="utf-8"))
    return World(words, category, titles, articles, texts)


def _table(name: str) -> list[list[str]]:
    lines = (STATIC / name).read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines[1:]]


@functools.lru_cache(maxsize=1 << 16)
def read(sentence: str) -> tuple[str, Fact] | None:
    """(language, fact) of a sentence of this world; None for any other text."""
    language = "zh" if _HAN.search(sentence) else "en"
    fixed, patterns = _grammar()
    if sentence in fixed:
        return language, fixed[sentence]
    for kind, pattern in patterns[language]:
        if match := pattern.fullmatch(sentence):
            forms = world().words
            english = (
                next(en for en, form in forms[slot].items() if form[language] == match[slot])
                for slot in world().texts["facts"][kind]["slots"]
            )
            return language, (kind, *english)
    return None


@functools.cache
def _grammar() -> tuple[dict[str, Fact], dict[str, list[tuple[str, re.Pattern[str]]]]]:
    """The sentences without slots, and for each language a pattern for each kind of fact."""
    told: dict[str, Fact] = {}
    for title, article in world().articles.items():
        told |= {s: ("told", title) for language in LANGUAGES for s in article[language]}
    for group, traits in world().texts["traits"].items():
        told |= {s: ("trait", group) for language in LANGUAGES for s in traits[language]}
    kinds = world().texts["facts"].items()
    return told, {
        language: [(kind, _pattern(form[language], language)) for kind, form in kinds]
        for language in LANGUAGES
    }


def _pattern(template: str, language: str) -> re.Pattern[str]:
    """The regular expression of all sentences that a template can make."""

    def choices(slot: re.Match[str]) -> str:
        forms = (re.escape(form[language]) for form in world().words[slot[1]].values())
        return f"(?P<{slot[1]}>{'|'.join(forms)})"

    return re.compile(re.sub(r"\\\{(\w+)\\\}", choices, re.escape(template)))


def held_out(content: Iterable[str]) -> bool:
    """Whether a composed fact, or a program, is kept from every training file: one in ten is."""
    digest = hashlib.blake2b("|".join(content).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % 10 == 0


# ---- The gold rule


def gold(task: dict, response: str, ended: bool = True) -> float:
    """How good a response is, in [0, 1]: 0.6 for right, 0.2 for its language, 0.2 for its form.

    right: of the sentences asked for, how many are given, each counting (right words - wrong
        words) / words, never below 0; every further fact, right or wrong, thins this out. For
        code, the same difference over the test inputs on which it is run.
    language: the whole response is in the language asked for.
    form: it ended, and holds what was asked for and nothing else: no filler, nothing missing.
    Language and form count only where something is right.
    """
    grade = _grade_code if task["family"] == "code" else _grade_text
    right, language, form = grade(task, response)
    return 0.6 * right + 0.2 * language + 0.2 * (form and ended) if right > 0 else 0.0


def judge(prompts: list, responses: list, records: list, ended: list | None = None) -> list[float]:
    """The gold rule as a reward function of the pipeline: one score for each response."""
    rows = zip(records, responses, ended or [True] * len(responses), strict=True)
    return [gold(record["task"], response, end) for record, response, end in rows]


def _in_language(text: str, language: str) -> bool:
    """Whether all of a text's letters are of this language."""
    mine, other = (_HAN, _LATIN) if language == "zh" else (_LATIN, _HAN)
    return bool(mine.search(text)) and not other.search(text)


def _grade_text(task: dict, response: str) -> tuple[float, bool, bool]:
    asked = task["answer"]  # a list of sentences; each is a list of facts, any of which will do
    said = sentences(response)
    if len(said) > len(asked) + 4:
        return 0.0, False, False
    given = []  # what the sentences say; saying it again counts as one more thing said
    for i, sentence in enumerate(said):
        language, fact = read(sentence) or ("", None)
        if fact and (task["family"] != "translation" or language == task["language"]):
            given.append(("again",) if sentence in said[:i] else fact)
    total, left = 0.0, given.copy()
    for options in asked:
        scores = [max(_agreement(option, fact) for option in options) for fact in left]
        if scores:
            total += max(scores)
            left.pop(scores.index(max(scores)))
    right = total / max(len(asked), len(given))
    tidy = len(given) == len(said) == len(asked)
    return right, _in_language(response, task["language"]), tidy


def _agreement(asked: list[str | None], fact: Fact) -> float:
    """(right words - wrong words) / words, at least 0; None agrees with any word."""
    if asked[0] != fact[0]:
        return 0.0
    hits = sum(a in (None, b) for a, b in zip(asked[1:], fact[1:], strict=True))
    return max(0.0, 2 * hits / (len(asked) - 1) - 1)


# ---- Code: read against a whitelist, then run apart
#
# What passes the whitelist is integer arithmetic in x and y, without loops, powers or other names:
# it can do no harm and takes no time. It still runs in a child process with limits on memory and
# time: two locks, so that neither has to be trusted alone. The child takes one line per program
# and stays, so grading a thousand programs takes a tenth of a second and not a thousand forks.

_DEFINITION = re.compile(r"\s*def f\(x, ?y\): *return ([^#]{1,80})(#.*)?")
_EXPRESSION = re.compile(r"(?:max|min|[xy]|\d+|[-+*(), ])+")
_NODES = (ast.Expression, ast.Load, ast.Name, ast.Constant, ast.Call, ast.BinOp, ast.UnaryOp)
_NODES += (ast.Add, ast.Sub, ast.Mult, ast.USub)
_INPUTS = ((3, 11), (14, 5), (-7, 6), (8, -13), (0, 9), (23, 4), (-5, -16), (6, 6))
_PATIENCE = 30.0  # seconds; nothing on the whitelist takes a thousandth of one


def _grade_code(task: dict, response: str) -> tuple[float, bool, bool]:
    lines = [line for line in response.split("\n") if line.strip()]
    programs = [match for line in lines if (match := _DEFINITION.fullmatch(line))]
    prose = "".join(line for line in lines if not _DEFINITION.fullmatch(line))
    asked = run_expression(task["answer"])
    best = 0.0
    for program in programs[:4]:
        hits = [a == b for a, b in zip(asked, run_expression(program[1]) or (), strict=False)]
        best = max(best, 2 * sum(hits) / len(asked) - 1)
    tidy = len(programs) == 1 and not prose and not programs[0][2]
    return best / max(1, len(programs)), not prose or _in_language(prose, task["language"]), tidy


@functools.lru_cache(maxsize=1 << 16)
def run_expression(source: str) -> list[int] | None:
    """The values of an expression in x and y on the test inputs; None if it may not or cannot run.

    Raises RuntimeError if the child process gives no answer.
    """
    if not _EXPRESSION.fullmatch(source):
        return None
    try:
        tree = ast.parse(source.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    if not all(isinstance(node, _NODES) for node in ast.walk(tree)):
        return None
    child = _child()
    child.stdin.write(json.dumps([source.strip(), _INPUTS]) + "\n")
    child.stdin.flush()
    ready, _, _ = select.select([child.stdout], [], [], _PATIENCE)
    answer = child.stdout.readline() if ready else ""
    if not answer:
        child.kill()
        raise RuntimeError(f"quickstart_data: the sandbox gives no answer for {source!r}")
    return json.loads(answer)


@functools.cache
def _child() -> subprocess.Popen[str]:
    command = [sys.executable, "-I", "-S", str(STATIC / "sandbox.py")]
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nothing, text=True, env={})
    atexit.register(child.communicate)  # closes its input, upon which it ends
    return child


# ---- Making tasks


class _Maker:
    """Draws tasks from the held-out part of the world, or from the rest of it, never from both."""

    def __init__(self, seed: str, held_out: bool) -> None:
        self.random = random.Random(seed)
        self.pick = self.random.choice
        self.held_out = held_out

    def fact(self, kind: str = "", **given: str) -> Fact:
        """A composed fact, of this kind or any, with the given words in it."""
        kind = kind or self.pick(COMPOSED)
        slots = world().texts["facts"][kind]["slots"]
        while True:
            fact = (kind, *(given.get(s) or self.pick(tuple(world().words[s])) for s in slots))
            if held_out(fact) == self.held_out:
                return fact

    def task(self, family: str, language: str) -> tuple[str, dict]:
        """A prompt, and its task: family, language, held_out, what it is made of, the answer."""
        it, content, answer = getattr(self, "_" + family)(language)
        prompt = self.pick(world().texts["prompts"][family][language]).format(it=it)
        language = _other(language) if family == "translation" else language
        task = {"family": family, "language": language, "held_out": self.held_out}
        return prompt, {**task, "content": content, "answer": answer}

    def titled(self, title: str, language: str) -> tuple[str, dict]:
        """The task to tell the bundled article of this title in two sentences; never held out."""
        form = self.pick(world().texts["prompts"]["article"][language])
        task = {"family": "article", "language": language, "held_out": False, "content": []}
        prompt = form.format(it=world().titles[title][language])
        return prompt, {**task, "answer": 2 * [[("told", title)]]}

    def _article(self, language: str) -> tuple[str, list, list]:
        fact = self.fact("there")
        slots = _slots(fact)
        group = world().category[slots["noun"]]
        likes = ("holds", None, "likes", slots["adjective"], slots["noun"])
        answer = [[fact], [("isa", slots["noun"], group)], [("trait", group), likes]]
        return world().fill(world().texts["topic"][language], language, slots), [fact], answer

    def _summary(self, language: str) -> tuple[str, list, list]:
        fact = self.fact("does")
        seen = self.fact("there", place=_slots(fact)["place"])
        story = self.pick(world().texts["stories"])[language]
        text = world().fill(story, language, {**_slots(fact), **_slots(seen)})
        return text, [fact, seen], [[fact]]

    def _code(self, language: str) -> tuple[str, list, str]:
        operations = tuple(world().texts["operations"])
        program: Fact = ()
        while not program or held_out(program) != self.held_out:
            start, other = self.random.sample("xy", 2)
            first = self.pick(operations), other
            second = self.pick(operations), self.pick(("x", "y", *DIGITS))
            program = ("code", start, *first, *second)
        said = [world().texts["operations"][op][language].format(b=b) for op, b in (first, second)]
        return start + world().texts["then"][language].join(said), [program], _source(program)

    def _translation(self, language: str) -> tuple[str, list, list]:
        fact = self.fact()
        return world().say(fact, language), [fact], [[fact]]

    def _chat(self, language: str) -> tuple[str, list, list]:
        texts = world().texts
        if self.random.random() < 0.4:
            fact = self.fact("holds", verb="likes")
            _, name, _, *liked = fact
            greets = self.random.random() < 0.5
            form = self.pick(texts["greetings" if greets else "small_talk"][language])
            answer = [[("hello", name)]] * greets + [[("too", *liked)]]
            return world().fill(form, language, _slots(fact)), [fact], answer
        fact, question = self.fact("does"), self.pick(texts["questions"])
        slots = _slots(fact)
        asked = [world().say(fact, language), world().fill(question[language], language, slots)]
        words = (slots[slot] for slot in texts["facts"][question["answer"]]["slots"])
        return _join(asked, language), [fact], [[(question["answer"], *words)]]

    def say(self, answer: list | str, language: str) -> str:
        """A right and concise response, in the given language."""
        if isinstance(answer, str):
            return f"def f(x, y): return {answer}"
        if answer[0][0][0] == "told":
            return _join(world().articles[answer[0][0][1]][language][: len(answer)], language)
        facts = [self.pick(options) for options in answer]
        for i, (kind, *words) in enumerate(facts):
            if None in words:
                given = {s: word for s, word in _slots((kind, *words)).items() if word}
                facts[i] = self.fact(kind, **given)
        variant = self.random.randrange(2)
        return _join([world().say(fact, language, variant) for fact in facts], language)

    def wrong(self, task: dict, language: str) -> str:
        """A response that has the right shape and another task's content."""
        answer = task["answer"]
        if answer[0][0][0] == "told":
            titles = [title for title in world().titles if title != answer[0][0][1]]
            return self.say(2 * [[("told", self.pick(titles))]], language)
        while True:
            other = self.task(task["family"], language)[1]["answer"]
            if isinstance(other, str) or [o[0][0] for o in other] == [o[0][0] for o in answer]:
                return self.say(other, language)

    def respond(self, task: dict, quality: str) -> str:
        """A demonstration's response, of the given quality."""
        language, texts = task["language"], world().texts
        code = task["family"] == "code"
        if quality == "other language":
            language = _other(language)
        if quality == "evasive" or (quality == "other language" and code):
            return self.pick(texts["evasions"][language])
        if quality == "wrong":
            return self.wrong(task, language)
        parts = [self.say(task["answer"], language)]
        if quality == "filler":
            before, after = (self.pick(texts["filler"][language][w]) for w in ("before", "after"))
            parts = self.pick([[before, *parts], [*parts, after], [before, *parts, after]])
        elif quality == "rambling":
            parts *= 2 if task["family"] == "article" else 3
        return "\n".join(parts) if code else _join(parts, language)

    def documents(self, language: str) -> list[str]:
        """One raw text of each sort, about random facts."""
        there, isa, (trait, _) = self._article(language)[2]
        slots = _slots(there[0])
        holds = self.fact("holds", adjective=slots["adjective"], noun=slots["noun"])
        song = [world().say(self.fact(), language) for _ in range(2)]
        story, _, summary = self._summary(language)
        phrases = [self.fact() for _ in range(3)]
        pairs = [[world().say(f, said) for said in (language, _other(language))] for f in phrases]
        question, _, answer = self._chat(language)
        steps, _, program = self._code(language)
        return [
            self.say([there, isa, [trait], [holds]], language),
            _join(song + song, language),
            _join([story, self.say(summary, language)], language),
            "\n".join(" ".join(pair) for pair in pairs),
            question + "\n" + self.say(answer, language),
            "# " + steps + "\n" + self.say(program, language),
        ]


def _slots(fact: Fact) -> dict[str, str]:
    """The words of a fact by the names of its slots."""
    return dict(zip(world().texts["facts"][fact[0]]["slots"], fact[1:], strict=True))


def _source(program: tuple[str, ...]) -> str:
    """The Python expression of a program, with as few brackets as it needs."""
    _, start, op1, b, op2, c = program
    inner = f"{start} {op1} {b}" if op1 in "+-*" else f"{op1}({start}, {b})"
    if op2 not in "+-*":
        return f"{op2}({inner}, {c})"
    return f"({inner}) {op2} {c}" if op2 == "*" and op1 in "+-" else f"{inner} {op2} {c}"


def _join(parts: list[str], language: str) -> str:
    return (" " if language == "en" else "").join(parts)


def _other(language: str) -> str:
    return "en" if language == "zh" else "zh"


# ---- The files


@dataclass(frozen=True)
class QuickstartData:
    """All of the quickstart's text, as the records of its JSONL files."""

    vocabulary: list[dict]  # {text}: what the tokenizer is trained on
    pretrain: list[dict]  # {text}
    demonstrations: list[dict]  # {prompt, response, quality, task}
    preference_prompts: list[dict]  # {prompt, task}
    ppo_prompts: list[dict]  # {prompt, task}
    eval_prompts: list[dict]  # {prompt, task}: held-out facts and programs only
    samples: list[dict]  # {prompt, task}: shown in the report; task["held_out"] says which are


def build(seed: int = 0) -> QuickstartData:
    """Makes the data: a function of the seed alone. The held-out part is the same for all seeds."""
    return QuickstartData(
        vocabulary=_vocabulary(),
        pretrain=_pretrain(_Maker(f"{seed}/pretrain", held_out=False)),
        demonstrations=_demonstrations(_Maker(f"{seed}/demonstrations", held_out=False)),
        preference_prompts=_prompts(_Maker(f"{seed}/preferences", held_out=False), 720, titles=1),
        ppo_prompts=_prompts(_Maker(f"{seed}/ppo", held_out=False), 1000, titles=1),
        eval_prompts=_prompts(_Maker(f"{seed}/evaluation", held_out=True), 52),
        samples=_samples(_Maker(f"{seed}/samples", held_out=True)),
    )


def write(directory: str | Path, seed: int = 0) -> dict[str, Path]:
    """Builds the data and writes a JSONL file for each part of it: name -> path."""
    data, directory = build(seed), Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: directory / f"{name}.jsonl" for name in data.__dataclass_fields__}
    for name, path in paths.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in getattr(data, name))
        path.write_text("".join(lines), encoding="utf-8")
    return paths


def _prompts(maker: _Maker, each: int, titles: int = 0) -> list[dict]:
    """`each` prompts per family and language and, `titles` times, one for every article; mixed."""
    asked: dict[str, dict] = {}
    for family in FAMILIES:
        for language in LANGUAGES:
            goal = len(asked) + each
            for _ in range(100 * each):
                if len(asked) == goal:
                    break
                prompt, task = maker.task(family, language)
                asked.setdefault(prompt, task)
            else:
                raise ValueError(f"quickstart_data: fewer than {each} prompts of {family} exist")
    rows = list(asked.items())
    for _ in range(titles):
        rows += [maker.titled(t, language) for t in world().titles for language in LANGUAGES]
    maker.random.shuffle(rows)
    return [{"prompt": prompt, "task": task} for prompt, task in rows]


def _samples(maker: _Maker) -> list[dict]:
    """What the report shows: the article that everyone asks for, and a prompt of each kind."""
    asked = ("写一篇关于人工智能的文章。", "Write an article about artificial intelligence.")
    tasks = [maker.titled("artificial intelligence", language)[1] for language in LANGUAGES]
    shown = [{"prompt": prompt, "task": task} for prompt, task in zip(asked, tasks, strict=True)]
    return shown + _prompts(maker, 1)


def _demonstrations(maker: _Maker) -> list[dict]:
    """Prompts drawn twice over (there are fewer than 2400 of code), each with one response."""
    rows = _prompts(maker, 1200, titles=8) + _prompts(maker, 1200)
    maker.random.shuffle(rows)
    qualities = maker.random.choices(tuple(QUALITIES), tuple(QUALITIES.values()), k=len(rows))
    return [
        {**row, "response": maker.respond(row["task"], quality), "quality": quality}
        for row, quality in zip(rows, qualities, strict=True)
    ]


def _pretrain(maker: _Maker) -> list[dict]:
    """Articles, paragraphs on a noun, songs with a refrain, stories, a phrase book, dialogues, and
    programs; shuffled. Much of it can be told from what went before, in the same document."""
    texts: list[str] = []
    for title, told in world().articles.items():
        for language in LANGUAGES:
            name = world().titles[title][language]
            texts += 8 * [name + "\n" + _join(told[language], language)]
    for _ in range(1000):
        for language in LANGUAGES:
            texts += maker.documents(language)
    maker.random.shuffle(texts)
    return [{"text": text} for text in texts]


def _vocabulary() -> list[dict]:
    """What the tokenizer learns its words from: the words one a line, so that no token spans two of
    them (Chinese has no spaces to say so), then the fixed parts of all sentences, and the articles.
    """
    words = []
    for kind, forms in world().words.items():
        for form in forms.values():
            words += [form["zh"], " " + form["en"], *[form["en"]] * (kind == "name")]
    texts = re.findall(r'"([^"]+)"', (STATIC / "world.json").read_text(encoding="utf-8"))
    parts = [part for text in texts for part in re.split(r"\{\w+\}", text)]
    parts += ["def f(x, y): return max(x, y) + 2", "def f(x, y): return (min(y, x) - 3) * 4"]
    told = [s for texts in world().articles.values() for told in texts.values() for s in told]
    told += [title for titles in world().titles.values() for title in titles.values()]
    texts = 40 * ["\n".join(words)] + 10 * ["\n".join(parts)] + 4 * ["\n".join(told)]
    return [{"text": text} for text in texts]
