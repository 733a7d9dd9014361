import json
import re
import shutil
import statistics
import sys

import pytest
from conftest import ROOT, rows

import recipes
import tables
from recipes import make_parser, new_config, recorded_config
from train import learning_rate, plateau_rate
from utils import run_script

PAGES = [ROOT / "README.md", ROOT / "results" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EVALUATED = sorted(path.parent for path in (ROOT / "results").glob("*/test.json"))
TRAINED = sorted(path.parent for path in (ROOT / "results").glob("*/metrics.csv"))
# Of write_run's runs.
COMMAND = "python train.py --epochs 9 --lr 0.125 --batch-size 128 --mix none "
COMMAND += "--warm-up 0.05 --dropout-scaling training"
IMAGES = {"cifar10": 10_000, "shapes": 1_000}  # in the test splits


@pytest.fixture
def script(handlers_restored, monkeypatch, tmp_path):
    """Runs tables.py on a copy of the pages and of results/; returns the exit code."""
    shutil.copytree(ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("*.png"))
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tables.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            run_script(tables.main)
        return stopped.value.code

    return run


def write_run(folder, seed, test_accuracy, accuracies=(0.5, 0.75)):
    folder.mkdir(parents=True)
    settings = {"dataset": "cifar10", "optimizer": "sgd", "epochs": 9, "lr": 0.125}
    settings |= {"momentum": 0.9, "weight_decay": 5e-4, "precision": "bf16"}
    settings |= {"seed": seed, "data_dir": f"data{seed}"}
    start = {"device": "a CPU, 2 threads"}
    (folder / "config.json").write_text(json.dumps({"settings": settings, "starts": [start]}))
    rows = [f"{i},{i},0.1,2,0.1,1.5,{a}" for i, a in enumerate(accuracies, 1)]
    header = "epoch,step,lr,train_loss,train_accuracy,val_loss,val_accuracy"
    (folder / "metrics.csv").write_text("\n".join([header, *rows]))
    times = [f"{i},90,500,1" for i in range(1, len(accuracies) + 1)]
    header = "epoch,seconds,images_per_second,peak_memory_mib"
    (folder / "timing.csv").write_text("\n".join([header, *times]))
    if test_accuracy:
        test = {"accuracy": test_accuracy, "interval_95": [0.7, 0.9], "loss": 0.5 + seed / 100}
        test |= {"calibration_error": 0.03, "ten_views": {"accuracy": test_accuracy + 0.01}}
        (folder / "test.json").write_text(json.dumps(test))


def test_pages_agree_with_the_results():
    marked = {name for page in PAGES for _, name, _ in tables.MARKED.findall(page.read_text())}
    assert marked == tables.TABLES.keys()
    for page in PAGES:
        assert tables.fill(page) == page.read_text(), f"{page}: run python tables.py"


@pytest.mark.parametrize("folder", EVALUATED, ids=[folder.name for folder in EVALUATED])
def test_published_number_is_of_its_run(folder):
    """On the whole test split, of the epoch that was the best on the validation images."""
    settings = json.loads((folder / "config.json").read_text())["settings"]
    test = json.loads((folder / "test.json").read_text())
    assert test["dataset"] == settings["dataset"]
    assert (test["split"], test["images"]) == ("test", IMAGES[settings["dataset"]])
    right = sum(row[i] for i, row in enumerate(test["confusion_matrix"]))
    assert test["accuracy"] == pytest.approx(right / test["images"])
    accuracies = [float(row["val_accuracy"]) for row in rows(folder)]
    assert test["epoch"] == 1 + accuracies.index(max(accuracies))
    assert len(accuracies) == settings["epochs"]


@pytest.mark.parametrize("folder", TRAINED, ids=[folder.name for folder in TRAINED])
def test_learning_rate_of_a_published_run_is_that_of_the_code(folder):
    config = recorded_config(json.loads((folder / "config.json").read_text())["settings"])
    history = rows(folder)
    if config["schedule"] == "plateau":
        accuracies = [float(row["val_accuracy"]) for row in history]
        expected = [plateau_rate(accuracies[:i], config["lr"]) for i in range(len(history))]
    else:
        total = int(history[0]["step"]) * config["epochs"]
        places = [int(row["step"]) - 1 for row in history]
        expected = [learning_rate(step, total, config["lr"], config["warm_up"]) for step in places]
    assert [float(row["lr"]) for row in history] == pytest.approx(expected)


@pytest.mark.parametrize("folder", TRAINED, ids=[folder.name for folder in TRAINED])
def test_command_in_the_tables_has_the_settings_of_its_run(folder):
    """Also when its recipe has changed since."""
    settings = recorded_config(json.loads((folder / "config.json").read_text())["settings"])
    program, script, *options = tables.command_for(settings).split()
    assert [program, script] == ["python", "train.py"]
    today = new_config(vars(make_parser().parse_args(options)))
    names = settings.keys() - {*tables.NOT_COMPARED, "precision"}  # chosen by the hardware
    assert {name: today[name] for name in names} == {name: settings[name] for name in names}


def test_run_that_the_pages_call_the_default_is_it():
    """A new default needs a new run."""
    record = json.loads((ROOT / "results" / "cifar10-sgd" / "config.json").read_text())
    assert tables.command_for(record["settings"]) == "python train.py --compile"


def test_command_of_a_recipe_that_has_changed_says_what_it_was(monkeypatch):
    settings = new_config({"recipe": "fast"}) | {"precision": "bf16"}
    assert tables.command_for(settings) == "python train.py --recipe fast"
    row = {**recipes.RECIPES["fast", "cifar10", "adam"], "lr": 0.5, "dropout": 0.25}
    monkeypatch.setitem(recipes.RECIPES, ("fast", "cifar10", "adam"), row)
    command = tables.command_for(settings | {"precision": "fp32"})
    assert set(command.removeprefix("python train.py ").split(" --")) == {
        "--recipe fast",
        f"lr {settings['lr']}",
        f"dropout {settings['dropout']}",
        "precision fp32",
    }


def anchors(page):
    """What the page's headings are called in links, as GitHub does it."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_links_lead_somewhere():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
            if not target.startswith("http"):
                place = page.parent / target if target else page
                assert place.exists(), f"{page}: {target}"
                place = place / "README.md" if place.is_dir() else place
                assert not anchor or anchor in anchors(place), f"{page}: {target}#{anchor}"


def test_tests_that_the_pages_name_are_there():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)`", page.read_text()):
            assert f"def {name}(" in tests, f"{page}: {name}"


def test_run_on_all_images_has_no_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    write_run(tmp_path / "run", 0, 0.8, accuracies=("", ""))
    assert "| [0](results/run) |  | 80.0% (" in tables.results_table()
    assert tables.time_table().count("\n") == 2  # no row
    assert "| 2 of 9 |  |  |  |" in tables.tried_table()


def test_number_that_is_not_in_the_results_is_found_and_mended(script, tmp_path, capsys):
    page = tmp_path / "README.md"
    true = page.read_text()
    before, speed = true.split("<!-- table speed -->")
    page.write_text(
        before + "<!-- table speed -->" + re.sub(r"\| [\d.]+ \(", "| 99 (", speed, count=1)
    )
    assert page.read_text() != true
    assert script("--check") == 1
    assert capsys.readouterr().out == "out of date: README.md\n"
    assert page.read_text() != true
    assert script() == 0
    assert page.read_text() == true
    assert script("--check") == 0


def test_unknown_table_is_named(script, tmp_path, capsys):
    (tmp_path / "docs" / "new.md").write_text("<!-- table magic -->\n<!-- end -->\n")
    assert script() == 2
    assert "no table is called magic" in capsys.readouterr().err


def test_seeds_are_averaged(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    accuracies = (0.8, 0.82, 0.87)
    for seed, accuracy in enumerate(accuracies):
        write_run(tmp_path / f"run-{seed}", seed, accuracy)
    write_run(tmp_path / "not-evaluated", 7, None)
    header, _, row = tables.results_table().splitlines()
    seeds = "[0](results/run-0), [1](results/run-1), [2](results/run-2)"
    assert row.startswith(f"| `{COMMAND}` | {seeds} | 75.0% ± 0.0 | ")
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
    assert f"| {mean:.1%} ± {100 * deviation:.1f} | {mean + 0.01:.1%} ± " in row
    assert row.endswith(" | 3.0% ± 0.0 | 0.510 ± 0.010 | 9 epochs, 3 min | a CPU, 2 threads |")
    assert header.count("|") == row.count("|")


def test_columns_are_left_out_with_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    write_run(tmp_path / "run", 0, 0.8)
    lines = tables.results_table(("ten views", "test loss")).splitlines()
    assert lines[0] == (
        "| command | seeds | validation | test | calibration error | training | hardware |"
    )
    assert lines[2].endswith(
        " | 80.0% (70.0% to 90.0%) | 3.0% | 9 epochs, 3 min | a CPU, 2 threads |"
    )
    assert len({line.count("|") for line in lines}) == 1


def test_two_seeds_are_shown_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for seed, accuracy in enumerate((0.8, 0.82)):
        write_run(tmp_path / f"run-{seed}", seed, accuracy)
    shown = "| 75.0%, 75.0% | 80.0%, 82.0% | 81.0%, 83.0% | 3.0%, 3.0% | 0.500, 0.510 |"
    assert shown in tables.results_table()


def test_ten_views_of_some_seeds_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for seed in range(2):
        write_run(tmp_path / f"run-{seed}", seed, 0.8)
    path = tmp_path / "run-1" / "test.json"
    test = json.loads(path.read_text())
    del test["ten_views"]
    path.write_text(json.dumps(test))
    assert " | 81.0% (1 of 2 seeds) | " in tables.results_table().splitlines()[2]


def test_minutes_of_seeds_are_from_the_shortest_to_the_longest(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for seed, epochs in enumerate((3, 2, 4)):  # of 90 seconds each
        write_run(tmp_path / f"run-{seed}", seed, 0.8, accuracies=[0.5] * epochs)
    assert " | 9 epochs, 3 to 6 min | " in tables.results_table().splitlines()[2]


def test_seed_from_before_an_option_is_one_of_the_same_experiment(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for seed, added in enumerate(({}, {"mix": "none", "ema": 0.0}, {"mix": "cutmix"})):
        write_run(tmp_path / f"run-{seed}", seed, 0.8)
        path = tmp_path / f"run-{seed}" / "config.json"
        record = json.loads(path.read_text())
        record["settings"] |= added
        path.write_text(json.dumps(record))
    rows = tables.results_table().splitlines()[2:]
    seeds = [row.split(" | ")[1] for row in rows]
    assert seeds == ["[0](results/run-0), [1](results/run-1)", "[2](results/run-2)"]


def test_single_seed_has_its_interval(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    write_run(tmp_path / "run", 0, 0.8, accuracies=(0.75, 0.5))
    row = tables.results_table().splitlines()[2]
    assert "| [0](results/run) | 75.0% | 80.0% (70.0% to 90.0%) | 81.0% | 3.0% |" in row


def test_time_until_an_accuracy(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    write_run(tmp_path / "run", 5, 0.8, accuracies=(0.6, 0.61, 0.71, 0.7, 0.85))  # 90 s each
    header, _, row = tables.time_table().splitlines()
    assert header == "|  | hardware | 60% | 70% | 80% |"
    assert row == f"| `{COMMAND} --seed 5` | a CPU, 2 threads | 90 s | 4.5 min | 7.5 min |"


def test_search_shows_failures(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    write_run(tmp_path / "search" / "good", 0, None)
    write_run(tmp_path / "search" / "bad", 1, None, accuracies=())
    write_run(tmp_path / "search" / "chance", 2, None, accuracies=(0.098,))
    (tmp_path / "search" / "bad" / "note.txt").write_text("diverged\n")
    good, chance, bad = tables.tried_table().splitlines()[2:]
    assert "| 1 of 9 | 9.8% | 9.8% |" in chance
    assert good == f"| `{COMMAND}` | 2 of 9 | 50.0% | 75.0% |  |"
    assert bad == f"| `{COMMAND} --seed 1` | 0 of 9 |  |  | diverged |"
