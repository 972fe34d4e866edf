"""Which optimiser steps are mapped to the decision space (section 4.1: 200 of them, at equal intervals)."""

from __future__ import annotations

from dipguard.checks import check_int


def sampled_steps(T: int, *, decisions: int | None = 200, every: int | None = None) -> tuple[int, ...]:
    """The 0-based optimiser steps t, 0 <= t < T, whose reconstruction x(t) is read by the victim.

    With ``every=n`` these are n-1, 2n-1, ...: a shorter T then gives a prefix of a longer one. With ``decisions=S``
    they are ceil((i+1) T/S) - 1 for i = 0 ... S-1, which spreads S samples as evenly as whole steps allow, whether or
    not S divides T (T/200 is not whole for T = 500, 750, 1250 and 1500 of Table 3). Both end on or near step T-1,
    because the last reconstructions matter most: Algorithm 1 falls back on them when no boundary was crossed.

    Args:
        T: Number of optimiser steps, at least 1.
        decisions: Number of samples S, from 2 to T. Not read when ``every`` is given.
        every: Distance of two samples in steps, from 1 to T // 2.

    Raises:
        TypeError: An argument is no integer, or neither ``decisions`` nor ``every`` is given.
        ValueError: An argument is out of range, such as T < decisions.
    """
    check_int(T, name="T", low=1)
    if every is not None:
        check_int(every, name="every", low=1, high=max(1, T // 2))
        return tuple(range(every - 1, T, every))
    if decisions is None:
        raise TypeError("`decisions` must be an integer when `every` is not given, got None")
    check_int(decisions, name="decisions", low=2)
    if T < decisions:
        raise ValueError(f"`T` must be at least `decisions`, got T={T} and decisions={decisions}")
    return tuple(-(-(i + 1) * T // decisions) - 1 for i in range(decisions))
