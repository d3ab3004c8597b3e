import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "feature(name, refused=False): the column of docs/families.md a test fills")
