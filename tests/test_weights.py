"""weights/cifar10.pt: the trained network that comes with the repository."""

import json
import math
import re

import pytest
import torch
from conftest import ROOT

import hubconf
from cifar import load_cifar
from predict import Classifier

WEIGHTS = ROOT / "weights" / "cifar10.pt"
README = (ROOT / "README.md").read_text()


def test_weights_fit_into_a_repository():
    assert WEIGHTS.stat().st_size < 15e6


def test_hub_gives_the_trained_network_and_its_classifier():
    network, classifier = hubconf.alexnet(pretrained=True), hubconf.classifier(device="cpu")
    assert not network.training
    expected = classifier.network.state_dict()
    assert network.state_dict().keys() == expected.keys()
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    with pytest.raises(ValueError, match="for other classes replace fc8"):
        hubconf.alexnet(pretrained=True, num_classes=5)


def test_a_thousand_test_images_agree_with_the_published_accuracy(cifar10_dir):
    """Within four standard deviations of a sample of a thousand."""
    record = json.loads((ROOT / "results" / "weights" / "test.json").read_text())
    assert record["images"] == 10_000
    classes, _, (images, labels) = load_cifar("cifar10", cifar10_dir)
    classifier = Classifier.from_checkpoint(WEIGHTS, "cpu", "fp32")
    assert classifier.classes == classes
    predicted = classifier.probabilities(images[:1000]).argmax(1)
    accuracy = (predicted == labels[:1000]).double().mean().item()
    expected = record["accuracy"]
    assert abs(accuracy - expected) < 4 * math.sqrt(expected * (1 - expected) / 1000)


def test_readme_has_the_published_accuracy():
    accuracy = json.loads((ROOT / "results" / "weights" / "test.json").read_text())["accuracy"]
    [told] = re.findall(r"weights/cifar10\.pt`\]\(weights\), 9 MB: ([\d.]+%)", README)
    assert told == f"{accuracy:.1%}"
