"""The distribution function of Fisher's F, so that SciPy is not needed at run time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Smallest magnitude that a denominator of the continued fraction may take (modified Lentz).
_TINY = 1e-300
_MAX_TERMS = 10_000


def _continued_fraction(a: float, b: float, x: Tensor) -> Tensor:
    """Return the continued fraction of the incomplete beta function; it converges fast for x below (a+1)/(a+b+2)."""

    def away_from_zero(value: Tensor) -> Tensor:
        return torch.where(value.abs() < _TINY, _TINY, value)

    c = torch.ones_like(x)
    d = away_from_zero(1.0 - (a + b) * x / (a + 1.0)).reciprocal()
    result = d
    for m in range(1, _MAX_TERMS + 1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = away_from_zero(1.0 + even * d).reciprocal()
        c = away_from_zero(1.0 + even / c)
        result = result * d * c
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = away_from_zero(1.0 + odd * d).reciprocal()
        c = away_from_zero(1.0 + odd / c)
        step = d * c
        result = result * step
        if bool(((step - 1.0).abs() < 1e-15).all()):
            return result
    raise ArithmeticError(f"the incomplete beta function did not converge for a={a}, b={b}")


def _beta_tail(a: float, b: float, x: Tensor, one_minus_x: Tensor) -> Tensor:
    """Return I_x(a, b) by its continued fraction at x."""
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    front = torch.exp(a * x.log() + b * one_minus_x.log() - log_beta) / a
    return front * _continued_fraction(a, b, x)


def f_cdf(value: Tensor, numerator: float, denominator: float) -> Tensor:
    """Return the distribution function of Fisher's F.

    ``P(F <= f) = I_x(m/2, n/2)`` with ``x = m f / (m f + n)`` and I the regularised incomplete beta function, computed
    from a continued fraction to about 1e-12.

    Args:
        value: Values f, any shape, float64. Infinity gives 1, NaN gives NaN, negative values give 0.
        numerator: Degrees of freedom m, positive.
        denominator: Degrees of freedom n, positive.

    Returns:
        Probabilities of the shape of ``value``, float64.

    Raises:
        ValueError: If ``value`` is not float64 or the degrees of freedom are not positive.

    Example:
        >>> f_cdf(torch.tensor([0.0, 1.0, torch.inf], dtype=torch.float64), 2.0, 2.0).tolist()
        [0.0, 0.5, 1.0]

    Reference:
        Press et al. 2007, Numerical Recipes, section 6.4.
    """
    if value.dtype != torch.float64:
        raise ValueError(f"value must be float64, got {value.dtype}")
    if not (numerator > 0 and denominator > 0):
        raise ValueError(f"degrees of freedom must be positive, got {numerator} and {denominator}")
    a, b = 0.5 * numerator, 0.5 * denominator
    result = torch.full_like(value, torch.nan)
    result[value <= 0] = 0.0
    result[value == torch.inf] = 1.0
    inside = (value > 0) & (value < torch.inf)
    ratio = value[inside] * (numerator / denominator)
    # x and 1 - x are both formed without a difference, so neither tail loses digits.
    x, one_minus_x = ratio / (1.0 + ratio), 1.0 / (1.0 + ratio)
    lower = x < (a + 1.0) / (a + b + 2.0)
    probability = torch.empty_like(x)
    probability[lower] = _beta_tail(a, b, x[lower], one_minus_x[lower])
    probability[~lower] = 1.0 - _beta_tail(b, a, one_minus_x[~lower], x[~lower])
    result[inside] = probability.clamp(0.0, 1.0)
    return result
