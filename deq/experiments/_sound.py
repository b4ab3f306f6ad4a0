"""Sounds to represent: a deterministic synthesised chord, or a WAV file."""

import math
import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ._run import SettingsError

RATE = 8192  # samples a second of the synthesised sound
CHORD = ((196.0, 0.0), (246.94, 0.05), (293.66, 0.1), (392.0, 0.15))  # Hz and onset of four plucked strings
_SCALES = {1: (np.uint8, 128), 2: (np.dtype("<i2"), 0), 4: (np.dtype("<i4"), 0)}  # bytes a sample: type, offset


def chord(count: int) -> Tensor:
    """(count,) samples of four strings, eight harmonics each, decaying; largest amplitude 1."""
    t = torch.arange(count, dtype=torch.float64) / RATE
    total = torch.zeros_like(t)
    for string, (pitch, onset) in enumerate(CHORD):
        since = (t - onset).clamp(min=0)
        envelope = torch.exp(-3 * since) * (1 - torch.exp(-200 * since))
        for harmonic in range(1, 9):
            phase = 2 * math.pi * ((string * 8 + harmonic) * 0.618 % 1)
            total += envelope * harmonic**-1.2 * torch.sin(2 * math.pi * pitch * harmonic * t + phase)
    return total / total.abs().max()


def read_wav(path: str, count: int) -> Tensor:
    """(count,) samples from the loudest stretch of a PCM WAV file of 8, 16 or 32 bits, channels averaged, largest
    amplitude 1. Raises SettingsError for what cannot be read, and for files shorter than that."""
    try:
        with wave.open(str(Path(path)), "rb") as file:
            size, channels = file.getsampwidth(), file.getnchannels()
            raw = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise SettingsError(
            f"audio: {path} is no WAV file that can be read: {str(error) or 'it ends too early'}"
        ) from error
    if size not in _SCALES:
        raise SettingsError(f"audio: {path} has {8 * size} bits a sample; 8, 16 and 32 are read")
    kind, offset = _SCALES[size]
    raw = raw[: len(raw) - len(raw) % (size * channels)]  # a file that was cut off may end within a sample
    sound = (np.frombuffer(raw, kind).astype(np.float64) - offset).reshape(-1, channels).mean(1)
    if len(sound) < count:
        raise SettingsError(f"audio: {path} has {len(sound)} samples; at least {count} are needed")
    power = np.concatenate(([0.0], np.cumsum(sound**2)))
    start = int(np.argmax(power[count:] - power[:-count]))
    stretch = torch.from_numpy(sound[start : start + count].copy())
    largest = float(stretch.abs().max())
    if largest == 0:
        raise SettingsError(f"audio: {path} is silent")
    return stretch / largest
