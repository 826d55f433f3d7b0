"""The training's losses by epoch, as an SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def curves(history: Sequence[Mapping[str, float]], *, width: int = 640, height: int = 320) -> bytes:
    """The training's losses by epoch, as an SVG.

    Args:
        history: rows with ``epoch``, ``loss`` and ``validation_loss``.
        width: in pixels.
        height: in pixels.
    """
    left, right, top, bottom = 56, 16, 28, 40
    series = {"loss": "#0072b2", "validation_loss": "#d55e00"}
    values = [row[key] for row in history for key in series]
    low, high = min(values), max(values)
    span, last = (high - low) or 1.0, max(row["epoch"] for row in history)

    def point(epoch: float, value: float) -> tuple[float, float]:
        x = left + (width - left - right) * (epoch - 1) / max(last - 1, 1)
        return x, top + (height - top - bottom) * (high - value) / span

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for value in (low, (low + high) / 2, high):
        _, y = point(1, value)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for epoch in sorted({1, int(last)}):
        x, _ = point(epoch, low)
        parts.append(f'<text x="{x:.1f}" y="{height - 18}" text-anchor="middle">{epoch}</text>')
    parts.append(f'<text x="{width / 2:.0f}" y="{height - 6}" text-anchor="middle">epoch</text>')
    for number, (key, color) in enumerate(series.items()):
        points = " ".join("{:.1f},{:.1f}".format(*point(row["epoch"], row[key])) for row in history)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="{left + 160 * number}" y="18" fill="{color}">{key.replace("_", " ")}</text>')
    return "\n".join([*parts, "</svg>"]).encode()
