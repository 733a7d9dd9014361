"""Write the tables of README.md and docs/ from results/: python -m research.tables [--check]

A table stands between the lines <!-- table NAME --> and <!-- end -->, NAME being one of TABLES.
"""

import itertools
import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

from figures import read_history
from research.figures import speed_name
from utils import OneLineParser, UserError, atomic_write, count_of, read_csv, run_script

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
MARKED = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.S)
# Folders in results/, and the command that does the same today, but for the seed. The tables have
# them in this order.
ON_CIFAR10 = {
    "cifar10-sgd": "python train.py --compile",
    "cifar10-muon": "python train.py --optimizer muon",
    "cifar10-adam-16-epochs": "python train.py --optimizer adam --epochs 16",
    "cifar10-adam": "python train.py --optimizer adam",
    "cifar10-adam-seed-1": "python train.py --optimizer adam",
    "cifar10-paper-3-epochs": "python train.py --recipe paper --epochs 3",
}
IN_README = {k: v for k, v in ON_CIFAR10.items() if not k.endswith("16-epochs")}
ON_SHAPES = {
    f"shapes-{recipe}": f"python train.py --dataset shapes --recipe {recipe}"
    for recipe in ("sgd", "muon", "adam", "paper")
}
FOLDER = "python train.py --dataset folder --data-dir photos --optimizer muon"
ON_PHOTOS = {
    "photos-muon": FOLDER,
    "photos-muon-pretrained": f"{FOLDER} --weights weights/cifar10.pt",
}
MARK = "¹"
NOTE = (
    f"\n{MARK} Trained with PyTorch's dropout, at an earlier commit; the command has the paper's.\n"
)
MILESTONES = (0.7, 0.8, 0.85, 0.9, 0.93, 0.94, 0.95)  # validation accuracies
RATE_COLUMNS = ("textbook (images/s)", "this repository (images/s)", "times as fast (range)")


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown, a line for each row."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# --- Accuracy ---


def read_run(folder: str, command: str) -> dict:
    """Return what the tables need of a run of train.py that evaluate.py tested.

    command: does the same today, but for the seed.
    """
    path = RESULTS / folder
    record = json.loads((path / "config.json").read_text())
    settings = record["settings"]
    # Before the rebuild there were more settings, "ema" too, and at first PyTorch's dropout only.
    is_inverted = "ema" in settings and settings.get("dropout_scaling", "training") == "training"
    history = read_history(path)
    device = re.sub(r"\(R\)| Processor| @ [\d.]+GHz", "", record["starts"][0]["device"])
    return {
        "folder": f"results/{folder}",
        "command": f"`{command}`",
        "mark": MARK if is_inverted else "",
        "seed": str(settings["seed"]),
        "hardware": f"{device}, {settings['precision']}",
        "history": history,
        "minutes": history[-1]["minutes"],
        "validation": max(row["val_accuracy"] for row in history),
        "test": json.loads((path / "test.json").read_text()),
    }


def experiments(commands: dict[str, str]) -> list[list[dict]]:
    """Return the runs in this order; those that differ by their seed are together."""
    groups = {}
    for run in itertools.starmap(read_run, commands.items()):
        key = run["command"], run["mark"], run["hardware"]
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def percent(shares: list[float]) -> str:
    """Return shares (0..1) as mean ± standard deviation; fewer than three as they are."""
    if len(shares) < 3:
        return ", ".join(f"{share:.1%}" for share in shares)
    return f"{statistics.mean(shares):.1%} ± {100 * statistics.stdev(shares):.1f}"


def accuracy_with_interval(runs: list[dict]) -> str:
    """Return the test accuracy, of a single run with its 95% interval."""
    text = percent([run["test"]["accuracy"] for run in runs])
    if len(runs) == 1:
        text += " ({:.1%} to {:.1%})".format(*runs[0]["test"]["interval_95"])
    return text


def training_time(runs: list[dict]) -> str:
    """Return epochs and minutes, from the shortest run to the longest.

    No mean, as machines of one name differ by a factor of two.
    """
    minutes = sorted(run["minutes"] for run in runs)
    span = dict.fromkeys(f"{value:.3g}" for value in (minutes[0], minutes[-1]))
    return f"{count_of(len(runs[0]['history']), 'epoch')}, {' to '.join(span)} min"


def with_note(table: str) -> str:
    """Return a table with the note that its marks refer to."""
    return table + (NOTE if MARK in table else "")


def short_results_table(commands: dict[str, str]) -> str:
    rows = []
    for runs in experiments(commands):
        recipe = f"[{runs[0]['command']}]({runs[0]['folder']}){runs[0]['mark']}"
        rows.append(
            [recipe, accuracy_with_interval(runs), training_time(runs), runs[0]["hardware"]]
        )
    return with_note(markdown(["recipe", "test accuracy", "training time", "hardware"], rows))


