"""Hold an attached network to every promise of `ecanet.attach`."""

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import ecanet
from ecanet.errors import AttachError


class RefusedError(Exception):
    """`ecanet.attach` refuses a network; the message is its reason."""


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Move norm affines, running statistics, layer scales and skip gains away from 0, 1 and 1e-6.

    Fresh networks hide a wrong placement: a zero gamma makes any branch vanish.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(t: Tensor, low: float, high: float) -> None:
        t.copy_(torch.rand(t.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            vector = parameter.numel() == max(parameter.shape, default=1)
            if not vector or not parameter.is_floating_point():
                continue
            if name.endswith("bias"):
                uniform(parameter, -0.3, 0.3)
            else:
                uniform(parameter, 0.4, 0.9)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                uniform(buffer, -0.3, 0.3)
            elif name.endswith("running_var"):
                uniform(buffer, 0.5, 1.5)


def outputs(result: Any) -> list[Tensor]:
    """Return the floating-point tensors of whatever a model returns, and complex ones as pairs of numbers."""
    if isinstance(result, Tensor):
        return [torch.view_as_real(result)] if result.is_complex() else [result] if result.is_floating_point() else []
    if isinstance(result, dict):
        return [t for v in result.values() for t in outputs(v)]
    return [t for v in result for t in outputs(v)] if isinstance(result, tuple | list) else []


def equal(a: Any, b: Any) -> bool:
    """Return whether two results are the same tensors bit for bit, and finite."""
    left, right = outputs(a), outputs(b)
    finite = all(bool(t.isfinite().all()) for t in left)
    return finite and len(left) == len(right) > 0 and all(map(torch.equal, left, right))


@torch.no_grad()
def evaluate(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Return the model's outputs in evaluation mode, always from the same random state."""
    torch.manual_seed(0)
    return model.eval()(*copy.deepcopy(inputs))


def gradients(model: nn.Module, inputs: tuple[Any, ...], seed: int = 0) -> tuple[dict[str, Tensor], Any]:
    """Return the gradients of a random projection of the training outputs in every parameter, and the outputs."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    result = model.train()(*copy.deepcopy(inputs))
    generator = torch.Generator().manual_seed(1)
    sum((t * torch.rand(t.shape, generator=generator)).sum() for t in outputs(result)).backward()  # pyright: ignore
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, result


def last_layers(gate: nn.Module) -> list[Tensor]:
    """Return the parameters that a neutral gate has at zero."""
    return list(gate.last_parameters())  # pyright: ignore[reportCallIssue]


def excite(gates: Iterable[nn.Module], seed: int = 0) -> None:
    """Write random numbers into the last layers of ``gates``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in gates:
            for parameter in last_layers(gate):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def check(model: nn.Module, inputs: tuple[Any, ...], *, train: bool = True, **options: Any) -> list[Any]:
    """Attach to ``model``, hold it to every promise, and return the report.

    Raises:
        RefusedError: attach refuses the network, and has left it as it was.
        AssertionError: a promise is broken; the message says which.
    """
    randomize(model)
    plain = copy.deepcopy(model)
    before, plain_state = evaluate(plain, inputs), copy.deepcopy(plain.state_dict())
    assert all(bool(t.isfinite().all()) for t in outputs(before)), "the plain network's outputs are not finite"
    flags = [(m, m.training) for m in model.train().modules()]
    try:
        ecanet.attach(model, **{"example": inputs, **options})
    except AttachError as error:
        check_refusal(model, str(error), inputs, before, plain_state)
        raise RefusedError(str(error)) from error
    assert all(m.training == training for m, training in flags), "a training flag changed"
    report = ecanet.attached(model)
    gates = [model.get_submodule(site.name) for site in report]

    assert equal(evaluate(model, inputs), before), "evaluation outputs differ"
    own = model.state_dict()
    assert all(torch.equal(own[k], v) for k, v in plain_state.items()), "an old tensor changed"
    if train:
        idle = check_gradients(model, plain, inputs, report)
        gates = [model.get_submodule(site.name) for site in report if site.name not in idle]
        plain.load_state_dict(plain_state)
        model.load_state_dict(plain_state, strict=False)
    for gate in gates[:: max(1, len(gates) // 12)]:
        excite([gate])
        assert not equal(evaluate(model, inputs), before), "a gate has no effect"
        gate.neutralize()  # pyright: ignore[reportCallIssue]
    check_copies(model, plain, inputs, gates, options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ecanet.detach(model)
    assert list(model.state_dict()) == list(plain_state), "keys after detach"
    assert all(torch.equal(v, plain_state[k]) for k, v in model.state_dict().items()), "tensors after detach"
    assert equal(evaluate(model, inputs), before), "outputs after detach"
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in plain.modules()], "hooks after detach"
    return report


def check_refusal(
    model: nn.Module, message: str, inputs: tuple[Any, ...], before: Any, plain_state: dict[str, Tensor]
) -> None:
    """Hold a refusal to it: one line, and the network as it was."""
    assert "\n" not in message, f"a refusal of {len(message.splitlines())} lines"
    state = model.state_dict()
    assert list(state) == list(plain_state), "keys after a refusal"
    assert all(torch.equal(v, plain_state[k]) for k, v in state.items()), "tensors after a refusal"
    assert equal(evaluate(model, inputs), before), "outputs after a refusal"


def check_gradients(model: nn.Module, plain: nn.Module, inputs: tuple[Any, ...], report: Any) -> set[str]:
    """Hold training to it: same outputs, same gradients of old parameters, and gradients that flow into every gate.

    Return the names of the gates without a gradient behind layers that have none in the plain network either.
    """
    expected, result = gradients(plain, inputs)
    actual, attached_result = gradients(model, inputs)
    assert equal(attached_result, result), "training outputs differ"
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), f"the gradient of {name} differs"
    gates = {site.name: model.get_submodule(site.name) for site in report}
    idle = {site.name for site in report if is_untrained(plain, site, set(expected))}
    gates = {name: gate for name, gate in gates.items() if name not in idle}
    for name, gate in gates.items():
        assert all(p.grad is not None for p in gate.parameters()), f"{name}: an unused parameter"
    # stochastic depth may drop both samples of a block: look again with other random numbers
    for seed in range(8):
        gates = {n: g for n, g in gates.items() if not all(p.grad is not None and p.grad.any() for p in last_layers(g))}
        if not gates:
            break
        gradients(model, inputs, seed + 1)
    assert not gates, f"{next(iter(gates))}: no gradient"
    return idle


def is_untrained(plain: nn.Module, site: Any, trained: set[str]) -> bool:
    """Return whether the layers before a gate have no gradient in the plain network (an unused last layer, say)."""
    for name in (site.after, site.name.rpartition(".")[0]):
        own = {f"{name}.{key}" for key, _ in plain.get_submodule(name).named_parameters()}
        if own:
            return not own & trained
    return False


def check_copies(
    model: nn.Module, plain: nn.Module, inputs: tuple[Any, ...], gates: list[nn.Module], options: dict[str, Any]
) -> None:
    """Hold a state dict and a deep copy to it, with gates that do something."""
    evaluate(plain, inputs)  # a weight norm that has run with gradients cannot be copied
    excite(gates, seed=1)
    expected = evaluate(model, inputs)
    again = ecanet.attach(copy.deepcopy(plain), **{"example": inputs, **options})
    missing = set(again.load_state_dict(plain.state_dict(), strict=False).missing_keys)
    added = set(again.state_dict()) - set(plain.state_dict())
    assert missing == {key for key in added if not key.endswith(".gain")}, "an old checkpoint misses more than gates"
    again.load_state_dict(model.state_dict())
    assert equal(evaluate(again, inputs), expected), "outputs after a state-dict round trip"
    twin = copy.deepcopy(model)
    assert equal(evaluate(twin, inputs), expected), "outputs of a deep copy"
    for site in ecanet.attached(twin):
        twin.get_submodule(site.name).neutralize()  # pyright: ignore[reportCallIssue]
    assert equal(evaluate(model, inputs), expected), "a deep copy shares its gates with the original"
    assert equal(evaluate(twin, inputs), evaluate(plain, inputs)), "a deep copy's gates do not act"
    for gate in gates:
        gate.neutralize()  # pyright: ignore[reportCallIssue]
