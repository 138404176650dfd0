"""What the double of the Hub must not do: leave this machine, or outlive a test."""

import os
import sys
from types import ModuleType

import pytest
from diffusers.utils import dynamic_modules_utils
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import get_session

from fake_hub import hub_in_process


def test_nothing_leaves_this_machine_or_outlives_the_fixture(tmp_path):
    def state():
        folders = constants.HF_HOME, constants.HF_HUB_CACHE, dynamic_modules_utils.HF_MODULES_CACHE
        return (HfApi().endpoint, *folders, *(os.environ.get(name) for name in ("HF_ENDPOINT", "HF_HOME")))

    before, late = state(), ModuleType("diffusers.late")
    with pytest.MonkeyPatch.context() as patch, hub_in_process(patch, tmp_path) as hub:
        assert HfApi().endpoint == hub.url
        assert all(str(tmp_path) in folder for folder in state()[1:4])
        late.HF_HUB_CACHE = constants.HF_HUB_CACHE  # a module that is imported only now copies what it finds
        patch.setitem(sys.modules, "diffusers.late", late)
        with pytest.raises(AssertionError, match="would leave this machine"):
            get_session().get("http://localhost:1/")
    assert state() == before
    assert late.HF_HUB_CACHE == constants.HF_HUB_CACHE
