"""Adam for a stack whose images began at different steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adam import adam

from dipguard.engines.base import joined_rows, kept_rows


class StaggeredAdam(torch.optim.Optimizer):
    """:class:`torch.optim.Adam`, fused, over parameters [B, ...] each of whose rows counts its own steps.

    Adam corrects its moments' bias by the number of steps (Kingma and Ba 2015, Algorithm 1), so an image that takes
    another's place must count from 0. Rows that began together are one run, and are updated together by torch's own
    fused kernel; with a single run this is torch's Adam, number by number.

    Args:
        params: All with the same first axis.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the denominator.
    """

    def __init__(
        self,
        params: Iterable[Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        self._runs = [len(self._parameters()[0])]
        for parameter in self._parameters():
            moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            self.state[parameter] = {**moments, "steps": [_zero(parameter)]}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every row."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = self._parameters()
        gradients = [parameter.grad for parameter in parameters]
        assert all(gradient is not None for gradient in gradients)
        states = [self.state[parameter] for parameter in parameters]
        first, second = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        (group,) = self.param_groups
        adam(
            self._split(parameters),
            self._split(gradients),
            self._split(first),
            self._split(second),
            [],
            [step for state in states for step in state["steps"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
        return loss

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in increasing order; the parameters have been cut already."""
        ends = [sum(self._runs[: i + 1]) for i in range(len(self._runs))]
        counts = [sum(end - run <= row < end for row in rows) for end, run in zip(ends, self._runs, strict=True)]
        self._runs = [count for count in counts if count]
        for state in (self.state[parameter] for parameter in self._parameters()):
            at = torch.tensor(rows, device=state["exp_avg"].device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = kept_rows(state[name], at)
            state["steps"] = [step for step, count in zip(state["steps"], counts, strict=True) if count]

    def join(self, count: int) -> None:
        """So many rows begin now, behind the others; the parameters hold them already."""
        self._runs.append(count)
        for parameter in self._parameters():
            state = self.state[parameter]
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = joined_rows(state[name], state[name].new_zeros(count, *parameter.shape[1:]))
            state["steps"] = [*state["steps"], _zero(parameter)]

    def _parameters(self) -> list[Parameter]:
        found: list[Parameter] = self.param_groups[0]["params"]
        return found

    def _split(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Each tensor's runs, in the order of ``steps``."""
        return [run for tensor in tensors if tensor is not None for run in tensor.split(self._runs)]


def _zero(parameter: Parameter) -> Tensor:
    """A count of steps, as the fused kernel wants it."""
    return torch.zeros((), dtype=torch.float32, device=parameter.device)
