"""Figure 8's network as a program: which operations run on which frames, forward and backward."""

from __future__ import annotations

from dipguard.engines.native_plan import MOST_KERNEL, Block, Instruction, Layer, Operation, Plan, UnsupportedError
from dipguard.networks.layers import same_padding
from dipguard.networks.presets import NetworkSpec


def make_plan(spec: NetworkSpec, *, padding: str, height: int, width: int, z_gradient: bool = False) -> Plan:
    """The program for images [3, height, width], with the gradient with respect to z or without.

    Raises:
        UnsupportedError: The native engine cannot run this network.
    """
    if max(*spec.k_d, *spec.k_u, *spec.k_s) > MOST_KERNEL:
        raise UnsupportedError(f"kernels are at most {MOST_KERNEL}x{MOST_KERNEL}")
    if spec.upsample != "bilinear":
        raise UnsupportedError(f"upsampling is bilinear, got {spec.upsample!r}")
    plan = Plan(spec, padding)
    z = plan.activation(height, width, spec.input_depth, kernels=_readers(spec, 0))
    plan.program.append(Instruction(Operation.READ_Z, target=z))
    top, backward, readers = _scale(plan, 0, z, name="body")
    head = _convolution(plan, "head", top, 3, kernel=1)
    plan.program += [head, Instruction(Operation.LOSS, source=head.target)]
    plan.program += [
        head._replace(operation=Operation.WEIGHT_GRADIENT),
        head._replace(operation=Operation.BIAS_GRADIENT),
        *_input_gradient(top, head),
        *backward,
    ]
    if z_gradient:
        plan.program += [*_input_gradient(z, *readers), Instruction(Operation.WRITE_Z_GRADIENT, source=z)]
    _share_room(plan)
    return plan


def _readers(spec: NetworkSpec, level: int) -> tuple[int, ...]:
    """Kernels that read the input of a scale."""
    return (spec.k_d[level], spec.k_s[level]) if spec.n_s[level] else (spec.k_d[level],)


