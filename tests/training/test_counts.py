"""The counts and the example images of an evaluation, against loops over the images."""

import pytest
import torch

from ecanet.data import DataSpec
from ecanet.training.tasks.counts import EXAMPLES, ClassCounts, ExampleImages


def make_batches(classes, sizes, seed=0):
    """Return logits (N, K) and labels (N,) of several batches; the last class has no image."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for size in sizes:
        labels = torch.randint(0, classes - 1, (size,), generator=generator)
        logits = torch.randn(size, classes, generator=generator)
        logits[torch.arange(size), labels] += 1
        batches.append((logits, labels))
    return batches


@pytest.mark.parametrize(("classes", "sizes"), [(3, (1, 7, 30)), (7, (64, 5)), (1200, (40,))])
def test_counts_equal_those_of_a_loop(classes, sizes):
    counts, batches = ClassCounts(classes), make_batches(classes, sizes)
    images = [(row, int(label)) for logits, labels in batches for row, label in zip(logits, labels, strict=True)]
    for batch in batches:
        counts.update(*batch)
    found = counts.compute()
    hits = [(label, int(row.argmax()) == label) for row, label in images]
    assert float(found["top1"]) == pytest.approx(100 * sum(hit for _, hit in hits) / len(hits))
    if classes > 5:
        five = sum(label in row.argsort(descending=True)[:5] for row, label in images)
        assert float(found["top5"]) == pytest.approx(100 * five / len(images))
    shares = []
    for one in {label for label, _ in hits}:
        own = [hit for label, hit in hits if label == one]
        shares.append(sum(own) / len(own))
    assert float(found["macro"]) == pytest.approx(100 * sum(shares) / len(shares))
    expected = [[0] * classes for _ in range(classes)]
    for row, label in images:
        expected[label][int(row.argmax())] += 1
    assert found["confusion"].tolist() == (expected if classes <= 1000 else [])


def test_there_is_no_macro_where_all_classes_have_as_many_images():
    counts = ClassCounts(3)
    counts.update(torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 1, 0, 1]))
    assert set(counts.compute()) == {"confusion", "top1"}


@pytest.mark.parametrize("sizes", [(5,), (40,), (3, 30, 1, 25), (1,) * 40])
def test_examples_are_the_first_correct_and_the_first_wrong_images(sizes):
    spec = DataSpec(class_names=("a", "b", "c"), channels=1, size=1, mean=(0.0,), std=(1.0,))
    kept, expected, number = ExampleImages(), {True: [], False: []}, 0
    for logits, labels in make_batches(3, sizes):
        images = (number + torch.arange(len(labels)).float())[:, None, None, None] / 255
        kept.add(images, labels, logits)
        for row, label in zip(logits, labels, strict=True):
            guess = int(row.argmax())
            example = (number, int(label), guess, pytest.approx(float(row.softmax(0)[guess])))
            expected[guess == int(label)].append(example)
            number += 1
    found = [(int(e["image"]), e["label"], e["prediction"], e["probability"]) for e in kept.to_list(spec)]
    assert found == expected[True][:EXAMPLES] + expected[False][:EXAMPLES]
