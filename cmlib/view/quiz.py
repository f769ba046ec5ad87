"""Predict, then reveal: a guess is asked for before the measured answer shows."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets


class Guess(widgets.VBox):
    """A question with a slider; the answer is measured when the guess is locked in. ``guess`` and ``answer`` hold both afterwards."""

    def __init__(self, question: str, measure: Callable[[], float], lo: float, hi: float, unit: str, why: str) -> None:
        self.measure, self.unit, self.why = measure, unit, why
        self.guess: float | None = None
        self.answer: float | None = None
        looks = {"style": {"description_width": "initial"}, "layout": {"width": "28em"}, "readout_format": ",.0f" if hi >= 1000 else ".3g"}
        label = f"guess, {unit}" if unit else "guess"
        self.slider = widgets.FloatSlider((lo + hi) / 2, min=lo, max=hi, step=(hi - lo) / 200, description=label, **looks)
        self.button = widgets.Button(description="lock in", tooltip="measure the answer now", button_style="warning")
        self.button.on_click(lambda _: self.reveal())
        self.said = widgets.HTML()
        self.question = question
        super().__init__([widgets.HTML(f"<b>{html.escape(question)}</b>"), widgets.HBox([self.slider, self.button]), self.said])

    def reveal(self) -> None:
        """Measure, and show the guess beside the answer."""
        self.guess = self.slider.value
        self.button.disabled = self.slider.disabled = True
        try:
            self.answer = float(self.measure())
        except Exception as error:  # shown to the learner; the slider comes back
            self.button.disabled = self.slider.disabled = False
            self.said.value = f'<p role="alert">Measuring failed: {html.escape(f"{type(error).__name__}: {error}")}</p>'
            return
        off = self.guess - self.answer
        close = abs(off) <= 0.01 * (self.slider.max - self.slider.min)
        verdict = "spot on" if close else f"{self._say(abs(off))} too {'high' if off > 0 else 'low'}"
        said = f"You said {self._say(self.guess)}; measured {self._say(self.answer)}: {verdict}. {html.escape(self.why)}"
        self.said.value = f'<p role="status">{said}</p>'

    def _say(self, value: float) -> str:
        """Three digits, or all before the point, and the unit."""
        return f"{f'{value:,.0f}' if abs(value) >= 100 else f'{value:.3g}'} {html.escape(self.unit)}".rstrip()

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The widget, and beside it the question alone for pages where no widget runs."""
        bundle = super()._repr_mimebundle_(**kwargs)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        twin = f"{self.question} Note your guess{f' in {self.unit}' if self.unit else ''} before you read on."
        return {**data, "text/plain": twin, "text/html": f"<p>{html.escape(twin)}</p>"}, metadata


def predict_first(question: str, measure: Callable[[], float], *, lo: float = 0, hi: float = 100, unit: str = "%", why: str = "") -> Guess:
    """Ask ``question``, take a guess between ``lo`` and ``hi``, then call ``measure()`` and show both, with ``why`` it comes out so."""
    return Guess(question, measure, lo, hi, unit, why)
