"""The report in a real browser: it opens, answers, and asks the network for nothing."""

import json
import re
import time

import pytest
from selenium.common.exceptions import ElementClickInterceptedException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from pr1_jax.report import page
from pr1_jax.system import files
from tests.helpers import browser, made_up_run

pytestmark = pytest.mark.skipif(
    browser.find() is None,
    reason="needs Chromium and its driver (Debian: apt install chromium-driver)",
)
_LONGEST_TASK_SEC = 0.25  # of a 3,000 token response; a frame is much shorter


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "collapsed"
    made_up_run.write(workdir, responses=(1, 76, 77, 138, 139, 140, 160))
    large = made_up_run.response(paths=8, tokens=93, blocks=4)
    assert len(large["trace"]["pieces"]) > 2900
    made_up_run.write_responses(workdir, "eval_2_rl", [large])
    made_up_run.write_responses(workdir, "eval_1_sft", made_up_run.labelled())
    page.write([workdir], workdir / "report.html")
    return workdir / "report.html"


@pytest.fixture(scope="module")
def chrome():
    with browser.opened() as opened:
        yield opened


@pytest.fixture
def see(chrome, report):
    """Opens the report: see(fragment) gives the browser and a function for texts."""

    def visit(fragment="", width=1280):
        browser.look(chrome, width, 900)
        browser.visit(chrome, report, fragment)
        return chrome, lambda selector: [
            e.text for e in chrome.find_elements(By.CSS_SELECTOR, selector)
        ]

    return visit


def test_it_opens_on_the_trained_state_and_compares_it_with_sft(see):
    _, texts = see()
    assert "eval_2_rl" in texts("#response .facts")[0]
    accuracy, blocks, identical, distinct, steps = texts("#headline div")
    assert "40.0" in accuracy and "from 55.0\u202f% after SFT" in accuracy
    assert "60.0" in blocks and "12.5" in identical and "75.0" in distinct
    assert "80" in steps and "70 with blocks banned" in steps and "120 tokens" in steps
    dropped, signal = texts("#event-list .fact")
    assert dropped == "rl: kept 30 of 60 records read: 30 too long."
    assert "no signal (100% in the last steps)" in signal


def _press(chrome, selector):
    for _ in range(20):  # what is laid out anew may move away from under the click
        try:
            return chrome.find_element(By.CSS_SELECTOR, selector).click()
        except ElementClickInterceptedException:
            time.sleep(0.1)
    return chrome.find_element(By.CSS_SELECTOR, selector).click()


def _count(texts):
    return int(texts("#count")[0].split()[0])


def test_it_opens_without_errors_and_without_the_network(see, chrome):
    chrome.get_log("performance")
    see()
    assert chrome.get_log("browser") == []
    assert len(chrome.find_elements(By.CSS_SELECTOR, ".chart:not([hidden])")) >= 8
    logged = [json.loads(e["message"]) for e in chrome.get_log("performance")]
    events = [e["message"] for e in logged]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    asked = [params["request"]["url"] for params in sent]
    assert asked and all(url.startswith(("file:", "data:", "about:")) for url in asked)


def test_hostile_text_stays_text(see, chrome):
    see()
    _press(chrome, '[data-value="undecided"]')
    chrome.execute_script("document.querySelector('#responses').scrollIntoView()")
    _press(chrome, "#list button")
    shown = "return document.querySelector('.trace').textContent.includes(arguments[0])"
    assert chrome.execute_script(shown, made_up_run.HOSTILE)
    assert chrome.title == "collapsed – report"
    assert chrome.find_elements(By.TAG_NAME, "img") == []


