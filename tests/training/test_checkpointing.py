import os
import time
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_terdit import training
from tiny import read_weights
from tiny_training import fresh_model, optimizer_of, take_steps


class TestFolders:
    def test_only_whole_checkpoints_are_found_and_the_oldest_go(self, tmp_path):
        for step in (100, 20, 3):
            (tmp_path / f"checkpoint-{step}").mkdir()
            (tmp_path / f"checkpoint-{step}" / training.checkpointing.STATE_NAME).write_text("{}")
        (tmp_path / "checkpoint-200.partial").mkdir()
        (tmp_path / "checkpoint-300").mkdir()  # empty
        assert [path.name for path in training.checkpointing.find(tmp_path)] == [
            "checkpoint-3",
            "checkpoint-20",
            "checkpoint-100",
        ]
        training.checkpointing.rotate(tmp_path, None)
        training.checkpointing.rotate(tmp_path, -1)
        assert len(training.checkpointing.find(tmp_path)) == 3
        training.checkpointing.rotate(tmp_path, 2)
        assert [path.name for path in training.checkpointing.find(tmp_path)] == ["checkpoint-20", "checkpoint-100"]


class TestLog:
    def test_lines_after_the_step_and_torn_lines_are_cut(self, tmp_path):
        path = tmp_path / "log.jsonl"
        path.write_bytes(
            b'{"step": 1}\n{"step": 2, "loss": 0.5}\n{"step": 3}\n{}\nnull\n[1]\n\xff\n{"step": "2"}\n{"step": 2, "lo'
        )
        training.checkpointing.cut_log(path, 2)
        assert path.read_text() == '{"step": 1}\n{"step": 2, "loss": 0.5}\n'
        assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]
        training.checkpointing.cut_log(tmp_path / "missing.jsonl", 2)


class TestCheckpoints:
    @pytest.mark.parametrize("kind", [torch.optim.AdamW, training.muon.Muon])
    def test_training_goes_on_in_the_same_bits(self, tmp_path, kind):
        model, average = fresh_model(), fresh_model()
        optimizer = optimizer_of(model, kind)
        take_steps(model, optimizer, 2)
        training.checkpointing.save(tmp_path / "checkpoint-2", model, average, optimizer, {"step": 2})
        take_steps(model, optimizer, 2, start=2)

        resumed, resumed_average = fresh_model(1), fresh_model(2)
        resumed_optimizer = optimizer_of(resumed, kind)
        state = training.checkpointing.load(tmp_path / "checkpoint-2", resumed, resumed_average, resumed_optimizer)
        assert state == {"step": 2}
        take_steps(resumed, resumed_optimizer, 2, start=2)
        for name, value in model.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name
        for name, value in average.state_dict().items():
            assert torch.equal(value, resumed_average.state_dict()[name]), name

    def test_raw_weights_are_the_models_own_tensors_by_name(self, tmp_path):
        model = fresh_model(scale_granularity="row")
        training.checkpointing.save(tmp_path / "checkpoint-0", model, model, optimizer_of(model), {})
        tensors = load_file(tmp_path / "checkpoint-0" / "model.safetensors")
        loaded = training.initialize.load_transformer(tmp_path / "checkpoint-0")
        assert tensors.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(value, tensors[name])
            assert torch.equal(value, loaded.state_dict()[name])

    def test_optimizer_tensors_are_named_after_their_parameters(self, tmp_path):
        model = fresh_model()
        model.proj_in.requires_grad_(False)
        optimizer = optimizer_of(model)
        take_steps(model, optimizer, 1)
        training.checkpointing.save(tmp_path / "checkpoint-1", model, model, optimizer, {})
        tensors = load_file(tmp_path / "checkpoint-1" / "optimizer.safetensors")
        expected = {
            f"{name}.{kind}": value
            for name, parameter in model.named_parameters()
            for kind, value in optimizer.state.get(parameter, {}).items()
        }
        assert {name.rpartition(".")[2] for name in tensors} == {"step", "exp_avg", "exp_avg_sq"}
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())

    def test_an_optimizer_of_8_bits_goes_on_in_the_same_bits(self, tmp_path):
        """Also where a weight had no gradient yet; small tensors stay in float32, and the step is a number."""
        optim = pytest.importorskip("bitsandbytes.optim")

        def start(seed):
            model = fresh_model(seed, num_attention_heads=8, ffn_dim=128)
            model.class_embed.requires_grad_(False)
            optimizer = optim.AdamW8bit(training.recipes.parameter_groups(model, weight_decay=0.1), lr=1e-2)
            optimizer.add_param_group({"params": model.class_embed.parameters()})
            return model, optimizer

        model, optimizer = start(0)
        take_steps(model, optimizer, 2)
        training.checkpointing.save(tmp_path / "checkpoint-2", model, model, optimizer, {})
        tensors = load_file(tmp_path / "checkpoint-2" / "optimizer.safetensors")
        name = "transformer_blocks.0.ff.gate_proj.weight"
        assert {key: tensor.dtype for key, tensor in tensors.items() if key.startswith(name + ".")} == {
            f"{name}.step": torch.int64,
            **{f"{name}.state{i}": torch.uint8 for i in (1, 2)},
            **{f"{name}.absmax{i}": torch.float32 for i in (1, 2)},
        }
        assert tensors["norm_out.linear.bias.state1"].dtype == torch.float32
        resumed, resumed_optimizer = start(1)
        for trained in (model, resumed):
            trained.class_embed.requires_grad_(True)
        training.checkpointing.load(tmp_path / "checkpoint-2", resumed, resumed, resumed_optimizer)
        take_steps(model, optimizer, 3)
        take_steps(resumed, resumed_optimizer, 3)
        for name, value in model.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name

    @pytest.mark.parametrize("steps", [0, 2])
    def test_a_parameter_without_a_gradient_so_far_starts_afresh(self, tmp_path, steps):
        """No step was taken, or the label table is trained from now on."""

        def start(seed):
            model = fresh_model(seed)
            model.class_embed.requires_grad_(False)
            optimizer = optimizer_of(model)
            optimizer.add_param_group({"params": model.class_embed.parameters()})
            return model, optimizer

        model, optimizer = start(0)
        take_steps(model, optimizer, steps)
        training.checkpointing.save(tmp_path / "checkpoint-2", model, model, optimizer, {})
        assert len(optimizer.state) == (len(list(model.parameters())) - 1 if steps else 0)
        resumed, resumed_optimizer = start(1)
        for trained in (model, resumed):
            trained.class_embed.requires_grad_(True)
        training.checkpointing.load(tmp_path / "checkpoint-2", resumed, resumed, resumed_optimizer)
        take_steps(model, optimizer, 2)
        take_steps(resumed, resumed_optimizer, 2)
        for name, value in model.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name


