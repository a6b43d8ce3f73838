"""The passes over memory in Triton kernels. To import these files, Triton must be installed.

Read downward: `expansion_proof` (the cases of the next two that are checked on a device), `expansion` (a block's last
1x1 convolution with gate, addition and activation in its epilogue), `predicted_gates` (that gate, from the means of the
convolution's input), `launch` (the passes as autograd and `torch.compile` call them), `node` (a whole tail as one
autograd node), `coefficients` (the launches of the algebra between the passes), `tiles` (grids and launches of the
passes), `algebra_grads` and `algebra` (the kernels between the passes, backward and forward), `reductions` and
`kernels` (those of the passes: sums, and elementwise).
"""
