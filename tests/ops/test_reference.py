"""The specification itself against explicit Python loops."""

import math

import pytest
import torch

from ecanet.ops import reference

SHAPES = [(2, 3), (2, 3, 5), (1, 4, 2, 3), (2, 2, 2, 3, 2), (1, 1, 1, 1), (3, 5, 1, 1)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop_squeeze(x, mask=None):
    """Return channel means, computed one number at a time."""
    n, c = x.shape[:2]
    means = torch.empty(n, c, dtype=x.dtype)
    for i in range(n):
        kept = [True] * math.prod(x.shape[2:]) if mask is None else mask[i].flatten().tolist()
        for j in range(c):
            values = [v for v, keep in zip(x[i, j].flatten().tolist(), kept, strict=True) if keep]
            means[i, j] = sum(values) / max(1, len(values))
    return means


@pytest.mark.parametrize("shape", SHAPES)
def test_squeeze_scale_equals_explicit_loops(shape):
    x = random(*shape)
    means = loop_squeeze(x)
    torch.testing.assert_close(reference.squeeze(x), means, rtol=1e-14, atol=1e-14)
    expected = torch.stack(
        [torch.stack([x[i, j] * (3 * means[i, j] - 1) for j in range(shape[1])]) for i in range(shape[0])]
    )
    actual = reference.squeeze_scale(x, lambda p: 3 * p - 1)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 2, 4, 3), (2, 2, 2, 3, 2)])
def test_masked_squeeze_equals_explicit_loops_and_ignores_padding(shape):
    x = random(*shape)
    mask = torch.rand(shape[0], *shape[2:], generator=torch.Generator().manual_seed(1)) < 0.6
    mask[0] = False  # a sample that is all padding
    padded = torch.where(mask[:, None], x, math.nan)
    torch.testing.assert_close(reference.squeeze(padded, mask), loop_squeeze(x, mask), rtol=1e-14, atol=1e-14)
    assert (reference.squeeze(padded, mask)[0] == 0).all()


def test_padded_and_unpadded_sequences_give_the_same():
    long, short = random(1, 4, 9, seed=1), random(1, 4, 5, seed=2)
    batch = torch.cat([long, torch.cat([short, torch.full((1, 4, 4), 1e9, dtype=torch.float64)], 2)])
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    y = reference.squeeze_scale(batch, torch.sigmoid, mask)
    torch.testing.assert_close(y[:1], reference.squeeze_scale(long, torch.sigmoid), rtol=1e-14, atol=0)
    torch.testing.assert_close(y[1:, :, :5], reference.squeeze_scale(short, torch.sigmoid), rtol=1e-14, atol=0)


def test_gradients_by_gradcheck():
    x = random(2, 3, 4, 3).requires_grad_()
    mask = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(1)) < 0.7
    assert torch.autograd.gradcheck(lambda x: reference.squeeze_scale(x, torch.sigmoid), x)
    assert torch.autograd.gradcheck(lambda x: reference.squeeze_scale(x, torch.sigmoid, mask), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_neither_overflow_nor_lose_digits(dtype):
    """512 x 512 values of 300 sum to 78 million: infinite in float16, lost in bfloat16."""
    x = torch.full((1, 2, 512, 512), 300, dtype=dtype)
    assert reference.squeeze(x).tolist() == [[float(x[0, 0, 0, 0])] * 2]
    assert reference.squeeze(x, torch.ones(1, 512, 512, dtype=torch.bool)).tolist() == [[float(x[0, 0, 0, 0])] * 2]
    y = reference.squeeze_scale(x, torch.sigmoid)
    assert y.dtype == dtype
    assert torch.equal(y, x)
