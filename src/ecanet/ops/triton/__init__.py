"""The passes over memory in Triton kernels. To import these files, Triton must be installed.

Read downward: `expansion` (a block's last 1x1 convolution with gate, addition and activation in its epilogue), `launch`
(the passes as autograd calls them: grids and allocations), `kernels` (the code that runs on the GPU).
"""
