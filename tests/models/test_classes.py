"""The class embedder of class-conditional latent diffusion."""

from __future__ import annotations

import pytest
import torch

from sfumato.models.classes import ClassEmbedder, ClassEmbedderConfig


def test_a_class_is_a_context_of_one_token() -> None:
    net = ClassEmbedder(ClassEmbedderConfig(num_classes=5, embed_dim=8))
    context = net(torch.tensor([4, 0, 4]))
    assert context.shape == (3, 1, 8)
    assert torch.equal(context[:, 0], net.embedding.weight[[4, 0, 4]])
    assert list(net.state_dict()) == ["embedding.weight"]


def test_the_published_table_has_1001_rows() -> None:
    with torch.device("meta"):
        net = ClassEmbedder(ClassEmbedderConfig())
    assert net.embedding.weight.shape == (1001, 512)


def test_config_survives_the_round_trip() -> None:
    c = ClassEmbedderConfig(num_classes=5, embed_dim=8)
    assert ClassEmbedderConfig.from_dict(c.to_dict()) == c
    assert c.to_dict()["_class_name"] == "ClassEmbedder"
    with pytest.raises(ValueError, match="unknown option n_classes = 5"):
        ClassEmbedderConfig.from_dict({"n_classes": 5})


def test_errors_name_the_value_and_the_mend() -> None:
    net = ClassEmbedder(ClassEmbedderConfig())
    for label in (1001, -1):
        with pytest.raises(ValueError, match=f"class label {label}; use 0 to 1000"):
            net(torch.tensor([1, label]))
    with pytest.raises(ValueError, match=r"torch\.float32 of shape \(1,\); give integers \(B,\)"):
        net(torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"of shape \(1, 1\); give integers \(B,\)"):
        net(torch.tensor([[1]]))
