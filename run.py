"""A run in training: how far it has come, its folder, and what it shows of its progress.

train.py has the loop; this is the bookkeeping around it.
"""

import contextlib
import copy
import itertools
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import figures
from checkpoint import (
    check_progress,
    copy_into,
    damaged_run,
    layer_types,
    load_run,
    save_checkpoint,
)
from dataset import Dataset, fingerprints
from distributed import Processes
from evaluate import loss_and_accuracy
from model import AlexNet
from predict import Classifier, eval_batch_size
from recipes import CHANGEABLE, Config, record, run_name
from transforms import Augmentation, Mix, Preprocessing, stream_seed, training_batches
from utils import (
    DAMAGE_ERRORS,
    PRECISIONS,
    FolderLock,
    StopRequest,
    UserError,
    compile_network,
    count_of,
    duration,
    environment,
    finished_names,
    log,
    peak_memory_mib,
    remove_unfinished,
    seed_device,
    user_file,
    write_csv,
    write_json,
)

METRICS = ("epoch", "step", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
TIMING = ("epoch", "seconds", "images_per_second", "peak_memory_mib")


def quality(row: dict) -> tuple[float, float]:
    """Return what tells the best epoch: validation accuracy; of equal ones the lowest loss."""
    return row["val_accuracy"], -row["val_loss"]


class DivergedError(UserError):
    """A loss or weight has become NaN or infinite."""


class Run:
    """A network in training, how far it has come, and the folder that records it."""

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        dataset: Dataset,
        network: AlexNet,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        processes: Processes,
    ):
        self.dir, self.config, self.device, self.processes = run_dir, config, device, processes
        self.network, self.optimizer = network, optimizer
        self.quiet = not processes.is_main
        self.lock: FolderLock | None = None
        self.classes = dataset.classes
        images, augmentation = dataset.train.images, config.augmentation
        self.preprocessing = Preprocessing.fit(images, config.input, augmentation)
        self.augmentation = Augmentation.fit(augmentation, images)
        self.mix = Mix(config.mix, config.mix_probability, len(self.classes), config.seed)
        self.seen: Tensor | None = None  # fingerprints of the user's training and validation images
        if config.dataset == "folder":
            self.seen = torch.cat([fingerprints(x.images) for x in (dataset.train, dataset.val)])
        self.train_split = dataset.train.to(device)
        # With all images in training, none are left to choose by.
        self.val_split = dataset.val.to(device) if config.train_split == "train" else None
        self.steps_per_epoch = math.ceil(len(self.train_split.labels) / config.batch_size)
        self.total_steps = self.steps_per_epoch * config.epochs

        self.parallel = processes.parallel(network)
        self.compiled = self.parallel
        if config.compile:
            self.compiled = compile_network(self.parallel, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

        self.epoch = 0  # epochs finished
        self.step = 0  # steps done in the epoch under way
        self.stopped_by = 0  # the signal that a process got, once all of them know of it
        # This process's part of each step's mean loss, and its correct predictions, in the epoch
        # under way. Their sums over all processes are the whole batch's.
        self.losses = torch.zeros(self.steps_per_epoch, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.seconds = 0.0  # spent training in the epoch under way
        self.history: list[dict] = []
        self.best: dict | None = None  # the best network, until it is written to best.pt
        self.last_save = time.monotonic()
        self.progress = Progress(self)

    # --- The epoch under way ---

    @property
    def global_step(self) -> int:
        """Return the steps done in the whole run."""
        return self.epoch * self.steps_per_epoch + self.step

    @property
    def batch_images(self) -> int:
        """Return the images of this step, over all processes; an epoch's last batch is smaller."""
        return self.images_done(self.step + 1) - self.images_done(self.step)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the rest of the epoch: this process's images [B, 3, S, S] and labels [B].

        Images have the precision that conv1 takes: less to mix and to copy.
        """
        config = self.config
        for images, labels in training_batches(
            self.train_split,
            self.preprocessing,
            self.augmentation,
            config.batch_size,
            config.seed,
            self.epoch,
            self.step,
            self.processes.shard,
        ):
            yield images.to(PRECISIONS[config.precision]), labels

    def seed_step(self) -> None:
        """Seed torch's generators for this step and process."""
        position = self.global_step, self.processes.rank
        seed_device(self.device, stream_seed(self.config.seed, "step", *position))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits; only full batches go through the compiled network."""
        is_full = self.batch_images == self.images_done(1)  # others would be compiled anew
        return (self.compiled if is_full else self.parallel)(images)

    def images_done(self, step: int) -> int:
        """Return how many images of an epoch so many steps see."""
        return min(step * self.config.batch_size, len(self.train_split.labels))

    def record_step(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Note a step's loss and correct predictions on the device: reading them would wait.

        Of a mixed image the class with the larger part is correct.
        """
        labels = targets if targets.dim() == 1 else targets.argmax(1)
        self.losses[self.step] = loss
        self.correct += (logits.argmax(1) == labels).sum()

    def running_metrics(self) -> tuple[float, float]:
        """Return mean loss and accuracy of the epoch's images so far. Waits for the device."""
        images = self.images_done(self.step)
        losses = self.processes.all_reduce_sum(self.losses)[: self.step]
        losses = losses.cpu().double()  # not every GPU has float64
        weights = torch.full_like(losses, self.config.batch_size)
        weights[-1] = images - weights[:-1].sum()
        correct = self.processes.all_reduce_sum(self.correct)
        return (losses @ weights).item() / images, correct.item() / images

    def show_save_or_stop(self, stop: StopRequest) -> bool:
        """Show progress and save where it is time to; return whether a stop was requested.

        Processes have clocks and signals of their own, but must do the same.
        """
        self.progress.step()
        self.stopped_by, save_is_due, show_is_due = self.processes.all_reduce_max(
            stop.signal, self.is_save_due(), self.progress.is_due()
        )
        if show_is_due:
            self.check_losses()
            self.progress.show(*self.running_metrics())
        if self.stopped_by:
            self.progress.end_epoch()
        elif save_is_due:
            self.save()
            self.progress.clock = time.monotonic()  # saving is not training
        return bool(self.stopped_by)

    def finish_epoch(self, lr: float) -> None:
        """Validate, note the epoch in the run's folder, keep the best network, save if it is time.

        lr is the learning rate of the epoch's last step.
        """
        self.check_losses()
        self.progress.end_epoch()
        self.check_weights()
        val_loss, val_accuracy, is_best = None, None, True
        if self.val_split:
            val_loss, val_accuracy = self.validate()
            if not math.isfinite(val_loss):
                raise self.diverged(f"the validation loss became {val_loss}", self.step)
            best_before = max(map(quality, self.history), default=(-1.0, 0.0))
            is_best = (val_accuracy, -val_loss) > best_before
        train_loss, train_accuracy = self.running_metrics()
        self.epoch += 1
        row = {
            "epoch": self.epoch,
            "step": self.epoch * self.steps_per_epoch,
            "lr": lr,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "seconds": round(self.seconds, 2),
            "images_per_second": round(len(self.train_split.labels) / self.seconds, 1),
            "peak_memory_mib": peak_memory_mib(self.device),
        }
        self.history.append(row)
        self.step, self.seconds = 0, 0.0
        self.losses.zero_()
        self.correct.zero_()
        if self.processes.is_main:
            if is_best:
                self.best = copy.deepcopy(self.checkpoint())
            # metrics.csv last: an epoch that it has is complete, even if the run is killed here.
            write_csv(self.dir / "timing.csv", TIMING, self.history)
            write_csv(self.dir / "metrics.csv", METRICS, self.history)
        self.progress.log_epoch(row)
        guess = math.log(len(self.classes))
        if self.epoch == 1 and (train_loss if val_loss is None else val_loss) > 0.99 * guess:
            advice = "" if self.config.optimizer == "muon" else ", or --optimizer muon"
            self.log(
                f"the loss is still that of guessing, ln {len(self.classes)} = {guess:.2f}: if it "
                f"stays there, try more steps or another --lr{advice}"
            )
        [save_is_due] = self.processes.all_reduce_max(self.is_save_due())
        if save_is_due and self.epoch < self.config.epochs:
            self.save()

    def validate(self) -> tuple[float, float]:
        """Return loss and accuracy on the validation split, of which each process sees a shard."""
        shard = self.processes.shard
        logits = torch.zeros(len(self.val_split.labels), len(self.classes), device=self.device)
        batch_size = eval_batch_size(self.config.batch_size)
        precision = self.config.precision
        classifier = Classifier(
            self.network, self.classes, self.preprocessing, precision, batch_size, self.quiet
        )
        logits[shard] = classifier.logits(self.val_split.images[shard])
        logits = self.processes.all_reduce_sum(logits)
        return loss_and_accuracy(logits, self.val_split.labels)

    # --- Saving and resuming ---

    def checkpoint(self) -> dict:
        """Return what evaluate.py needs; the weights are the network's own, not a copy."""
        config = self.config
        return {
            "model": {
                "num_classes": len(self.classes),
                "groups": config.groups,
                "dropout": config.dropout,
            },
            "layers": layer_types(self.network),
            "weights": self.network.state_dict(),
            "classes": self.classes,
            "preprocessing": vars(self.preprocessing),
            "training": asdict(config),
            "epoch": self.epoch,
            **({} if self.seen is None else {"seen": self.seen}),
        }

    def is_save_due(self) -> bool:
        """Return whether this process's last save is longer ago than --save-every."""
        return time.monotonic() - self.last_save > 60 * self.config.save_every

    def save_best(self) -> None:
        """Write best.pt if there is a new best."""
        if self.best is not None and self.processes.is_main:
            save_checkpoint(self.dir / "best.pt", self.best)
            self.best = None

    def save(self) -> None:
        """Write best.pt if there is a new best, last.pt, and curves.png if an epoch is done.

        Called by all processes together. Raises UserError, and leaves last.pt as it was, if a loss
        or weight is NaN or infinite.
        """
        self.save_best()
        self.check_losses()
        self.check_weights()
        progress = {
            "step": self.step,
            "losses": self.processes.all_reduce_sum(self.losses),
            "correct": self.processes.all_reduce_sum(self.correct),
            "seconds": self.seconds,
            "history": self.history,
        }
        optimizer = {"state": self.optimizer.state_dict()["state"]}  # its settings are the run's
        if self.processes.is_main:
            content = {"optimizer": optimizer, "scaler": self.scaler.state_dict()}
            content |= {"progress": progress, **self.checkpoint()}
            save_checkpoint(self.dir / "last.pt", content)
            if self.history:  # drawn here, as an epoch may be no longer than the drawing
                title = f"{run_name(self.config)}, {count_of(self.config.epochs, 'epoch')}"
                is_mixed = self.mix.probability > 0
                curves = figures.learning_curves(self.history, title, is_mixed)
                figures.save_figure(curves, self.dir / "curves.png")
        self.last_save = time.monotonic()

    def load(self) -> None:
        """Go back to where last.pt was written. Raises UserError if it does not fit the run."""
        path = self.dir / "last.pt"
        content = load_run(path, self.network, asdict(self.config), CHANGEABLE)
        if self.seen is not None and not torch.equal(self.seen, content.get("seen", self.seen[:0])):
            raise UserError(
                f"the pictures in {self.config.data_dir} are not those that {path} was trained on; "
                "put them back, or start a new run, with --weights to go on from this one"
            )
        try:
            self.restore(content)
        except DAMAGE_ERRORS as error:
            raise damaged_run(path, error) from error
        epochs, before = self.config.epochs, content["training"]["epochs"]
        if self.epoch > epochs:
            raise UserError(
                f"--epochs {epochs} is less than the {self.epoch} that {self.dir} already has; "
                f"give at least {self.epoch}"
            )
        if epochs != before and self.config.schedule == "cosine":
            self.log(
                f"{epochs} epochs instead of {before}: from here the learning rate is that of "
                "the new length"
            )

    def restore(self, content: dict) -> None:
        """Take what save() wrote. Raises one of DAMAGE_ERRORS for what does not fit the run."""
        validated = self.val_split is not None
        check_progress(content, self.steps_per_epoch, (*METRICS, *TIMING), validated)
        with torch.no_grad():
            copy_into(self.network.state_dict(), content["weights"])
            copy_into(self.optimizer.state_dict()["state"], content["optimizer"]["state"])
        if content["scaler"].keys() != self.scaler.state_dict().keys():
            raise ValueError("the state of its loss scale is not complete")
        self.scaler.load_state_dict(content["scaler"])
        progress = content["progress"]
        self.epoch, self.step = content["epoch"], progress["step"]
        self.seconds, self.history = progress["seconds"], progress["history"]
        if self.processes.is_main:  # these are the sums over all processes
            self.losses.copy_(progress["losses"])
            self.correct.copy_(progress["correct"])

    # --- Divergence ---

    def check_losses(self) -> None:
        """Raise DivergedError if a loss of this epoch is NaN or infinite. Waits for the device."""
        losses = self.processes.all_reduce_sum(self.losses)[: self.step]
        wrong = (~losses.isfinite()).nonzero()
        if len(wrong):
            step = wrong[0].item()
            raise self.diverged(f"the loss became {losses[step].item()}", step + 1)

    def check_weights(self) -> None:
        """Raise DivergedError if a weight is NaN or infinite. Waits for the device."""
        if not all(weight.isfinite().all() for weight in self.network.parameters()):
            raise self.diverged("a weight became NaN or infinite", self.step)

    def diverged(self, what: str, step: int) -> DivergedError:
        """Return the error that ends a run gone wrong: where, what to try, what is left."""
        kept = f"{self.dir / 'last.pt'}"
        if self.history:  # best.pt is written when the run ends, if not before
            kept += f" and {self.dir / 'best.pt'}"
        fp32 = "" if self.config.precision == "fp32" else ", or --precision fp32"
        return DivergedError(
            f"{what} in epoch {self.epoch + 1}, step {step}; start a new run with a lower --lr "
            f"than {self.config.lr:g}{fp32}. Kept from before: {kept}"
        )

    # --- The folder ---

    def log(self, text: str) -> None:
        """Print a line, once for all processes."""
        if not self.quiet:
            log(text)

    def open_folder(self, output_dir: Path | None, resume: Path | None, starts: list) -> None:
        """Make the run's folder, or load what is in it, and keep other processes out of it."""
        on_main = self.processes.broadcast_from_main
        if not resume:
            self.dir = on_main(lambda: make_run_dir(self.config, output_dir))
        if self.processes.is_main:
            self.lock = FolderLock(self.dir)
            if output_dir and not resume:
                check_output_dir(output_dir)  # another run may have come and gone
            remove_unfinished(self.dir)
        if resume:
            self.load()
        else:
            self.save()  # a run can be resumed whenever it ends
        position = [self.epoch, self.step]
        if self.processes.all_reduce_max(*position) != position:
            raise UserError(f"{self.dir} is not the same for all processes; is the folder shared?")
        if self.processes.is_main and self.epoch < self.config.epochs:
            content = record(self.config, [*starts, environment(self.device)])
            write_json(self.dir / "config.json", content)

    def close(self) -> None:
        """Close the progress bar, and let another process write to the run's folder."""
        self.progress.bar.close()
        if self.lock:
            self.lock.release()


def check_output_dir(output_dir: Path) -> None:
    """Raise UserError if a folder for a new run is taken or cannot be written to."""
    with user_file("use the folder", output_dir):
        if output_dir.exists() and (not output_dir.is_dir() or finished_names(output_dir)):
            raise UserError(
                f"--output-dir {output_dir} is not empty; go on with a run in it by "
                f"--resume {output_dir}, or name another folder"
            )
        folder = output_dir.absolute()
        parent = next(path for path in (folder, *folder.parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"cannot write to {output_dir}: {parent} is not a writable folder")


def make_run_dir(config: Config, output_dir: Path | None) -> Path:
    """Make the folder for a new run: output_dir, or runs/DATASET-RECIPE with a number if taken."""
    name = f"{config.dataset}-{config.recipe}"
    with user_file("make the folder", output_dir or f"runs/{name}"):
        if output_dir:
            output_dir.mkdir(parents=True, exist_ok=True)
            return output_dir
        Path("runs").mkdir(exist_ok=True)
        for i in itertools.count(1):
            run_dir = Path("runs", name if i == 1 else f"{name}-{i}")
            with contextlib.suppress(FileExistsError):
                run_dir.mkdir()
                return run_dir


# --- Progress ---


class Progress:
    """Show how a run goes: a bar on a terminal, a line a minute elsewhere; and the time left."""

    WARM_UP_STEPS = 2  # slow ones at the start, which the estimate leaves out
    FIRST_ESTIMATE = 8  # steps after which the time left is told for the first time

    def __init__(self, run: Run):
        self.run = run
        self.steps, self.timed_seconds = 0, 0.0
        self.mixed = " of mixed images" if run.mix.probability > 0 else ""
        self.bar = tqdm(disable=True)
        self.last_shown = time.monotonic()

    def start_epoch(self) -> None:
        """Open a bar, and start the clock."""
        run = self.run
        self.bar = tqdm(
            desc=f"epoch {run.epoch + 1}/{run.config.epochs}",
            initial=run.images_done(run.step),
            total=len(run.train_split.labels),
            unit="image",
            leave=False,
            disable=True if run.quiet else None,
        )
        self.interval = 60.0 if self.bar.disable else 1.0  # seconds
        self.clock = time.monotonic()

    def end_epoch(self) -> None:
        """Add the time that the device needed to finish its steps, and close the bar."""
        self.run.seconds += time.monotonic() - self.clock
        self.bar.close()

    def step(self) -> None:
        """Count a step."""
        now = time.monotonic()
        self.run.seconds += now - self.clock
        self.steps += 1
        if self.steps > self.WARM_UP_STEPS:
            self.timed_seconds += now - self.clock
        self.clock = now
        self.bar.update(self.run.images_done(self.run.step) - self.bar.n)

    def is_due(self) -> bool:
        """Return whether it is time to show something, which has to wait for the device."""
        is_first = self.steps == self.FIRST_ESTIMATE
        is_late = time.monotonic() - self.last_shown > self.interval
        return not self.run.quiet and (is_first or is_late)

    def show(self, loss: float, accuracy: float) -> None:
        """Show mean loss and accuracy of the epoch so far and the time left."""
        run = self.run
        text = f"loss {loss:.4f}, accuracy {accuracy:.2%}{self.mixed}{self.time_left()}"
        if self.bar.disable:
            position = f"step {run.step}/{run.steps_per_epoch}"
            run.log(f"epoch {run.epoch + 1}/{run.config.epochs}, {position}: training {text}")
        else:
            self.bar.set_postfix_str(text)
        is_slow = run.config.optimizer == "sgd" and self.seconds_left() > 3600
        if self.steps == self.FIRST_ESTIMATE and is_slow:
            with self.bar.external_write_mode():
                run.log("quicker: --optimizer muon, fewer --epochs, --dataset shapes, or a GPU")
        self.last_shown = time.monotonic()

    def log_epoch(self, row: dict) -> None:
        """Print a line about an epoch that is done."""
        text = f"loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.2%}{self.mixed}"
        if row["val_loss"] is not None:
            text += f"; validation loss {row['val_loss']:.4f}, accuracy {row['val_accuracy']:.2%}"
        speed = f"{row['images_per_second']:,.0f} images/s{self.time_left()}"
        self.run.log(f"epoch {row['epoch']}/{self.run.config.epochs}: training {text}; {speed}")

    def time_left(self) -> str:
        """Return the time left for people, or nothing if it is unknown."""
        seconds = self.seconds_left()
        return f"; about {duration(seconds)} left" if seconds >= 1 else ""

    def seconds_left(self) -> float:
        """Return an estimate from all steps since the start; 0 after the first few."""
        run = self.run
        timed_steps = max(1, self.steps - self.WARM_UP_STEPS)
        return (run.total_steps - run.global_step) * self.timed_seconds / timed_steps
