"""Is the surprise map right, in numbers and in a real browser?"""

from __future__ import annotations

import base64
import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.inference.tiny import prose, random_ids, tiny_export
from titans_pretrain.inference.export import load_export
from tools.surprise_map import Observation, main, observe_text, packed

# On one worker of pytest-xdist, so that what they share is trained once.
pytestmark = pytest.mark.xdist_group("surprise_map")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HOSTILE = "café 日本 </script><b>bold</b> & \t\"quoted\" 'ends' <!-- \\u003c"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("surprise") / "mag"
    tiny_export(folder, tokenizer_file, "mag", memory_depth=3)
    return folder


@pytest.mark.parametrize("variant", ["mac", "mal"])
def test_text_read_in_pieces_is_the_text_read_at_once(variant: str, tmp_path: Path, tokenizer_file: Path) -> None:
    tiny_export(tmp_path / "out", tokenizer_file, variant)
    model = load_export(tmp_path / "out").model.double()
    ids = random_ids(75)
    once, parts = observe_text(model, ids, 1000), observe_text(model, ids, 32)
    tokens = torch.tensor([ids])
    assert torch.isnan(once.nll[0])
    assert float(once.nll[1:].sum()) == pytest.approx(float(model(tokens[:, :-1], tokens[:, 1:])), rel=1e-5)
    torch.testing.assert_close(parts.nll, once.nll, equal_nan=True)
    assert parts.blocks.keys() == once.blocks.keys() == {0, 1}
    for i, signals in once.blocks.items():
        for x, y in zip(parts.blocks[i], signals, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def test_packed_numbers_keep_three_digits() -> None:
    x = 1e7 * torch.rand(300, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[7, 1] = float("nan")
    found = packed(x)
    halves = np.frombuffer(base64.b64decode(found["data"]), "<f2").astype(np.float64)
    np.testing.assert_allclose(
        halves.reshape(2, 3, 300).transpose(2, 0, 1) * found["scale"], x.numpy(), rtol=6e-4, atol=1
    )


def test_command_line(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("\n".join(prose(12)))
    main([str(export), str(tmp_path / "text.txt"), "--output", str(tmp_path / "a.html"), "--max-tokens", "40"])
    said = capsys.readouterr().out
    assert "40 tokens, the first of" in said
    page = (tmp_path / "a.html").read_text()
    assert "the first 40 of" in page
    assert "default-src 'none'" in page  # the browser itself refuses everything that is not in the file
    assert "http:" not in page
    assert "https:" not in page


def test_text_from_stdin(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(HOSTILE)
    main([str(export), str(tmp_path / "text.txt"), "--output", str(tmp_path / "a.html")])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(HOSTILE.encode())))
    main([str(export), "-", "--output", str(tmp_path / "b.html")])
    a, b = ((tmp_path / name).read_text() for name in ("a.html", "b.html"))
    assert a.replace("text.txt", "standard input") == b


BAD = {
    "no export": (["{none}", "{text}"], "there is no exported model at"),
    "no text": (["{export}", "{none}"], "cannot read TEXT"),
    "empty": (["{export}", "{empty}"], "is empty"),
    "too few": (["{export}", "{text}", "--max-tokens", "1"], "--max-tokens must be 2 or more"),
    "no folder": (["{export}", "{text}", "--output", "{none}/a.html"], "there is no folder"),
    "no memory": (["{transformer}", "{text}"], "variant transformer, which has no neural memory"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(
    name: str, export: Path, tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("some text")
    (tmp_path / "empty").write_text("")
    if "{transformer}" in BAD[name][0]:
        tiny_export(tmp_path / "transformer", tokenizer_file, "transformer")
    places = {"export": export, **{n: tmp_path / n for n in ("none", "text", "empty", "transformer")}}
    arguments, message = BAD[name]
    with pytest.raises(SystemExit) as exit_:
        main([a.format(**places) for a in arguments])
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


# --------------------------------------------------------------------------------------------------- in a real browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window, driven by selenium."""
    program = next((found for found in map(shutil.which, BROWSERS) if found), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("there is no chromium with its chromedriver; on Debian: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,1000"),
        *("--disable-background-networking", "--no-first-run", "--disable-sync", "--disable-component-update"),
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chromium = webdriver.Chrome(options=options, service=Service(driver))
    yield chromium
    chromium.quit()


@pytest.fixture(scope="module")
def text() -> str:
    return "\n".join([*prose(25), "", HOSTILE, *prose(5, seed=3)]) + "\n"


@pytest.fixture(scope="module")
def observed(export: Path, text: str) -> Observation:
    loaded = load_export(export)
    return observe_text(loaded.model, loaded.tokenizer.encode(text), 32)


@pytest.fixture
def page(browser: Any, export: Path, text: str, tmp_path: Path) -> Any:
    (tmp_path / "text.txt").write_text(text)
    main([str(export), str(tmp_path / "text.txt"), "--output", str(tmp_path / "map.html")])
    return opened(browser, tmp_path / "map.html")


def opened(browser: Any, path: Path, fragment: str = "") -> Any:
    browser.get("about:blank")
    browser.get(path.as_uri() + fragment)
    assert browser.execute_script("return document.documentElement.dataset.ready") == "yes"
    return browser


def choose(page: Any, name: str, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(page.find_element("id", name)).select_by_value(value)


def shade(page: Any) -> list[int]:
    """The colour of every token, from 0 to 31; -1: none."""
    names = page.execute_script("return [...document.querySelectorAll('#text i')].map(e => e.className)")
    return [int(name.split()[0][1:]) if name.startswith("c") else -1 for name in names]


def quantiles(values: torch.Tensor) -> list[int]:
    x = values.numpy()
    below = np.searchsorted(np.sort(x), x) / (len(x) - 1)
    return [min(31, int(b * 32)) for b in below]


def near(found: list[int], expected: list[int]) -> None:
    """Rounding to 16 bits may move a token that is at a border by one."""
    differences = np.abs(np.array(found) - np.array(expected))
    assert differences.max() <= 1
    assert (differences > 0).mean() < 0.1


def test_page_shows_exactly_the_text_without_a_complaint_or_a_request(page: Any, text: str) -> None:
    assert page.execute_script("return document.getElementById('text').textContent") == text
    assert page.execute_script("return document.querySelectorAll('#text b').length") == 0
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert page.get_log("browser") == []


def test_colours_follow_the_choices(page: Any, observed: Observation) -> None:
    surprise = {i: s.gradient_norm.square().sum(-1).sqrt() for i, s in observed.blocks.items()}
    near(shade(page), quantiles(surprise[0].mean(1)))
    choose(page, "block", "1")
    near(shade(page), quantiles(surprise[1].mean(1)))
    choose(page, "head", "1")
    near(shade(page), quantiles(surprise[1][:, 1]))
    choose(page, "scale", "local")
    x = surprise[1][:, 1].numpy()
    around = [np.delete(x[max(0, t - 128) : t + 129], min(t, 128)) for t in range(len(x))]
    near(shade(page), [min(31, int(32 * (others < value).mean())) for value, others in zip(x, around, strict=True)])
    choose(page, "scale", "quantile")
    choose(page, "block", "-1")
    near(shade(page), quantiles((surprise[0][:, 1] + surprise[1][:, 1]) / 2))
    choose(page, "quantity", "alpha")
    choose(page, "block", "0")
    choose(page, "matrix", "2")
    assert observed.blocks[0].alpha is not None
    near(shade(page), quantiles(observed.blocks[0].alpha[:, 1, 2]))
    choose(page, "quantity", "nll")
    assert shade(page)[0] == -1  # the first token has no loss
    near(shade(page)[1:], quantiles(observed.nll[1:]))
    assert not page.find_element("id", "block").is_enabled()
    choose(page, "quantity", "step")
    choose(page, "matrix", "-1")
    choose(page, "head", "-1")
    choose(page, "scale", "absolute")
    steps = torch.stack(
        [(s.theta * s.gradient_norm).square().sum(-1).sqrt().mean(1) for s in observed.blocks.values()]
    ).numpy()
    top = max(np.sort(row)[round(0.995 * (len(row) - 1))] for row in steps)
    levels = (steps[0] - steps.min()) / (top - steps.min())
    near(shade(page), [max(0, min(31, int(level * 32))) for level in levels])
    ticks = page.find_element("id", "ticks").text.split()
    assert float(ticks[0]) == pytest.approx(steps.min(), rel=2e-3)


def table(page: Any) -> dict[str, list[float]]:
    rows = page.execute_script(
        "return [...document.querySelectorAll('#numbers tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    return {f"{i} {row[0]}": [float(x) for x in row[1:]] for i, row in enumerate(rows)}


def test_a_click_and_a_hover_show_all_numbers_of_the_token(page: Any, observed: Observation) -> None:
    from selenium.webdriver import ActionChains

    t = 30
    page.find_element("id", f"t{t}").click()
    page.find_element("id", "all-heads").click()
    rows = table(page)
    assert [name.split(maxsplit=1)[1] for name in rows] == [
        *("block 0, mean of heads", "head 0", "head 1"),
        *("block 1, mean of heads", "head 0", "head 1"),
    ]
    found = np.array(list(rows.values()))
    expected = []
    for s in observed.blocks.values():
        assert s.alpha is not None
        assert s.eta is not None
        norm, step = (x[t].square().sum(-1, keepdim=True).sqrt() for x in (s.gradient_norm, s.theta * s.gradient_norm))
        heads = torch.cat(
            (s.inner_loss[t][:, None], norm, step, s.gradient_norm[t], s.theta[t], s.eta[t], s.alpha[t]), dim=1
        )
        expected += [heads.mean(0).numpy(), *heads.numpy()]
    np.testing.assert_allclose(found, np.array(expected), rtol=2e-3)
    facts = page.find_element("id", "token-facts").text
    assert f"token {t + 1} of" in facts
    assert float(facts.split("loss ")[1].split()[0]) == pytest.approx(float(observed.nll[t]), rel=2e-3)
    ActionChains(page).move_to_element(page.find_element("id", "t33")).perform()
    assert "token 34 of" in page.find_element("id", "token-facts").text
    ActionChains(page).move_to_element(page.find_element("id", "theme")).perform()
    assert f"token {t + 1} of" in page.find_element("id", "token-facts").text


def test_keys_move_through_the_text(page: Any, observed: Observation) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys: str) -> str:
        ActionChains(page).send_keys(*keys).perform()
        return page.switch_to.active_element.get_attribute("id")

    page.execute_script("document.getElementById('scale').focus()")
    assert press(Keys.TAB) == "t0"  # the whole text is one stop
    assert press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT) == "t1"
    below = press(Keys.ARROW_DOWN)
    place = "return document.getElementById(arguments[0]).getBoundingClientRect().top"
    assert page.execute_script(place, below) > page.execute_script(place, "t1") + 10
    assert press(Keys.ARROW_UP) == "t1"
    surprise = observed.blocks[0].gradient_norm.square().sum(-1).sqrt().mean(1)
    highest = sorted(surprise.topk(-(-len(surprise) * 2 // 100)).indices.tolist())
    assert press("n") == f"t{next(t for t in highest if t > 1)}"
    assert press("]").startswith("t")
    assert page.find_element("id", "block").get_attribute("value") == "1"
    assert press(Keys.END) == f"t{len(observed.nll) - 1}"
    assert press(Keys.HOME) == "t0"
    assert "token 1 of" in page.find_element("id", "token-facts").text
    assert page.find_element("id", "live").get_attribute("textContent")


def test_light_and_dark_are_readable(page: Any) -> None:
    """Every colour has the contrast 4.5 with its letters, as WCAG AA asks."""
    grounds = []
    for theme in ("light", "dark"):
        choose(page, "theme", theme)
        pairs = page.execute_script(
            "return [...document.querySelectorAll('#ramp span')].map(e => { const s = getComputedStyle(e);"
            "return [s.backgroundColor, s.color] })"
        )
        assert len(pairs) == 32
        for back, front in pairs:
            assert contrast(rgb(back), rgb(front)) >= 4.5, (theme, back, front)
        grounds.append(rgb(page.execute_script("return getComputedStyle(document.body).backgroundColor")))
    assert sum(grounds[0]) > 700 > 100 > sum(grounds[1])


def rgb(text: str) -> list[float]:
    return [float(x) for x in text[text.index("(") + 1 : -1].split(",")[:3]]


def contrast(x: list[float], y: list[float]) -> float:
    def light(c: list[float]) -> float:
        linear = [v / 12.92 if (v := part / 255) <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for part in c]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, bright = sorted((light(x), light(y)))
    return (bright + 0.05) / (dark + 0.05)


def test_twenty_thousand_tokens(browser: Any, tmp_path: Path, tokenizer_file: Path) -> None:
    tiny_export(tmp_path / "out", tokenizer_file, "lmm", memory_chunk=64, memory_momentum=False)
    (tmp_path / "text.txt").write_text("\n".join(prose(3000)))
    main([str(tmp_path / "out"), str(tmp_path / "text.txt"), "--output", str(tmp_path / "map.html")])
    page = opened(browser, tmp_path / "map.html", "#q=theta&block=1&token=19000&theme=dark")
    assert page.execute_script("return document.querySelectorAll('#text i').length") == 20_000
    assert page.find_element("id", "quantity").get_attribute("value") == "theta"
    assert "eta" not in page.execute_script(
        "return [...document.querySelectorAll('#quantity option')].map(o => o.value)"
    )
    assert "token 19001 of 20000" in page.find_element("id", "token-facts").text
    took = page.execute_script(
        "const select = document.getElementById('block'), start = performance.now(); select.value = 0;"
        "select.dispatchEvent(new Event('change')); document.body.offsetHeight; return performance.now() - start"
    )
    assert took < 2000, f"a change of the block took {took:.0f} ms"
    print(f"a change of the block: {took:.0f} ms")
