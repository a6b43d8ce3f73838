"""The larger plain network that serves as a control: it shows what more layers bring instead of attention."""

import re

from ecanet import networks
from ecanet.errors import ConfigError

__all__ = ["choose_larger", "find_larger"]

LADDERS = tuple(
    tuple(rungs.split())
    for rungs in (
        "8 14 20 56",  # small-image ResNets
        "10 18 34 50 101 152 200",
        "14 26 50 101 152 200",  # bottlenecks alone
        "11 13 16 19",  # VGG
        "121 169 201",  # DenseNet
        "atto femto pico nano tiny small base large xlarge huge",
        "s m l xl",
        "b0 b1 b2 b3 b4 b5 b6 b7 b8",
        "lite0 lite1 lite2 lite3 lite4",
        "200mf 400mf 800mf 1_6gf 3_2gf 8gf 16gf 32gf",
        "002 004 006 008 016 032 040 064 080 120 160 320",  # the same as timm writes it
        "x0_5 x1_0 x1_5 x2_0",
        "0_5 0_75 1_0 1_3",
        "050 075 100 110 120 140",
    )
)
"""How families name their sizes, from small to large. The first ladder with a higher rung in the library decides."""


def choose_larger(name: str, named: str | None, weights: str | None) -> tuple[str, str]:
    """Return the network that is the larger control of the network ``name``, and in a few words why it is.

    Args:
        name: the network that is compared, or a detector's backbone.
        named: the user's choice, ``larger=NAMED``; None looks for the next one of the family.
        weights: the first weights of all arms.

    Raises:
        ConfigError: no larger network is known, or the weights are not for it.
    """
    if weights not in (None, "default"):
        raise ConfigError(
            f"the variant 'larger' cannot begin with {weights}, which is for {name}; leave the variant out, or take "
            f"weights that both networks have: default or none"
        )
    if named is not None:
        if networks.find_library(named)[0] == "file":
            if weights is not None:
                raise ConfigError(f"larger={named}: your own network has no default weights; leave the variant out")
            named = networks.trust(named)
        return named, "named"
    found = find_larger(name)
    if found is None:
        example = "torchvision:resnet50" if ":" in name else "resnet50"
        raise ConfigError(
            f"no larger network is known for {name!r}; name one, such as larger={example}, or leave out the variant "
            f"'larger'"
        )
    library = networks.find_library(name)[0]
    return found, f"next in {library}'s list" if library else ""


def find_larger(name: str) -> str | None:
    """Return the next larger network of the family of ``name`` that its library has; None if there is none.

    >>> find_larger("torchvision:regnet_y_400mf"), find_larger("resnet20"), find_larger("torchvision:mobilenet_v2")
    ('torchvision:regnet_y_800mf', 'resnet56', None)
    """
    library, inner = networks.find_library(name)
    inner = inner.partition(".")[0]  # timm writes the name of weights after a point
    known = set(networks.list_names(library))
    for ladder in LADDERS:
        for rung, small in enumerate(ladder):
            for larger in ladder[rung + 1 :]:
                found = _as_word(small).sub(larger, inner, count=1)
                if found != inner and found in known:
                    return f"{library}:{found}" if library else found
    return None


def _as_word(rung: str) -> re.Pattern[str]:
    """Return the pattern of ``rung`` where it is neither a part of a longer number nor of a longer word."""
    before = r"\d" if rung[0].isdigit() else "[a-z0-9]"
    after = r"\d" if rung[-1].isdigit() else "[a-z]"
    return re.compile(f"(?<!{before}){re.escape(rung)}(?!{after})")
