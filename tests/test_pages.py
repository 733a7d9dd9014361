"""README.md, docs/ and results/README.md: what they link to, and the commands and code in them."""

import argparse
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from model import AlexNet
from recipes import new_config, parse_command_line
from research import tables
from utils import UserError

README = ROOT / "README.md"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "results" / "README.md")
}
SCRIPTS = ["train", "evaluate", "predict", "compact", "figures"]
SCRIPTS += [f"research.{name}" for name in ("ablate", "benchmark", "tables")]
FOREIGN_OPTIONS = {"--nproc_per_node"}
FOREIGN_OPTIONS |= {"--index-url", "--long"}  # pip's, and tests/conftest.py's


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)


def heading_anchors(page):
    """Return the anchors that GitHub gives a page's headings."""
    page = re.sub(r"^```.*?^```", "", page, flags=re.M | re.S)
    titles = [
        re.sub(r"[^\w\- ]", "", title.lower()) for title in re.findall(r"^#+ (.*)", page, re.M)
    ]
    return {title.replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    targets = re.findall(r"\]\(([^)\s]+)\)", PAGES[name])
    targets += re.findall(r'(?:src|href)="([^"]+)"', PAGES[name])
    targets += re.findall(r"^\[[^\]]+\]: (\S+)", PAGES[name], re.M)
    for target in targets:
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            assert anchor in heading_anchors(file.read_text()), target


def test_pages_are_short():
    assert sum(len(page.split()) for page in PAGES.values()) <= 8000
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_tables_are_those_of_the_results(monkeypatch, capsys):
    assert any("<!-- table " in page for page in PAGES.values())
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert not tables.main(), capsys.readouterr()


def test_readme_names_every_module():
    """And has the network's own summary."""
    modules = {path.name for path in ROOT.glob("*.py")}
    assert modules <= set(re.findall(r"`(\w+\.py)`", PAGES["README.md"]))
    with torch.device("meta"):
        assert AlexNet().summary() + "\n" in blocks(PAGES["README.md"], "text")


# --- Programs and commands ----------------------------------------------------------------------


def test_python_of_the_pages_compiles_and_the_networks_runs():
    for page in PAGES.values():
        for program in blocks(page, "python"):
            compile(program, "page", "exec")
    names = {}
    exec(blocks(PAGES["README.md"], "python")[0], names)
    assert names["logits"].shape == (8, 10)
    assert names["features"].shape == (8, 4096)


def commands(page):
    """Return each command of the code blocks and between backticks, split as a shell does."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").replace("&&", "\n").splitlines()
    prose = re.sub(r"^```.*?^```", "", page, flags=re.M | re.S)
    lines += [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", prose)]
    split = [shlex.split(line, comments=True) for line in lines if "'s" not in line]
    return [words for words in split if len(words) > 1 and words[0] in ("python", "torchrun")]


def parse(script, arguments, monkeypatch):
    """Let a script parse its arguments, and do nothing else. Raises UserError for wrong ones."""
    if script == "train":
        settings = parse_command_line(arguments)
        if "resume" not in settings:
            settings.pop("output_dir", None)
            new_config(settings)
        return
    original = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *given, **settings):
        original(self, *given, **settings)
        raise StopIteration

    main = importlib.import_module(script).main
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(Path, "is_dir", lambda path: True)  # those that a run would make
        patch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(StopIteration):
            main()


@pytest.mark.parametrize("name", PAGES)
def test_every_command_has_valid_options(name, monkeypatch):
    for words in commands(PAGES[name]):
        if words[0] == "python" and words[1] == "-m":
            script, arguments = words[2], words[3:]
        else:
            [position] = [i for i, word in enumerate(words) if word.endswith(".py")]
            script, arguments = words[position].removesuffix(".py"), words[position + 1 :]
        if script in ("venv", "pytest"):
            assert all((ROOT / word).exists() for word in words if word.endswith(".py")), words
            continue
        assert script in SCRIPTS, words
        try:
            parse(script, [word for word in arguments if word != "..."], monkeypatch)
        except UserError as error:
            pytest.fail(f"{shlex.join(words)}: {error}")


def test_every_option_named_exists(monkeypatch, capsys):
    known = set(FOREIGN_OPTIONS)
    for script in SCRIPTS:
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit):
            importlib.import_module(script).main()
        known |= set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    for name, page in PAGES.items():
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page))
        assert named <= known, (name, named - known)


def test_notebook_is_stored_as_it_ran():
    """.ci/notebook.py runs it."""
    text = (ROOT / "notebooks" / "alexnet.ipynb").read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 10
    assert not re.search(r"/(home|root|work|tmp)/", text)
    assert len(text) < 700_000


def test_network_is_loaded_and_exported_by_plain_torch(tmp_path, monkeypatch):
    """docs/training.md's program, and what ONNX Runtime makes of the file."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    [program] = [text for text in blocks(PAGES["docs/training.md"], "python") if "onnx" in text]
    network = AlexNet(num_classes=3).eval()
    checkpoint = {"model": {"num_classes": 3}, "weights": network.state_dict()}
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint, "best.pt")
    exec(program, {})
    session = onnxruntime.InferenceSession("alexnet.onnx")
    images = torch.randn(1, 3, 227, 227)
    [logits] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), network(images).detach())
