import pytest
from tiny_model import TinyAutoencoder, TinyTextEncoder

from t2v.checkpoint import card


@pytest.fixture(autouse=True)
def tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(card.AUTOENCODERS, "Autoencoder", lambda: TinyAutoencoder.from_pretrained)
    monkeypatch.setitem(card.TEXT_ENCODERS, "TextEncoder.random", lambda: TinyTextEncoder.random)