def test_filters_change_the_count(see, chrome):
    _, texts = see()
    whole = _count(texts)
    counts = []
    for verdict in ("undecided", "incorrect", "correct"):
        _press(chrome, f'[data-filter="verdict"][data-value="{verdict}"]')
        counts.append(_count(texts))
        assert len(texts("#list li")) == counts[-1]
    assert sum(counts) == whole and min(counts) > 0
    _press(chrome, '[data-filter="blocks"][data-value="without"]')
    assert _count(texts) == 0
    for name in ("verdict", "blocks"):
        _press(chrome, f'[data-filter="{name}"][data-value=""]')
    chrome.find_element(By.ID, "filter-text").send_keys("answer: 7")
    assert 0 < _count(texts) < whole


def test_a_filter_without_a_hit_shows_no_response(see, chrome):
    _, texts = see()
    _press(chrome, '[data-filter="verdict"][data-value="correct"]')
    assert "correct" in texts("#response .judged")[0]
    _press(chrome, '[data-filter="blocks"][data-value="without"]')
    assert _count(texts) == 0
    assert texts("#response") == ["No response is of this kind."]
    _press(chrome, '[data-filter="verdict"][data-value="undecided"]')
    assert "undecided" in texts("#response .judged")[0]


def test_a_response_states_its_task(see, chrome):
    _, texts = see()
    _open(chrome, "eval_1_sft")
    labels, words = texts("#response .question .label"), texts("#response .question p")
    assert dict(zip(labels, words)) == {
        "Question": "Which two add to 26? 16 6 9 17",
        "What is asked": "Two of the listed numbers add up to 26. The answer is their "
        "difference.",
        "What counts as right": "A final answer equal to 8",
    }


@pytest.mark.parametrize("is_traced", [True, False])
def test_labels_stand_above_paths(see, chrome, is_traced):
    _, texts = see()
    _open(chrome, "eval_1_sft", 0 if is_traced else 1)
    assert chrome.execute_script(
        """return [...document.querySelectorAll(".paths .heads .cell")].map((cell) =>
          [...cell.querySelectorAll(".t")].map((t) => t.textContent).join(""));"""
    ) == [" 1", " 2"]
    rows = texts(".paths .row:not(.heads) .cell")
    assert rows and not any(re.search(r"> ?[12] ", row) for row in rows)
    assert (
        "0.0\u202f% of the work is distinct, paths are identical" in texts(".join")[0]
    )
    facts = texts("#response .facts")[0]
    assert "distinct work in paths\n0.0\u202f%" in facts
    assert "blocks with identical paths\n1 of 1" in facts


@pytest.mark.parametrize("is_planned", [True, False])
def test_plans_stand_above_paths(chrome, tmp_path, is_planned):
    """Where blocks are planned; elsewhere the tags of plans are text."""
    made_up_run.write(tmp_path, steps=3, responses=[])
    config = files.read_json(tmp_path / "config.json", {})
    config["rollout"] |= {"planned": is_planned, "path_labels": [" 1", " 2", " 3"]}
    files.write_json(tmp_path / "config.json", config)
    made_up_run.write_responses(tmp_path, "eval_2_rl", made_up_run.planned())
    page.write([tmp_path], tmp_path / "report.html")
    browser.look(chrome, 1280, 900)
    browser.visit(chrome, tmp_path / "report.html")
    found = lambda css: [
        e.text for e in chrome.find_elements(By.CSS_SELECTOR, f"#response {css}")
    ]
    lines = [
        [f"plan {i}", f"<Plan> row {row}</Plan>"] for i, row in enumerate("CAB", 1)
    ]
    heads = [
        f"path {i}: row {row} · 6 tokens, label {i}" for i, row in enumerate("CAB", 1)
    ]
    if not is_planned:
        lines, heads = [], [re.sub(r": row \w ·", "", head) for head in heads]
    for number in range(2):  # with a trace and without
        _open(chrome, "eval_2_rl", number)
        assert [row.split("\n")[-2:] for row in found(".plan")] == lines
        assert [" ".join(head.split()) for head in found(".heads .cell")] == heads
        assert sum("<Plan>" in text for text in found(".tag")) == 3 * is_planned
        count = "return document.querySelectorAll('.trace .t').length"
        pieces = made_up_run.planned()[0]["trace"]["pieces"]
        if number == 0:  # each token stands there once
            assert chrome.execute_script(count) == len(pieces) - pieces.count("\n")
    assert chrome.get_log("browser") == []


