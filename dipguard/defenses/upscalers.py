"""Networks that double an image's size, for the super-resolution defence: EDSR (its authors') and IMDN."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIV2K_MEAN = (0.4488, 0.4371, 0.4040)
"""Mean colour of EDSR's training images, in [0, 1]."""
FEATURES = 64


class EDSR(nn.Module):
    """EDSR baseline x2 (Lim et al. 2017): 16 residual blocks without BatchNorm, one long skip, PixelShuffle.

    Its parts have the names that its authors' weights have. Files may or may not hold the two fixed 1x1 convolutions
    that take the mean colour away and add it again.

    Args:
        stored_mean: whether the state dict has these two.
    """

    mean: Tensor

    def __init__(self, *, stored_mean: bool = True) -> None:
        super().__init__()
        self.stored_mean = stored_mean
        mean = 255 * torch.tensor(DIV2K_MEAN)
        self.register_buffer("mean", mean.view(1, 3, 1, 1), persistent=False)
        if stored_mean:
            self.sub_mean, self.add_mean = _shift(-mean), _shift(mean)
        self.head = nn.Sequential(_conv(3, FEATURES))
        self.body = nn.Sequential(*(_ResidualBlock() for _ in range(16)), _conv(FEATURES, FEATURES))
        grow = nn.Sequential(_conv(FEATURES, 4 * FEATURES), nn.PixelShuffle(2))
        self.tail = nn.Sequential(grow, _conv(FEATURES, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, 3, H, W] in [0, 1] -> [n, 3, 2H, 2W], not limited to [0, 1]."""
        x = images * 255
        first = self.head(self.sub_mean(x) if self.stored_mean else x - self.mean)
        y = self.tail(first + self.body(first))
        result: Tensor = (self.add_mean(y) if self.stored_mean else y + self.mean) / 255
        return result


class _ResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(FEATURES, FEATURES), nn.ReLU(), _conv(FEATURES, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.body(x)
        return result


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _shift(by: Tensor) -> nn.Conv2d:
    convolution = nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        convolution.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
        convolution.bias = nn.Parameter(by.clone())
    return convolution


class IMDN(nn.Module):
    """IMDN x2 (Hui et al. 2019), information multi-distillation: a small network, 694,404 parameters.

    Its parts have the names that its authors' weights have.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fea_conv = _conv(3, FEATURES)
        for number in range(6):
            self.add_module(f"IMDB{number + 1}", _DistillationBlock())
        self.c = nn.Sequential(nn.Conv2d(6 * FEATURES, FEATURES, 1), nn.LeakyReLU(0.05))
        self.LR_conv = _conv(FEATURES, FEATURES)
        self.upsampler = nn.Sequential(_conv(FEATURES, 12), nn.PixelShuffle(2))

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, 3, H, W] in [0, 1] -> [n, 3, 2H, 2W], not limited to [0, 1]."""
        first = self.fea_conv(images)
        outputs = [first]
        for number in range(6):
            outputs.append(self.get_submodule(f"IMDB{number + 1}")(outputs[-1]))
        together = self.LR_conv(self.c(torch.cat(outputs[1:], dim=1)))
        result: Tensor = self.upsampler(first + together)
        return result


class _DistillationBlock(nn.Module):
    """Four convolutions; each keeps 16 channels and passes the rest on, the last keeps all of its 16."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = _conv(FEATURES, FEATURES), _conv(48, FEATURES), _conv(48, FEATURES)
        self.c4 = _conv(48, 16)
        self.cca = _ContrastAttention()
        self.c5 = nn.Conv2d(FEATURES, FEATURES, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, passed = [], x
        for convolution in (self.c1, self.c2, self.c3):
            part, passed = F.leaky_relu(convolution(passed), 0.05).split((16, 48), dim=1)
            kept.append(part)
        together = torch.cat([*kept, self.c4(passed)], dim=1)
        result: Tensor = x + self.c5(self.cca(together))
        return result


class _ContrastAttention(nn.Module):
    """Scales each channel by what two layers make of its standard deviation plus mean over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_du = nn.Sequential(nn.Conv2d(FEATURES, 4, 1), nn.ReLU(), nn.Conv2d(4, FEATURES, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3), keepdim=True)
        contrast = ((x - mean) ** 2).mean(dim=(2, 3), keepdim=True).sqrt()
        result: Tensor = x * self.conv_du(contrast + mean)
        return result
