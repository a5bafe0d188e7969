"""timm without a network: its pretrained weights are made up, or cannot be fetched."""

from typing import Any

import pytest
import timm
from torch import nn


def made_up(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[nn.Module]:
    """Lets timm make up, at random, the weights that it would fetch, with `changes` of the settings; lists those models."""
    create, made = timm.create_model, []

    def create_offline(name: str, pretrained: bool = False, **settings: Any) -> nn.Module:
        model = create(name, pretrained=False, **settings | (changes if pretrained else {}))
        if pretrained:
            for parameter in model.parameters():
                nn.init.normal_(parameter)
            made.append(model)
        return model

    monkeypatch.setattr(timm, "create_model", create_offline)
    return made


def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every fetch fail."""
    create = timm.create_model

    def create_offline(name: str, pretrained: bool = False, **settings: Any) -> nn.Module:
        if pretrained:
            raise OSError("no route\nto host")
        return create(name, pretrained=False, **settings)

    monkeypatch.setattr(timm, "create_model", create_offline)
