"""Find a network's tensors in the content of a checkpoint: in which entry they are, and under which prefix.

Training code stores state dicts under many keys (``net``, ``state_dict_ema``, ``params``) and puts many prefixes before
the names (``module.``, ``backbone.``, ``encoder_q.``). No list of them is complete. So every entry and every prefix is
a candidate here, and the one under which most tensors fit the network is taken. All of it takes time in proportion to
the number of names.
"""

import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ecanet.errors import CheckpointError

Shapes = Mapping[str, torch.Size]
"""Shapes of a network's tensors by name."""

DEEPEST_ENTRY = 8
"""Entries inside more dictionaries than this are not searched."""

LONGEST_PREFIX = 8
"""Parts of the longest prefix that is tried."""

WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module)\."
)
"""Parts of a name that DataParallel, torch.compile, FSDP, activation checkpointing and DeepSpeed insert anywhere."""

AVERAGED = re.compile(r"(?<![a-z])(?:ema|swa|averaged|teacher)(?![a-z])|EMA")
"""Words in the names of entries that hold averages of the weights over training."""

LAST = re.compile(r"current_model_state|optim")
"""Entries to take last: an optimizer's, and Lightning's raw weights beside the averaged ones in ``state_dict``."""


@dataclass(frozen=True)
class Match:
    """The entry of a checkpoint that fits a network best."""

    entry: str
    """Path of the entry in the checkpoint and the prefix of its names; empty if the names are the network's."""
    values: Mapping[str, object]
    """Everything in the entry, under the checkpoint's names."""
    names: Mapping[str, str]
    """The network's names of the tensors in the entry, by the checkpoint's names."""
    others: tuple[str, ...]
    """Other entries or prefixes under which at least half as many tensors fit, best first."""


@dataclass
class Candidate:
    """One entry with one prefix of its names and one prefix of the network's, and the number of tensors that fit."""

    path: str
    values: Mapping[str, object]
    prefix: str
    own_prefix: str
    shared: int = 0
    """Names that the network has too."""
    fitting: int = 0
    """Names that the network has too, with a tensor of the same shape."""

    @property
    def label(self) -> str:
        """The path, and the prefix with a star."""
        return ": ".join(part for part in (self.path, self.prefix and f"{self.prefix}*") if part)

    @property
    def rank(self) -> tuple[int, int, int]:
        """The order in which candidates are preferred: those that fit best, and averaged weights before raw ones."""
        preference = -1 if LAST.search(self.label) else int(AVERAGED.search(self.label) is not None)
        return self.fitting, self.shared, preference


class Names:
    """The names of a network's tensors without `WRAPPERS`, for comparison with a checkpoint's."""

    def __init__(self, shapes: Shapes):
        self.shapes = shapes
        has_se, has_eca = (any(f".{gate}.conv." in name for name in shapes) for gate in ("se", "eca"))
        # timm calls the gate `se`, this library and the authors `eca`. Networks that have both are left alone.
        self.translate = None if has_se == has_eca else (".eca.", ".se.") if has_se else (".se.", ".eca.")
        self.simplify: Callable[[str], str] = self.remove_wrappers
        self.own = {self.simplify(name): name for name in shapes}
        if len(self.own) < len(shapes):  # a module of this network is called like a wrapper: keep all names whole
            self.simplify, self.own = str, {name: name for name in shapes}
        self.prefixes = self.list_prefixes()

    def remove_wrappers(self, name: str) -> str:
        """Return ``name`` without wrappers' parts, and with the network's name for ECA gates."""
        name = WRAPPERS.sub("", name)
        if self.translate is not None and ".conv." in name:
            name = name.replace(f"{self.translate[0]}conv.", f"{self.translate[1]}conv.")
        return name

    def list_prefixes(self) -> list[str]:
        """Return the prefixes that at least half of the network's names have: of a network inside another one."""
        prefixes, names = [""], list(self.own)
        while len(prefixes) <= LONGEST_PREFIX:
            start = len(prefixes[-1])
            firsts = Counter(name[: name.find(".", start) + 1] for name in names if "." in name[start:])
            prefix, count = firsts.most_common(1)[0] if firsts else ("", 0)
            if 2 * count < len(self.own):
                break
            prefixes.append(prefix)
            names = [name for name in names if name.startswith(prefix)]
        return prefixes


def match(content: object, shapes: Shapes, source: str) -> Match:
    """Return the entry of ``content`` that fits a network with tensors of ``shapes`` best.

    Where several entries fit equally, averaged weights are preferred, then the first one in the file.

    Raises:
        CheckpointError: ``content`` has no named tensors, or shares no name with the network. The message calls it
            ``source``.
    """
    entries = list(list_entries(content))
    if not any(isinstance(value, Tensor) for _, values in entries for value in values.values()):
        raise CheckpointError(f"{source} holds no state dict, a dictionary of names and tensors{describe(content)}")
    names = Names(shapes)
    candidates = [candidate for path, values in entries for candidate in list_candidates(path, values, names)]
    if not candidates:
        largest = max((values for _, values in entries), key=len)
        first = next(iter(largest), "none")
        raise CheckpointError(f"{source} shares no tensor name with this network (its first is {shorten(first)!r})")
    candidates.sort(key=lambda candidate: candidate.rank, reverse=True)  # a stable sort: equal ones stay in file order
    best = candidates[0]
    others = (c.label for c in candidates[1:] if 2 * c.fitting >= best.fitting > 0 and c.label != best.label)
    return Match(best.label, best.values, assign_names(best, names), tuple(dict.fromkeys(others)))


