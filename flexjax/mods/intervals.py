"""Interval arithmetic on integer nodes: the range of a result from the ranges of its operands.

Ranges are inclusive pairs of Python integers, which do not wrap; the caller drops a range that leaves the
dtype. `None` stands for "unknown". Each rule is sound: the result contains every value that operands inside
their ranges can produce.
"""

from __future__ import annotations

from typing import Any

Interval = tuple[int, int]


def _truncated_quotient(x: int, y: int) -> int:
    return abs(x) // abs(y) * (1 if (x >= 0) == (y > 0) else -1)


def _corners(f: Any, x: Interval, y: Interval) -> Interval:
    values = [f(i, j) for i in x for j in y]
    return min(values), max(values)


def _absolute(x: Interval) -> Interval:
    low = 0 if x[0] <= 0 <= x[1] else min(abs(x[0]), abs(x[1]))
    return low, max(abs(x[0]), abs(x[1]))


def _remainder(x: Interval, y: Interval) -> Interval | None:
    if y[0] <= 0 <= y[1]:
        return None
    bound = max(abs(y[0]), abs(y[1])) - 1
    if y[0] == y[1] and x[0] >= 0 and x[1] <= bound:
        return x
    # The remainder has the dividend's sign and is never larger than it in magnitude.
    low = 0 if x[0] >= 0 else max(-bound, x[0])
    high = 0 if x[1] <= 0 else min(bound, x[1])
    return low, high


def _sign(v: int) -> int:
    return (v > 0) - (v < 0)


def result_interval(op: str, operands: list[Interval | None]) -> Interval | None:
    """The range of an integer-valued `op`, or None where nothing is known.

    Args:
        op: a name in `ops.OPS`.
        operands: ranges of the operands, in order.
    """
    known = [x for x in operands if x is not None]
    if op == "sign":
        return (-1, 1) if operands[0] is None else (_sign(operands[0][0]), _sign(operands[0][1]))
    if op == "select_n":
        cases = operands[1:]
        if any(x is None for x in cases):
            return None
        return min(x[0] for x in known[-len(cases) :]), max(x[1] for x in known[-len(cases) :])
    if op == "clamp":
        low, x, high = operands
        if low is None or high is None:
            return None
        if x is None:
            x = (low[0], high[1])
        # clamp(low, x, high) = min(max(x, low), high), monotone in all three.
        return min(max(x[0], low[0]), high[0]), min(max(x[1], low[1]), high[1])
    if len(known) != len(operands):
        return None
    match op, known:
        case (("convert" | "stop_gradient"), [x]):
            return x
        case "neg", [x]:
            return -x[1], -x[0]
        case "abs", [x]:
            return _absolute(x)
        case "square", [x]:
            low, high = _absolute(x)
            return low * low, high * high
        case "add", [x, y]:
            return x[0] + y[0], x[1] + y[1]
        case "sub", [x, y]:
            return x[0] - y[1], x[1] - y[0]
        case "mul", [x, y]:
            return _corners(lambda i, j: i * j, x, y)
        case "max", [x, y]:
            return max(x[0], y[0]), max(x[1], y[1])
        case "min", [x, y]:
            return min(x[0], y[0]), min(x[1], y[1])
        case "div", [x, y] if not y[0] <= 0 <= y[1]:
            return _corners(_truncated_quotient, x, y)
        case "rem", [x, y]:
            return _remainder(x, y)
        case (("and"), [x, y]) if x[0] >= 0 and y[0] >= 0:
            return 0, min(x[1], y[1])
        case (("or" | "xor"), [x, y]) if x[0] >= 0 and y[0] >= 0:
            return 0, (1 << max(x[1].bit_length(), y[1].bit_length())) - 1
    return None


def decide_comparison(op: str, x: Interval, y: Interval) -> bool | None:
    """The truth of `x op y` where the ranges settle it, otherwise None."""
    match op:
        case "lt":
            return True if x[1] < y[0] else False if x[0] >= y[1] else None
        case "le":
            return True if x[1] <= y[0] else False if x[0] > y[1] else None
        case "gt":
            return decide_comparison("lt", y, x)
        case "ge":
            return decide_comparison("le", y, x)
        case "eq":
            if x[1] < y[0] or y[1] < x[0]:
                return False
            return True if x[0] == x[1] == y[0] == y[1] else None
        case "ne":
            equal = decide_comparison("eq", x, y)
            return None if equal is None else not equal
    raise ValueError(f"{op!r} is not a comparison.")
