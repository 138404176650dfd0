import numpy as np
import pytest


@pytest.fixture(scope="session")
def digits():
    """scikit-learn's digits as images: (1797, 8, 8, 1) uint8."""
    datasets = pytest.importorskip("sklearn.datasets")
    return (datasets.load_digits().images * 15.9375).astype(np.uint8)[..., None]
