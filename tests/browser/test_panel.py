"""The panel in a real JupyterLab, worked from the keyboard and read as text."""

from pathlib import Path

import pytest

from cmlib.bench import browser

from .conftest import Panel, kernel, notebook

HAN = "magnitude_pruning_han"
START = "import torch\ntorch.set_num_threads(1)\nfrom cmlib import *"
SHOWN = f'panel = explore("{HAN}", net="lenet300", data="mnist", keep=0.1)\npanel'
ASKED = f'asked = explore("{HAN}", net="mlp", data="digits", keep=0.5, predict={{"keep": 0.1}})\nasked'

NAMELESS = """(panel) => [...panel.querySelectorAll('input, select, button, summary, textarea, progress')]
  .filter(node => !node.closest('[hidden]')).map(node => [node.tagName, node.dataset.role ?? '',
    node.getAttribute('aria-label') || node.labels?.[0]?.textContent || node.textContent || ''])
  .filter(([, , name]) => !name.trim())"""
OUTSIDE = """(panel) => { const {left, right} = panel.getBoundingClientRect();
  return [...panel.querySelectorAll('*')].filter(node => node.getClientRects().length && !node.closest('.pnl-hidden, caption'))
    .filter(node => { const box = node.getBoundingClientRect(); return box.width && (box.right > right + 1 || box.left < left - 1); })
    .map(node => `${node.tagName}.${node.getAttribute('class')} ${node.textContent.slice(0, 40)}`); }"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A notebook with two panels, open in JupyterLab, all cells run."""
    folder = tmp_path_factory.mktemp("lab")
    notebook(folder / "panels.ipynb", START, SHOWN, ASKED, "panel")
    with browser.lab(folder, "panels.ipynb") as found:
        browser.run_all(found)
        yield found


@pytest.fixture
def panel(page):
    found = Panel(page)
    found.rested()
    return found


@pytest.fixture
def asked(page):
    return Panel(page, 1)


@pytest.fixture(autouse=True)
def no_script_fails(page):
    errors = []
    note = lambda error: errors.append(str(error))  # noqa: E731
    page.on("pageerror", note)
    yield
    page.remove_listener("pageerror", note)
    assert not errors


def says(page, name="panel"):
    """What the kernel knows of a panel's state: accuracy and bytes as the table words them."""
    cells = dict((row[0], row[2]) for row in kernel(page, f"{name}.cells({name}.state)"))
    return cells["accuracy, exact"], cells["file on disk"]


def test_panels_of_one_page_keep_to_themselves(page, panel, asked):
    names = page.evaluate("() => [...document.querySelectorAll('[data-role=panel] [id]')].map(node => node.id)")
    assert len(names) == len(set(names)) > 10
    for one in (panel, asked, Panel(page, 2)):
        foreign = "panel => [...panel.querySelectorAll('label')].filter(l => !panel.contains(l.control)).map(l => l.textContent)"
        assert one.root.evaluate(foreign) == []
        assert one.part("seed").locator("input:checked").count() == 1


def test_a_slider_moves_from_the_keyboard_and_the_figures_are_the_kernels(page, panel):
    start = panel.press("knob-keep", "ArrowLeft")
    moved = panel.press("knob-keep", *["ArrowLeft"] * 5, "PageDown", "PageDown")
    assert moved["accuracy"] != start["accuracy"] and moved["bytes"] != start["bytes"]
    assert (moved["accuracy"], moved["bytes"]) == says(page)
    assert moved["line"] == kernel(page, "panel.line()")
    shown, inside = panel.table(), kernel(page, "panel.cells(panel.state)")
    assert {row[0]: row[1:] for row in inside}.items() <= shown.items()
    back = panel.press("knob-keep", "PageUp", "PageUp", *["ArrowRight"] * 5)
    assert (back["accuracy"], back["bytes"]) == (start["accuracy"], start["bytes"])
    assert panel.part("knob-keep").get_attribute("aria-valuetext") == panel.part("exact-keep").input_value()


def test_home_and_end_reach_the_corners(page, panel):
    assert panel.press("knob-keep", "End")["accuracy"] == panel.table()["accuracy, exact"][0]  # all stays: as dense
    panel.press("knob-keep", "Home")
    assert panel.table()["weights kept"][1] == kernel(page, "f'{panel.state.kept:,}'") == "266"


