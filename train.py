"""Train AlexNet. On one GPU, or on the CPU if there is none:

    python train.py                            # CIFAR-10: 200 epochs of SGD with CutMix
    python train.py --optimizer adam           # 8 epochs of Adam: an hour on two CPU cores
    python train.py --recipe paper             # as in 2012
    python train.py --dataset shapes           # minutes on two CPU cores, nothing to download
    python train.py --dataset folder --data-dir pets  # your own pictures: pets/cat/*, pets/dog/*
    python train.py --resume runs/cifar10-sgd  # go on with a run that was stopped

On four GPUs:

    torchrun --nproc_per_node=4 train.py

A run's folder has config.json, metrics.csv, timing.csv, curves.png, last.pt (for --resume) and
best.pt (the best on the validation images, for evaluate.py). Settings are in recipes.py.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoint import load_network
from dataset import DEFAULT_DATA_DIR, Dataset, load_dataset, stratified_subset
from distributed import Processes, is_connection_lost
from model import AlexNet, init_weights
from optimizers import cosine_lr, make_optimizer, plateau_lr
from recipes import Config, new_config, parse_command_line, resumed_config, run_name
from run import Run, check_output_dir, quality
from utils import (
    StopRequest,
    UserError,
    autocast,
    command_line,
    count_of,
    device_name,
    duration,
    keep_freed_memory,
    make_deterministic,
    run_script,
    script_path,
    select_precision,
    summarize_error,
    to_device,
)

FEW_STEPS = 200  # shapes are learnt in 188

# --- The loop ---


def train(run: Run, stop: StopRequest) -> None:
    """Train until all epochs are done or a stop is requested. run.py does what surrounds a step."""
    config, optimizer, scaler = run.config, run.optimizer, run.scaler
    while run.epoch < config.epochs:
        run.network.train()
        run.progress.start_epoch()
        for images, labels in run.batches():  # shuffled, augmented, normalized, 227x227
            lr = lr_at(run, run.global_step)
            for group in optimizer.param_groups:
                group["lr"] = group["lr_factor"] * lr
            run.seed_step()  # for CutMix and dropout: a resumed run draws the same
            images, targets = run.mix(images, labels, run.global_step)
            with autocast(run.device, config.precision):
                logits = run.forward(images)
            # The mean over the whole batch, of which several processes have a shard each.
            loss = F.cross_entropy(logits.float(), targets, reduction="sum") / run.batch_images
            # DistributedDataParallel averages gradients; they must be summed.
            scaler.scale(loss * run.processes.world_size).backward()
            scaler.step(optimizer)  # fp16 alone has a scale, and skips a step that overflows
            scaler.update()
            optimizer.zero_grad()
            run.record_step(loss.detach(), logits.detach(), targets)
            run.step += 1
            if run.show_save_or_stop(stop):
                return
        last_lr = lr_at(run, run.global_step - 1)
        run.finish_epoch(last_lr)  # validate, keep the best, go on to the next epoch


# --- Learning rate and network ---


def lr_at(run: Run, step: int) -> float:
    """Return the weights' learning rate at a step of the whole run."""
    if run.config.schedule == "plateau":
        return plateau_lr([row["val_accuracy"] for row in run.history], run.config.lr)
    return cosine_lr(step, run.total_steps, run.config.lr, run.config.warm_up)


def make_network(config: Config, num_classes: int) -> AlexNet:
    """Return the network with the initial weights that the run's seed draws."""
    torch.manual_seed(config.seed)
    network = AlexNet(num_classes, config.groups, config.dropout)
    if config.init != "he":  # the constructor has drawn those
        init_weights(network, config.init)
    return network


def check_weights(config: Config) -> None:
    """Raise UserError for weights to start from that are of another kind of input."""
    _, _, checkpoint = load_network(config.weights)
    theirs = checkpoint["training"].get("input")
    if theirs != config.input:
        raise UserError(f"--weights {config.weights} needs --input {theirs}, as it was trained")


def start_from(network: AlexNet, path: Path, classes: list[str]) -> list[str]:
    """Copy the weights of a checkpoint into all layers that they fit; return the other layers.

    The last layer stays new if it is for other classes.
    """
    trained, _, checkpoint = load_network(path)
    own, weights = network.state_dict(), trained.state_dict()
    if checkpoint["classes"] != classes:
        weights = {name: weights[name] for name in weights if "fc8" not in name}
    fitting = {
        name: value
        for name, value in weights.items()
        if name in own and own[name].shape == value.shape
    }
    network.load_state_dict(fitting, strict=False)
    return sorted({name.split(".")[1] for name in own.keys() - fitting.keys()})


# --- The script ---


def prepare(overrides: dict, processes: Processes) -> Run:
    """Return a new run, or a stopped one loaded; nothing is written before all of it is known."""
    settings = dict(overrides)
    resume, output_dir = settings.pop("resume", None), settings.pop("output_dir", None)
    processes.connect()
    # Decides for all: machines may see a change in a shared folder at different times.
    on_main = processes.broadcast_from_main
    config, starts = on_main(
        lambda: resumed_config(resume, settings) if resume else (new_config(settings), [])
    )
    check_shards(config, processes)
    if output_dir and not resume:
        on_main(lambda: check_output_dir(output_dir))
    if config.weights and not resume:
        on_main(lambda: check_weights(config))  # before data is read
    device = processes.select_device(config.device)
    # Machines may differ.
    precision = on_main(lambda: select_precision(config.precision, device))
    config = replace(config, precision=precision)
    if config.deterministic:
        make_deterministic(device)
    run = make_run(resume, config, load_data(config, processes), device, processes)
    if config.weights and not resume:
        new = start_from(run.network, Path(config.weights), run.classes)
        run.log(f"weights of {config.weights}; new layers: {', '.join(new) or 'none'}")
    try:
        run.open_folder(output_dir, resume, starts)
    except BaseException:
        run.close()
        raise
    return run


