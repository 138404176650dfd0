"""What this package leans on in diffusers and PEFT; `_diffusers.py` and `lora.py` are the files to mend."""

import inspect

import diffusers
import pytest
import transformers
from diffusers import ConfigMixin
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models import model_loading_utils
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

import diffusers_terdit
from diffusers_terdit import _diffusers
from diffusers_terdit.models.transformer_terdit import TerDiTBlock


class TestContactWithTheHost:
    """Each of these breaks when diffusers changes what this package leans on."""

    def test_tables_that_registration_writes_to_exist(self):
        assert LOADABLE_CLASSES["diffusers"]["ModelMixin"] == ["save_pretrained", "from_pretrained"]
        assert LOADABLE_CLASSES["diffusers_terdit"] == {"ModelMixin": ["save_pretrained", "from_pretrained"]}
        assert TransformerBlockRegistry.get(TerDiTBlock).return_hidden_states_index == 0

    @pytest.mark.parametrize(
        "name",
        [
            "TerDiTPipeline", "TerDiTTransformer2DModel", "TernaryLinear",  # ours, by name
            "ModelMixin", "SchedulerMixin", "DiffusionPipeline",  # the host's, where it looks for them
        ],
    )  # fmt: skip
    def test_classes_are_found_in_both_packages(self, name):
        assert getattr(diffusers, name) is getattr(diffusers_terdit, name)

    def test_registering_twice_and_over_a_class_of_the_host_changes_nothing(self):
        class AutoencoderKL:
            pass

        theirs, tables = diffusers.AutoencoderKL, {key: dict(value) for key, value in LOADABLE_CLASSES.items()}
        _diffusers.register("diffusers_terdit", classes=[AutoencoderKL], blocks=[TerDiTBlock], quantizers={})
        assert diffusers.AutoencoderKL is theirs
        assert tables == LOADABLE_CLASSES

    def test_quantizers_are_in_the_tables_of_both_hosts(self):
        for tables in (diffusers.quantizers.auto, transformers.quantizers.auto):
            assert tables.AUTO_QUANTIZATION_CONFIG_MAPPING["ternary"] is diffusers_terdit.TernaryConfig
            assert tables.AUTO_QUANTIZER_MAPPING.keys() > {"ternary", "torchao"}

    def test_config_hooks_that_are_overridden_exist(self):
        assert list(inspect.signature(ConfigMixin.extract_init_dict).parameters) == ["config_dict", "kwargs"]
        assert list(inspect.signature(ConfigMixin.to_json_string).parameters) == ["self"]
        assert "_supports_param_buffer_assignment" in inspect.getsource(model_loading_utils)

    def test_the_config_of_a_lora_is_made_where_it_is_looked_for(self):
        code = PeftAdapterMixin.load_lora_adapter.__code__
        assert "_create_lora_config" in code.co_names
        assert code.co_freevars == ()

    def test_a_key_leaves_the_config(self):
        vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=32)
        _diffusers.remove_from_config(vae, "latent_channels")
        assert "latent_channels" not in vae.config
        assert vae.config["block_out_channels"] == (32,)
