"""Fold the gates of a trained network that barely vary into the layers beside them, within a budget."""

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ecanet import inference, progress
from ecanet.deploy.preparation import unwrap, unwrap_inside
from ecanet.deploy.slim_fit import Constant, Frozen, find_constant_factor, fit
from ecanet.deploy.slim_images import Images, Sets, check_runs, split_images
from ecanet.deploy.slim_judge import Answers, Decide, Share, answer, compare, mean_divergence, shift
from ecanet.deploy.slim_report import GateReport, SlimReport
from ecanet.deploy.slim_tune import copy_affines, restore_affines, tune
from ecanet.errors import AttachError
from ecanet.surgery import Scaling, find_scalings

__all__ = ["slim"]

MOST_SHIFTED = 8
"""Batches of images that are shifted for the report."""
UNTUNED = 0.25
"""Part of the budget that may change on the images to fit with before constants are tuned, which takes time."""
LARGEST_ERROR = 1e-5
"""Largest error of folding, relative to the largest output."""


def slim(
    model: nn.Module,
    images: Images,
    *,
    budget: float = 0.01,
    fit_images: Images | None = None,
    also: Mapping[str, Images] | None = None,
    decide: Decide | None = None,
) -> tuple[nn.Module, SlimReport]:
    """Return a copy of ``model`` in evaluation mode without the gates that barely vary, and a report.

    A trained gate may give nearly the same factors for every image. Then a constant does as well, and a norm or
    convolution beside the gate takes it for free. The procedure needs no labels:

    1. ``fit_images``, or half of the images, 4,096 at most, give the scale and bias of each gate and channel that fit
       the gate's output best (least squares), and the order of the gates: by the Kullback-Leibler divergence of the
       network's class probabilities when that gate alone is constant.
    2. Gates become constant one after the other. As soon as more than a quarter of the budget changes on the images of
       step 1, the scales and biases of all that are constant, and those of the norms, are tuned together on these each
       time, so that the divergence becomes small.
    3. The images that did not fit judge, until the share of changed decisions may exceed the budget: its one-sided
       upper 95 % confidence limit (Clopper-Pearson) decides. The first gate that exceeds it and all after it are kept.
       As nothing in steps 1 and 2 depends on the judging images and the first failure ends the procedure, the
       confidence holds for the result as a whole.
    4. Constants move into the layer before the gate (scale and bias) or, where that is an activation, into the
       convolution behind it (no bias if that pads with zeros). A gate with neither is kept: its constant would cost a
       pass over memory, as the gate does.

    Gates that are constant by construction (`asr`, and attached ones that nobody has trained) are folded first and need
    no judgement. This library's gates are found, built in or attached, and the channel attention of other networks.

    Args:
        model: a trained network, which is not changed.
        images: unlabeled images (N, ...) on any device, or batches of them, normalized as in training. With
            ``fit_images`` all of them judge; without, every second one, and after 8,192 all. They stay in memory.
        budget: largest share of decisions that may change, between 0 and 1. Its proof needs 299 judged images at 0.01.
        fit_images: other unlabeled images, of the network's training set for example, for steps 1 and 2. None of them
            may be among ``images``.
        also: further sets of images by name (other weather, another camera, noise), all of which judge as well: the
            budget holds on each. A gate may be constant on ``images`` and not on these.
        decide: a function from the network's output to its decisions, integers or booleans (N, ...). By default the
            output is class scores (N, K, ...), the decision is the highest one, at each position if there are several,
            and a single score decides at a probability of one half.

    >>> import torch, ecanet
    >>> model = ecanet.create_model("resnet8", attention="asr", num_classes=4).eval()
    >>> plain, report = ecanet.slim(model, torch.randn(4, 3, 32, 32))
    >>> len(report.folded), [key for key in plain.state_dict() if "asr" in key]
    (3, [])

    Raises:
        ConfigError: an argument has another type, the network does not run on the images, there are too few of them for
            the budget, or the network's decisions are not known, or it has no weights yet.
        AttachError: the network has no gates, returns NaN for the images, or folding changes outputs by more than 1e-5
            of the largest.
    """
    sets = split_images(model, images, budget, also, fit_images)
    model = unwrap(model)
    result = unwrap_inside(inference.copy_for_evaluation(model))
    to = next((p.device for p in result.parameters()), torch.device("cpu"))
    sets = sets.to(to)
    check_runs(result, sets.fitted[0][:2])
    report = SlimReport(budget=budget, fitted=sum(map(len, sets.fitted)))
    with find_scalings(result, sets.fitted[0][:2]) as scalings:
        if not scalings:
            raise AttachError(f"{type(model).__name__} has no channel gates; there is nothing to slim")
        trial = Trial(result, scalings, report)
        trial.fold_constants()
        trial.judge(sets, decide)
        trial.fold((sets.judged or sets.fitted)[0])
    base = unwrap_inside(inference.copy_for_evaluation(model))
    for name, shifted in shift(sets.judged[:MOST_SHIFTED]).items() if report.changed else ():
        report.shifted[name] = compare(answer(base, shifted, decide), answer(result, shifted, decide)).share
    return result.eval(), report


