"""Trains AlexNet: python train.py [--recipe paper] [--dataset shapes] [--resume RUN_DIR]

On several GPUs torchrun starts a process for each: torchrun --nproc_per_node=4 train.py

Each run has a folder: config.json, metrics.csv, timing.csv, curves.png, last.pt (what
--resume needs besides config.json) and best.pt (the best on the validation split, for evaluate.py).
"""

import contextlib
import copy
import itertools
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import figures
from checkpoint import (
    check_dicts,
    check_progress,
    fitting_state,
    fitting_tensor,
    load_network,
    save_checkpoint,
)
from dataset import (
    DEFAULT_DATA_DIR,
    Augmentation,
    Dataset,
    Preprocessing,
    combine_seeds,
    in_fast_layout,
    load_dataset,
    stratified_subset,
    training_batches,
)
from evaluate import loss_and_accuracy, predict
from model import CHOICES, AlexNet
from parallel import Processes, is_connection_lost
from recipes import (
    BEFORE,
    CHANGEABLE,
    MIXES,
    OPTIMIZERS,
    make_parser,
    new_config,
    resumed_config,
    run_name,
)
from utils import (
    DAMAGE_ERRORS,
    FolderLock,
    StopRequest,
    UserError,
    autocast,
    command_line,
    compiled,
    device_name,
    environment,
    finished_names,
    first_line,
    is_compiler_error,
    keep_freed_memory,
    make_deterministic,
    peak_memory_mib,
    remove_unfinished,
    run_script,
    say,
    seed_device,
    select_precision,
    write_csv,
    write_json,
)

PATIENCE = 5  # epochs; the paper does not say how long its authors watched
DIVISIONS = 3  # paper §5: the learning rate was "reduced three times prior to termination"

