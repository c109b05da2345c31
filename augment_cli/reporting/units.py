"""Numbers and names as text for people. All views of a report use these functions, so that they agree."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from augment_cli.planning.latency import PlanLatency

_SIZES = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))

UNITS = {
    "params": "parameters",
    "macs": "multiply-adds of one image",
    "flops": "floating-point operations of one image; FLOPs = 2 x multiply-adds",
    "latency": "nanoseconds of one pass over a batch",
}


def amount(number: int) -> str:
    """Four digits and a decimal prefix.

    >>> amount(25557032), amount(4089184256), amount(-18648), amount(999999), amount(512)
    ('25.56M', '4.089G', '-18.65k', '1.000M', '512')
    """
    for size, prefix in _SIZES:
        if abs(number) >= 0.99995 * size:  # what rounds to 1000k is 1.000M
            return f"{number / size:#.4g}{prefix}"
    return str(number)


def signed_amount(number: int) -> str:
    return f"{'+' if number > 0 else ''}{amount(number)}"


def duration(nanoseconds: int) -> str:
    """A time in milliseconds, to four digits.

    >>> duration(12_345_678), duration(-4_321), duration(1_083_400_000), duration(0)
    ('12.35 ms', '-0.004321 ms', '1083 ms', '0 ms')
    """
    return f"{f'{nanoseconds / 1e6:#.4g}'.rstrip('.')} ms" if nanoseconds else "0 ms"


def signed_duration(nanoseconds: int) -> str:
    return f"{'+' if nanoseconds > 0 else ''}{duration(nanoseconds)}"


def describe_latency(latency: "PlanLatency") -> str:
    """The latency of a plan's model beside its source's, as predicted and as measured, and how that was done."""

    def change(ratio: float) -> str:
        return percent(100 * (ratio - 1))

    error = 100 * latency.error / latency.source if latency.source else 0.0
    text = f"predicted {change(latency.predicted_ratio)} (standard error {error:.1f}%)"
    if latency.measured:
        ratio, rounds = latency.measured.ratio, counted(latency.measured.rounds, "round")
        text += f", measured {change(ratio.median)} (quartiles {change(ratio.low)} to {change(ratio.high)}, {rounds})"
    return f"{text}: {latency.settings.describe()}; {latency.machine}"


def percent(value: float | None) -> str:
    """A change in percent; a change that is not zero never reads 0%.

    >>> percent(2.5755), percent(-34.26), percent(-0.00031), percent(0), percent(None)
    ('+2.58%', '-34.3%', '-0.0003%', '0%', 'n/a')
    """
    if value is None:
        return "n/a"
    if not value:
        return "0%"
    text = f"{value:+.1f}" if abs(value) >= 10 else f"{value:+.2f}"
    return f"{text if float(text) else f'{value:+.1g}'}%"


def share(value: float, digits: int = 1) -> str:
    """A part of a whole, in percent. Less than the whole never reads 100%, and more than nothing never 0%.

    >>> share(0.9399), share(0.9999), share(1), share(0.0001, digits=0)
    ('94.0%', '>99.9%', '100%', '<1%')
    """
    hair = 10**-digits
    if 0 < value < 1 and round(100 * value, digits) in (0, 100):
        return f">{100 - hair:.{digits}f}%" if value > 0.5 else f"<{hair:.{digits}f}%"
    return f"{100 * value:.{digits if 0 < value < 1 else 0}f}%"


def error(value: float) -> str:
    """A normalised mean squared error: 0 is exact, 1 no better than the mean.

    >>> error(0.09214), error(0.00004), error(0)
    ('0.092', '<0.001', '0')
    """
    if not value:
        return "0"
    return f"{value:.3f}" if value >= 0.0005 else "<0.001"


def divergence(value: float) -> str:
    """A Kullback-Leibler divergence, in nats, to three digits.

    >>> divergence(0.01234), divergence(0.0000005), divergence(0)
    ('0.0123', '5e-07', '0')
    """
    return f"{value:.3g}"


def span(values: Iterable[float], show: Callable[[float], str]) -> str:
    """The least and the most of some values, or one text if both read the same."""
    ordered = sorted(values)
    least, most = show(ordered[0]), show(ordered[-1])
    return least if least == most else f"{least.removesuffix('%')}-{most}"


def size(pair: Iterable[int]) -> str:
    return "x".join(map(str, pair))


def kernel(kernel_size: tuple[int, int], stride: tuple[int, int]) -> str:
    """A kernel's size and, where it is not 1, its stride.

    >>> kernel((3, 3), (2, 2)), kernel((3, 3), (1, 1)), kernel((1, 7), (2, 1))
    ('3x3 /2', '3x3', '1x7 /2x1')
    """
    short = str(stride[0]) if stride[0] == stride[1] else size(stride)
    return size(kernel_size) + ("" if short == "1" else f" /{short}")


def counted(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"
