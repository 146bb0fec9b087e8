"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from trainings import Trainings


@pytest.fixture(scope="session")
def shapes_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def trainings(tmp_path: Path, shapes_data: Path) -> Trainings:
    return Trainings(tmp_path, shapes_data)
