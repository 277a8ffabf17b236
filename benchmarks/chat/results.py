"""Statistics over the multi-turn benchmark's points: medians over rounds, and ratios between modes."""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence

import msgspec

from benchmarks.chat.load import Point

TPOT_LIMITS_MS = (40, 60)
Spread = tuple[float, float, float]  # median, lowest, highest


class Over(msgspec.Struct):
    """Ratios of a mode's figures to those of the mode `base`, in the same round with the same number of clients."""

    mode: str
    base: str
    clients: int
    requests_per_second: Spread
    ttft: Spread


def by_mode_and_clients(points: Sequence[Point]) -> dict[tuple[str, int], list[Point]]:
    found: dict[tuple[str, int], list[Point]] = {}
    for point in points:
        found.setdefault((point.mode, point.clients), []).append(point)
    return found


def medians(points: Sequence[Point]) -> list[Point]:
    """One point for all rounds: medians of all numbers, but sums of requests, failures and the tier's counters."""
    found = []
    for of_one in by_mode_and_clients(points).values():
        values = {
            name: statistics.median(getattr(point, name) for point in of_one)
            for name, kind in Point.__annotations__.items()
            if kind is float
        }
        tier = {name: sum(point.tier.get(name, 0.0) for point in of_one) for name in of_one[0].tier}
        totals = {name: sum(getattr(point, name) for point in of_one) for name in ("requests", "failed")}
        failure = next((point.first_failure for point in of_one if point.failed), "")
        found.append(msgspec.structs.replace(of_one[0], **values, **totals, tier=tier, first_failure=failure))
    return found


def best(points: Sequence[Point]) -> dict[str, dict[str, float]]:
    """Each mode's highest requests per second with a mean TPOT within each limit. If only one of two numbers of clients
    is within it, interpolated linearly between them."""
    found: dict[str, dict[str, float]] = {}
    for mode in dict.fromkeys(point.mode for point in points):
        line = sorted((point for point in points if point.mode == mode), key=lambda point: point.clients)
        for limit in TPOT_LIMITS_MS:
            within = [point.requests_per_second for point in line if point.tpot_ms_mean <= limit]
            within += [_at(limit, *pair) for pair in itertools.pairwise(line) if _crosses(limit, *pair)]
            if within:
                found.setdefault(mode, {})[str(limit)] = round(max(within), 3)
    return found


def _crosses(limit: float, one: Point, other: Point) -> bool:
    return (one.tpot_ms_mean <= limit) is not (other.tpot_ms_mean <= limit)


def _at(limit: float, one: Point, other: Point) -> float:
    share = (limit - one.tpot_ms_mean) / (other.tpot_ms_mean - one.tpot_ms_mean)
    return one.requests_per_second + share * (other.requests_per_second - one.requests_per_second)


def over(base: str, points: Sequence[Point]) -> list[Over]:
    """Ratios round by round. Prompts without reuse are compared with the base's."""
    grouped = by_mode_and_clients(points)
    found = []
    for (mode, clients), of_one in grouped.items():
        name, comma, kind = mode.partition(", ")
        compared = grouped.get((f"{base}{comma}{kind}", clients), [])
        if name == base or not compared:
            continue
        pairs = list(zip(of_one, compared, strict=False))

        def ratios(value: Callable[[Point], float], pairs: list[tuple[Point, Point]] = pairs) -> Spread:
            values = sorted(value(one) / (value(other) or math.nan) for one, other in pairs)
            return round(statistics.median(values), 3), round(values[0], 3), round(values[-1], 3)

        requests = ratios(lambda point: point.requests_per_second)
        found.append(Over(mode, base, clients, requests, ratios(lambda point: point.ttft_ms_mean)))
    return found
