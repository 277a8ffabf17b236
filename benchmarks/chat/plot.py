"""The multi-turn benchmark's picture: requests per second and time to first token against clients, as SVG."""

from collections.abc import Callable, Sequence

from benchmarks.chat.load import Point

# Told apart by people who do not see red and green, too (Okabe and Ito, 2008).
COLOURS = ("#000000", "#0072b2", "#e69f00", "#009e73", "#cc79a7")
PANEL = (360, 240)
MARGIN = 60


def plot(points: Sequence[Point]) -> str:
    """Two panels side by side, a line for each mode."""
    modes = list(dict.fromkeys(point.mode for point in points))
    width, height = 2 * (PANEL[0] + MARGIN) + MARGIN, PANEL[1] + 2 * MARGIN + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
        f' font-size="12"><rect width="{width}" height="{height}" fill="white"/>'
    ]
    parts += _panel(points, modes, MARGIN, "requests per second", lambda point: point.requests_per_second)
    parts += _panel(points, modes, PANEL[0] + 2 * MARGIN, "mean TTFT, ms", lambda point: point.ttft_ms_mean)
    for number, mode in enumerate(modes):
        left = MARGIN + 110 * number
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<rect x="{left}" y="{height - 24}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{left + 18}" y="{height - 14}">{mode}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _panel(
    points: Sequence[Point], modes: Sequence[str], left: int, title: str, value: Callable[[Point], float]
) -> list[str]:
    most_clients = max((point.clients for point in points), default=1)
    most = 1.1 * max((value(point) for point in points), default=1.0) or 1.0
    bottom = MARGIN + PANEL[1]

    def place(point: Point) -> tuple[float, float]:
        return left + PANEL[0] * point.clients / most_clients, bottom - PANEL[1] * value(point) / most

    parts = [
        f'<text x="{left}" y="{MARGIN - 16}" font-weight="bold">{title}</text>',
        f'<path d="M{left} {MARGIN}V{bottom}H{left + PANEL[0]}" fill="none" stroke="#888"/>',
        f'<text x="{left + PANEL[0]}" y="{bottom + 32}" text-anchor="end">clients</text>',
    ]
    for share in (0.5, 1.0):
        height = bottom - PANEL[1] * share
        parts.append(f'<text x="{left - 6}" y="{height + 4:.0f}" text-anchor="end">{most * share:.3g}</text>')
    for clients in sorted({point.clients for point in points}):
        across = left + PANEL[0] * clients / most_clients
        parts.append(f'<text x="{across:.0f}" y="{bottom + 16}" text-anchor="middle">{clients}</text>')
    for number, mode in enumerate(modes):
        line = sorted((point for point in points if point.mode == mode), key=lambda point: point.clients)
        colour = COLOURS[number % len(COLOURS)]
        corners = " ".join(f"{across:.1f},{height:.1f}" for across, height in map(place, line))
        parts.append(f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for across, height in map(place, line):
            parts.append(f'<circle cx="{across:.1f}" cy="{height:.1f}" r="3" fill="{colour}"/>')
    return parts
