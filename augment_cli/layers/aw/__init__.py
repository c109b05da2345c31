"""Attention-weights convolution (Zhu et al., arXiv 2108.08205): the layer, and the backends of its convolution."""