def test_the_notebook_does_not_take_the_keys(page, panel):
    cells = page.locator(".jp-NotebookPanel .jp-Cell").count()
    panel.part("knob-keep").focus()
    for key in "abdd":
        page.keyboard.press(key)
    assert page.locator(".jp-NotebookPanel .jp-Cell").count() == cells
    assert panel.part("knob-keep").evaluate("node => node === document.activeElement")


def test_an_exact_value_can_be_typed(page, panel):
    found = panel.type("exact-keep", "0.0371")
    assert kernel(page, "panel.state.knobs['keep']") == 0.0371
    assert "keep=0.0371" in found["line"] and (found["accuracy"], found["bytes"]) == says(page)
    panel.type("exact-keep", "7")  # out of range: the nearest that is allowed
    assert kernel(page, "panel.state.knobs['keep']") == 1.0


def test_another_choice_of_a_list(page, panel):
    panel.type("exact-keep", "0.2")
    before = panel.figures()
    unit = panel.part("knob-unit")
    options = unit.locator("option").all_inner_texts()
    seq = panel.figures()["seq"]
    unit.select_option(label=next(o for o in options if o != "weight"))
    found = panel.rested(seq)
    assert kernel(page, "panel.state.knobs['unit']") != "weight"
    assert (found["accuracy"], found["bytes"]) == says(page) and found["accuracy"] != before["accuracy"]
    seq = found["seq"]
    unit.select_option(label="weight")
    found = panel.rested(seq)
    assert (found["accuracy"], found["bytes"]) == (before["accuracy"], before["bytes"])


def test_the_pictured_layer_is_chosen(page, panel):
    layers = panel.part("layer")
    seq = panel.figures()["seq"]
    layers.select_option(label="fc2")
    panel.rested(seq)
    assert kernel(page, "panel.layer") == "fc2"
    assert panel.root.locator(".pnl-histogram figcaption").inner_text().endswith("fc2 100×300")
    layers.select_option(label="fc1")
    panel.rested(seq + 1)


def test_an_error_is_shown_and_the_sliders_live_on(page, panel):
    kernel(page, "[setattr(panel, 'look', lambda knobs: 1 / 0)] and 0")
    panel.part("knob-keep").focus()
    page.keyboard.press("ArrowLeft")
    panel.part("error").wait_for(state="visible")
    assert "ZeroDivisionError" in panel.figures()["error"] and panel.part("error").get_attribute("role") == "alert"
    kernel(page, "[delattr(panel, 'look')] and 0")
    found = panel.press("knob-keep", "ArrowLeft")
    assert found["error"] == "" and (found["accuracy"], found["bytes"]) == says(page)


def test_two_states_are_pinned_and_compared(page, panel):
    first = panel.type("exact-keep", "0.3")
    panel.part("pin").press("Enter")
    panel.wait("panel => !panel.querySelector('[data-role=compare]').closest('section').hidden")
    second = panel.type("exact-keep", "0.03")
    assert panel.table("compare")["accuracy, exact"][:2] == [first["accuracy"], second["accuracy"]]  # A beside now
    panel.part("pin").press("Enter")
    panel.wait("panel => panel.querySelector('[data-role=compare] thead').textContent.includes('B beside A')")
    compared = panel.table("compare")
    assert compared["accuracy, exact"][:2] == [first["accuracy"], second["accuracy"]]
    assert compared["file on disk"][:2] == [first["bytes"], second["bytes"]]
    change = 100 * (kernel(page, "panel.pins[1].accuracy") - kernel(page, "panel.pins[0].accuracy"))
    assert compared["accuracy, exact"][2] == f"{change:+.1f}".replace("-", "−")
    panel.part("unpin").press("Enter")
    panel.wait("panel => panel.querySelector('[data-role=compare]').closest('section').hidden")
    assert kernel(page, "panel.pins") == []


def test_the_path_is_walked_and_cleared(page, panel):
    panel.press("knob-keep", "ArrowLeft")
    walked = panel.root.locator(".pnl-twin table").last.locator("tbody tr")
    assert walked.count() >= 1
    panel.part("clear").press("Enter")
    panel.wait("panel => !panel.querySelector('.pnl-twin table:last-child tbody tr')")
    panel.press("knob-keep", "ArrowLeft")
    assert walked.count() == 1 == kernel(page, "len(panel.path)")