def test_titles_of_charts_are_whole(see, chrome):
    for width in (360, 1280):
        see("", width)
        cut = """return [...document.querySelectorAll(".chart:not([hidden]) h4")]
          .filter((h) => h.scrollWidth > h.clientWidth).map((h) => h.textContent)"""
        assert chrome.execute_script(cut) == []


def test_why_did_step_140_collapse(see, chrome):
    _, texts = see("#step=140")
    (panel,) = texts("#step")
    assert panel.startswith("Step 140 of rl")
    for words in ("Entropy collapse", "Length collapse", "tiered", "samples the same"):
        assert words in panel, words
    moved = texts("#step tbody th")
    assert {"Reward", "Entropy", "Response length"} <= {*moved}
    fell = dict(zip(moved, texts("#step tbody tr")))["Entropy"]
    assert "0.001" in fell and "↓" in fell
    (read, before) = chrome.find_elements(By.CSS_SELECTOR, "#step .actions button")
    assert before.text == "3 of the step before"
    read.click()
    assert _count(texts) == 3 and "rl 140" in texts("#response .facts")[0]


def test_an_event_leads_to_its_step_and_escape_back(see, chrome):
    _, texts = see()
    chrome.find_element(By.PARTIAL_LINK_TEXT, "Update skipped").click()
    assert texts("#step h2")[0].startswith("Step 77")
    assert chrome.current_url.endswith("#step=rl:77")
    chrome.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not chrome.find_element(By.ID, "step").is_displayed()


def test_one_step_is_read_off_all_charts_by_key(see, chrome):
    _, texts = see()
    charts = chrome.find_element(By.ID, "charts")
    charts.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    lines = chrome.find_elements(By.CSS_SELECTOR, ".cursor line")
    assert len(lines) == len(texts(".chart:not([hidden])"))
    charts.send_keys(Keys.ENTER)
    assert texts("#step h2") == ["Step 159 of rl"]


def _open(chrome, name, number=0):
    chrome.execute_script(
        """const rows = [...document.querySelectorAll("#list button")];
        rows.filter((row) => row.textContent.includes(arguments[0]))[arguments[1]].click();""",
        name,
        number,
    )


def test_paths_stand_side_by_side_in_time(see, chrome):
    see()
    _open(chrome, "eval_2_rl")
    _press(chrome, '[data-size="16"]')
    found = chrome.execute_script(
        """const rows = document.querySelectorAll(".paths .row:not(.heads)");
        const block = document.querySelector(".paths");
        return {
          blocks: document.querySelectorAll(".block").length,
          paths: block.querySelectorAll(".heads .cell").length,
          times: [...block.querySelectorAll(".time")].map((t) => t.textContent),
          cells: [...rows[1].querySelectorAll(".cell")].map((cell) => {
            const box = cell.getBoundingClientRect(); return [box.top, box.left]; }),
          forced: document.querySelectorAll(".trace .forced").length,
          tokens: document.querySelectorAll(".trace .t").length,
        };"""
    )
    assert found["blocks"] == 4 and found["paths"] == 8
    assert found["times"][1:4] == ["3", "19", "35"]
    tops, lefts = zip(*found["cells"], strict=True)
    assert len({*tops}) == 1 and [*lefts] == sorted({*lefts})
    # Of each block: two tags a path and four around it; and an EOS.
    assert found["forced"] == 4 * (8 * 2 + 4) + 1
    assert found["tokens"] > 2900