def list_entries(content: object) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the path and the values of every dictionary in ``content``, the outermost first, dictionaries left out.

    A dictionary that is found under two keys is yielded once.
    """
    waiting: deque[tuple[str, int, object]] = deque([("", 0, content)])
    seen: set[int] = set()
    while waiting:
        path, depth, found = waiting.popleft()
        if id(found) in seen or depth > DEEPEST_ENTRY or not isinstance(found, Mapping):
            continue
        mapping = cast("Mapping[object, object]", found)
        seen.add(id(mapping))
        values: dict[str, object] = {}
        for key, value in mapping.items():
            if not is_mapping(value):
                values[key if isinstance(key, str) else f"<{type(key).__name__} key {len(values)}>"] = value
            elif isinstance(key, str):
                waiting.append((f"{path}.{key}" if path else key, depth + 1, value))
        if values:
            yield path, values


def is_mapping(content: object) -> bool:
    """Return whether ``content`` is a dictionary or another mapping."""
    return isinstance(content, Mapping)


def list_candidates(path: str, values: dict[str, object], names: Names) -> list[Candidate]:
    """Return a candidate for each prefix under which ``values`` share a name with the network."""
    candidates: dict[tuple[str, str], Candidate] = {}
    for name, value in values.items():
        simple = names.simplify(name)
        for prefix, rest in split_name(simple):
            for own_prefix in names.prefixes:
                own = names.own.get(own_prefix + rest)
                if own is None:
                    continue
                if (prefix, own_prefix) not in candidates:
                    candidates[prefix, own_prefix] = Candidate(path, values, prefix, own_prefix)
                candidate = candidates[prefix, own_prefix]
                # Some tools leave the norms' counters out, so they do not decide between two entries.
                if not rest.endswith("num_batches_tracked"):
                    candidate.shared += 1
                    candidate.fitting += shape_of(value) == names.shapes[own]
    return list(candidates.values())


def split_name(name: str) -> Iterator[tuple[str, str]]:
    """Yield every way to split ``name`` into a prefix that ends with a dot, or is empty, and the rest."""
    start = 0
    for _ in range(LONGEST_PREFIX + 1):
        yield name[:start], name[start:]
        start = name.find(".", start) + 1
        if start == 0:
            return


def assign_names(best: Candidate, names: Names) -> dict[str, str]:
    """Return the network's name for each name in the entry that has one; no two have the same.

    Names without the whole prefix count too, such as ``fc.weight`` beside ``backbone.conv1.weight``.
    """
    found: dict[str, str] = {}
    free = dict(names.own)
    rest = {name: names.simplify(name) for name in best.values}
    for own_prefix in outer_prefixes(best.own_prefix):
        for prefix in outer_prefixes(best.prefix):
            for name, simple in rest.items():
                own = free.pop(own_prefix + simple[len(prefix) :], None) if simple.startswith(prefix) else None
                if own is not None:
                    found[name] = own
            rest = {name: simple for name, simple in rest.items() if name not in found}
    return found


def outer_prefixes(prefix: str) -> list[str]:
    """Return ``prefix``, and it without its last part, and so on: "a.b." gives "a.b.", "a." and ""."""
    parts = prefix.split(".")[:-1]
    return ["".join(f"{part}." for part in parts[:end]) for end in range(len(parts), -1, -1)]


def rename(state: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """Return ``state`` under the names of a network with tensors of ``shapes``; other names are kept.

    Raises:
        CheckpointError: See `match`.
    """
    names = match(state, shapes, "the state dict").names
    return {names.get(name, name): value for name, value in state.items()}


def shape_of(value: object) -> torch.Size | None:
    """Return the shape of a tensor, None of anything else and of a nested tensor, which has none."""
    return value.shape if isinstance(value, Tensor) and not value.is_nested else None


def find_problem(value: Tensor, own: Tensor) -> str | None:
    """Return why ``value`` cannot be copied into a network's tensor ``own``, None if it can."""
    if value.layout != torch.strided:
        return f"has the layout {value.layout}; save its to_dense()"
    if value.is_quantized:
        return "is quantized; save its dequantize()"
    if value.is_meta:
        return "is on the meta device, so its values are not in the file"
    if (own.is_floating_point() and not value.is_floating_point()) or (value.is_complex() and not own.is_complex()):
        return f"has the dtype {value.dtype} where the network has {own.dtype}; convert it before saving"
    return None


def describe(content: object) -> str:
    """Return what ``content`` is instead of a state dict, in brackets."""
    if not is_mapping(content):
        return f" (it is {type(content).__name__})"
    first: object = next(iter(cast("Mapping[object, object]", content)), None)
    if first is None:
        return " (it is empty)"
    if not isinstance(first, str):
        return f" (its first key is no name but {type(first).__name__})"
    return f" (its first key is {shorten(first)!r})"


def shorten(name: str) -> str:
    """Return ``name`` in at most 80 printable characters."""
    name = name if len(name) <= 80 else f"{name[:76]}…"
    return name if name.isprintable() else ascii(name)[1:-1]
