"""What a training has come to: weights and their average, the epoch to keep, the history."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from method.network import Inputs, Network


class Selection:
    """The epoch to keep: the one at which held-out spots are predicted best.

    For their score they are split in two halves (even, odd), and each half is scored at the epoch
    that the other one chose: the choice of the epoch then does not flatter the score.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.loss = math.inf
        self.weights: dict[str, Tensor] = {}
        self.half_loss = [math.inf, math.inf]
        self.half_predicted = [torch.empty(0), torch.empty(0)]

    def consider(
        self, epoch: int, losses: np.ndarray, predicted: np.ndarray, network: nn.Module
    ) -> None:
        """Keep this epoch if it is the best so far, by losses (M,); predicted counts are (M, G)."""
        if losses.mean() < self.loss:
            self.epoch, self.loss = epoch, float(losses.mean())
            self.weights = copy.deepcopy(network.state_dict())
        for half in (0, 1):
            chooses = losses[half::2] if len(losses) > 1 else losses
            if chooses.mean() < self.half_loss[half]:
                self.half_loss[half] = float(chooses.mean())
                self.half_predicted[1 - half] = torch.from_numpy(predicted[1 - half :: 2].copy())

    def predicted(self) -> np.ndarray:
        """Counts (M, G) predicted for the held-out spots."""
        even, odd = (half.numpy() for half in self.half_predicted)
        out = np.empty((len(even) + len(odd), even.shape[1]), np.float32)
        out[0::2], out[1::2] = even, odd
        return out


class Average(AveragedModel):
    """The moving average of the weights; over the last tenth of the steps while these are few.

    The class of torch counts the steps on the CPU and has a card wait for their number every time.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network)
        self.decay = decay

    def update_parameters(self, model: nn.Module) -> None:
        n = int(self.n_averaged)
        share = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        averages, weights = list(self.module.parameters()), list(model.parameters())
        get_ema_multi_avg_fn(share)(averages, weights, n)
        self.n_averaged += 1


class MeanLoss(nn.Module):
    """The mean loss of a batch of spots, from the parts of ``Inputs``."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, *parts: Tensor) -> Tensor:
        inputs = Inputs(*parts)
        output = self.network.see(*inputs[:4])
        return self.network.loss(output, inputs.areas, inputs.counts).mean()


def recorded(loss: nn.Module, inputs: Inputs) -> nn.Module:
    """The loss and its gradients as a card replays them, for inputs of these shapes."""
    device = inputs.counts.device
    with torch.random.fork_rng([device], device_type=device.type):  # trials draw random numbers
        parts = tuple(part.clone() for part in inputs)
        graphed = torch.cuda.make_graphed_callables(loss, parts, allow_unused_input=True)
        return cast(nn.Module, graphed)


class Progress:
    """What a training has come to; a checkpoint holds all of it."""

    def __init__(
        self,
        network: Network,
        optimizer: torch.optim.Optimizer,
        averaging: float | None,
        n_steps: int | None,
    ) -> None:
        """``n_steps``: the step size falls to 0 over so many, as a cosine; None: it stays."""

        def size(step: int) -> float:
            return 1.0 if n_steps is None else (1 + math.cos(math.pi * step / n_steps)) / 2

        self.network = network
        self.optimizer = optimizer
        self.average = None if averaging is None else Average(network, averaging)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, size)
        self.selection = Selection()
        self.history: list[dict[str, float]] = []
        self.losses: dict[int, nn.Module] = {}  # by the number of spots

    def loss(self, inputs: Inputs) -> Tensor:
        """Mean loss of a batch of spots.

        A card is done with the many small operators of a step long before Python has asked for
        them. So it records them once, for every size of a batch, and replays them.
        """
        size = len(inputs.counts)
        if size not in self.losses:
            loss: nn.Module = MeanLoss(self.network)
            on_card = inputs.counts.device.type == "cuda"
            self.losses[size] = recorded(loss, inputs) if on_card and self.network.repeats else loss
        return cast(Tensor, self.losses[size](*inputs))

    @property
    def kept(self) -> Network:
        """What is scored and saved: the averaged network, if there is an average."""
        if self.average is None:
            return self.network
        return cast(Network, self.average.module)

    @property
    def parts(self) -> dict[str, Any]:
        named: dict[str, Any] = {"network": self.network, "average": self.average}
        named |= {"optimizer": self.optimizer, "schedule": self.schedule}
        return {name: part for name, part in named.items() if part is not None}

    def content(self) -> dict[str, Any]:
        content = {name: part.state_dict() for name, part in self.parts.items()}
        return {**content, "selection": vars(self.selection), "history": self.history}

    def restore(self, content: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(content[name])
        vars(self.selection).update(content["selection"])
        self.history = content["history"]