def results_table() -> str:
    rows = []
    for runs in experiments(ON_CIFAR10):
        tests = [run["test"] for run in runs]
        seeds = ", ".join(f"[{run['seed']}]({run['folder']})" for run in runs)
        cells = [runs[0]["command"] + runs[0]["mark"], seeds]
        cells += [percent([run["validation"] for run in runs]), accuracy_with_interval(runs)]
        ten_views = [test["ten_views"]["accuracy"] for test in tests if "ten_views" in test]
        cells.append(percent(ten_views))
        cells.append(percent([test["calibration_error"] for test in tests]))
        rows.append([*cells, training_time(runs), runs[0]["hardware"]])
    header = ["command", "seeds", "validation", "test", "ten views", "calibration error"]
    return with_note(markdown([*header, "training", "hardware"], rows))


def time_table() -> str:
    """Return the training time after which an epoch's validation accuracy first was so high.

    Runs that reached none of MILESTONES are left out.
    """
    rows = []
    for run in (run for runs in experiments(ON_CIFAR10) for run in runs):
        times = [time_to(milestone, run["history"]) for milestone in MILESTONES]
        if any(times):
            rows.append([run["command"] + run["mark"], run["seed"], run["hardware"], *times])
    header = ["command", "seed", "hardware", *(f"{milestone:.0%}" for milestone in MILESTONES)]
    return with_note(markdown(header, rows))


def time_to(accuracy: float, history: list[dict]) -> str:
    """Return the training time to the first epoch that reaches it; nothing if none does."""
    for row in history:
        if row["val_accuracy"] >= accuracy:
            minutes = row["minutes"]
            return f"{60 * minutes:.0f} s" if minutes < 2 else f"{minutes:.3g} min"
    return ""


def tried_table() -> str:
    """Return the runs of results/tried.csv on all training images of CIFAR-10."""
    rows = [
        [
            row["recipe"],
            row["setting"],
            row["epochs"],
            f"{float(row['val_accuracy']):.1%}" if row["val_accuracy"] else "",
            f"{float(row['val_loss']):.3f}" if row["val_loss"] else "",
            row["verdict"],
        ]
        for row in read_csv(RESULTS / "tried.csv")
        if row["images"] == "45,000"
    ]
    header = ["recipe", "other than the recipe", "epochs", "accuracy", "loss", ""]
    return markdown(header, rows)


# --- Speed ---


def speed_rows(*files: str) -> list[tuple[dict, dict]]:
    """Return the textbook's row and ours for all that was measured at batch 128 in these files."""
    rows = []
    for file in files:
        rows += json.loads((RESULTS / "speed" / file).read_text())["rows"]
    rows = [row for row in rows if row["batch_size"] == 128]
    textbook = {row["part"]: row for row in rows if row["side"] == "textbook"}
    parts = ("loop", "step", "inference", "lrn", "pipeline")
    ours = [row for row in rows if row["part"] in parts and row["side"] != "textbook"]
    ours.sort(key=lambda row: parts.index(row["part"]))
    return [(textbook[row["part"]], row) for row in ours]


def rates(textbook: dict, ours: dict) -> list[str]:
    """Return images per second of both, and how many times as fast this repository is."""
    speeds = [f"{row['images_per_second'][0]:,.0f}" for row in (textbook, ours)]
    return [*speeds, "{:.1f} ({:.1f} to {:.1f})".format(*ours["times_the_textbook"])]


def short_speed_table() -> str:
    """Return a row for each part, in the precision that train.py chooses on that CPU."""
    chosen = {}
    for textbook, ours in speed_rows("cpu.json"):
        if ours["part"] != "pipeline" and ours["side"] != "compiled":
            chosen[ours["part"]] = [speed_name(ours), *rates(textbook, ours)]  # 16 bits come last
    return markdown(["", *RATE_COLUMNS], chosen.values())


def speed_table(*files: str) -> str:
    """Return every row, with the share of the machine's matrix-multiply peak."""
    rows = []
    for textbook, ours in speed_rows(*files):
        share = ours.get("share_of_peak")
        shares = "{:.0%} ({:.0%} to {:.0%})".format(*share) if share else ""
        rows.append([speed_name(ours), *rates(textbook, ours), shares])
    return markdown(["", *RATE_COLUMNS, "of the peak"], rows)


# --- The script ---

TABLES = {
    "results-short": lambda: short_results_table(IN_README),
    "results": results_table,
    "shapes": lambda: short_results_table(ON_SHAPES),
    "photos": lambda: short_results_table(ON_PHOTOS),
    "time": time_table,
    "tried": tried_table,
    "speed": short_speed_table,
    "speed-cpu": lambda: speed_table("cpu.json"),
    "speed-h200": lambda: speed_table("h200-128.json", "h200-parts.json"),
}


def fill(page: Path) -> str:
    """Return the page with each of its marked tables made anew.

    Raises UserError for an unknown table.
    """
    to_root = "../" * (len(page.relative_to(ROOT).parts) - 1)  # links are relative to the page

    def table(match: re.Match) -> str:
        start, name, end = match.groups()
        if name not in TABLES:
            raise UserError(f"{page}: no table is called {name}; there are {', '.join(TABLES)}")
        return f"{start}\n{TABLES[name]().replace('](', f']({to_root}')}\n{end}"

    return MARKED.sub(table, page.read_text())


def main() -> int:
    parser = OneLineParser(
        prog="python -m research.tables",
        description="Write the tables of README.md and docs/ from results/.",
    )
    parser.add_argument("--check", action="store_true", help="only name the pages out of date")
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
