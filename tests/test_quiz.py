"""A guess before the answer, and the catalogue that one can search."""

import html
import re

import ipywidgets as widgets
import pytest

from cmlib.methods import catalog
from cmlib.methods.coincide import COINCIDENCES
from cmlib.view import browse as module
from cmlib.view.browse import browse, families, installed, methods_table, sentence
from cmlib.view.quiz import predict_first
from cmlib.view.survey import ELSEWHERE, SURVEY, group, section


def text(widget):
    return re.sub("<[^>]+>", "", widget.said.value)


def test_a_guess_is_held_against_the_measured_answer():
    calls = []
    quiz = predict_first("How many?", lambda: calls.append(1) or 42.0, lo=0, hi=100, why="Six times seven.")
    assert calls == [] and quiz.said.value == "" and quiz.slider.value == 50  # nothing is measured before the guess
    quiz.slider.value = 60
    quiz.button.click()
    assert (quiz.guess, quiz.answer, calls) == (60, 42.0, [1])
    assert text(quiz) == "You said 60 %; measured 42 %: 18 % too high. Six times seven."
    assert quiz.button.disabled and quiz.slider.disabled


@pytest.mark.parametrize(("guess", "verdict"), [(42.5, "spot on"), (30, "12 % too low"), (90, "48 % too high")])
def test_the_verdict(guess, verdict):
    quiz = predict_first("How many?", lambda: 42)
    quiz.slider.value = guess
    quiz.reveal()
    assert verdict in text(quiz)


def test_a_measurement_that_fails_gives_the_slider_back():
    answers = [ValueError("a < b"), 7]

    def measure():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    quiz = predict_first("How many?", measure, hi=10)
    quiz.reveal()
    assert 'role="alert"' in quiz.said.value and "ValueError: a &lt; b" in quiz.said.value
    assert quiz.answer is None and not quiz.button.disabled and not quiz.slider.disabled
    quiz.reveal()
    assert quiz.answer == 7 and 'role="status"' in quiz.said.value


def test_large_and_small_numbers_are_written_out():
    quiz = predict_first("How many kB?", lambda: 1066.44, hi=4000, unit="kB")
    quiz.slider.value = 2480
    quiz.reveal()
    assert text(quiz).startswith("You said 2,480 kB; measured 1,066 kB: 1,414 kB too high.")
    small = predict_first("How long?", lambda: 0.0123, lo=0, hi=1, unit="ms")
    small.slider.value = 0.25
    small.reveal()
    assert "You said 0.25 ms; measured 0.0123 ms: 0.238 ms too high." in text(small)


def test_without_a_unit_no_blank_is_left():
    quiz = predict_first("How many?", lambda: 10, hi=20, unit="")
    quiz.reveal()
    assert text(quiz).strip() == "You said 10; measured 10: spot on."


def test_markup_in_question_and_reason_is_shown_as_it_is():
    quiz = predict_first("Is a < b & c?", lambda: 1, why="<b> is no tag")
    question = quiz.children[0].value
    assert "a &lt; b &amp; c" in question
    quiz.reveal()
    assert "&lt;b&gt; is no tag" in quiz.said.value


def test_every_control_of_the_quiz_says_what_it_is():
    quiz = predict_first("How many?", lambda: 1, unit="kB")
    assert quiz.slider.description == "guess, kB" and quiz.button.description and quiz.button.tooltip


# The catalogue


def test_the_table_has_every_method():
    table = methods_table()
    assert list(table.index) == list(catalog())
    assert all(table.loc[k, "paper"] == m.paper and table.loc[k, "chapter"] == m.chapter for k, m in catalog().items())


def test_the_filter_narrows():
    found = set(methods_table(text="OPTIMAL brain DAMAGE").index)
    assert "optimal_brain_damage" in found and len(found) < len(catalog())
    assert set(methods_table(text="damping").index) == {k for k, m in catalog().items() if "damping" in m.knobs}
    assert set(methods_table("02").index) == {k for k, m in catalog().items() if m.chapter == "02"}
    assert len(methods_table(text="no such thing")) == 0
    assert len(methods_table("99")) == 0 and list(methods_table("99").columns) == list(methods_table().columns)


def test_the_groups_are_those_of_the_survey():
    references = [number for numbers in SURVEY.values() for number in numbers]
    assert len(references) == len(set(references))
    for m in catalog().values():
        if re.search(r"001, .*\[", section(m)):  # its number is in one group, and that group is of the section that the docstring names
            assert group(m).startswith(section(m).partition(", ")[2].partition(" ")[0]), m.key
        else:
            assert group(m) == ELSEWHERE


def test_what_sets_a_method_apart_is_a_sentence_of_its_docstring():
    told = {key: sentence(m) for key, m in catalog().items()}
    for key, text in told.items():
        words, whole = text.split(), " ".join(catalog()[key].__doc__.split())
        assert len(text) > 40 and text.endswith(".") and "urvey 00" not in text
        assert " ".join(words[:3]) in whole and " ".join(words[-2:]).rstrip(".") in whole
    assert told["magnitude_pruning_han"] == "s = |w|. Train, remove the smallest, retrain what stays from where it stands, repeat."
    assert len(set(told.values())) == len(told)


def test_a_chapters_table_has_every_method_once_and_says_where_two_are_one():
    for chapter in ("02", "03", "04"):
        shown = families(chapter)
        page, text = shown._repr_html_(), repr(shown)
        for key, m in catalog().items():
            assert page.count(f"<td style='text-align:left;vertical-align:top'><code>{key}</code>") == (m.chapter == chapter)
            assert len(re.findall(rf"^  {key} \(", text, re.M)) == (m.chapter == chapter)
            assert m.chapter != chapter or html.escape(m.no_plan) in page
    for c in COINCIDENCES:
        assert c.limit in methods_table().loc[c.key, "the same as"] and c.key in methods_table().loc[c.other, "the same as"]


def test_the_browser_follows_search_and_chapter():
    panel = browse()
    (search, chapter), shown = panel.children[0].children, panel.children[1]
    assert isinstance(search, widgets.Text) and search.description and chapter.description
    assert f"{len(catalog())} of {len(catalog())} methods" in shown.value and "magnitude_pruning_han" in shown.value
    assert chapter.label == "all"
    search.value = "surgeon"
    assert f"{len(methods_table(text='surgeon'))} of" in shown.value and "magnitude_pruning_han" not in shown.value
    chapter.value = "02"
    assert "optimal_brain_surgeon" in shown.value
    search.value = "no such thing"
    assert f"0 of {len(catalog())} methods" in shown.value
    search.value = ""
    assert "magnitude_pruning_han" in shown.value


# What is installed


def test_what_is_installed(monkeypatch):
    table = installed()
    assert {"Python", "torch", "anywidget", "threads", "trained networks"} <= set(table.index)
    assert re.match(r"\d+\.\d+", table.loc["torch", "found"])
    assert re.fullmatch(r"\d+ of \d+", table.loc["trained networks", "found"])
    monkeypatch.setattr(module, "PACKAGES", ("torch", "no-such-package"))
    assert installed().loc["no-such-package", "found"] == "not installed"
