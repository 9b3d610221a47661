"""What a training has come to: weights and their average, the epoch to keep, the history."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
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
        self.pairs = list(self.module.parameters()), list(network.parameters())

    def update_parameters(self, _: nn.Module) -> None:
        n = int(self.n_averaged)
        share = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        get_ema_multi_avg_fn(share)(*self.pairs, n)
        self.n_averaged += 1


class Recording:
    """A step of training that a card replays, for batches of one size.

    A card is done with the many small operators of a step long before Python has asked for them, so
    they are recorded and asked for at once. The first steps are taken without: they choose
    algorithms and get memory, which a recording cannot.
    """

    first = 3  # steps

    def __init__(self, step: Callable[[Inputs], Tensor]) -> None:
        self.step, self.n_done = step, 0
        self.stream = torch.cuda.Stream()  # recordings need another one than the default
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: Inputs) -> Tensor:
        if self.n_done < self.first:
            self.n_done += 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = self.step(inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if self.graph is None:
            self.graph, self.inputs = torch.cuda.CUDAGraph(), Inputs(*map(torch.clone, inputs))
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.loss = self.step(self.inputs)
        for place, part in zip(self.inputs, inputs, strict=True):
            place.copy_(part)
        self.graph.replay()
        return self.loss


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
        self.recordings: dict[int, Recording] = {}  # by the number of spots

    def learn(self, inputs: Inputs) -> Tensor:
        """Take a step with a batch of spots; returns its mean loss."""
        size = len(inputs.counts)
        if inputs.counts.is_cuda and self.network.repeats:
            if size not in self.recordings:
                self.recordings[size] = Recording(self.step)
            loss = self.recordings[size](inputs)
        else:
            loss = self.step(inputs)
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        return loss

    def step(self, inputs: Inputs) -> Tensor:
        """Change the weights; nothing here asks the device for values."""
        output = self.network.see(*inputs[:4])
        loss = self.network.loss(output, inputs.areas, inputs.counts).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

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
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"] = group["lr"].to(next(self.network.parameters()).device)
        vars(self.selection).update(content["selection"])
        self.history = content["history"]
