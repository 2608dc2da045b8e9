"""Two pretrained networks for speech as plain torch, for `TorchBackbone(loader=speech_loaders.speech_embedding)`.

Each forward maps waveforms (B, T) at 16 kHz, zero-padded, and their lengths (B,), to frames (B, L, D) and their
lengths. `PYTHONPATH=benchmarks` makes the file importable; a run that names it needs `--trust speech_loaders`.
"""

import os

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from tl_modules import LogMel

SILENCE = 9600  # samples before and after a word, so that it occurs at each position in the 0.78 s of a frame
WIDTHS = (24,) * 3 + (48,) * 4 + (72,) * 4 + (96,) * 8
POOLS = {2: (2, 2), 6: (1, 2), 10: (2, 2), 14: (1, 2), 18: (2, 2)}  # pooling after these convolutions: time, frequency


class SpeechEmbedding(nn.Module):
    """Google's speech_embedding as openWakeWord ships it: convolutions over 76 log-mel frames, every 80 ms."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("re", torch.zeros(257, 1, 512))
        self.register_buffer("im", torch.zeros(257, 1, 512))
        self.register_buffer("mel", torch.zeros(257, 32))
        self.convs, inputs = nn.ModuleList(), 1
        for number, outputs in enumerate(WIDTHS):
            kernel = (3, 3) if number == 0 else (1, 3) if number % 2 else (3, 1)
            self.convs.append(nn.Conv2d(inputs, outputs, kernel, padding=(0, int(kernel[1] == 3))))
            inputs = outputs
        self.head = nn.Conv2d(96, 96, (3, 1), bias=False)

    def forward(self, waves, lengths):
        waves = F.pad(waves, (SILENCE, SILENCE))[:, None] * 32767  # it was trained on int16
        power = F.conv1d(waves, self.re, stride=160).square() + F.conv1d(waves, self.im, stride=160).square()
        decibels = 10 * (power.transpose(1, 2) @ self.mel).clamp(min=1e-10).log10()
        h = (torch.maximum(decibels, decibels.amax((1, 2), keepdim=True) - 80) / 10 + 2)[:, None]
        for number, conv in enumerate(self.convs):
            h = F.leaky_relu(conv(h), 0.2).clamp(min=-0.4)
            h = F.max_pool2d(h, POOLS[number]) if number in POOLS else h
        frames = self.head(h).squeeze(3).transpose(1, 2)
        return frames, ((lengths + 2 * SILENCE - 512) // 160 + 1 - 76) // 8 + 1


class SpeakerStates(nn.Module):
    """The states of Resemblyzer's speaker encoder (Wan et al., ICASSP 2018): LSTM layers on mel frames of 10 ms."""

    def __init__(self) -> None:
        super().__init__()
        self.mel = LogMel(16000, 40, n_fft=400, scale="slaney", norm=True, floor=1e-30)
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, waves, lengths):
        return self.lstm(self.mel(waves).exp())[0], self.mel.frames(lengths)  # it was trained on powers


def filled(module: nn.Module, weights: str | None) -> nn.Module:
    if weights is not None:
        module.load_state_dict(load_file(os.path.expandvars(weights)))
    return module


def speech_embedding(weights: str) -> nn.Module:
    """Loads the network; `weights` is a .safetensors file, which also contains the front end."""
    return filled(SpeechEmbedding(), weights)


def speaker_states(weights: str | None = None) -> nn.Module:
    """Loads the network; `weights` is a .safetensors file, None for random weights."""
    return filled(SpeakerStates(), weights)
