"""What a step does to the weights: SGD, Adam, Muon; and how the learning rate changes."""

import math

import torch
from torch import Tensor, nn

from model import AlexNet
from recipes import Config

PATIENCE = 5  # epochs; the paper does not say how long its authors watched
DIVISIONS = 3  # paper §5: the learning rate was "reduced three times prior to termination"


# --- Learning rate ---


def cosine_lr(step: int, total_steps: int, peak: float, warm_up: float) -> float:
    """Return a rate that rises linearly to peak, then falls to 0 as half a cosine.

    step counts from 0; warm_up is the part of the steps in which the rate rises.
    """
    warm_up_steps = max(1, round(warm_up * total_steps))
    if step < warm_up_steps:
        return peak * (step + 1) / warm_up_steps
    progress = (step - warm_up_steps) / max(1, total_steps - warm_up_steps)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def plateau_lr(val_accuracies: list[float], start: float) -> float:
    """Return the learning rate after epochs with these validation accuracies (paper §5).

    It is divided by 10 when PATIENCE epochs in a row have brought no new best, DIVISIONS times at
    most.
    """
    best, waited, divisions = -1.0, 0, 0
    for accuracy in val_accuracies:
        waited = 0 if accuracy > best else waited + 1
        best = max(best, accuracy)
        if waited == PATIENCE and divisions < DIVISIONS:
            divisions, waited = divisions + 1, 0
    return start / 10**divisions


# --- Optimizers ---


def make_optimizer(network: AlexNet, config: Config) -> torch.optim.Optimizer:
    """Return SGD, Adam or Muon; biases may have a learning rate and a weight decay of their own.

    SGD's step is b <- m b + (g + d w), w <- w - r b, with gradient g, momentum m, weight decay d
    and learning rate r. The paper's (§5) is v <- m v - r d w - r g, w <- w + v. They are the same,
    with v = -r b, while r is constant; after a change of r the paper's v still holds the old r.
    """
    filters = []
    if config.optimizer == "muon":
        convolutions = [layer for layer in network.features if isinstance(layer, nn.Conv2d)]
        filters = [layer.weight for layer in convolutions[1:] if layer.weight.requires_grad]
    parameters = [
        parameter
        for parameter in network.parameters()
        if not any(parameter is weight for weight in filters)
    ]
    groups = [{"params": parameters, "lr_factor": 1.0}]
    if (config.bias_lr_factor, config.bias_decay_factor) != (1, 1):
        biases = {
            "params": [parameter for parameter in parameters if parameter.dim() <= 1],
            "lr_factor": config.bias_lr_factor,
            "weight_decay": config.bias_decay_factor * config.weight_decay,
        }
        groups[0]["params"] = [parameter for parameter in parameters if parameter.dim() > 1]
        groups.append(biases)
    # fused: one operation for all weights
    settings = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=config.momentum, **settings)
        names = ("momentum_buffer",) if config.momentum else ()
    else:
        optimizer = torch.optim.Adam(groups, **settings)
        names = ("exp_avg", "exp_avg_sq")
    # The state exists from the start: a run that is resumed is copied into it, and fused SGD would
    # take uninitialized memory for it after a first step that fp16 skips.
    for parameter in parameters:
        state = {name: torch.zeros_like(parameter) for name in names}
        if "exp_avg" in state:
            state["step"] = parameter.new_zeros(())
        if state:
            optimizer.state[parameter] = state
    return MuonAndAdam(filters, optimizer, config.muon_lr / config.lr) if filters else optimizer


class MuonAndAdam(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the filters of convolutions, Adam for all other parameters.

    Muon steps along the momentum made orthogonal, so that all directions of a matrix are learnt at
    one rate. torch.optim.Muon takes matrices: filters [N, C, h, w] are one of N rows, in whatever
    order the values of a row lie in memory.
    """

    def __init__(self, filters: list[Tensor], adam: torch.optim.Adam, lr_factor: float):
        # Adam's groups are its own: it sees the learning rates that are set here.
        groups = [{"params": filters, "lr_factor": lr_factor}, *adam.param_groups]
        super().__init__(groups, {})
        self.adam = adam
        matrices = [as_matrix(weight.detach()) for weight in filters]  # views of the filters
        self.muon = torch.optim.Muon(matrices, weight_decay=0.0)
        for weight, matrix in zip(filters, matrices, strict=True):
            self.state[weight] = self.muon.state[matrix]
            self.state[weight]["momentum_buffer"] = torch.zeros_like(matrix)
        self.state.update(adam.state)

    def step(self) -> None:
        """Take a step with each."""
        filters, matrices = self.param_groups[0], self.muon.param_groups[0]
        for weight, matrix in zip(filters["params"], matrices["params"], strict=True):
            matrix.grad = as_matrix(weight.grad)
        matrices["lr"] = filters["lr"]
        self.muon.step()
        self.adam.step()


def as_matrix(filters: Tensor) -> Tensor:
    """Return filters [N, C, h, w] as the matrix [N, C h w] that shares their memory."""
    if not filters.is_contiguous():  # channels last
        filters = filters.movedim(1, -1)
    return filters.flatten(1)