def test_a_path_walked_before_the_view_opened_has_its_knobs(page):
    other = Panel(page, 2)
    assert walked(other) and all("keep " in row[-1] and "scope layer" in row[-1] for row in walked(other))


def test_a_guess_comes_before_the_accuracy(page, asked):
    asked.wait("panel => +panel.dataset.exact >= 0")
    page.wait_for_timeout(1_500)
    hidden = kernel(page, "asked.cells(asked.state)")[1][2]
    assert hidden.endswith(" %") and asked.figures()["accuracy"] == "?"
    assert asked.table()["accuracy, exact"][1] == "?"
    assert hidden not in asked.part("table").inner_text() + asked.part("plot").get_attribute("aria-label")
    asked.part("guess").focus()
    for key in ("Home", "PageUp", "PageUp"):
        page.keyboard.press(key)
    guess = float(asked.part("guess-exact").input_value())
    asked.part("lock").press("Enter")
    asked.wait("panel => panel.querySelector('[data-role=reveal]').textContent.includes('measured')")
    found = asked.rested()
    assert kernel(page, "asked.guesses[-1]['guess']") == guess / 100
    assert kernel(page, "asked.state.knobs['keep']") == 0.1
    actual = kernel(page, "asked.guesses[-1]['actual']")
    assert f"You said {guess:.0f} %; measured {100 * actual:.1f} %" in asked.part("reveal").inner_text()
    assert (found["accuracy"], found["bytes"]) == says(page, "asked")


def test_another_seed_another_network(page, asked):
    before = asked.figures()
    radio = asked.part("seed").locator("input").nth(1)
    radio.focus()
    page.keyboard.press("Space")
    found = asked.rested(before["seq"])
    assert kernel(page, "asked.net.source['seed']") == 1 and "seed=1" in found["line"]
    assert (found["accuracy"], found["bytes"]) == says(page, "asked")
    assert asked.table()["accuracy, exact"][0] == kernel(page, "f'{100 * asked.dense.accuracy:.2f} %'")


def test_the_button_trains_in_view(page, asked):
    seq = asked.type("exact-keep", "0.05")["seq"]
    reset(asked)
    plain = asked.rested(seq)
    asked.part("train").press("Enter")
    asked.wait("panel => /retrained/.test(panel.querySelector('[data-role=training]').textContent)", timeout=60)
    accuracy = kernel(page, "asked.path[-1].accuracy")
    assert f"{100 * accuracy:.2f} %" in asked.part("training").inner_text()
    trained = asked.rested()
    assert trained["accuracy"] == f"{100 * accuracy:.2f} %" and "fit(" in trained["line"]
    last = walked(asked)[-1]
    assert "keep 0.5," in last[-1] and last[-1].endswith("retrained, 1 epoch")
    assert len(walked(asked)) == kernel(page, "len(asked.path)")
    reset(asked)  # the same knobs again: the plan, untrained
    again = asked.rested(trained["seq"])
    assert again["line"] == plain["line"] and again["accuracy"] == plain["accuracy"]


def reset(panel):
    panel.root.get_by_role("button", name="reset").press("Enter")


def walked(panel):
    """The text twin's path: its rows of cells."""
    rows = panel.root.locator(".pnl-twin table").last.locator("tbody tr")
    return rows.evaluate_all("rows => rows.map(row => [...row.cells].map(cell => cell.textContent))")


def test_a_move_from_code_is_shown(page, panel):
    before = panel.figures()["seq"]
    kernel(page, "panel.move(keep=0.06).accuracy")
    found = panel.rested(before)
    assert (found["accuracy"], found["bytes"]) == says(page) and "keep=0.06" in found["line"]
    assert panel.part("exact-keep").input_value() == "0.06"
    assert panel.press("knob-keep", "ArrowLeft")["seq"] > found["seq"]


