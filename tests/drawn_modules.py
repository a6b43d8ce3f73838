"""Attention modules and images drawn at random, and what padding may do to them."""

import torch
from torch import Tensor, nn


def draw(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return ``module`` in evaluation, with every parameter and statistic drawn: none is zero, one or its default."""
    generator = torch.Generator().manual_seed(1)
    for key, tensor in (*module.eval().named_parameters(), *module.named_buffers()):
        if tensor.dim() > 0:  # not a norm's counter
            drawn = torch.randn(tensor.shape, generator=generator)
            tensor.data = drawn.abs() + 0.5 if key.endswith("running_var") else drawn
    return module.to(dtype)


def image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def check_padding(module: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
    """Check that padding under a mask has no influence; return the images (2, C, 4, 6) and the mask (2, 4, 6)."""
    x = image(2, channels, 4, 6)
    mask = torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[:, :3, :5] = True
    padded = torch.where(mask[:, None], x, torch.nan)
    with torch.no_grad():
        expected = module(x[:, :, :3, :5])
        torch.testing.assert_close(module(padded, mask=mask)[:, :, :3, :5], expected, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(module(x)[:, :, :3, :5], expected, rtol=1e-3)  # unmasked, it does matter
        assert module(x, mask=torch.zeros_like(mask)).isfinite().all()
    return x, mask
