"""The passes in Triton kernels; importing these files needs Triton.

Read downward: `expansion` (a last 1x1 convolution with gate, addition and activation in its epilogue), `launch`
(grids and allocations: the passes that autograd calls), `kernels` (what runs on the GPU).
"""
