// AW's convolution in plain loops and double precision, to read and to test the fast kernels against.
//
// N samples, C1 input and C2 output channels, maps of H x W, results of OH x OW, kernels of KH x KW taps, T of them; R
// input channels share a scale, so that there are G = C1 / R groups. Rows first: stride SY, SX, padding PY, PX,
// dilation DY, DX.
#include "attended.h"

// x (N, C1, H, W), kernel (C2, C1, T), mixing (G, C2), scales (N, G, T); out (N, C2, OH, OW)
EXPORT void attended_forward_reference(const Conv *conv, const double *x, const double *kernel, const double *mixing,
                                       const double *scales, double *out) {
    const auto [N, C1, C2, H, W, R, KH, KW, SY, SX, PY, PX, DY, DX, OH, OW] = *conv;
    const int G = C1 / R, T = KH * KW;
    for (int n = 0; n < N; n++)
        for (int o = 0; o < C2; o++)
            for (int p = 0; p < OH * OW; p++) {
                double sum = 0;
                for (int c = 0; c < C1; c++)
                    for (int t = 0; t < T; t++) {
                        const int y = p / OW * SY + t / KW * DY - PY, z = p % OW * SX + t % KW * DX - PX, g = c / R;
                        if (y < 0 || y >= H || z < 0 || z >= W) continue;
                        const double factor = 1 + mixing[g * C2 + o] * scales[(n * G + g) * T + t];
                        sum += kernel[(o * C1 + c) * T + t] * factor * x[((n * C1 + c) * H + y) * W + z];
                    }
                out[(n * C2 + o) * OH * OW + p] = sum;
            }
}

// Inputs as above, d_out (N, C2, OH, OW); gradients in the inputs' shapes, zero at the start
EXPORT void attended_backward_reference(const Conv *conv, const double *x, const double *kernel, const double *mixing,
                                        const double *scales, const double *d_out, double *dx, double *d_kernel,
                                        double *d_mixing, double *d_scales) {
    const auto [N, C1, C2, H, W, R, KH, KW, SY, SX, PY, PX, DY, DX, OH, OW] = *conv;
    const int G = C1 / R, T = KH * KW;
    for (int n = 0; n < N; n++)
        for (int o = 0; o < C2; o++)
            for (int p = 0; p < OH * OW; p++)
                for (int c = 0; c < C1; c++)
                    for (int t = 0; t < T; t++) {
                        const int y = p / OW * SY + t / KW * DY - PY, z = p % OW * SX + t % KW * DX - PX, g = c / R;
                        if (y < 0 || y >= H || z < 0 || z >= W) continue;
                        // out += K (1 + s a) x, with one number of each
                        const double K = kernel[(o * C1 + c) * T + t], s = mixing[g * C2 + o];
                        const double a = scales[(n * G + g) * T + t], in = x[((n * C1 + c) * H + y) * W + z];
                        const double d = d_out[(n * C2 + o) * OH * OW + p];
                        dx[((n * C1 + c) * H + y) * W + z] += d * K * (1 + s * a);
                        d_kernel[(o * C1 + c) * T + t] += d * (1 + s * a) * in;
                        d_mixing[g * C2 + o] += d * K * a * in;
                        d_scales[(n * G + g) * T + t] += d * K * s * in;
                    }
}