class TestDamage:
    """A damaged or changed checkpoint, or one of another network, is refused; nothing trains on from it."""

    @pytest.fixture
    def checkpoint(self, tmp_path):
        model = fresh_model()
        optimizer = optimizer_of(model)
        take_steps(model, optimizer, 2)
        training.checkpointing.save(tmp_path / "checkpoint-2", model, fresh_model(2), optimizer, {"step": 2})
        return tmp_path / "checkpoint-2"

    @staticmethod
    def resume(folder, **changes):
        model = fresh_model(1, **changes)
        return training.checkpointing.load(folder, model, fresh_model(1, **changes), optimizer_of(model))

    @pytest.mark.parametrize("name", ["model", "ema", "optimizer"])
    def test_a_flipped_bit(self, checkpoint, name):
        path, random = checkpoint / f"{name}.safetensors", np.random.default_rng(0)
        data = path.read_bytes()
        for place in random.integers(8 + int.from_bytes(data[:8], "little"), len(data), 10):
            damaged = bytearray(data)
            damaged[place] ^= 1 << int(random.integers(8))
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"{path}.*(the digest|NaN or infinity)"):
                self.resume(checkpoint)

    @pytest.mark.parametrize("edit", [
        lambda tensors: {name: tensor.to(torch.int8) for name, tensor in tensors.items()},
        lambda tensors: {},
        lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith("proj_in.")},
        lambda tensors: {**tensors, "proj_in.weight.momentum": torch.zeros(3)},
    ])  # fmt: skip
    @pytest.mark.parametrize("keep", [True, False])
    def test_other_tensors_in_the_optimizer(self, checkpoint, edit, keep):
        path = checkpoint / "optimizer.safetensors"
        tensors, metadata = read_weights(path)
        save_file(edit(tensors), path, metadata if keep else None)
        with pytest.raises(ValueError, match=str(path)):
            self.resume(checkpoint)

    @pytest.mark.parametrize(
        "text", ['{"step": 5}', "{}", '{"step": 9223372036854775808}', "[2]", '{"step": 2', "[" * 100_000]
    )
    def test_another_state(self, checkpoint, text):
        (checkpoint / "training_state.json").write_text(text)
        with pytest.raises(ValueError, match=r"training_state\.json"):
            self.resume(checkpoint)

    def test_files_of_two_checkpoints(self, checkpoint):
        model = fresh_model()
        training.checkpointing.save(checkpoint.with_name("other"), model, model, optimizer_of(model), {"step": 3})
        (checkpoint.with_name("other") / "ema.safetensors").replace(checkpoint / "ema.safetensors")
        with pytest.raises(ValueError, match=r"ema\.safetensors was not saved with this"):
            self.resume(checkpoint)

    @pytest.mark.parametrize(
        ("name", "value"), [("pos_embed_type", "rope+sincos2d"), ("activation_bits", 8), ("norm_eps", 1e-3)]
    )
    def test_another_network_of_the_same_shapes(self, checkpoint, name, value):
        with pytest.raises(ValueError, match=f"{checkpoint} was trained with {name}="):
            self.resume(checkpoint, **{name: value})


class TestBesideTraining:
    """A checkpoint is written by a thread from a copy, while the next steps change the weights."""

    def test_what_is_written_is_the_state_of_the_snapshot(self, tmp_path):
        model, average = fresh_model(), fresh_model(1)
        optimizer = optimizer_of(model)
        training.checkpointing.save(tmp_path / "checkpoint-1", model, average, optimizer, {"step": 1})
        write = training.checkpointing.snapshot(model, average, optimizer, {"step": 1})
        with torch.no_grad():
            for parameter in (*model.parameters(), *average.parameters()):
                parameter.zero_()
            for state in optimizer.state.values():
                for tensor in state.values():
                    tensor.fill_(7.0)
        writer = training.checkpointing.Writer()
        writer.start(lambda: write(tmp_path / "checkpoint-2"))
        writer.wait()
        for name in ("model", "ema", "optimizer"):
            first, second = (load_file(tmp_path / f"checkpoint-{i}" / f"{name}.safetensors") for i in (1, 2))
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first)

    def test_what_fails_on_the_thread_is_raised_where_it_is_waited_for(self):
        writer = training.checkpointing.Writer()
        writer.start(partial(os.mkdir, "/nowhere/at/all"))
        with pytest.raises(FileNotFoundError):
            writer.wait()
        writer.wait()  # it is raised once

    def test_the_next_one_waits_for_the_one_before(self):
        writer, order = training.checkpointing.Writer(), []
        writer.start(lambda: (time.sleep(0.2), order.append(1)))
        writer.start(lambda: order.append(2))
        writer.wait()
        assert order == [1, 2]