def make_run(
    run_dir: Path | None,
    config: Config,
    dataset: Dataset,
    device: torch.device,
    processes: Processes,
) -> Run:
    """Return a run at its start; nothing is written."""
    network = to_device(make_network(config, len(dataset.classes)), device)
    optimizer = make_optimizer(network, config)
    return Run(run_dir, config, dataset, network, optimizer, device, processes)


def check_shards(config: Config, processes: Processes) -> None:
    """Raise UserError if a process's shard of a batch has too few images."""
    needed = processes.world_size * (1 if config.mix == "none" else 2)
    if config.batch_size < needed and processes.world_size > 1:
        raise UserError(
            f"--batch-size {config.batch_size} is too small for {processes.world_size} processes"
            f"{'' if config.mix == 'none' else f' with --mix {config.mix}'}; give at least {needed}"
        )


def load_data(config: Config, processes: Processes) -> Dataset:
    """Return the run's data set, with the training images that it asks for."""
    with processes.main_process_first():  # which may download it
        dataset = load_dataset(
            config.dataset, config.data_dir, config.classes, quiet=not processes.is_main
        )
    if config.train_split == "full":
        dataset.train = dataset.train.joined_with(dataset.val)
    if config.train_images:
        dataset.train = stratified_subset(dataset.train, config.train_images)
    return dataset


def train_and_report(run: Run) -> int:
    """Train to the end or to a stop. Returns the exit code."""
    config = run.config
    if run.epoch == config.epochs:
        run.log(f"{run.dir} has all its {config.epochs} epochs; give more --epochs to go on")
        log_result(run)
        return 0
    stop = StopRequest()  # before the first line is printed to what may be a closed pipe
    where = device_name(run.device)
    if run.processes.world_size > 1:
        where = f"{run.processes.world_size} processes, the first on {where}"
    val_images = len(run.val_split.labels) if run.val_split else 0
    run.log(
        f"{run_name(config)}: {len(run.train_split.labels):,} training and {val_images:,} "
        f"validation images, {count_of(config.epochs, 'epoch')}, {config.precision} on {where}\n"
        f"the run's folder is {run.dir}"
    )
    if config.dataset == "folder" and run.total_steps < FEW_STEPS:
        run.log(
            f"that is {count_of(run.total_steps, 'step')}, too few to learn much: give more "
            "--epochs, or a smaller --batch-size"
        )
    if run.epoch or run.step:
        run.log(f"resumed after epoch {run.epoch}, step {run.step}")
    try:
        train(run, stop)
        run.save()
    except Exception:  # not after a second Ctrl-C, which stops at once
        try:
            run.save_best()
        except Exception as error:  # of the two errors the first tells more
            print(f"best.pt was not kept: {summarize_error(error)}", file=sys.stderr)
        raise
    if not run.stopped_by:
        log_result(run)
        return 0
    if run.processes.is_main:
        command = command_line(script_path("train.py"), "--resume", run.dir)
        print(f"stopped; go on with: {command}", file=sys.stderr)
    return 128 + run.stopped_by


def log_result(run: Run) -> None:
    """Print how the run ended and what to do next."""
    seconds = sum(row["seconds"] for row in run.history)
    result = "best.pt is the last epoch's"
    if run.val_split:
        best = max(run.history, key=quality)
        accuracy = f"{best['val_accuracy']:.2%}"
        result = f"best validation accuracy {accuracy} after epoch {best['epoch']}"
    arguments = [script_path("evaluate.py"), run.dir / "best.pt"]
    # best.pt names the folder of when it was written, which --resume --data-dir may have changed.
    if run.config.data_dir != DEFAULT_DATA_DIR:
        arguments += ["--data-dir", run.config.data_dir]
    run.log(
        f"finished {count_of(run.epoch, 'epoch')} in {duration(seconds)} of training: {result}\n"
        f"look at the curves in {run.dir / 'curves.png'}\n"
        f"evaluate it with: {command_line(*arguments, alone=True)}"
    )


def explain(error: RuntimeError) -> Exception:
    """Return what to tell the user of an error that torch raised, or the error itself."""
    reason = summarize_error(error)
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        # For want of a C++ compiler, for example.
        return UserError(f"--compile does not work here ({reason}); leave it out")
    if is_connection_lost(error):
        return UserError(
            f"another process of this run has ended or is out of reach ({reason}); "
            "go on with --resume"
        )
    return error


def main() -> int:
    overrides = parse_command_line()
    keep_freed_memory()
    processes = Processes()
    try:
        run = prepare(overrides, processes)
        try:
            code = train_and_report(run)
        finally:
            run.close()
        processes.disconnect()
    except RuntimeError as error:
        explained = explain(error)
        if explained is error:
            raise
        raise explained from error
    return code


if __name__ == "__main__":
    run_script(main)