METRICS = ("epoch", "step", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
TIMING = ("epoch", "seconds", "images_per_second", "peak_memory_mib")


# ---------------------------------------------------------------------------------------------
# Learning: rate, optimizer, mixed images, average of the weights
# ---------------------------------------------------------------------------------------------


def learning_rate(step: int, total_steps: int, peak: float, warm_up: float) -> float:
    """Rises linearly to peak over a share warm_up of the steps, then falls to 0 as a half cosine.

    step counts from 0. With a warm-up of 0.3 it is one cycle (Smith 2018, arXiv 1803.09820), but
    for the momentum, which stays.
    """
    warm_up_steps = max(1, round(warm_up * total_steps))
    if step < warm_up_steps:
        return peak * (step + 1) / warm_up_steps
    progress = (step - warm_up_steps) / max(1, total_steps - warm_up_steps)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def plateau_rate(val_accuracies: list[float], start: float) -> float:
    """The learning rate after epochs with these validation accuracies (paper §5).

    It begins at start and is divided by 10 when PATIENCE epochs in a row have brought no new best,
    DIVISIONS times at most.
    """
    best, waited, divisions = -1.0, 0, 0
    for accuracy in val_accuracies:
        waited = 0 if accuracy > best else waited + 1
        best = max(best, accuracy)
        if waited == PATIENCE and divisions < DIVISIONS:
            divisions, waited = divisions + 1, 0
    return start / 10**divisions


def make_optimizer(network: AlexNet, config: dict) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW; biases have a learning rate and a weight decay of their own.

    SGD's step is b <- m b + (g + d w), w <- w - r b, with gradient g, momentum m, weight decay d
    and learning rate r. The paper's (§5) is v <- m v - r d w - r g, w <- w + v. They are the same,
    with v = -r b, while r is constant; after a change of r the paper's v still holds the old r.
    """
    names = config.keys() & {"lr", "weight_decay", "momentum", "nesterov"}
    settings = {name: config[name] for name in names}
    kind = OPTIMIZERS[config["optimizer"]]
    # Fused: one operation for all weights.
    return kind(parameter_groups(network, config), fused=True, **settings)


def parameter_groups(network: AlexNet, config: dict) -> list[dict]:
    """The optimizer's groups: weights, and biases with a weight decay of their own.

    lr_factor is what the learning rate is to be multiplied by. One group if biases have none.
    """
    lr_factor, decay_factor = config["bias_lr_factor"], config["bias_decay_factor"]
    parameters = list(network.parameters())
    if lr_factor == decay_factor == 1:
        return [{"params": parameters, "lr_factor": 1.0}]
    weights = [parameter for parameter in parameters if parameter.dim() > 1]
    biases = [parameter for parameter in parameters if parameter.dim() == 1]
    decay = decay_factor * config["weight_decay"]
    return [
        {"params": weights, "lr_factor": 1.0},
        {"params": biases, "lr_factor": lr_factor, "weight_decay": decay},
    ]


def make_mix(config: dict, num_classes: int) -> Callable | None:
    """What mixes a batch's images [N, 3, S, S] and labels [N], which become [N, classes].

    None if they are not mixed.
    """
    kind = MIXES[config["mix"]]
    return kind(num_classes=num_classes) if kind else None


def update_average(average: AlexNet, network: AlexNet, decay: float, step: int) -> None:
    """Moves the averaged weights towards the network's; step counts from 0.

    At first it keeps less of itself, (1 + step) / (10 + step), or the initial weights would stay in
    it for longer than a short run has steps (as in TensorFlow's tf.train.ExponentialMovingAverage).
    No step waits for a GPU, as it would with torch.optim.swa_utils.AveragedModel.
    """
    keep = min(decay, (1 + step) / (10 + step))
    get_ema_multi_avg_fn(keep)(list(average.parameters()), list(network.parameters()), None)


def make_network(config: dict, num_classes: int) -> AlexNet:
    """The network with a run's switches and initial weights."""
    switches = {name: config[name] for name in ("dropout", *CHOICES)}
    return AlexNet.from_seed(config["seed"], config["init"], num_classes=num_classes, **switches)


# ---------------------------------------------------------------------------------------------
# A run: everything that changes while it trains, and its folder
# ---------------------------------------------------------------------------------------------


def make_run_dir(config: dict, output_dir: Path | None) -> Path:
    """Makes the folder for a new run. Raises UserError if that cannot be done."""
    while True:
        run_dir = free_run_dir(config, output_dir)
        try:
            run_dir.mkdir(parents=True, exist_ok=run_dir == output_dir)
            return run_dir
        except OSError as error:
            if output_dir is None and run_dir.exists():
                continue  # another run has just taken the name
            raise UserError(f"cannot make the folder {run_dir}: {error.strerror}") from None


def free_run_dir(config: dict, output_dir: Path | None) -> Path:
    """The folder for a new run, not yet made. Raises UserError if output_dir is taken."""
    if output_dir is None:
        recipe, optimizer = config["recipe"], config["optimizer"]
        name = f"{config['dataset']}-{optimizer if recipe == 'modern' else recipe}"
        names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
        return next(path for path in (Path("runs", each) for each in names) if not path.exists())
    if output_dir.exists() and (not output_dir.is_dir() or finished_names(output_dir)):
        raise UserError(
            f"--output-dir {output_dir} is not empty; go on with a run in it by "
            f"--resume {output_dir}, or name another folder"
        )
    place = output_dir.absolute()
    there = next(path for path in (place, *place.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"cannot write to {output_dir}: {there} is not a writable folder")
    return output_dir


class DivergedError(UserError):
    """A loss or weight has become NaN or infinite."""


class Run:
    """A network in training, how far it has come, and the folder that records it."""

    def __init__(
        self,
        run_dir: Path,
        config: dict,
        dataset: Dataset,
        device: torch.device,
        processes: Processes,
    ):
        self.dir, self.config, self.device, self.processes = run_dir, config, device, processes
        self.lock: FolderLock | None = None
        self.tensorboard = None  # opened with the folder, if asked for
        self.classes = dataset.classes
        images, augmentation = dataset.train.images, config["augmentation"]
        self.preprocessing = Preprocessing.of(images, config["input"], augmentation)
        self.augmentation = Augmentation.of(augmentation, images)
        self.train_split = dataset.train.to(device)
        # With all images in training, none are left to choose by.
        self.val_split = dataset.val.to(device) if config["train_split"] == "train" else None
        self.steps_per_epoch = math.ceil(len(self.train_split.labels) / config["batch_size"])
        self.total_steps = self.steps_per_epoch * config["epochs"]
        self.network = make_network(config, len(self.classes))
        # A pixel's channels side by side in memory are faster.
        self.network.to(device, memory_format=torch.channels_last)
        self.parallel = processes.parallel(self.network)
        self.compiled = compiled(self.parallel, device) if config["compile"] else self.parallel
        self.optimizer = make_optimizer(self.network, config)
        self.mix = make_mix(config, len(self.classes))
        # The exponential moving average of the weights.
        self.average = copy.deepcopy(self.network) if config["ema"] else None

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
        self.told_time = False  # whether the user knows how long the run will take

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.processes.rank == 0

    @property
    def evaluated(self) -> AlexNet:
        """The network that is validated and kept: the one in training, or its average."""
        return self.network if self.average is None else self.average

    def say(self, text: str) -> None:
        """Prints a line, once for all processes."""
        if self.is_first:
            say(text)

    def close(self) -> None:
        """Lets another process write to the run's folder."""
        if self.tensorboard:
            self.tensorboard.close()
        if self.lock:
            self.lock.release()

    def checkpoint(self) -> dict:
        """What evaluate.py needs of the network; its weights go on changing with the network."""
        return {
            "model": self.network.config,
            "weights": self.evaluated.state_dict(),
            "classes": self.classes,
            "preprocessing": vars(self.preprocessing),
            "training": self.config,
            "epoch": self.epoch,
        }

    def keep_best(self) -> None:
        """Remembers the network as it is now as the best so far."""
        self.best = copy.deepcopy(self.checkpoint())

    def save_best(self) -> None:
        """Writes best.pt if there is a new best."""
        if self.best is not None and self.is_first:
            save_checkpoint(self.dir / "best.pt", self.best)
            self.best = None

    def save(self) -> None:
        """Writes best.pt if there is a new best, last.pt, and curves.png if an epoch is done.

        Called by all processes together.

        Raises UserError, and leaves last.pt as it was, if a loss or weight is NaN or infinite.
        """
        self.save_best()
        self.check_losses()
        self.check_weights()
        progress = {
            "step": self.step,
            "losses": self.processes.sum(self.losses),
            "correct": self.processes.sum(self.correct),
            "seconds": self.seconds,
            "history": self.history,
        }
        optimizer = {"state": self.optimizer.state_dict()["state"]}  # its settings are the run's
        content = {**self.checkpoint(), "optimizer": optimizer, "progress": progress}
        if self.average:
            content["weights_in_training"] = self.network.state_dict()
        if self.is_first:
            save_checkpoint(self.dir / "last.pt", content)
            if self.history:  # drawn here, as an epoch may be no longer than the drawing
                title = f"{run_name(self.config)}, {self.config['epochs']} epochs"
                curves = figures.learning_curves(self.history, title)
                figures.save_figure(curves, self.dir / "curves.png")
        self.last_save = time.monotonic()

    def is_save_due(self) -> bool:
        """Whether the last save is longer ago than --save-every."""
        return time.monotonic() - self.last_save > 60 * self.config["save_every"]

    def check_weights(self) -> None:
        """Raises UserError if a weight is NaN or infinite. Waits for the device."""
        if not all(weight.isfinite().all() for weight in self.network.parameters()):
            raise self.diverged("a weight became NaN or infinite", self.step)

    def check_losses(self) -> None:
        """Raises UserError if a loss of this epoch is NaN or infinite. Waits for the device."""
        losses = self.processes.sum(self.losses)[: self.step]
        wrong = (~losses.isfinite()).nonzero()
        if len(wrong):
            step = wrong[0].item()
            raise self.diverged(f"the loss became {losses[step].item()}", step + 1)

    def diverged(self, what: str, step: int) -> DivergedError:
        """The error that ends a run gone wrong: where, what to try, what is left."""
        last, best = self.dir / "last.pt", self.dir / "best.pt"
        kept = [str(last)] if last.exists() else []
        kept += [str(best)] if self.history else []  # written when the run ends, if not before
        fp32 = "" if self.config["precision"] == "fp32" else ", or --precision fp32"
        return DivergedError(
            f"{what} in epoch {self.epoch + 1}, step {step}; start a new run with a lower --lr "
            f"than {self.config['lr']:g}{fp32}. "
            f"Kept from before: {' and '.join(kept) or 'nothing, no epoch was finished'}"
        )

    def load(self) -> None:
        """Goes back to where last.pt was written. Raises UserError if it does not fit the run."""
        path = self.dir / "last.pt"
        network, _, content = load_network(path)
        recorded = content["training"]
        for name in self.config | recorded:
            found, value = recorded.get(name, BEFORE.get(name)), self.config.get(name)
            if name not in CHANGEABLE and found != value:
                raise UserError(
                    f"{path} is not of this run: its {name!a:.40} is not {value}; "
                    "put back the run's own, or start a new run"
                )
        try:
            self.restore(network, content)
        except DAMAGE_ERRORS as error:
            raise UserError(
                f"{path} cannot be resumed from ({first_line(error)}); start a new run"
            ) from None
        epochs, before = self.config["epochs"], recorded["epochs"]
        if self.epoch > epochs:
            raise UserError(
                f"--epochs {epochs} is less than the {self.epoch} that {self.dir} already has; "
                f"give at least {self.epoch}"
            )
        follow = ["the learning rate"] if self.config["schedule"] == "cosine" else []
        follow += ["the growth of augmentation"] if self.config["augmentation_ramp"] else []
        follow += ["the end of mixing"] if self.config["mix_off"] else []
        if epochs != before and follow:
            self.say(
                f"{epochs} epochs instead of {before}: "
                f"from here {' and '.join(follow)} will be as for the new length"
            )

    def restore(self, network: AlexNet, content: dict) -> None:
        """Takes what save() wrote. Raises one of DAMAGE_ERRORS for what does not fit the run."""
        validated = self.val_split is not None
        check_progress(content, self.steps_per_epoch, (*METRICS, *TIMING), validated)
        self.evaluated.load_state_dict(network.state_dict())
        if self.average:
            check_dicts(content, "weights_in_training")
            for name, weight in self.network.state_dict().items():
                weight.copy_(fitting_tensor(content["weights_in_training"][name], weight))
        settings = self.optimizer.state_dict()["param_groups"]
        state = fitting_state(content["optimizer"]["state"], self.optimizer)
        self.optimizer.load_state_dict({"state": state, "param_groups": settings})
        progress = content["progress"]
        self.epoch, self.step = content["epoch"], progress["step"]
        self.seconds, self.history = progress["seconds"], progress["history"]
        if self.is_first:  # these are the sums over all processes
            self.losses.copy_(progress["losses"])
            self.correct.copy_(progress["correct"])

    def write_config(self, earlier_starts: list) -> None:
        """Writes config.json: the settings, and what the run was started and resumed with."""
        starts = [*earlier_starts, environment(self.device)]
        content = {"settings": self.config, "starts": starts}
        write_json(self.dir / "config.json", content)

    def write_history(self) -> None:
        """Writes metrics.csv and timing.csv from the first epoch to the last.

        TensorBoard, if asked for, gets the last.
        """
        # metrics.csv last: an epoch that it has is all there, even if the run is killed here.
        for name, columns in (("timing.csv", TIMING), ("metrics.csv", METRICS)):
            write_csv(self.dir / name, columns, self.history)
        if self.tensorboard:
            row = self.history[-1]
            for name, value in row.items():
                if name not in ("epoch", "step") and value is not None:
                    self.tensorboard.add_scalar(name, value, row["epoch"])
            self.tensorboard.flush()


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def rate_now(run: Run, global_step: int) -> float:
    """The weights' learning rate at this step of the whole run."""
    if run.config["schedule"] == "plateau":
        return plateau_rate([row["val_accuracy"] for row in run.history], run.config["lr"])
    return learning_rate(global_step, run.total_steps, run.config["lr"], run.config["warm_up"])


def augmentation_now(run: Run) -> Augmentation:
    """The augmentation of the epoch under way: it may grow over the first epochs."""
    growing_epochs = run.config["augmentation_ramp"] * run.config["epochs"]
    if run.epoch >= growing_epochs:
        return run.augmentation
    return run.augmentation.at(run.epoch / growing_epochs)


def is_mixed(run: Run, global_step: int) -> bool:
    """Whether the batch of this step of the whole run is mixed; the same for all processes."""
    config = run.config
    if not run.mix or global_step >= (1 - config["mix_off"]) * run.total_steps:
        return False
    generator = np.random.default_rng([config["seed"], global_step])
    return generator.random() < config["mix_probability"]


def train_step(run: Run, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """One step of gradient descent, with this process's share of the batch.

    Returns the share's part of the mean loss over the batch, and its number of correct predictions.
    """
    global_step = run.epoch * run.steps_per_epoch + run.step
    batch_images = images_done(run, run.step + 1) - images_done(run, run.step)
    rate = rate_now(run, global_step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
    # Dropout depends on seed, step and process, so that a resumed run draws what it would have.
    seed_device(run.device, combine_seeds(run.config["seed"], global_step, run.processes.rank))
    if run.config["precision"] == "bf16":
        images = images.bfloat16()  # as conv1 takes them: less to mix and to copy
    if len(labels) > 1 and is_mixed(run, global_step):  # an image alone has no partner
        images, targets = run.mix(images, labels)
        images = in_fast_layout(images)
        labels = targets.argmax(1)  # of the image that there is more of
    else:
        targets = labels
    # The epoch's last, smaller batch would be compiled anew.
    network = run.compiled if batch_images == images_done(run, 1) else run.parallel
    with autocast(run.device, run.config["precision"]):
        logits = network(images)
    if logits.dtype == torch.bfloat16:
        logits = logits.float()  # or the loss of each image would be rounded to bf16
    smoothing = run.config["label_smoothing"]
    loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    loss = loss / batch_images  # not of these images alone, which may be a process's share
    (loss * run.processes.count).backward()  # the parallel network divides by it
    run.optimizer.step()
    # To None, not 0: with --compile the next step overwrites the memory that they lie in.
    run.optimizer.zero_grad()
    if run.average:
        update_average(run.average, run.network, run.config["ema"], global_step)
    return loss.detach(), (logits.detach().argmax(1) == labels).sum()


def train(run: Run, stop: StopRequest) -> None:
    """Trains until all epochs are done or a stop is requested; either way the run is saved."""
    while run.epoch < run.config["epochs"]:
        train_epoch(run, stop)
        if run.stopped_by:
            break  # an epoch that is over will be validated by whoever goes on with it
        finish_epoch(run)
        [is_save_due] = run.processes.highest(run.is_save_due())
        if is_save_due and run.epoch < run.config["epochs"]:
            run.save()
    run.save()


def train_epoch(run: Run, stop: StopRequest) -> None:
    """Goes on with the epoch under way to its end, or until a stop is requested."""
    config = run.config
    run.network.train()
    batches = training_batches(
        run.train_split,
        run.preprocessing,
        augmentation_now(run),
        config["batch_size"],
        config["seed"],
        run.epoch,
        run.step,
        run.processes.share,
    )
    with Progress(run) as progress:
        for images, labels in batches:
            loss, correct = train_step(run, images, labels)
            run.losses[run.step] = loss  # stays on the device: reading it would wait for the step
            run.correct += correct
            run.step += 1
            progress.advance()
            # Processes have clocks and signals of their own, but must do the same.
            run.stopped_by, is_save_due, is_show_due = run.processes.highest(
                stop.signal, run.is_save_due(), progress.is_due()
            )
            if is_show_due:
                run.check_losses()
                progress.show(*running_metrics(run))
            if run.stopped_by:
                break
            if is_save_due:
                run.seconds = progress.seconds()
                run.save()
                progress.start_clock()  # saving is not training
        run.check_losses()
        run.seconds = progress.seconds()


def finish_epoch(run: Run) -> None:
    """Validates, notes the epoch in the run's folder and keeps the network if it is the best."""
    if run.val_split:
        val_loss, val_accuracy = validate(run)
        if not math.isfinite(val_loss):
            raise run.diverged(f"the validation loss became {val_loss}", run.step)
        improved = all(val_accuracy > row["val_accuracy"] for row in run.history)
        validation = f"validation loss {val_loss:.4f}, accuracy {val_accuracy:.2%}; "
    else:
        run.check_weights()
        val_loss, val_accuracy, improved, validation = None, None, True, ""
    train_loss, train_accuracy = running_metrics(run)
    last_rate = rate_now(run, (run.epoch + 1) * run.steps_per_epoch - 1)
    run.epoch += 1
    row = {
        "epoch": run.epoch,
        "step": run.epoch * run.steps_per_epoch,
        "lr": last_rate,
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "val_loss": val_loss,
        "val_accuracy": val_accuracy,
        "seconds": round(run.seconds, 2),
        "images_per_second": round(len(run.train_split.labels) / run.seconds, 1),
        "peak_memory_mib": peak_memory_mib(run.device),
    }
    run.history.append(row)
    run.step, run.seconds = 0, 0.0
    run.losses.zero_()
    run.correct.zero_()
    if run.is_first:
        if improved:
            run.keep_best()
        run.write_history()
    run.say(
        f"epoch {run.epoch}/{run.config['epochs']}: "
        f"training loss {train_loss:.4f}, accuracy {train_accuracy:.2%}; "
        f"{validation}{row['images_per_second']:,.0f} images/s"
    )


def validate(run: Run) -> tuple[float, float]:
    """Loss and accuracy on the validation split, of which each process sees its share."""
    share, precision = run.processes.share, run.config["precision"]
    logits = torch.zeros(len(run.val_split.labels), len(run.classes), device=run.device)
    logits[share] = predict(
        run.evaluated, run.val_split.images[share], run.preprocessing, precision
    )
    return loss_and_accuracy(run.processes.sum(logits), run.val_split.labels)


def images_done(run: Run, step: int) -> int:
    """Images of an epoch that so many steps see."""
    return min(step * run.config["batch_size"], len(run.train_split.labels))


def running_metrics(run: Run) -> tuple[float, float]:
    """Mean loss and accuracy over the images of the epoch so far. Waits for the device."""
    images = images_done(run, run.step)
    losses = run.processes.sum(run.losses)[: run.step]
    losses = losses.cpu().double()  # not every GPU has float64
    weights = torch.full_like(losses, run.config["batch_size"])
    weights[-1] = images - weights[:-1].sum()
    correct = run.processes.sum(run.correct)
    return (losses @ weights).item() / images, correct.item() / images


class Progress:
    """Shows how an epoch goes: a bar on a terminal, a line now and then elsewhere."""

    WARM_UP_STEPS = 2  # slow ones at the start
    TOLD_AFTER = 8  # steps, of which all but those tell how long the run will take

    def __init__(self, run: Run):
        self.run = run
        self.first_step = run.step
        self.start_clock()
        self.warmed_up = self.last_shown = self.started
        self.bar = tqdm(
            desc=f"epoch {run.epoch + 1}/{run.config['epochs']}",
            initial=images_done(run, run.step),
            total=len(run.train_split.labels),
            unit="image",
            leave=False,
            disable=None if run.is_first else True,
        )
        self.interval = 60.0 if self.bar.disable else 1.0  # seconds

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def start_clock(self) -> None:
        """Counts from now on, after what was spent before."""
        self.seconds_before, self.started = self.run.seconds, time.monotonic()

    def seconds(self) -> float:
        """Spent training in the epoch under way, before and after any interruption."""
        return self.seconds_before + time.monotonic() - self.started

    def advance(self) -> None:
        """Moves the bar to the step that is done."""
        self.bar.update(images_done(self.run, self.run.step) - self.bar.n)

    def is_due(self) -> bool:
        """Whether it is time to show something, which has to wait for the device."""
        if not self.run.is_first:
            return False
        steps = self.run.step - self.first_step
        if not self.run.told_time and steps in (self.WARM_UP_STEPS, self.TOLD_AFTER):
            return True
        return time.monotonic() - self.last_shown > self.interval

    def show(self, loss: float, accuracy: float) -> None:
        """Shows loss and accuracy so far; once, after the first steps, the time to come."""
        steps = self.run.step - self.first_step
        if steps == self.WARM_UP_STEPS:
            self.warmed_up = time.monotonic()
        if steps == self.TOLD_AFTER and not self.run.told_time:
            self.tell_time()
        if time.monotonic() - self.last_shown > self.interval:
            self.show_metrics(loss, accuracy)

    def show_metrics(self, loss: float, accuracy: float) -> None:
        """Shows mean loss and accuracy of the epoch so far, in the bar or as a line."""
        if self.bar.disable:
            self.run.say(
                f"epoch {self.run.epoch + 1}/{self.run.config['epochs']}, "
                f"step {self.run.step}/{self.run.steps_per_epoch}: "
                f"training loss {loss:.4f}, accuracy {accuracy:.2%}"
            )
        else:
            self.bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}")
        self.last_shown = time.monotonic()

    def tell_time(self) -> None:
        """Says how long the run will take, from the time of its first steps."""
        run = self.run
        run.told_time = True
        timed_steps = self.TOLD_AFTER - self.WARM_UP_STEPS
        step_seconds = (time.monotonic() - self.warmed_up) / timed_steps
        steps_left = run.total_steps - run.epoch * run.steps_per_epoch - run.step
        epochs_left = run.config["epochs"] - run.epoch
        # A validation image costs about a third of a training image: no backward pass.
        validation_images = len(run.val_split.labels) if run.val_split else 0
        validation_steps = epochs_left * validation_images / run.config["batch_size"] / 3
        seconds = step_seconds * (steps_left + validation_steps)
        message = f"this run will take about {readable_duration(seconds)}"
        if run.device.type == "cpu" and seconds > 600:
            message += "; quicker: fewer --epochs, --recipe fast, --dataset shapes, or a GPU"
        with self.bar.external_write_mode():
            self.run.say(message)


def readable_duration(seconds: float) -> str:
    """For people: seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def evaluate_command(run: Run) -> str:
    """The command that evaluates the run's best network."""
    arguments = ["evaluate.py", str(run.dir / "best.pt")]
    # best.pt names the folder of when it was written, which --resume --data-dir may have changed.
    if run.config["dataset"] == "cifar10" and run.config["data_dir"] != DEFAULT_DATA_DIR:
        arguments += ["--data-dir", str(run.config["data_dir"])]
    return shlex.join(["python", *arguments])


# ---------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def prepare(given: dict, processes: Processes) -> Iterator[Run]:
    """A new run, or a stopped one loaded; nothing is written before all of it is known."""
    given = dict(given)
    resume, output_dir = given.pop("resume", None), given.pop("output_dir", None)
    if processes.max_restarts and not (resume or output_dir):
        raise UserError("torchrun --max-restarts needs --output-dir: a restart must find the run")
    processes.connect()
    # torchrun repeats the command that made the run. The first process decides for all: machines
    # may see a change in a shared folder at different times.
    if processes.max_restarts and output_dir:
        known = processes.from_first(lambda: (output_dir / "config.json").exists())
        resume = output_dir if known else None
    config, earlier_starts = resumed_config(resume, given) if resume else (new_config(given), [])
    check_shares(config, processes)
    # Before the data are loaded: a taken folder is refused at once. open_folder() makes it.
    run_dir = resume or processes.from_first(lambda: free_run_dir(config, output_dir))
    device = processes.select_device(config["device"])
    precision = select_precision(config["precision"], device)
    config["precision"] = processes.from_first(lambda: precision)  # machines may differ
    if config["deterministic"]:
        make_deterministic(device)
    if config["tensorboard"] and processes.rank == 0:
        summary_writer_class()
    run = Run(run_dir, config, load_data(config, processes), device, processes)
    try:
        open_folder(run, output_dir, resume)
        note_start(run, earlier_starts)
        yield run
    finally:
        run.close()


def check_shares(config: dict, processes: Processes) -> None:
    """Raises UserError if a process's share of a batch has too few images."""
    if config["batch_size"] < processes.count:
        raise UserError(
            f"--batch-size {config['batch_size']} is less than one image per process; "
            f"give at least {processes.count}"
        )
    if config["mix"] != "none" and config["batch_size"] < 2 * processes.count:
        raise UserError(
            f"--mix {config['mix']} needs at least two images per process; "
            f"give --batch-size {2 * processes.count} or more, or --mix none"
        )


def load_data(config: dict, processes: Processes) -> Dataset:
    """The run's data set, with the training images that it asks for."""
    with processes.one_before_the_others():  # which may download it
        dataset = load_dataset(config["dataset"], config["data_dir"])
    if config["train_split"] == "full":
        dataset.train = dataset.train.joined_with(dataset.val)
    if "train_images" in config:
        dataset.train = stratified_subset(dataset.train, config["train_images"])
    return dataset


def open_folder(run: Run, output_dir: Path | None, resume: Path | None) -> None:
    """Makes the run's folder, or loads what is in it, and keeps other processes out of it."""
    if not resume:
        run.dir = run.processes.from_first(lambda: make_run_dir(run.config, output_dir))
    if run.is_first:
        run.lock = FolderLock(run.dir)
        remove_unfinished(run.dir)
    if resume and run.processes.from_first(lambda: has_checkpoint(run.dir)):
        run.load()
    elif resume and run.is_first:
        begin_anew(run)
    place = [run.epoch, run.step]
    if run.processes.highest(*place) != place:
        raise UserError(f"{run.dir} is not the same for all processes; is the folder shared?")


def note_start(run: Run, earlier_starts: list) -> None:
    """Notes the start in config.json, and opens TensorBoard's log if asked for."""
    if run.is_first and run.epoch < run.config["epochs"]:
        run.write_config(earlier_starts)
        if run.config["tensorboard"]:
            # What an earlier start logged of later epochs, a killed one say, is not to be shown.
            run.tensorboard = summary_writer_class()(run.dir, purge_step=run.epoch + 1)


def has_checkpoint(run_dir: Path) -> bool:
    """Whether the run was saved before it was stopped.

    Raises UserError if it was saved after an epoch and its last.pt is gone.
    """
    if (run_dir / "last.pt").exists():
        return True
    if (run_dir / "curves.png").exists():  # drawn once last.pt is written
        raise UserError(
            f"--resume {run_dir}: its last.pt is gone, without which it would begin anew and "
            "overwrite what is there; start a new run"
        )
    return False


def begin_anew(run: Run) -> None:
    """Says that a run has nothing to go on from; the best network of its first start is kept."""
    run.say(f"{run.dir} was not saved before it ended: it begins anew")
    best = run.dir / "best.pt"
    if best.exists():  # an error ended the run, after an epoch
        kept = best.replace(run.dir / "best-before.pt")
        run.say(f"its best network until then is now {kept}")


def summary_writer_class() -> type:
    """TensorBoard's SummaryWriter. Raises UserError if it is not there or does not work."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # slow, and not everyone has it
    except Exception as error:  # a version that does not fit the others fails in many ways
        raise UserError(
            f"--tensorboard does not work here ({first_line(error)}); pip install tensorboard, "
            "or leave it out"
        ) from None
    return SummaryWriter


def print_result(run: Run) -> None:
    """Says how the run ended and what to do next."""
    seconds = sum(row["seconds"] for row in run.history)
    result = "best.pt is the last epoch's"
    if run.val_split:
        best = max(run.history, key=lambda row: row["val_accuracy"])
        accuracy = f"{best['val_accuracy']:.2%}"
        result = f"best validation accuracy {accuracy} after epoch {best['epoch']}"
    run.say(
        f"finished {run.epoch} epochs in {readable_duration(seconds)} of training: {result}\n"
        f"look at the curves in {run.dir / 'curves.png'}\n"
        f"evaluate it with: {evaluate_command(run)}"
    )


def train_and_report(run: Run) -> int:
    """Trains to the end or to a stop. Returns the exit code."""
    config = run.config
    if run.epoch == config["epochs"]:
        run.say(f"{run.dir} has all its {run.epoch} epochs; give more --epochs to go on")
        print_result(run)
        return 0
    stop = StopRequest()  # before the first line is printed to what may be a closed pipe
    where = device_name(run.device)
    if run.processes.count > 1:
        where = f"{run.processes.count} processes, the first on {where}"
    validation_images = len(run.val_split.labels) if run.val_split else 0
    run.say(
        f"{run_name(config)}: {len(run.train_split.labels):,} training and "
        f"{validation_images:,} validation images, "
        f"{config['epochs']} epochs, {config['precision']} on {where}\n"
        f"the run's folder is {run.dir}"
    )
    if run.epoch or run.step:
        run.say(f"resumed after epoch {run.epoch}, step {run.step}")
    try:
        train(run, stop)
    except Exception:  # a second Ctrl-C, which is none, does not wait for a file
        try:
            run.save_best()
        except Exception as error:  # of the two errors the first tells more
            print(f"best.pt was not kept: {first_line(error)}", file=sys.stderr)
        raise
    if not run.stopped_by:
        print_result(run)
        return 0
    if run.is_first:
        command = command_line("train.py", "--resume", str(run.dir))
        print(f"stopped; go on with: {command}", file=sys.stderr)
    return 128 + run.stopped_by


def explained(error: RuntimeError) -> Exception:
    """What to tell the user of an error that torch raised, or the error itself."""
    if is_compiler_error(error):
        return UserError(f"--compile does not work here ({first_line(error)}); leave it out")
    if is_connection_lost(error):
        reason = first_line(error)
        return UserError(
            f"another process of this run has ended or is out of reach ({reason}); "
            "go on with --resume"
        )
    return error


def main() -> int:
    arguments = make_parser().parse_args()
    keep_freed_memory()
    processes = Processes()
    try:
        with prepare(vars(arguments), processes) as run:
            code = train_and_report(run)
        processes.disconnect()
    except RuntimeError as error:
        raise explained(error) from None
    return code


if __name__ == "__main__":
    run_script(main)
