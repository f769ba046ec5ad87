"""What every picture of the kit must be."""

from matplotlib.figure import Figure
from matplotlib.text import Text


def readable(figure: Figure) -> None:
    """A figure that can be drawn, without text below 12 points."""
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    small = [t.get_text() for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible() and t.get_fontsize() < 12]
    assert not small, f"smaller than 12 points: {small}"
