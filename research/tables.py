"""Writes the tables of README.md and docs/ from the files in results/: python tables.py [--check]

A table stands between the lines <!-- table NAME --> and <!-- end -->, NAME being one of TABLES.
"""

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

from figures import speed_name
from recipes import BEFORE, as_command_line, new_config, recorded_config
from utils import OneLineParser, UserError, atomic_write, read_csv, read_history, run_script

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
MARKED = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.S)
NOT_COMPARED = ("data_dir", "device", "save_every", "seed", "tensorboard")
RESULT_COLUMNS = (
    "command",
    "seeds",
    "validation",
    "test",
    "ten views",
    "calibration error",
    "test loss",
    "training",
    "hardware",
)
RATE_COLUMNS = ("textbook (images/s)", "here (images/s)")


def markdown(header: list[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown, a line for each row."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ---------------------------------------------------------------------------------------------
# Accuracy
# ---------------------------------------------------------------------------------------------


def read_run(folder: Path) -> dict:
    """A run's settings and command, epochs, minutes of training, and test.json if it has one."""
    record = json.loads((folder / "config.json").read_text())
    test = folder / "test.json"
    return {
        "folder": folder.name,
        "settings": record["settings"],
        "command": command_for(record["settings"]),
        "device": record["starts"][0]["device"],
        "epochs": read_csv(folder / "metrics.csv"),
        "minutes": sum(float(row["seconds"]) for row in read_csv(folder / "timing.csv")) / 60,
        "test": json.loads(test.read_text()) if test.exists() else None,
        "note": (folder / "note.txt").read_text().strip() if (folder / "note.txt").exists() else "",
    }


def read_runs(folder: Path) -> list[dict]:
    """The runs of train.py on CIFAR-10 whose folders are in this one, by name."""
    folders = [path.parent for path in sorted(folder.glob("*/config.json"))]
    runs = [read_run(each) for each in folders if not (each / "ablation.csv").exists()]
    return [run for run in runs if run["settings"]["dataset"] == "cifar10"]


def by_experiment(runs: list[dict]) -> list[list[dict]]:
    """Runs that differ by their seed alone are together."""
    groups = {}
    for run in runs:
        settings = {**BEFORE, **run["settings"]}  # a run may be older than an option
        key = {name: value for name, value in settings.items() if name not in NOT_COMPARED}
        key["hardware"] = run["device"]
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(run)
    return list(groups.values())


def command_for(settings: dict) -> str:
    """The command that trains with a run's settings today; its recipe may have been another then.

    Without the seed and the other settings that do not make it another experiment.
    """
    settings = recorded_config(settings)
    place = {name: settings[name] for name in ("recipe", "dataset")}
    row = {**place, "optimizer": settings["optimizer"]}
    usual = {**new_config(row), "recipe": "modern", "dataset": "cifar10", "precision": "bf16"}
    usual["optimizer"] = new_config(place)["optimizer"]
    ours = {**row, **settings}  # these three first
    others = {
        name: value
        for name, value in ours.items()
        if name not in NOT_COMPARED and value != usual.get(name)
    }
    return " ".join(["python train.py", *as_command_line(others)]).replace("=", " ")


def with_seed(run: dict) -> str:
    """The command of one run; a seed of 0 is the default."""
    seed = run["settings"].get("seed", 0)
    return f"`{run['command']} --seed {seed}`" if seed else f"`{run['command']}`"


def seed_link(run: dict) -> str:
    """A run's seed, leading to its folder."""
    return f"[{run['settings'].get('seed', 0)}](results/{run['folder']})"


def several(values: list[float], digits: int, unit: str = "") -> str:
    """Mean ± standard deviation; one or two as they are, as two say little of a spread."""
    if len(values) < 3:
        return ", ".join(f"{value:.{digits}f}{unit}" for value in values)
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return f"{mean:.{digits}f}{unit} ± {deviation:.{digits}f}"


def percent(shares: list[float], interval: list[float] | None = None) -> str:
    """Shares in 0..1, as several() shows them; of a single one also its 95% interval, if given."""
    text = several([100 * share for share in shares], 1, "%")
    if len(shares) == 1 and interval:
        text += f" ({interval[0]:.1%} to {interval[1]:.1%})"
    return text


def best_validation(run: dict) -> float | None:
    """The highest validation accuracy (0..1) of any epoch; None with --train-split full."""
    accuracies = [float(row["val_accuracy"]) for row in run["epochs"] if row["val_accuracy"]]
    return max(accuracies, default=None)


def results_table(left_out: Iterable[str] = (), min_epochs: int = 0) -> str:
    """A row for each experiment on CIFAR-10 that was evaluated on the test split.

    Of those of at least min_epochs, without the columns that are left out, by their names in the
    table's head.
    """
    runs = [run for run in read_runs(RESULTS) if run["settings"]["epochs"] >= min_epochs]
    groups = by_experiment([run for run in runs if run["test"]])
    groups.sort(key=lambda group: -statistics.mean(run["test"]["accuracy"] for run in group))
    rows = []
    for group in groups:
        tests = [run["test"] for run in group]
        validation = [best_validation(run) for run in group]
        errors = [test["calibration_error"] for test in tests if "calibration_error" in test]
        rows.append(
            {
                "command": f"`{group[0]['command']}`",
                "seeds": ", ".join(map(seed_link, group)),
                "validation": percent(validation) if None not in validation else "",
                "test": percent([test["accuracy"] for test in tests], tests[0]["interval_95"]),
                "ten views": ten_views(tests),
                "calibration error": percent(errors) if errors else "",
                "test loss": several([test["loss"] for test in tests], 3),
                "training": f"{group[0]['settings']['epochs']} epochs, {minutes_of(group)}",
                "hardware": group[0]["device"],
            }
        )
    header = [name for name in RESULT_COLUMNS if name not in left_out]
    return markdown(header, ([row[name] for name in header] for row in rows))


def ten_views(tests: list[dict]) -> str:
    """Accuracy with ten views, which not every seed may have been tested with."""
    accuracies = [test["ten_views"]["accuracy"] for test in tests if "ten_views" in test]
    if not accuracies:
        return ""
    some = f" ({len(accuracies)} of {len(tests)} seeds)" if len(accuracies) < len(tests) else ""
    return percent(accuracies) + some


def minutes_of(runs: list[dict]) -> str:
    """How long the training took; from the shortest to the longest if they differ.

    No mean: two machines of one name may differ by a factor of two.
    """
    minutes = [f"{run['minutes']:.3g}" for run in sorted(runs, key=lambda run: run["minutes"])]
    return f"{' to '.join(dict.fromkeys([minutes[0], minutes[-1]]))} min"


def time_table() -> str:
    """Minutes of training after which an epoch's validation accuracy first was so high."""
    marks = (0.6, 0.7, 0.8, 0.9, 0.93, 0.94, 0.95)
    runs = [run for run in read_runs(RESULTS) if run["test"] and best_validation(run)]
    reached = [mark for mark in marks if any(best_validation(run) >= mark for run in runs)]
    rows = []
    for run in sorted(runs, key=lambda run: -best_validation(run)):
        minutes = [minutes_until(run, mark) for mark in reached]
        times = ["" if each is None else readable_minutes(each) for each in minutes]
        rows.append([with_seed(run), run["device"], *times])
    return markdown(["", "hardware", *(f"{mark:.0%}" for mark in reached)], rows)


def minutes_until(run: dict, mark: float) -> float | None:
    """Minutes of training until the first epoch with a validation accuracy of mark (0..1)."""
    history = read_history(RESULTS / run["folder"])
    return next((row["minutes"] for row in history if row["val_accuracy"] >= mark), None)


def readable_minutes(minutes: float) -> str:
    """For people: few minutes in seconds."""
    return f"{60 * minutes:.0f} s" if minutes < 2 else f"{minutes:.3g} min"


def tried_table() -> str:
    """A row for each run on CIFAR-10, failures included, and its validation accuracy."""
    runs = [*read_runs(RESULTS), *read_runs(RESULTS / "search")]
    rows = []
    for run in sorted(runs, key=lambda run: -(best_validation(run) or 0)):
        done = f"{len(run['epochs'])} of {run['settings']['epochs']}"
        ends = [run["epochs"][place]["val_accuracy"] if run["epochs"] else "" for place in (0, -1)]
        accuracies = [f"{float(end):.1%}" if end else "" for end in ends]
        rows.append([with_seed(run), done, *accuracies, run["note"]])
    return markdown(["command", "epochs", "after the first", "after the last", ""], rows)


# ---------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------


def speed_rows(batch_size: int, compiled: bool, *files: str) -> Iterable[tuple[str, dict, dict]]:
    """For each part of the benchmark its name, the textbook's numbers and this project's.

    Of files in results/speed, which have different parts.
    """
    rows = []
    for file in files:
        rows += json.loads((RESULTS / "speed" / file).read_text())["rows"]
    rows = [row for row in rows if row["batch_size"] == batch_size]
    textbook = {row["part"]: row for row in rows if row["side"] == "textbook"}
    sides = ("here", "compiled") if compiled else ("here",)
    for part in ("loop", "step", "inference", "lrn", "pipeline"):
        for row in rows:
            if row["part"] == part and row["side"] in sides:
                yield speed_name(row), textbook[part], row


def speed_table() -> str:
    """Batch 128, in short."""
    rows = [
        [name, *rates(textbook, here)]
        for name, textbook, here in speed_rows(128, False, "cpu.json")
    ]
    return markdown(["", *RATE_COLUMNS, "times as fast (slowest to fastest turn)"], rows)


def long_speed_table(batch_size: int, *files: str) -> str:
    """With the compiled network, memory and the share of the machine's peak."""
    rows = []
    for name, textbook, here in speed_rows(batch_size, True, *files):
        memory = f"{textbook['peak_memory_mib']:,} / {here['peak_memory_mib']:,} MiB"
        share = here.get("share_of_peak")
        peak = f"{share[0]:.0%} ({share[1]:.0%} to {share[2]:.0%})" if share else ""
        rows.append([name, *rates(textbook, here), memory, peak])
    return markdown(
        ["", *RATE_COLUMNS, "times as fast", "memory, textbook / here", "of the peak"], rows
    )


def rates(textbook: dict, here: dict) -> list[str]:
    """Images per second of both, and how many times as fast this project is."""
    median, slowest, fastest = here["times_the_textbook"]
    return [
        f"{textbook['images_per_second'][0]:,.0f}",
        f"{here['images_per_second'][0]:,.0f}",
        f"{median:.1f} ({slowest:.1f} to {fastest:.1f})",
    ]


def operations_table() -> str:
    """The operations of a training step that take longest."""
    operations = json.loads((RESULTS / "speed" / "cpu.json").read_text())["operations"]
    total = sum(row["milliseconds"] for row in operations)
    rows = [
        [
            f"`{row['operation'].removeprefix('aten::')}`",
            f"{row['milliseconds']:.0f}",
            f"{row['milliseconds'] / total:.1%}",
        ]
        for row in operations[:15]
    ]
    return markdown(["operation", "ms", "of the step"], rows)


# ---------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------

TABLES = {
    "results": results_table,
    "results-short": lambda: results_table(("ten views", "calibration error", "test loss"), 8),
    "time": time_table,
    "tried": tried_table,
    "speed": speed_table,
    "speed-128": lambda: long_speed_table(128, "cpu.json"),
    "speed-32": lambda: long_speed_table(32, "cpu.json"),
    "speed-no-bf16": lambda: long_speed_table(128, "no-bf16.json"),
    "speed-h200": lambda: long_speed_table(128, "h200-128.json", "h200-parts.json"),
    "speed-h200-1024": lambda: long_speed_table(1024, "h200.json"),
    "operations": operations_table,
}


def fill(page: Path) -> str:
    """The page with each of its marked tables made anew. Raises UserError for an unknown one."""
    to_root = "../" * (len(page.relative_to(ROOT).parts) - 1)  # links are relative to the page

    def table(match: re.Match) -> str:
        start, name, end = match.groups()
        if name not in TABLES:
            raise UserError(f"{page}: no table is called {name}; there are {', '.join(TABLES)}")
        return f"{start}\n{TABLES[name]().replace('](', f']({to_root}')}\n{end}"

    return MARKED.sub(table, page.read_text())


def main() -> int:
    parser = OneLineParser(description="Write the tables of README.md and docs/ from results/.")
    parser.add_argument("--check", action="store_true", help="only say which are out of date")
    args = parser.parse_args()
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    stale = {page: text for page in pages if (text := fill(page)) != page.read_text()}
    for page, text in stale.items():
        if not args.check:
            with atomic_write(page) as temporary:
                temporary.write_text(text)
        print(f"{'out of date' if args.check else 'wrote'}: {page.relative_to(ROOT)}")
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    run_script(main)
