"""Charts as inline SVG: text that stands in a page as it is, without scripts, and shrinks to the page's width."""

import html
import math

import numpy as np

from utility import plain

WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 28, 40  # margins
COLOURS = ("#0969da", "#b35900", "#1a7f37", "#8250df")
MOST_POINTS = 400  # of a line: what a screen can show


def lines(series, x_label, y_label, title):
    """Lines over a common axis.

    Args:
        series: {name: (x, y)}, equally long sequences of finite numbers.
        title: what the chart shows, in words, for those who can't see it.
    """
    series = {name: _thinned(np.asarray(x, float), np.asarray(y, float)) for name, (x, y) in series.items()}
    frame = _Frame(*(np.concatenate([points[axis] for points in series.values()]) for axis in (0, 1)))
    parts = frame.axes(x_label, y_label)
    for colour, (x, y) in zip(COLOURS, series.values()):
        places = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(frame.x(x), frame.y(y)))
        parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if len(x) <= 40:
            parts += [
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{colour}"/>' for a, b in zip(frame.x(x), frame.y(y))
            ]
    return _svg(parts + _legend(series), title)


def histogram(series, edges, marks, x_label, y_label, title):
    """Shares of what falls between edges, as filled steps over each other.

    Args:
        series: {name: [B] shares}; edges: [B + 1]; marks: {text: x}, drawn as vertical lines.
    """
    edges = np.asarray(edges, float)
    frame = _Frame(edges, np.concatenate([[0], *series.values()]))
    parts = frame.axes(x_label, y_label)
    for colour, shares in zip(COLOURS, series.values()):
        x, y = np.repeat(frame.x(edges), 2), frame.y(np.concatenate([[0], np.repeat(shares, 2), [0]]))
        places = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
        parts.append(f'<polygon points="{places}" fill="{colour}" fill-opacity="0.35" stroke="{colour}"/>')
    for row, (text, x) in enumerate(marks.items()):
        place = frame.x(x)
        parts.append(f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" class="mark"/>')
        parts.append(_text(place - 4, TOP + 14 + 16 * row, text, "end"))
    return _svg(parts + _legend(series), title)


def points(x, y, groups, marked, title):
    """Points without axes, a colour for each group; each group's name is shown where the pointer rests on a point.

    Args:
        x, y: float [N]; groups: [(name, indices)]; marked: bool [N], those that get a dark ring.
    """
    side = HEIGHT * 1.5
    places = [_fitted(values, 6, length - 6) for values, length in ((x, WIDTH), (y, side))]
    parts, ring = [], np.where(marked, ' class="ring"', "")
    for number, (name, indices) in enumerate(groups):
        colour = f"hsl({number * 137.5 % 360:.0f} 65% {40 + number % 3 * 12}%)"  # golden angle: neighbours differ
        circles = "".join(f'<circle cx="{places[0][i]:.1f}" cy="{places[1][i]:.1f}" r="3"{ring[i]}/>' for i in indices)
        parts.append(f'<g fill="{colour}"><title>{html.escape(plain(name))}</title>{circles}</g>')
    return _svg(parts, title, side)


class _Frame:
    """Where values stand on the chart. x, y: all that it must show."""

    def __init__(self, x, y):
        self.ranges = [_range(values) for values in (x, y)]

    def x(self, values):
        return _scaled(values, *self.ranges[0], LEFT, WIDTH - RIGHT)

    def y(self, values):
        return _scaled(values, *self.ranges[1], HEIGHT - BOTTOM, TOP)

    def axes(self, x_label, y_label):
        parts = []
        for value in _ticks(*self.ranges[1]):
            y = self.y(value)
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            parts.append(_text(LEFT - 5, y + 4, f"{value:g}", "end"))
        for value in _ticks(*self.ranges[0]):
            parts.append(_text(self.x(value), HEIGHT - BOTTOM + 16, f"{value:g}", "middle"))
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle"))
        middle = (TOP + HEIGHT - BOTTOM) / 2
        turned = _text(0, 0, y_label, "middle")
        return [*parts, f'<g transform="translate(14 {middle:.1f}) rotate(-90)">{turned}</g>']


def _svg(parts, title, height=HEIGHT):
    body = "\n".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{html.escape(title)}">\n{body}\n</svg>\n'


def _text(x, y, text, anchor):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(str(text))}</text>'


def _legend(series):
    names = "".join(
        f'<tspan dx="12" fill="{colour}">{html.escape(name)}</tspan>' for name, colour in zip(series, COLOURS)
    )
    return [f'<text x="{WIDTH - RIGHT - 12}" y="18" text-anchor="end">{names}</text>']


def _range(values):
    low, high = float(np.min(values)), float(np.max(values))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _scaled(values, low, high, start, end):
    return start + (np.asarray(values, float) - low) / (high - low) * (end - start)


def _fitted(values, start, end):
    return _scaled(values, *_range(values), start, end)


def _ticks(low, high, most=6):
    """Round numbers between low and high, at most so many."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    return [round(number * step, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _thinned(x, y):
    """Means of neighbouring points where there are more than MOST_POINTS."""
    size = -(-len(x) // MOST_POINTS)
    starts = np.arange(0, len(x), size)
    counts = np.diff(np.append(starts, len(x)))
    return tuple(np.add.reduceat(values, starts) / counts for values in (x, y))