class Trial:
    """The gates of a network while they are tried as constants."""

    def __init__(self, model: nn.Module, scalings: Sequence[Scaling], report: SlimReport):
        self.model, self.scalings, self.report = model, scalings, report
        self.reports = {one: GateReport(name=one.name, attention=type(one.module).__name__) for one in scalings}
        self.constants: dict[Scaling, Constant] = {}
        self.standing: dict[Scaling, Frozen] = {}
        """What stands in the place of each gate that is constant now."""
        self.chosen: list[Scaling] = []
        self.fitted: list[Tensor] = []
        self.said: list[Answers] = []
        """What the network with all its gates says to ``fitted``."""
        self.found: dict[Scaling, Constant] = {}
        """The constants of the least squares."""
        self.affines = copy_affines(model)
        """The scales and biases of the norms before any tuning."""

    def fold_constants(self) -> None:
        """Choose the gates that are constant by construction, and note those that cannot be folded."""
        for one in self.scalings:
            gate = self.reports[one]
            factor = find_constant_factor(one.module)
            if one.obstacle:
                gate.reason = one.obstacle
                self.report.gates.append(gate)
            elif factor is not None:
                zero = torch.zeros_like(factor)
                self.constants[one] = Constant(scale=factor, bias=zero, spread=0.0, size=zero, biased=False)
                gate.spread, gate.reason = 0.0, "it does not depend on the image"
                self.choose(one)

    def choose(self, one: Scaling) -> None:
        """Put the constant in the gate's place for good."""
        self.put_constant(one)
        self.chosen.append(one)

    def put_constant(self, one: Scaling) -> None:
        """Let the constant stand where the gate stands."""
        like = next((p for p in self.model.parameters() if p.is_floating_point()), torch.zeros(()))
        self.standing[one] = Frozen(self.constants[one], like)
        one.put(self.model, self.standing[one])

    def judge(self, sets: Sets, decide: Decide | None) -> None:
        """Choose the longest row of gates, least divergence first, that stays within the budget on all images.

        Raises:
            ConfigError: there are gates to judge, and too few images to do so.
        """
        open_gates = [one for one in self.scalings if not one.obstacle and one not in self.constants]
        if not open_gates:
            return
        sets.check_count(self.report.budget)
        biased = {one.module: one.before is not None or one.takes_bias for one in open_gates}
        found = fit(self.model, biased, sets.fitted)
        self.found = {one: found[one.module] for one in open_gates}
        self.constants |= self.found
        self.fitted, self.said = sets.fitted, answer(self.model, sets.fitted, decide)
        for one in open_gates:
            gate = self.reports[one]
            self.put_constant(one)
            gate.spread = self.constants[one].spread
            gate.divergence = mean_divergence(self.said, answer(self.model, self.fitted, decide))
            one.put(self.model, one.module)
        ordered = sorted(open_gates, key=lambda one: cast(float, self.reports[one].divergence))
        self.freeze_in_order(ordered, {"": sets.judged, **sets.others}, decide)

    def freeze_in_order(
        self, ordered: Sequence[Scaling], sets: Mapping[str, list[Tensor]], decide: Decide | None
    ) -> None:
        """Make gates constant one after the other until one of the ``sets`` of images exceeds the budget."""
        before = {name: answer(self.model, batches, decide) for name, batches in sets.items()}
        self.keep({name: compare(answers, answers) for name, answers in before.items()})
        over = ""
        for one in progress.track(ordered, "gates"):
            gate = self.reports[one]
            self.report.gates.append(gate)
            if over:
                gate.reason = f"{over} before it exceeds the budget"
                continue
            earlier = dict(self.constants), copy_affines(self.model)
            self.put_constant(one)
            self.tune([*self.chosen, one])
            shares = self.compare_sets(before, sets, decide)
            gate.together = shares[""]
            worst = max(shares, key=lambda name: shares[name].limit)
            if shares[worst].limit <= self.report.budget:
                self.chosen.append(one)
                gate.reason = "within the budget"
                self.keep(shares)
                continue
            one.put(self.model, one.module)
            self.go_back(*earlier)
            over = gate.name
            where = f" on {worst}" if worst else ""
            gate.reason = (
                f"with it {shares[worst].share:.2%}, at most {shares[worst].limit:.2%} of decisions change{where}"
            )

    def go_back(self, constants: dict[Scaling, Constant], affines: Mapping[nn.Parameter, Tensor]) -> None:
        """Undo the last tuning: it was for a gate that is kept."""
        self.constants = constants
        restore_affines(affines)
        for one in self.chosen:
            self.put_constant(one)

    def tune(self, gates: Sequence[Scaling]) -> None:
        """Make the constants of ``gates`` and the norms better together, on the images that do not judge.

        Each tuning begins with the constants of the least squares and the network's own norms: small steps over few
        images, one tuning after the other, would fit these images too closely.
        """
        if any(said.log_probabilities is None for said in self.said):
            return  # the user's function says which decisions differ, and not by how much
        if compare(self.said, answer(self.model, self.fitted, None)).share <= self.report.budget * UNTUNED:
            return
        restore_affines(self.affines)
        changing = [one for one in gates if not self.constants[one].still]
        for one in changing:
            self.constants[one] = self.found[one]
            self.put_constant(one)
        if changing:
            moving = {self.standing[one]: one for one in changing}
            tuned = tune(self.model, {at: self.constants[one] for at, one in moving.items()}, self.fitted, self.said)
            self.constants |= {moving[at]: constant for at, constant in tuned.items()}

    def compare_sets(
        self, before: Mapping[str, list[Answers]], sets: Mapping[str, list[Tensor]], decide: Decide | None
    ) -> dict[str, Share]:
        """Return the shares of changed decisions on each set of images, for the gates that are constant now."""
        return {name: compare(before[name], answer(self.model, batches, decide)) for name, batches in sets.items()}

    def keep(self, shares: Mapping[str, Share]) -> None:
        """Write into the report what changes with the gates that are chosen so far."""
        self.report.changed = shares[""]
        self.report.also = {name: share for name, share in shares.items() if name}

    def fold(self, example: Tensor) -> None:
        """Move the constants into layers; check on ``example`` that this changes nothing beyond rounding.

        Raises:
            AttachError: it does.
        """
        before = run(self.model, example)
        folded: list[GateReport] = []
        for one in self.chosen:
            constant, gate = self.constants[one], self.reports[one]
            gate.into = one.absorb(self.model, constant.scale, constant.bias)
            folded.append(gate)
        self.report.gates = [*(g for g in folded if g not in self.report.gates), *self.report.gates]
        self.report.error = measure_error(before, run(self.model, example))
        if not math.isfinite(self.report.error):
            raise AttachError(
                f"{type(self.model).__name__} returns numbers that are not finite for these images; look for NaN in "
                f"the images and the weights"
            )
        if self.report.error > LARGEST_ERROR:
            raise AttachError(
                f"folding changes outputs of {type(self.model).__name__} by {self.report.error:.1g} of the largest, "
                f"more than {LARGEST_ERROR:g}; slim it in float32 or wider"
            )


@torch.no_grad()
def run(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the tensors in the output of ``model``, one after the other."""
    found: list[Tensor] = []
    queue: list[object] = [model(images)]
    while queue:
        content = queue.pop()
        if isinstance(content, Tensor):
            found += [content] if content.is_floating_point() else []
        elif isinstance(content, dict):
            queue += list(cast("dict[object, object]", content).values())
        elif isinstance(content, tuple | list):
            queue += list(cast("Sequence[object]", content))
    return found


def measure_error(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the largest difference of two outputs, relative to the largest number of each tensor; NaN if undefined."""
    errors = [0.0]
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape:  # boxes that a detector found
            return math.nan
        if a.numel():
            errors.append(float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-30)))
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)
