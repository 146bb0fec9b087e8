import pytest
from tiny_model import read_tiny_parts


@pytest.fixture(autouse=True)
def tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    read_tiny_parts(monkeypatch)