def test_every_control_has_a_name(page, panel, asked):
    for one in (panel, asked):
        one.root.locator("summary").last.scroll_into_view_if_needed()
        assert one.root.evaluate(NAMELESS) == []
        tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
        controls = {"slider", "spinbutton", "combobox", "button", "radio", "textbox", "DisclosureTriangle", "progressindicator", "image", "img"}
        inside = described(page, one)
        nodes = [n for n in tree if not n.get("ignored") and n.get("backendDOMNodeId") in inside and n["role"]["value"] in controls]
        found = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes]
        assert {"slider", "spinbutton", "combobox", "button"} <= {role for role, _ in found}
        assert [role for role, name in found if not name.strip()] == []
        shown = one.root.aria_snapshot()
        assert 'slider "keep' in shown and 'table "figures' in shown and 'button "pin"' in shown


def described(page, one):
    """The numbers of all nodes inside a panel, as the accessibility tree numbers them."""
    session = page.context.new_cdp_session(page)
    one.root.evaluate("node => window.cmlibPanel = node")
    found = session.send("Runtime.evaluate", {"expression": "window.cmlibPanel"})["result"]["objectId"]
    node = session.send("DOM.describeNode", {"objectId": found, "depth": -1})["node"]

    def numbers(n):
        yield n["backendNodeId"]
        for child in n.get("children", []):
            yield from numbers(child)

    return set(numbers(node))


def test_every_control_is_reached_by_tab(page, panel):
    controls = panel.root.evaluate("""panel => [...panel.querySelectorAll('input, select, button, summary')]
      .filter(node => node.checkVisibility() && !node.disabled && (node.type !== 'radio' || node.checked))
      .map(node => node.dataset.role ?? node.textContent)""")
    focused = """panel => { const node = document.activeElement; return panel.contains(node) ? node.dataset.role ?? node.textContent : null; }"""
    seen = []
    for keys in ("Tab", "Shift+Tab"):
        panel.part("knob-keep").focus()
        while (at := panel.root.evaluate(focused)) is not None and len(seen) < 100:
            seen.append(at)
            page.keyboard.press(keys)
    assert set(seen) == set(controls)


@pytest.mark.parametrize("width", [700, 480, 1800])
def test_nothing_is_cut_off_at_any_width(page, panel, asked, width):
    for one in (panel, asked):
        one.root.evaluate("(node, width) => { node.closest('.pnl-room').style.width = `${width}px`; }", width)
        page.wait_for_timeout(150)
        assert one.root.bounding_box()["width"] == pytest.approx(width, abs=2)
        twin = one.root.locator("details.pnl-twin")
        twin.evaluate("node => node.open = true")
        assert one.root.evaluate(OUTSIDE) == []
        assert one.root.evaluate("node => node.scrollWidth <= node.clientWidth + 1")
        twin.evaluate("node => node.open = false")
        one.root.evaluate("node => { node.closest('.pnl-room').style.width = ''; }")


def test_what_is_taken_away(page, panel):
    with page.expect_download() as download:
        panel.part("take-away").locator("summary").press("Enter")
        panel.part("save-csv").press("Enter")
    lines = Path(download.value.path()).read_text().splitlines()
    assert lines[0].startswith("step,bytes,accuracy,keep") and len(lines) == 1 + kernel(page, "len(panel.path)")
    assert float(lines[-1].split(",")[2]) == pytest.approx(kernel(page, "panel.path[-1].accuracy"))
    assert lines[0].endswith(",epochs") and not any(",," in line for line in lines)
    with page.expect_download() as download:
        panel.part("take-away").locator("summary").press("Enter")
        panel.part("save-svg").press("Enter")
    assert Path(download.value.path()).read_text().startswith("<svg")


def test_a_second_view_shows_where_the_kernel_stands(page, panel):
    seq = panel.figures()["seq"]
    panel.part("layer").select_option(label="fc3")
    panel.rested(seq)
    found = panel.type("exact-keep", "0.07")
    other = Panel(page, 2)
    other.wait("(panel, seq) => +panel.dataset.exact >= seq", found["seq"])
    assert other.figures() == found
    assert other.part("exact-keep").input_value() == "0.07"
    assert other.part("layer").locator("option:checked").inner_text() == "fc3"
    moved = other.press("knob-keep", "ArrowRight")
    panel.wait("(panel, seq) => +panel.dataset.exact >= seq", moved["seq"])
    assert panel.rested() == moved and panel.part("exact-keep").input_value() == other.part("exact-keep").input_value()
