// exp, erf and what follows from them, lane by lane. Polynomials fitted by weighted least squares to the smallest
// largest error, far below float32's rounding.
#pragma once

#include "common/vec.h"

namespace diffupose {
namespace DIFFUPOSE_ISA {

// e^x for x <= 88; smaller than e^-87 counts as 0.
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
    const IntVec exponent = reinterpret_cast<IntVec>(shifted) << 23;
    return select(tiny, Vec{}, reinterpret_cast<Vec>(reinterpret_cast<IntVec>(y) + exponent));
}

// x / (1 + e^-x)
static inline Vec silu(Vec x) { return x / (exp(max(-x, splat(-87.0f))) + 1.0f); }

static inline Vec abs(Vec x) { return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(x) & 0x7fffffff); }

// x / 2 (1 + erf(x / sqrt(2)))
static inline Vec gelu(Vec x) {
    const Vec y = x * 0.70710678118654752f;
    const Vec a = min(abs(y), splat(4.3f));  // erf is 1 to the last bit from 3.9 on
    const Vec u = a * a;
    // |y| < 1: y P(y^2)
    Vec near = u * 7.88911954e-05f - 8.02084128e-04f;
    near = near * u + 5.18953534e-03f;
    near = near * u - 2.68544446e-02f;
    near = near * u + 1.12836002e-01f;
    near = near * u - 3.76126271e-01f;
    near = (near * u + 1.12837917f) * a;
    // Beyond: 1 - e^(-y^2) Q(1 / (1 + 0.4 |y|))
    const Vec t = 1.0f / (a * 0.4f + 1.0f);
    Vec far = t * -2.29507648e-01f + 8.32331896e-01f;
    far = far * t - 5.83731364e-01f;
    far = far * t + 6.60846213e-01f;
    far = far * t + 6.59226719e-02f;
    far = far * t + 2.56710821e-01f;
    far = far * t - 2.57659401e-03f;
    far = 1.0f - far * exp(-u);
    const Vec magnitude = select(a < 1.0f, near, far);
    // 1 + erf(y) cancels for negative y: there it is far from 0 what is small, e^(-y^2) Q itself.
    const Vec half = x * 0.5f;
    const IntVec negative = y < 0.0f;
    return half * select(negative, 1.0f - magnitude, 1.0f + magnitude);
}

}  // namespace DIFFUPOSE_ISA
}  // namespace diffupose
