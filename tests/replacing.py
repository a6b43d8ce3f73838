"""A small network around attention modules, and the warning of replace= on it."""

import warnings

import torch
from torch import nn

import ecanet
from attention_spellings import CHANNELS, Spelling, conv, product
from se_spellings import excite, linear

IMAGE = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def network(*modules):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, CHANNELS, 3, padding=1), *modules, nn.Conv2d(CHANNELS, 4, 1)).eval()


def eca():
    return Spelling(product, conv=conv())


def se():
    return excite(lambda m, p: m.fc(p).sigmoid(), fc=linear())


def warnings_of(model, replace, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ecanet.attach(model, replace=replace, example=IMAGE, **options)
    assert len(caught) <= 1
    return "".join(str(one.message) for one in caught)
