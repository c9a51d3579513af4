"""Convolutions, pooling and resizing."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from zoo._case import Apply, Case, case


class _Headed(nn.Module):
    def __init__(self, layers: tuple[nn.Module, ...], classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.LazyLinear(classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def _conv(
    name: str,
    shape: tuple[int, ...],
    *layers: nn.Module,
    tags: tuple[str, ...] = (),
    loss: str = "cross_entropy",
) -> Case:
    """A convolutional net on inputs [N, ...], with a dense head of the width that comes out."""

    def make() -> nn.Module:
        model = _Headed(copy.deepcopy(layers), classes=2)
        with torch.no_grad():
            model.eval()(torch.zeros(shape))
        return model.train()

    return case(name, make, shape, loss, tags=("conv", *tags), gain=1.3)


def _two(first: nn.Module, second: nn.Module, activation: nn.Module | None = None) -> tuple[nn.Module, ...]:
    return first, nn.Tanh() if activation is None else activation, second, nn.Tanh()


K = ("kinked",)
CONV = [
    _conv("conv1d", (3, 2, 6), *_two(nn.Conv1d(2, 3, 3), nn.Conv1d(3, 2, 2))),
    _conv("conv2d", (2, 1, 5, 5), *_two(nn.Conv2d(1, 3, 2), nn.Conv2d(3, 2, 3))),
    _conv("conv2d_relu", (2, 1, 5, 5), *_two(nn.Conv2d(1, 3, 2), nn.Conv2d(3, 2, 3), nn.ReLU()), tags=K),
    _conv("conv3d", (2, 1, 3, 3, 3), *_two(nn.Conv3d(1, 2, 2), nn.Conv3d(2, 1, (1, 2, 1)))),
    _conv("conv2d_no_bias", (2, 1, 4, 4), *_two(nn.Conv2d(1, 3, 2, bias=False), nn.Conv2d(3, 2, 2, bias=False))),
    _conv("conv2d_strided", (2, 1, 7, 6), *_two(nn.Conv2d(1, 3, 3, stride=(2, 1)), nn.Conv2d(3, 2, 2, stride=2))),
    _conv(
        "conv2d_dilated",
        (2, 1, 6, 6),
        *_two(nn.Conv2d(1, 2, 2, dilation=2), nn.Conv2d(2, 2, 2, dilation=(1, 3))),
    ),
    _conv(
        "conv2d_padded",
        (2, 1, 4, 4),
        *_two(nn.Conv2d(1, 2, 3, padding=1, stride=2), nn.Conv2d(2, 2, 2, padding=(0, 1))),
    ),
    _conv(
        "conv2d_same",
        (2, 1, 3, 3),
        *_two(nn.Conv2d(1, 2, 2, padding="same"), nn.Conv2d(2, 1, 3, padding="same")),
    ),
    _conv(
        "conv2d_circular",
        (2, 1, 3, 3),
        *_two(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.Conv2d(2, 1, 2)),
    ),
    _conv(
        "conv2d_reflect",
        (2, 1, 3, 3),
        *_two(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.Conv2d(2, 1, 2)),
    ),
    _conv(
        "conv2d_replicate",
        (2, 1, 3, 3),
        *_two(nn.Conv2d(1, 2, 3, padding=1, padding_mode="replicate"), nn.Conv2d(2, 1, 2)),
    ),
    _conv("conv2d_grouped", (2, 2, 4, 4), *_two(nn.Conv2d(2, 4, 2, groups=2), nn.Conv2d(4, 2, 2, groups=2))),
    _conv("conv2d_depthwise", (2, 2, 4, 4), *_two(nn.Conv2d(2, 4, 3, groups=2, padding=1), nn.Conv2d(4, 2, 1))),
    _conv(
        "conv1d_dilated_strided",
        (2, 2, 9),
        *_two(nn.Conv1d(2, 2, 3, dilation=2, stride=2, padding=1), nn.Conv1d(2, 2, 2)),
    ),
    _conv(
        "conv_transpose1d",
        (2, 2, 3),
        *_two(nn.ConvTranspose1d(2, 3, 2), nn.ConvTranspose1d(3, 1, 2, stride=2)),
    ),
    _conv(
        "conv_transpose2d",
        (2, 1, 2, 2),
        *_two(nn.ConvTranspose2d(1, 2, 2), nn.ConvTranspose2d(2, 1, 2, padding=1)),
    ),
    _conv(
        "conv_transpose2d_strided",
        (2, 1, 2, 2),
        *_two(nn.ConvTranspose2d(1, 2, 3, stride=2, padding=1, output_padding=1), nn.Conv2d(2, 1, 2)),
    ),
    _conv(
        "conv_transpose2d_grouped",
        (2, 2, 2, 2),
        *_two(nn.ConvTranspose2d(2, 4, 2, groups=2, dilation=2), nn.Conv2d(4, 1, 2)),
    ),
    _conv("conv_transpose3d", (2, 1, 2, 2, 1), *_two(nn.ConvTranspose3d(1, 2, 2), nn.Conv3d(2, 1, 2))),
    _conv("unbatched_kernel_sizes", (2, 1, 4, 3), *_two(nn.Conv2d(1, 2, (3, 1)), nn.Conv2d(2, 2, (1, 3)))),
    _conv("max_pool1d", (2, 1, 7), nn.Conv1d(1, 3, 2), nn.MaxPool1d(2), nn.Tanh(), nn.Conv1d(3, 2, 2), tags=K),
    _conv("max_pool2d", (2, 1, 5, 5), nn.Conv2d(1, 3, 2), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2), tags=K),
    _conv(
        "max_pool2d_overlapping",
        (2, 1, 5, 5),
        nn.Conv2d(1, 2, 2),
        nn.SiLU(),
        nn.MaxPool2d(3, stride=1, padding=1),
        tags=K,
    ),
    _conv(
        "max_pool2d_after_relu",
        (2, 1, 5, 5),
        nn.Conv2d(1, 3, 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 2, 2),
        tags=K,
    ),
    _conv(
        "max_pool2d_dilated_ceil",
        (2, 1, 6, 6),
        nn.Conv2d(1, 2, 2),
        nn.Tanh(),
        nn.MaxPool2d(2, dilation=2, ceil_mode=True),
        tags=K,
    ),
    _conv("max_pool3d", (2, 1, 3, 3, 3), nn.Conv3d(1, 2, 2), nn.Tanh(), nn.MaxPool3d(2), tags=K),
    _conv("avg_pool1d", (2, 1, 6), nn.Conv1d(1, 3, 2), nn.Tanh(), nn.AvgPool1d(2), nn.Conv1d(3, 2, 2)),
    _conv("avg_pool2d", (2, 1, 5, 5), nn.Conv2d(1, 3, 2), nn.SiLU(), nn.AvgPool2d(2), nn.Tanh()),
    _conv(
        "avg_pool2d_padded",
        (2, 1, 4, 4),
        nn.Conv2d(1, 3, 2),
        nn.SiLU(),
        nn.AvgPool2d(2, padding=1, count_include_pad=False, ceil_mode=True),
        nn.Tanh(),
    ),
    _conv("avg_pool3d", (2, 1, 3, 3, 3), nn.Conv3d(1, 2, 2), nn.Tanh(), nn.AvgPool3d(2, stride=1)),
    _conv("adaptive_avg_pool1d", (2, 1, 6), nn.Conv1d(1, 3, 2), nn.Tanh(), nn.AdaptiveAvgPool1d(2), nn.Tanh()),
    _conv("adaptive_avg_pool2d", (2, 1, 5, 5), nn.Conv2d(1, 3, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1)),
    _conv(
        "adaptive_avg_pool2d_uneven",
        (2, 1, 6, 6),
        nn.Conv2d(1, 2, 2),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d((2, 3)),
        nn.Tanh(),
    ),
    _conv("adaptive_avg_pool3d", (2, 1, 3, 3, 3), nn.Conv3d(1, 2, 2), nn.Tanh(), nn.AdaptiveAvgPool3d((1, 2, 1))),
    _conv("adaptive_max_pool1d", (2, 1, 6), nn.Conv1d(1, 3, 2), nn.Tanh(), nn.AdaptiveMaxPool1d(2), tags=K),
    _conv(
        "adaptive_max_pool2d",
        (2, 1, 5, 5),
        nn.Conv2d(1, 3, 2),
        nn.Tanh(),
        nn.AdaptiveMaxPool2d((1, 2)),
        tags=K,
    ),
    _conv("adaptive_max_pool3d", (2, 1, 3, 3, 3), nn.Conv3d(1, 2, 2), nn.Tanh(), nn.AdaptiveMaxPool3d(1), tags=K),
    _conv("lp_pool2d", (2, 1, 4, 4), nn.Conv2d(1, 2, 2), nn.Sigmoid(), nn.LPPool2d(2, 2)),
    _conv("pixel_shuffle", (2, 1, 3, 3), nn.Conv2d(1, 4, 2), nn.Tanh(), nn.PixelShuffle(2), nn.Conv2d(1, 1, 2)),
    _conv("pixel_unshuffle", (2, 1, 4, 4), nn.Conv2d(1, 1, 3, padding=1), nn.Tanh(), nn.PixelUnshuffle(2)),
    _conv(
        "upsample_nearest",
        (2, 1, 2, 2),
        nn.Conv2d(1, 2, 2, padding=1),
        nn.Tanh(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(2, 1, 3),
    ),
    _conv(
        "upsample_bilinear",
        (2, 1, 3, 3),
        nn.Conv2d(1, 2, 2),
        nn.Tanh(),
        nn.Upsample(size=(3, 4), mode="bilinear", align_corners=False),
        nn.Tanh(),
    ),
    _conv(
        "upsample_bicubic",
        (2, 1, 3, 3),
        nn.Conv2d(1, 2, 2),
        nn.Tanh(),
        nn.Upsample(size=(3, 4), mode="bicubic", align_corners=True),
        nn.Tanh(),
    ),
    _conv(
        "upsample_linear",
        (2, 1, 4),
        nn.Conv1d(1, 2, 2),
        nn.Tanh(),
        nn.Upsample(size=5, mode="linear"),
        nn.Tanh(),
    ),
    _conv("unfold", (2, 1, 4, 4), nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Unfold(2), nn.Tanh()),
    _conv(
        "constant_pad",
        (2, 1, 3, 3),
        nn.Conv2d(1, 2, 2),
        nn.ConstantPad2d((1, 0, 0, 1), 0.7),
        nn.Tanh(),
        nn.Conv2d(2, 1, 2),
    ),
    _conv("channel_mean", (2, 1, 4, 4), nn.Conv2d(1, 3, 2), nn.Tanh(), Apply(lambda z: z.mean((2, 3)))),
    _conv(
        "conv_batch_norm_relu",
        (2, 1, 4, 4),
        nn.Conv2d(1, 2, 2),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Conv2d(2, 2, 2),
        tags=K,
    ),
    case(
        "fully_convolutional",
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 1)),
        (2, 1, 3, 3),
        tags=["conv"],
    ),
]
