// The attention core of AA in plain loops and double precision, to read and to test the fast kernels against.
//
// N samples, A heads, D key channels and E value channels of a head, maps of H x W positions; HW of them.
#include <cmath>

#include "vector.h"

namespace {

// Weights of query i for all keys.
// q, k (D, HW), rel_height (2H - 1, D), rel_width (2W - 1, D); weights (HW)
void softmax_of_query(const double *q, const double *k, const double *rel_height, const double *rel_width, int i, int D,
                      int H, int W, double *weights) {
    const int HW = H * W;
    double largest = -INFINITY, sum = 0;
    for (int j = 0; j < HW; j++) {
        const int y = j / W - i / W + H - 1, x = j % W - i % W + W - 1;  // rows of the tables
        double logit = 0;
        for (int c = 0; c < D; c++)
            logit += q[c * HW + i] * (k[c * HW + j] + rel_height[y * D + c] + rel_width[x * D + c]);
        weights[j] = logit / std::sqrt(D);
        largest = std::fmax(largest, weights[j]);
    }
    for (int j = 0; j < HW; j++) sum += weights[j] = std::exp(weights[j] - largest);
    for (int j = 0; j < HW; j++) weights[j] /= sum;
}

}  // namespace

// q, k (N, A, D, HW), v (N, A, E, HW), rel_height (2H - 1, D), rel_width (2W - 1, D); out (N, A, E, HW)
// weights: room for HW numbers
EXPORT void attention_forward_reference(const double *q, const double *k, const double *v, const double *rel_height,
                                        const double *rel_width, double *out, double *weights, int N, int A, int D,
                                        int E, int H, int W) {
    const int HW = H * W;
    for (int head = 0; head < N * A; head++, q += D * HW, k += D * HW, v += E * HW, out += E * HW)
        for (int i = 0; i < HW; i++) {
            softmax_of_query(q, k, rel_height, rel_width, i, D, H, W, weights);
            for (int c = 0; c < E; c++) {
                out[c * HW + i] = 0;
                for (int j = 0; j < HW; j++) out[c * HW + i] += weights[j] * v[c * HW + j];
            }
        }
}

// Inputs as above, d_out (N, A, E, HW); gradients in the inputs' shapes, zero at the start
// weights: room for HW numbers
EXPORT void attention_backward_reference(const double *q, const double *k, const double *v, const double *rel_height,
                                         const double *rel_width, const double *d_out, double *d_q, double *d_k,
                                         double *d_v, double *d_rel_height, double *d_rel_width, double *weights, int N,
                                         int A, int D, int E, int H, int W) {
    const int HW = H * W;
    for (int head = 0; head < N * A; head++) {
        for (int i = 0; i < HW; i++) {
            softmax_of_query(q, k, rel_height, rel_width, i, D, H, W, weights);
            // d_weight[j] = d_out_i . v_j, and its mean under the weights
            double mean = 0;
            for (int j = 0; j < HW; j++)
                for (int c = 0; c < E; c++) mean += weights[j] * d_out[c * HW + i] * v[c * HW + j];
            for (int j = 0; j < HW; j++) {
                double d_weight = 0;
                for (int c = 0; c < E; c++) {
                    d_weight += d_out[c * HW + i] * v[c * HW + j];
                    d_v[c * HW + j] += d_out[c * HW + i] * weights[j];
                }
                const double d_logit = weights[j] * (d_weight - mean) / std::sqrt(D);
                const int y = j / W - i / W + H - 1, x = j % W - i % W + W - 1;  // rows of the tables
                for (int c = 0; c < D; c++) {
                    d_q[c * HW + i] += d_logit * (k[c * HW + j] + rel_height[y * D + c] + rel_width[x * D + c]);
                    d_k[c * HW + j] += d_logit * q[c * HW + i];
                    d_rel_height[y * D + c] += d_logit * q[c * HW + i];
                    d_rel_width[x * D + c] += d_logit * q[c * HW + i];
                }
            }
        }
        q += D * HW, k += D * HW, v += E * HW, d_out += E * HW, d_q += D * HW, d_k += D * HW, d_v += E * HW;
    }
}
