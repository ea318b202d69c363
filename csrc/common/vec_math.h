// exp, erf, silu and gelu, lane by lane. The polynomials are fitted by weighted least squares to minimise the largest
// error, which is far below float32's rounding.
#pragma once

#include "common/vec.h"

namespace diffupose {
namespace DIFFUPOSE_ISA {

// e^x for x <= 88, e^88 beyond; smaller than e^-87 counts as 0.
static inline Vec exp(Vec x) {
    const IntVec tiny = x < -87.0f;
    const Vec clamped = min(max(x, splat(-87.0f)), splat(88.0f));
    // x = n ln 2 + r, |r| <= ln(2) / 2: adding 1.5 * 2^23 rounds to an integer, in the low bits.
    const Vec shifted = clamped * 1.44269504088896341f + 12582912.0f;
    const Vec n = shifted - 12582912.0f;
    const Vec r = (clamped - n * 0.693145751953125f) - n * 1.428606765330187e-6f;
    const Vec f = r * 1.44269504088896341f;  // in [-0.5, 0.5]
    Vec y = f * 1.53458435e-04f + 1.33999315e-03f;
    y = y * f + 9.61848884e-03f;
    y = y * f + 5.55032878e-02f;
    y = y * f + 2.40226469e-01f;
    y = y * f + 6.93147206e-01f;
    y = y * f + 1.0f;
    // 2^n as a factor: added to the bits of y, it would make numbers of some NaNs.
    const IntVec scale = (reinterpret_cast<IntVec>(shifted) << 23) + 0x3f800000;
    return select(tiny, Vec{}, y * reinterpret_cast<Vec>(scale));
}

// x / (1 + e^-x)
static inline Vec silu(Vec x) { return x / (exp(max(-x, splat(-87.0f))) + 1.0f); }

static inline Vec abs(Vec x) { return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(x) & 0x7fffffff); }

// x / 2 (1 + erf(x / sqrt(2)))
static inline Vec gelu(Vec x) {
    const Vec y = x * 0.70710678118654752f;
    const Vec a = min(abs(y), splat(9.4f));  // e^(-y^2) counts as 0 there
    const Vec u = a * a;
    // |y| < 1: erf = y P(y^2)
    Vec near = u * 7.88911954e-05f - 8.02084128e-04f;
    near = near * u + 5.18953534e-03f;
    near = near * u - 2.68544446e-02f;
    near = near * u + 1.12836002e-01f;
    near = near * u - 3.76126271e-01f;
    near = (near * u + 1.12837917f) * a;
    // Beyond: erfc = e^(-y^2) Q(1 / (1 + 0.4 |y|))
    const Vec t = 1.0f / (a * 0.4f + 1.0f);
    Vec far = t * -2.29507648e-01f + 8.32331896e-01f;
    far = far * t - 5.83731364e-01f;
    far = far * t + 6.60846213e-01f;
    far = far * t + 6.59226719e-02f;
    far = far * t + 2.56710821e-01f;
    far = far * t - 2.57659401e-03f;
    far = far * exp(-u);
    const Vec tail = select(a < 1.0f, 1.0f - near, far);  // erfc(|y|)
    // 1 + erf(y) is erfc(-y), for negative y the small number itself: a difference would have lost its digits.
    const IntVec negative = y < 0.0f;
    return x * 0.5f * select(negative, tail, 2.0f - tail);
}

}  // namespace DIFFUPOSE_ISA
}  // namespace diffupose
