"""Networks in a wrapper are saved as they were before, and images of other channels ask for their preprocessing."""

import re

import pytest
import timm
import torch
from torch import nn

import ecanet
from ecanet.errors import ConfigError
from ecanet.networks import Preprocessing


def make() -> nn.Module:
    torch.manual_seed(0)
    return ecanet.create_model("resnet8", num_classes=3).eval()


def compile_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


WRAPPED = {
    "compiled": torch.compile,
    "compiled in place": compile_in_place,
    "DataParallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model)),
    "the other way around": lambda model: torch.compile(nn.DataParallel(model)),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_network_is_saved_as_it_was(kind, tmp_path):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = ecanet.save_pretrained(WRAPPED[kind](model), tmp_path / "net", class_names=("a", "b", "c"))
    assert (config.network.name, len(config.sites)) == ("resnet8", 3)
    loaded = ecanet.from_pretrained(tmp_path / "net").state_dict()
    assert loaded.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in loaded.items())


@pytest.mark.parametrize("wrapper", [torch.compile, nn.DataParallel])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_of_the_wrapper_is_not_lost(wrapper, register, tmp_path):
    model = wrapper(make())
    hook = getattr(model, register)(lambda *given: None)
    with pytest.raises(ConfigError, match=f"^{type(model).__name__} has a hook, which would be lost; remove it"):
        ecanet.save_pretrained(model, tmp_path / "net", class_names=("a", "b", "c"))
    assert list(tmp_path.iterdir()) == []
    hook.remove()
    ecanet.save_pretrained(model, tmp_path / "net", class_names=("a", "b", "c"))


@pytest.mark.parametrize("wrapper", [torch.compile, nn.DataParallel])
def test_a_wrapped_part_is_named(wrapper, tmp_path):
    model = make()
    model.layer2 = wrapper(model.layer2)
    kind = type(model.layer2).__name__
    with pytest.raises(ConfigError, match=rf"^layer2 is wrapped in {kind}, .*load_checkpoint") as caught:
        ecanet.save_pretrained(model, tmp_path / "net")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    # The remedy works.
    again = make()
    ecanet.load_checkpoint(again, model.state_dict())
    assert len(ecanet.save_pretrained(again, tmp_path / "net").sites) == 3


@pytest.mark.parametrize(
    ("model", "remedy"),
    [
        (
            ecanet.create_model("resnet8", num_classes=3, in_channels=1),
            "(channels=1, size=32, mean=(0.5,), std=(0.5,))",
        ),
        (
            ecanet.create_model("resnet8", num_classes=3, in_channels=4).half(),
            "(channels=4, size=32, mean=(0.5,) * 4, ",
        ),
        (timm.create_model("resnet10t", num_classes=3, in_chans=1), "(channels=1, size=176, mean=(0.5,), "),
    ],
    ids=["grey", "four, in half precision", "timm"],
)
@pytest.mark.parametrize("class_names", [None, ("a", "b", "c")])
def test_other_channels_ask_for_their_preprocessing(model, remedy, class_names, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(f"preprocessing=ecanet.networks.Preprocessing{remedy}")) as caught:
        ecanet.save_pretrained(model, tmp_path / "net", class_names=class_names)
    assert re.search(r"takes images of [14] channels?, and its preprocessing has 3; ", str(caught.value))
    assert "\n" not in str(caught.value)


def test_with_their_preprocessing_they_are_saved(tmp_path):
    model = ecanet.create_model("resnet8", num_classes=3, in_channels=1)
    images = Preprocessing(channels=1, size=32, mean=(0.5,), std=(0.5,))
    assert ecanet.save_pretrained(model, tmp_path / "net", preprocessing=images).colour_order == "grey"
    with pytest.raises(ConfigError, match="takes images of 1 channel, and its preprocessing has 3"):
        ecanet.save_pretrained(model, tmp_path / "net", preprocessing=Preprocessing(size=32))
