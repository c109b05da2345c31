"""Attention-augmented convolution (Bello et al., arXiv 1904.09925): the layer, and the backends of its attention."""
