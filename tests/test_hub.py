"""hubconf.py: the network from anywhere through torch.hub."""

import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT

import hubconf

PROGRAM = f"""
import pickle, sys
for name in ("matplotlib", "tqdm", "torchvision", "PIL"):
    sys.modules[name] = None  # importing it is an error
import torch

network = torch.hub.load({str(ROOT)!r}, "alexnet", source="local", num_classes=7, groups=2).eval()
again = pickle.loads(pickle.dumps(network))
images = torch.randn(1, 3, 227, 227)
print(network(images).shape, torch.equal(again(images), network(images)))
"""


def test_alexnet_comes_from_another_folder_with_torch_alone_and_can_be_pickled(tmp_path):
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("torch.Size([1, 7]) True\n", "")


def test_hub_lists_the_network_and_the_classifier():
    """torch.hub.list() has what can be called and begins with no underscore."""
    public = [name for name in dir(hubconf) if not name.startswith("_")]
    assert [n for n in public if callable(getattr(hubconf, n))] == ["alexnet", "classifier"]


@pytest.mark.parametrize(
    ("entry", "name"), [("alexnet", "model"), ("classifier", "predict"), ("classifier", "utils")]
)
def test_another_module_of_the_name_is_a_clear_error(monkeypatch, tmp_path, entry, name):
    other = types.ModuleType(name)
    other.__file__ = str(tmp_path / f"{name}.py")
    monkeypatch.setitem(sys.modules, name, other)
    settings = {"checkpoint": "best.pt"} if entry == "classifier" else {}
    with pytest.raises(ImportError, match=f"{name}.py is imported as '{name}', which this "):
        torch.hub.load(str(ROOT), entry, source="local", **settings)
