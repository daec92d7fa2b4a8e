"""The chat page, in a real browser: what a user sees, types and hears."""

from __future__ import annotations

import browser
import pytest
from serving import Client, eventually, make_engine, slow_down, talkative

pytestmark = pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium")


@pytest.fixture(scope="module")
def window():
    window = browser.Browser()
    yield window
    window.close()


@pytest.fixture
def page(window):
    """The page of a server that takes its time, and whose answers do not end by themselves."""
    with Client(slow_down(talkative(make_engine(context=512)), 0.004)) as client:
        window.look(1100, 760)
        window.open(str(client.base_url))
        window.until("model.textContent")
        window.client = client
        yield window
        assert window.complaints == []


ANSWERED = "!answering && document.querySelectorAll('.assistant').length === {}"
COLOURS = """(() => {
  const light = (c) => c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => { // the nearest background that is not transparent
    for (; ; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (!c.startsWith("rgba(0, 0, 0, 0")) return c;
    }
  };
  return [...document.querySelectorAll("body *")]
    .filter((e) => e.checkVisibility() && !e.disabled && !e.matches(".unseen, script"))
    .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
    .map((e) => {
      const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), e.className || e.tagName, e.textContent.slice(0, 20)];
    });
})()"""


def say(page, text: str) -> None:
    page.type(text)
    page.press("Enter")


def test_streams_and_stops(page):
    say(page, "Hello")
    page.until("document.querySelector('.busy .note')?.textContent.includes('tokens/s')")
    assert page.value("send.textContent") == "Stop"
    assert page.value("prompt.value") == ""
    early = len(page.value("document.querySelector('.assistant .said').textContent"))
    page.until(f"document.querySelector('.assistant .said').textContent.length > {early + 20}")
    page.press("Escape")
    page.until(ANSWERED.format(1))
    note = page.value("document.querySelector('.assistant .note').textContent")
    assert note.endswith(" · stopped") and "first after 0." in note
    assert page.value("send.textContent") == "Send"
    eventually(lambda: page.client.engine.stats.running == 0)
    assert page.client.engine.stats.tokens_generated < 200
    assert "Answer complete" in page.value("document.querySelector('#status').textContent")

    partial = page.value("document.querySelector('.assistant .said').textContent")
    say(page, "And now?")
    page.until("answering")
    page.value("send.click()")  # the button stops, too
    page.until(ANSWERED.format(2))
    said = [(message["role"], message["content"]) for message in page.posts[-1]["messages"]]
    assert said == [("user", "Hello"), ("assistant", partial), ("user", "And now?")]
    page.value("fresh.click()")
    assert page.value("log.childElementCount") == 0 and page.value("!welcome.hidden")
    assert page.value("document.activeElement.id") == "prompt"


def test_what_is_sent(page):
    """The settings; Shift+Enter makes a line, and the Enter that ends a Chinese word sends none."""
    page.type("one")
    page.press("Enter", shift=True)
    page.type("two")
    page.command("Input.imeSetComposition", text="wen", selectionStart=3, selectionEnd=3)
    composing = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, cancelable: true})"
    assert page.value(f"prompt.dispatchEvent({composing})")
    assert page.value("log.childElementCount") == 0
    page.type("文")
    page.value("document.querySelector('details').open = true")
    page.value("temperature.value = 1.5, temperature.oninput()")
    assert page.value("degree.textContent") == "1.50"
    page.value("$('length').value = 7, $('stop').value = 'END\\n\\\\n\\\\n'")
    page.press("Enter")
    page.until(ANSWERED.format(1))
    (body,) = page.posts
    assert body["messages"] == [{"role": "user", "content": "one\ntwo文"}]
    assert (body["temperature"], body["max_tokens"]) == (1.5, 7)
    assert body["stop"] == ["END", "\n\n"]
    note = page.value("document.querySelector('.assistant .note').textContent")
    assert note.startswith("7 tokens · ") and note.endswith(" · length limit reached")