def _convolution(plan: Plan, name: str, source: int, outputs: int, *, kernel: int, stride: int = 1) -> Instruction:
    frame = plan.frames[source]
    target = plan.raw(-(-frame.height // stride), -(-frame.width // stride), outputs, kernel=kernel)
    lanes = plan.frames[target].padded
    weight = plan.slot(kernel, kernel, frame.channels, lanes, outputs=outputs)
    bias = plan.slot(lanes, outputs=outputs)
    plan.layers[name] = Layer(weight, bias)
    pad = same_padding(kernel)[0]
    return Instruction(Operation.CONVOLVE, source, target, weight.offset, bias.offset, kernel, stride, pad)


def _normalisation(plan: Plan, name: str, source: int, target: int, *, leaky: bool) -> Instruction:
    frame = plan.frames[source]
    weight, bias = (plan.slot(frame.padded, outputs=frame.channels) for _ in range(2))
    plan.layers[name] = Layer(weight, bias)
    statistics = plan.reserve(2 * frame.padded)
    return Instruction(
        Operation.NORMALISE, source, target, weight.offset, bias.offset, statistics=statistics, leaky=int(leaky)
    )


def _block(
    plan: Plan,
    name: str,
    source: int,
    outputs: int,
    *,
    kernel: int,
    stride: int = 1,
    target: int | None = None,
    readers: tuple[int, ...] = (),
) -> Block:
    """Appends convolution, normalisation and LeakyReLU to the program."""
    convolution = _convolution(plan, f"{name}.conv", source, outputs, kernel=kernel, stride=stride)
    raw = plan.frames[convolution.target]
    if target is None:
        target = plan.activation(raw.height, raw.width, outputs, kernels=readers)
    normalisation = _normalisation(plan, f"{name}.norm", convolution.target, target, leaky=True)
    plan.program += [convolution, normalisation]
    return Block(convolution, normalisation)


def _parameter_gradients(block: Block) -> list[Instruction]:
    return [
        block.normalisation._replace(operation=Operation.NORMALISE_BACK),
        block.convolution._replace(operation=Operation.WEIGHT_GRADIENT),
        block.convolution._replace(operation=Operation.NO_BIAS_GRADIENT),
    ]


def _input_gradient(source: int, *convolutions: Instruction) -> list[Instruction]:
    """The gradient of a frame that these convolutions read, in place: no one reads its activation any more."""
    return [
        Instruction(Operation.CLEAR, source=source),
        *(convolution._replace(operation=Operation.CONVOLVE_BACK) for convolution in convolutions),
        Instruction(Operation.FOLD_BORDER, source=source),
    ]


def _back(block: Block) -> list[Instruction]:
    return _parameter_gradients(block) + _input_gradient(block.convolution.source, block.convolution)


def _scale(plan: Plan, level: int, source: int, *, name: str) -> tuple[int, list[Instruction], list[Instruction]]:
    """Appends a scale's forward pass; returns its output's frame, its backward pass, and what it reads ``source`` with.

    The backward pass takes the gradient from the output's frame. The gradient with respect to ``source`` is not part of
    it: the convolutions that read ``source`` are what gives it (`_input_gradient`).
    """
    spec = plan.spec
    n_d, n_u, n_s = spec.n_d[level], spec.n_u[level], spec.n_s[level]
    k_d, k_u, k_s = spec.k_d[level], spec.k_u[level], spec.k_s[level]
    deeper = level + 1 < spec.scales
    frame = plan.frames[source]
    joined = plan.joined(frame.height, frame.width, n_s, spec.n_u[level + 1] if deeper else n_d)
    skip = None
    if n_s:
        skip = _block(plan, f"{name}.skip", source, n_s, kernel=k_s, target=plan.part(joined, n_s))
    down0 = _block(plan, f"{name}.down.0", source, n_d, kernel=k_d, stride=2, readers=(k_d,))
    below = _readers(spec, level + 1) if deeper else ()
    down1 = _block(plan, f"{name}.down.1", down0.normalisation.target, n_d, kernel=k_d, readers=below)
    low = down1.normalisation.target
    backward: list[Instruction] = []
    if deeper:
        low, backward, deeper_readers = _scale(plan, level + 1, low, name=f"{name}.deeper")
        backward += _input_gradient(down1.normalisation.target, *deeper_readers)
    upsample = Instruction(Operation.UPSAMPLE, low, joined, first=n_s)
    normal = plan.activation(frame.height, frame.width, plan.frames[joined].channels, kernels=(k_u,))
    if plan.frames[normal].padded != plan.frames[joined].padded:
        raise UnsupportedError(f"n_u must be a multiple of 4 below a scale with skips, got {spec.n_u}")
    norm = _normalisation(plan, f"{name}.norm", joined, normal, leaky=False)
    plan.program += [upsample, norm]
    up0 = _block(plan, f"{name}.up.0", normal, n_u, kernel=k_u, readers=(1,))
    up1 = _block(plan, f"{name}.up.1", up0.normalisation.target, n_u, kernel=1)
    readers = [down0.convolution] if skip is None else [skip.convolution, down0.convolution]
    steps = [
        *_back(up1),
        *_back(up0),
        norm._replace(operation=Operation.NORMALISE_BACK),
        *([] if skip is None else _parameter_gradients(skip)),
        upsample._replace(operation=Operation.UPSAMPLE_BACK),
        *backward,
        *_back(down1),
        *_parameter_gradients(down0),
    ]
    return up1.normalisation.target, steps, readers


def _share_room(plan: Plan) -> None:
    """One scratch for all: each use of it lies within a single operation."""
    needs: dict[int, int] = {}
    for position, op in enumerate(plan.program):
        source, target = plan.frames[op.source], plan.frames[op.target]
        if op.operation == Operation.CONVOLVE_BACK:
            needs[position] = op.kernel**2 * target.channels * source.padded
        elif op.operation in (Operation.NORMALISE, Operation.NORMALISE_BACK):
            needs[position] = 2 * source.height * source.padded
    room = plan.reserve(max(needs.values()))
    plan.program = [op._replace(room=room) if n in needs else op for n, op in enumerate(plan.program)]
