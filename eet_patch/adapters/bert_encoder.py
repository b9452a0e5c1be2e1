"""BertEncoder and the encoders that are BertEncoder under another name."""

from __future__ import annotations

from typing import Any

from eet_patch.adapters import bert
from eet_patch.adapters.encoder import EncoderKind


def _layers(encoder: Any) -> tuple[Any, ...]:
    return tuple(encoder._modules["layer"]._modules.values())


def kind(layer_class: str) -> EncoderKind:
    return EncoderKind(layer_class, bert.layer_kind, _layers)
