"""The engine for NVIDIA GPUs: the fastest kernel for each layer, and the step recorded once as a CUDA graph.

The roughly 300 kernels of a step then run without the host: on an H200 1.8 to 4.5 times as fast as torch's engine.
`fastest_engine` measures once whether that holds here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Collection
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from dipguard.cache import cache_folder
from dipguard.classifier import is_out_of_memory
from dipguard.engines.base import Engine, HandOver, Step, TorchEngine, fit_errors, say_once
from dipguard.engines.kernel_choice import Choice, choose_kernels, layer_shapes, use_first_kernels, use_kernels
from dipguard.files import file_digest, read_json, write_json
from dipguard.networks import StackedSkipNet
from dipguard.precision import precision

_log = logging.getLogger(__name__)

WARMUP = 3
"""Eager runs on a side stream before the recording, as torch asks for: the first chooses algorithms and compiles."""
SOURCES = ("engines/_triton_kernels.py", "engines/triton_ops.py", "engines/kernel_choice.py", "networks/unet.py")
"""Files whose change makes every kept measurement and choice void."""
MEASURED = 5
"""Steps of each engine that are timed, after one that is not."""
LONG = 0.1
"""A step that takes longer than these seconds is timed once."""
_ALONE = threading.RLock()
"""Torch records one graph at a time in a process, and Triton tunes one kernel at a time; fits may run in threads."""


class CudaGraphEngine(Engine):
    """Forward and backward pass as one CUDA graph, always in the same memory.

    The graph holds the addresses of the parameters: an optimiser must update them in place, as all of torch's do. The
    loss's ``backward()`` hands over gradients that have been computed already.

    ``net`` and ``given`` (x0, [B, 3, H, W]) are of one dtype and on one CUDA device, or on any device without
    ``capture``, which runs the step eagerly (``name`` is then ``torch``); so is ``tolerance`` [B], if there is one
    (`fit_errors`). ``convolutions`` and ``normalisations`` are the candidates of
    :func:`~dipguard.engines.kernel_choice.choose_kernels`; ``choice`` is the kernel of each layer. ValueError for an
    unknown name; RuntimeError if no candidate works for some layer.
    """

    def __init__(
        self,
        net: StackedSkipNet,
        given: Tensor,
        *,
        tolerance: Tensor | None = None,
        z_gradient: bool = False,
        matmul_precision: str = "float32",
        convolutions: Collection[str] | None = None,
        normalisations: Collection[str] | None = None,
        capture: bool = True,
    ) -> None:
        self.name = "cuda_graph" if capture else "torch"
        self.net = net
        self.matmul_precision = matmul_precision
        # Tensors made under inference_mode can neither be written to nor saved for a backward pass outside of it.
        with torch.inference_mode(False):
            net.set_layout(channels_last=given.device.type == "cpu")
            self.given, self.tolerance = given.detach(), tolerance
            self.z = given.new_zeros(len(given), net.spec.input_depth, *given.shape[-2:]).requires_grad_(z_gradient)
            self._handle = given.new_zeros((), requires_grad=True)
        with precision(matmul_precision, given.device):
            candidates = {"convolutions": convolutions, "normalisations": normalisations}
            self.choice = _kept_choice(net, given, z_gradient=z_gradient, precision=matmul_precision, **candidates)
        use_kernels(net, self.choice)
        self._wanted = [*net.parameters(), *([self.z] if z_gradient else [])]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._results: tuple[Tensor, Tensor, list[Tensor]] | None = None
        if capture:
            self._capture()

    def step(self, z: Tensor) -> Step:
        """One pass; the backward pass is already queued when this returns."""
        x, errors, gradients = self.compute(z)
        # The next step writes into the same memory, so callbacks get copies.
        parameters = self.parameters()
        own, to_z = gradients[: len(parameters)], gradients[-1] if self.z.requires_grad else None
        loss: Tensor = HandOver.apply(self._handle, z, errors.sum(), parameters, own, to_z)
        return Step(loss, x.clone(), errors.clone())

    def compute(self, z: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """One pass for z [B, input_depth, H, W]; the host does not wait for the GPU.

        Returns x [B, 3, H, W], the mean squared error of each image [B], and the gradients of the errors' sum in the
        order of ``net.parameters()``, followed by z's with ``z_gradient``. The next call overwrites all of them.
        """
        with torch.no_grad():
            self.z.copy_(z, non_blocking=True)
        if self._graph is None:
            return self._run()
        assert self._results is not None
        self._graph.replay()
        return self._results

    def _run(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        with torch.inference_mode(False), torch.enable_grad(), precision(self.matmul_precision, self.given.device):
            x = self.net(self.z).to(self.given.dtype)
            errors = fit_errors(x, self.given, self.tolerance)
            # Not ``backward()``: this gives new tensors in the graph's own memory, and nothing has to be zeroed.
            gradients = torch.autograd.grad(errors.sum(), self._wanted)
        return x.detach(), errors.detach(), list(gradients)

    def _capture(self) -> None:
        device = self.given.device
        with _ALONE, torch.cuda.device(device):
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(WARMUP):
                    self._run()
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # A workspace of cuBLAS that is made during the recording belongs to the graph. An earlier one would be
            # freed by the next Trainer that starts or ends, while the graph still writes to it.
            torch._C._cuda_clearCublasWorkspaces()
            # Other threads (a logger's, the jitter's) may allocate or wait meanwhile without breaking the recording.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                self._results = self._run()
            torch._C._cuda_clearCublasWorkspaces()
        self._graph = graph


def fastest_engine(
    net: StackedSkipNet, given: Tensor, *, tolerance: Tensor | None = None, z_gradient: bool = False
) -> Engine:
    """Torch's engine or the CUDA graph, whichever takes less time a step (`engine_times`); the log says which and why.

    Arguments are those of `CudaGraphEngine`. On a CPU the step is not recorded.
    """
    times = engine_times(net, given, z_gradient=z_gradient)
    name = min(times, key=times.__getitem__)
    found = ", ".join(f"{engine} {1000 * seconds:.2f} ms" for engine, seconds in times.items())
    say_once(f"fits of {len(given)} images at once: engine {name} (a step with {found})", level=logging.INFO)
    try:
        return _engine(name, net, given, tolerance=tolerance, z_gradient=z_gradient)
    except Exception as problem:  # what an earlier process measured may not work in this one
        if name == "torch" or is_out_of_memory(problem):
            raise
        say_once(f"the engine 'cuda_graph' cannot be used, torch's takes its place: {problem}")
    use_first_kernels(net)
    return TorchEngine(net, given, tolerance=tolerance)


def engine_times(net: StackedSkipNet, given: Tensor, *, z_gradient: bool = False) -> dict[str, float]:
    """Seconds of a step of the engines ``torch`` and ``cuda_graph``; infinite for one that cannot run here.

    Measured once for each network, size of image and (to a power of two) of stack, GPU and version of torch, and kept
    in ``engines.json`` of the cache folder. The network's parameters stay as they are.
    """
    key, place = _situation(net, given, z_gradient), cache_folder("engines.json")
    names = ("torch", "cuda_graph")
    with _ALONE, precision("float32", given.device):  # as in a fit
        kept = _TIMES.get(key) or _kept(place).get(key, {})
        if _are(kept, float, names):
            return dict(kept)
        measured = {name: _seconds(name, deepcopy(net), given, z_gradient=z_gradient) for name in names}
        times = {name: seconds for name, (seconds, _) in measured.items()}
        if float("inf") not in times.values():  # a lack of memory may pass
            _TIMES[key] = times
        if all(lasting for _, lasting in measured.values()):
            _keep(place, key, times)
    return times


_TIMES: dict[str, dict[str, float]] = {}
_CHOSEN: dict[str, Choice] = {}


def _kept_choice(net: StackedSkipNet, given: Tensor, *, z_gradient: bool, precision: str, **candidates: Any) -> Choice:
    """`choose_kernels`, once for each size of stack (to a power of two): fits of a process never differ by the choice.

    A choice that was not cut short is kept in ``kernels.json`` of the cache folder, for those of later processes; under
    ``torch.use_deterministic_algorithms(True)``, any choice, so that later processes give the same bits.
    """
    options: Any = {"size": tuple(given.shape[2:]), "z_gradient": z_gradient}
    if not given.is_cuda and all(len(names or ()) < 2 for names in candidates.values()):  # nothing is measured
        return choose_kernels(net, given.device, **options, **candidates)
    key, place = _situation(net, given, z_gradient, precision, candidates), cache_folder("kernels.json")
    with _ALONE:
        if key not in _CHOSEN:
            kept, shapes = _kept(place).get(key, {}), layer_shapes(net, **options)
            if _are(kept, str, shapes) and all(kept[layer] in shape.table for layer, shape in shapes.items()):
                _CHOSEN[key] = Choice(kept)
            else:
                made = choose_kernels(net, given.device, **options, **candidates)
                lasting = made.complete or torch.are_deterministic_algorithms_enabled()
                _CHOSEN[key] = Choice(made, complete=lasting)
                if lasting:
                    _keep(place, key, made)
            taken = Counter(f"{shapes[layer].kind} {name}" for layer, name in _CHOSEN[key].items())
            about = ", ".join(f"{count} {name}" for name, count in sorted(taken.items()))
            _log.info("kernels for %d networks at once: %s", len(given), about)
        return _CHOSEN[key]


def _situation(net: StackedSkipNet, given: Tensor, *more: object) -> str:
    """What measurements depend on, of the stack its size to a power of two."""
    stack = 1 << (len(given) - 1).bit_length()
    where = torch.cuda.get_device_name(given.device) if given.is_cuda else given.device.type
    about = [where, torch.__version__, _kernels_digest(), list(given.shape[2:]), given.dtype, net.padding, net.spec]
    if torch.are_deterministic_algorithms_enabled():  # where some products of cuBLAS may raise an error
        about.append("deterministic")
    return " ".join(map(str, [*about, stack, *more]))


@cache
def _kernels_digest() -> str:
    """A kernel that was changed is measured, and compared with float64, again."""
    package = Path(__file__).parents[1]
    return " ".join(file_digest(package / name)[:16] for name in SOURCES)


def _kept(place: Path) -> dict[str, Any]:
    """What was measured before; nothing if the file is damaged."""
    try:
        kept = read_json(place)
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _keep(place: Path, key: str, value: Any) -> None:
    try:
        with FileLock(place.with_suffix(".lock"), timeout=10):  # another process may add to it
            write_json(place, _kept(place) | {key: value})
    except OSError as problem:
        _log.warning("the choice cannot be kept: %s", problem)


def _are(found: Any, kind: type, names: Collection[str]) -> bool:
    """Whether ``found`` maps just these names to values of a kind."""
    return isinstance(found, dict) and found.keys() == set(names) and all(type(v) is kind for v in found.values())


def _engine(
    name: str, net: StackedSkipNet, given: Tensor, *, z_gradient: bool, tolerance: Tensor | None = None
) -> Engine:
    if name == "torch":
        return TorchEngine(net, given, tolerance=tolerance)
    return CudaGraphEngine(net, given, tolerance=tolerance, z_gradient=z_gradient, capture=given.is_cuda)


def _seconds(name: str, net: StackedSkipNet, given: Tensor, *, z_gradient: bool) -> tuple[float, bool]:
    """Seconds of a step as the program sees it, with the host's share, and whether a later process would see the same.

    That is not so where memory was lacking, or the choice of kernels was cut short.
    """

    def run(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            engine.step(z).loss.backward()
            for parameter in engine.parameters():
                parameter.grad = None  # as an optimiser does
        if given.is_cuda:
            torch.cuda.current_stream(given.device).synchronize()
        return time.perf_counter() - start

    try:
        engine = _engine(name, net, given, z_gradient=z_gradient)
        z = given.new_zeros(len(given), net.spec.input_depth, *given.shape[2:]).requires_grad_(z_gradient)
        run(1)
        first = run(1)
        choice = getattr(engine, "choice", None)  # of the graph's kernels
        return first if first > LONG else run(MEASURED) / MEASURED, choice is None or choice.complete
    except Exception as problem:  # no memory for both graphs, no kernel works, or a compiler's own error types
        _log.warning("the engine %r cannot be used here: %s", name, problem)
        return float("inf"), False