def test_errors(page):
    page.value("$('stop').value = 'a\\nb\\nc\\nd\\ne'")
    say(page, "Hello")
    page.until("document.querySelector('[role=alert]')")
    assert "stop takes at most 4" in page.value(
        "document.querySelector('[role=alert]').textContent"
    )
    assert page.value("document.querySelectorAll('.assistant').length") == 0
    page.value("$('stop').value = '', $('length').value = 5")
    page.value("document.querySelector('[role=alert] button').click()")
    page.until(ANSWERED.format(1))
    assert page.value("document.querySelectorAll('[role=alert]').length") == 0
    assert page.posts[-1]["messages"] == [{"role": "user", "content": "Hello"}]
    (complaint,) = page.complaints
    assert "400" in complaint
    page.complaints.clear()

    page.client.close()
    say(page, "Still there?")
    page.until("document.querySelector('[role=alert]')")
    assert "cannot be reached" in page.value("document.querySelector('[role=alert]').textContent")
    page.complaints.clear()


def test_what_no_longer_fits_is_left_out(page):
    page.value("$('length').value = 200")
    for i in range(3):
        say(page, f"{i}" * 60)
        page.until(ANSWERED.format(i + 1))
    (last,) = page.posts[-1:]
    assert last["messages"][-1]["content"] == "2" * 60 and len(last["messages"]) < 5
    note = page.value("[...document.querySelectorAll('.assistant .note')].at(-1).textContent")
    assert note.endswith("to fit the context")
    assert page.complaints and all("400" in complaint for complaint in page.complaints)
    page.complaints.clear()


def test_key(window):
    with Client(make_engine(), "sesame") as client:
        window.look(1100, 760)
        window.open(str(client.base_url))
        window.until("!keyform.hidden && document.activeElement.id === 'key'")
        say(window, "sesame")
        window.until("model.textContent === 'toy' && keyform.hidden")
        assert window.value("document.activeElement.id") == "prompt"
        say(window, "Hello")
        window.until(ANSWERED.format(1))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1100])
def test_looks(page, width, dark):
    """Nothing is cut off, text has a contrast of 4.5, focus shows, and it is dark where asked."""
    page.look(width, 640, dark=dark)
    page.value("document.querySelector('details').open = true, $('length').value = 30")
    say(page, "Hello, " * 20 + "a" * 200)
    page.until(ANSWERED.format(1))
    page.value("fail(new Error('It broke.'), answer)")
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value("log.scrollWidth <= log.clientWidth")
    assert page.value("composer.getBoundingClientRect().bottom") < 640
    background = page.value("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(23, 23, 22)") == dark
    colours = page.value(COLOURS)
    assert len(colours) > 12
    assert [entry for entry in colours if entry[0] < 4.5] == []
    seen = set()
    for _ in range(15):
        page.press("Tab")
        seen.add(page.value("document.activeElement.id || document.activeElement.tagName"))
        ring = page.value(
            "[document.activeElement, composer].some((e) => e.matches(':focus-within') && "
            "(getComputedStyle(e).outlineStyle === 'solid' || e === composer))"
        )
        assert ring or page.value("document.activeElement === document.body")
    wanted = {"language", "fresh", "MAIN", "BUTTON", "prompt", "SUMMARY", "temperature", "length"}
    assert wanted | {"stop"} <= seen


@pytest.mark.parametrize("language", ["en", "zh"])
def test_names_for_screen_readers(page, language):
    if language == "zh":
        page.value("$('language').click()")
        assert page.value("document.documentElement.lang") == "zh-Hans"
        assert page.value("prompt.placeholder") == "输入消息"
    page.value("document.querySelector('details').open = true")
    nodes = page.command("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "slider", "spinbutton", "log", "DisclosureTriangle"}
    named = {}
    for node in nodes:
        role = node.get("role", {}).get("value")
        if role in roles and not node["ignored"]:
            named.setdefault(role, []).append(node["name"].get("value"))
    assert roles <= named.keys()
    assert all(name for names in named.values() for name in names)
    assert len(named["textbox"]) == 2
    chinese = any("消息" in name for name in named["textbox"])
    assert chinese == (language == "zh")
