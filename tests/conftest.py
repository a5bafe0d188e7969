"""Two threads at most for every test process, and long tests first: the suite runs in parallel on small machines."""

import pytest
import torch

torch.set_num_threads(1)
LONG = ("test_zero_shot_shapes.py", "test_narrow.py", "test_export.py", "test_shards.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No process is left alone at the end with tests that take minutes."""
    items.sort(key=lambda item: not any(each in item.nodeid for each in LONG))