def test_a_token_says_what_it_is(see, chrome):
    _, texts = see()
    _open(chrome, "eval_2_rl")
    chrome.execute_script("document.querySelector('.trace').scrollIntoView()")
    _press(chrome, '.trace [data-i="5"]')
    tip = texts("#tip")[0].split("\n")
    assert tip[0] == "1+1·"
    assert dict(zip(tip[1::2], tip[2::2])) == {
        "log-prob": "−0.60",
        "probability": "54.9 %",
        "step": "5",
        "position": "15",
        "block, path": "1, 1",
        "token": "5",
    }


def test_mask_and_positions_are_drawn(see, chrome):
    see()
    _open(chrome, "eval_0_base")
    _press(chrome, '[data-picture="mask"]')
    _press(chrome, '[data-picture="positions"]')
    cells = chrome.execute_script(
        """const canvas = document.querySelector(".mask"), n = canvas.width;
        const data = canvas.getContext("2d").getImageData(0, 0, n, n).data;
        const at = (i, j) => [...data.slice(4 * (i * n + j), 4 * (i * n + j) + 4)].join();
        return {n, own: at(5, 4), sibling: at(10, 4), shared: at(10, 1),
          future: at(4, 10), summary: at(17, 10)};"""
    )
    # so ↵ <Parallel> | six tokens | five | </Parallel> …, and the prompt not drawn
    assert cells["n"] == 24
    assert len({cells[k] for k in ("own", "sibling", "shared", "future")}) == 4
    assert cells["summary"] == cells["shared"] and cells["future"].endswith(",0")
    assert len(chrome.find_elements(By.CSS_SELECTOR, ".positions path")) >= 4
    assert chrome.get_log("browser") == []


def test_a_response_of_3000_tokens_scrolls_smoothly(see, chrome):
    see()
    took = chrome.execute_async_script(
        """const done = arguments[0], tasks = [];
        new PerformanceObserver((list) => {
          for (const entry of list.getEntries()) tasks.push(entry.duration);
        }).observe({ type: "longtask" });
        const rows = [...document.querySelectorAll("#list button")];
        rows.find((row) => row.textContent.includes("eval_2_rl")).click();
        document.querySelector("#response").scrollIntoView();
        let frames = 0;
        const scroll = () => {
          scrollBy(0, 120);
          if (++frames < 60) return requestAnimationFrame(scroll);
          setTimeout(() => done(Math.max(0, ...tasks) / 1000), 100);
        };
        requestAnimationFrame(scroll);"""
    )
    assert took < _LONGEST_TASK_SEC


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_window(see, chrome, width):
    see("", width)
    _open(chrome, "eval_2_rl")
    _press(chrome, '[data-picture="mask"]')
    assert chrome.execute_script("return document.documentElement.scrollWidth") == width


def test_the_theme_follows_the_system_and_the_button(see, chrome, report):
    background = "return getComputedStyle(document.body).backgroundColor"
    see()
    light = chrome.execute_script(background)
    browser.look(chrome, 1280, 900, dark=True)
    dark = chrome.execute_script(background)
    chrome.find_element(By.ID, "theme").click()
    assert dark != light == chrome.execute_script(background)


def test_runs_lie_over_each_other(chrome, report, tmp_path):
    made_up_run.write(tmp_path / "other", steps=40, responses=[3])
    page.write([tmp_path / "other", report.parent], tmp_path / "compare.html")
    browser.look(chrome, 1280, 900)
    browser.visit(chrome, tmp_path / "compare.html", "#step=40")
    found = lambda css: chrome.find_elements(By.CSS_SELECTOR, css)
    assert {"other", "collapsed"} <= {e.text for e in found("#step .switch button")}
    reward = chrome.find_element(By.CSS_SELECTOR, ".chart:not([hidden]) svg")
    assert len(reward.find_elements(By.CSS_SELECTOR, "path")) >= 3
    before = len(found(".chart path"))
    _press(chrome, ".key")
    assert len(found(".chart path")) < before
    assert chrome.get_log("browser") == []
