"""Where the user has chosen another default device for new tensors, the network's own device counts.

The default device here is "meta", which stands for a GPU: no tensor of it meets one of the CPU.
"""

import torch

import ecanet


def make_network():
    torch.manual_seed(0)
    return ecanet.create_model("resnet8", num_classes=3, attention="asr").eval()


def test_optimize():
    model, x = make_network(), torch.randn(2, 3, 16, 16)
    with torch.device("meta"):
        fast = ecanet.optimize(model, example=x)
        found = fast(x)
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)


def test_slim():
    model, x = make_network(), torch.randn(40, 3, 16, 16)
    with torch.device("meta"):
        slimmed, _ = ecanet.slim(model, x, budget=0.5)
    torch.testing.assert_close(slimmed(x), model(x), rtol=1e-4, atol=1e-4)
