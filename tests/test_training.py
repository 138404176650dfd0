import copy
import json
import logging
import math

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, ternarize, training
from diffusers_terdit.ops import dequantize
from tiny import randomize


FROZEN_UNIFORM = [0.5014364721147898, 0.648593774063379]
FROZEN_NORMAL = [1.2475111484527588, 1.2347158193588257]
FROZEN_ORDER = [6, 4, 7, 2, 3, 5, 1, 0]


def fresh_model(seed=0, **overrides):
    torch.manual_seed(seed)
    config = {
        "sample_size": 8,
        "in_channels": 1,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "ffn_dim": 32,
        "num_classes": 10,
    }
    return TerDiTTransformer2DModel(**{**config, **overrides})


@pytest.fixture
def image_folder(tmp_path):
    """Three plain images of two labels, in shades of 0, 10, 20 and 100, 110, 120."""
    for label, base in (("ant", 0), ("bee", 100)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 12), (base + 10 * i,) * 3).save(tmp_path / "images" / label / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def parquet(image_folder, tmp_path, monkeypatch):
    """The same images in a file of `datasets`."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    files = sorted(image_folder.rglob("*.png"))
    rows = [{"image": {"bytes": f.read_bytes(), "path": None}, "label": f.parent.name} for f in files]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data.parquet")
    return tmp_path / "data.parquet"


def optimizer_of(model, **kwargs):
    return torch.optim.AdamW(training.parameter_groups(model, **kwargs), lr=1e-2)


def take_steps(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        samples = training.normal(0, "test", range(4 * step, 4 * step + 4), (1, 8, 8))
        output = model(samples, torch.arange(4), torch.arange(4), return_dict=False)[0]
        (output[:, :1] - samples).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


class TestRandomNumbers:
    def test_numbers_are_a_function_of_seed_stream_and_position_only(self):
        together = training.normal(3, "noise", range(100, 110), (2, 3))
        apart = torch.cat([training.normal(3, "noise", [p], (2, 3)) for p in range(100, 110)])
        assert torch.equal(together, apart)
        together = training.uniform(3, "timestep", range(100, 110))
        apart = torch.cat([training.uniform(3, "timestep", [p]) for p in reversed(range(100, 110))]).flip(0)
        assert torch.equal(together, apart)

    def test_numbers_are_frozen(self):
        # A run that is resumed after an update of this package must go on with the numbers it began with.
        assert training.uniform(0, "timestep", [0, 10**12]).tolist() == FROZEN_UNIFORM
        assert training.normal(7, "noise", [5], (2,)).flatten().tolist() == FROZEN_NORMAL
        assert training.sample_order(8, 0, 1).tolist() == FROZEN_ORDER

    @pytest.mark.parametrize("other", [(1, "a", 0), (0, "b", 0), (0, "a", 1)], ids=["seed", "stream", "position"])
    def test_seed_stream_and_position_each_matter(self, other):
        seed, stream, position = other
        first, second = training.normal(0, "a", [0], (4000,))[0], training.normal(seed, stream, [position], (4000,))[0]
        assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 5 / math.sqrt(4000)

    def test_numbers_are_uniform_and_normal(self):
        number = training.uniform(0, "x", range(4000))
        assert 0 <= number.min() < number.max() < 1
        assert abs(number.mean() - 0.5) < 5 * math.sqrt(1 / 12 / 4000)
        noise = training.normal(0, "x", range(100), (100,))
        assert abs(noise.mean()) < 5 / 100
        assert abs(noise.var() - 1) < 5 * math.sqrt(2 / 1e4)

    def test_every_sample_comes_once_per_epoch_in_a_new_order(self):
        orders = [training.sample_order(1000, 0, epoch) for epoch in range(3)]
        assert all(np.array_equal(np.sort(order), np.arange(1000)) for order in orders)
        assert (orders[0] != orders[1]).mean() > 0.99
        assert (orders[1] != orders[2]).mean() > 0.99

    @pytest.mark.parametrize(("processes", "accumulation", "batch"), [(1, 1, 24), (2, 1, 12), (3, 4, 2), (1, 8, 3)])
    def test_any_split_of_a_step_takes_the_same_positions(self, processes, accumulation, batch):
        taken = [
            position
            for process in range(processes)
            for part in training.microbatch_positions(5, batch, accumulation, process, processes)
            for position in part
        ]
        assert sorted(taken) == list(range(5 * 24, 6 * 24))


class TestLearningRate:
    def test_warmup_rises_to_the_full_rate(self):
        factors = [training.learning_rate_factor(step, "constant", 100, warmup_steps=4) for step in range(6)]
        assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])

    def test_wsd_is_flat_and_then_falls_to_nothing(self):
        factors = [training.learning_rate_factor(step, "wsd", 100, decay_steps=20) for step in (0, 79, 80, 90, 99)]
        assert factors == pytest.approx([1, 1, 1, 0.5, 0.05])

    def test_cosine_is_half_at_half_time(self):
        factors = [training.learning_rate_factor(step, "cosine", 110, warmup_steps=10) for step in (10, 60, 109)]
        assert factors == pytest.approx([1, 0.5, 0], abs=1e-3)

    @pytest.mark.parametrize(("step", "rate"), [(0, 5e-4), (1_549_999, 5e-4), (1_550_000, 1e-4), (1_749_999, 1e-4)])
    def test_the_papers_two_phases(self, step, rate):
        factor = training.learning_rate_factor(step, "piecewise_constant", 1_750_000, step_rules="1:1550000,0.2")
        assert 5e-4 * factor == pytest.approx(rate)

    @pytest.mark.parametrize("rules", [None, "", "1:x,2", "1:2:3,4"])
    def test_rules_that_do_not_parse_are_shown(self, rules):
        with pytest.raises(ValueError, match="step_rules"):
            training.learning_rate_factor(0, "piecewise_constant", 10, step_rules=rules)

    def test_unknown_schedule_is_refused(self):
        with pytest.raises(ValueError, match="'linear'"):
            training.learning_rate_factor(0, "linear", 10)


class TestParameterGroups:
    def test_only_matrices_decay_and_scales_stand_alone(self):
        model = fresh_model()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = {
            group["name"]: {**group, "names": [names[id(p)] for p in group["params"]]}
            for group in training.parameter_groups(model, weight_decay=0.1, scale_lr_factor=0.5)
        }
        assert sorted(n for g in groups.values() for n in g["names"]) == sorted(names.values())
        assert all(name.endswith("weight_scale") for name in groups["scales"]["names"])
        assert len(groups["scales"]["names"]) == len(model.ternary_layers())
        assert {name: (g["weight_decay"], g["lr_factor"]) for name, g in groups.items()} == {
            "matrices": (0.1, 1.0),
            "vectors": (0.0, 1.0),
            "scales": (0.0, 0.5),
        }
        assert "class_embed.weight" in groups["vectors"]["names"]
        assert all(dict(model.named_parameters())[name].ndim == 2 for name in groups["matrices"]["names"])

    @pytest.mark.parametrize("granularity", ["row", 8])
    def test_scales_with_two_dimensions_do_not_decay(self, granularity):
        model = fresh_model(scale_granularity=granularity)
        matrices = training.parameter_groups(model, weight_decay=0.1)[0]["params"]
        assert not {id(p) for p in matrices} & {id(m.weight_scale) for m in model.ternary_layers().values()}

    def test_the_full_precision_twin_has_no_scales(self):
        groups = training.parameter_groups(fresh_model(ternary=False))
        assert [group["name"] for group in groups] == ["matrices", "vectors"]

    def test_frozen_parameters_are_left_out(self):
        model = fresh_model()
        model.proj_in.requires_grad_(False)
        grouped = {id(p) for group in training.parameter_groups(model) for p in group["params"]}
        assert id(model.proj_in.weight) not in grouped


class TestAverage:
    def test_average_follows_its_formula_and_leaves_the_model_alone(self):
        model, average = fresh_model(0), fresh_model(1)
        before, start = copy.deepcopy(model.state_dict()), copy.deepcopy(average.state_dict())
        training.update_ema(average, model, 0.9)
        for name, value in average.state_dict().items():
            torch.testing.assert_close(value, 0.9 * start[name] + 0.1 * before[name])
            assert torch.equal(model.state_dict()[name], before[name])

    def test_warmup_forgets_the_first_weights(self):
        assert training.ema_decay(0, 0.9999) == pytest.approx(0.1)
        assert training.ema_decay(90, 0.9999) == pytest.approx(0.91)
        assert training.ema_decay(10**7, 0.9999) == 0.9999


class TestStatistics:
    def test_shares_of_a_matrix_made_by_hand(self):
        model = fresh_model(num_layers=1)
        layers = model.ternary_layers()
        with torch.no_grad():
            for layer in layers.values():
                layer.weight.fill_(1.0)
            first = next(iter(layers.values()))
            first.weight.zero_()
            first.weight_scale.fill_(-3.0)
        statistics = training.ternary_statistics(model)
        total = sum(layer.weight.numel() for layer in layers.values())
        assert statistics["zero_share"] == pytest.approx(first.weight.numel() / total)
        assert statistics["dead_layers"] == [next(iter(layers))]
        assert statistics["scale_max"] == 3.0
        assert statistics["scale_negative_share"] == pytest.approx(1 / len(layers))
        assert statistics["near_threshold_share"] == 0
        assert "flip_share" not in statistics

    def test_weights_next_to_the_threshold_are_counted(self):
        model = fresh_model(num_layers=1)
        with torch.no_grad():
            for layer in model.ternary_layers().values():
                half = layer.weight.numel() // 2
                # Half of the weights at 1, half at 1/3: the mean is 2/3, and 1/3 is where rounding changes.
                layer.weight.copy_(torch.tensor([1.0, 1 / 3]).repeat(half).view_as(layer.weight))
        assert training.ternary_statistics(model)["near_threshold_share"] == 0.5

    @pytest.mark.parametrize("granularity", ["tensor", "row", 8])
    def test_flips_are_counted_since_the_codes_given(self, granularity):
        model = fresh_model(num_layers=1, scale_granularity=granularity)
        codes = training.packed_codes(model)
        assert training.ternary_statistics(model, codes)["flip_share"] == 0
        total = changed = 0
        for layer in model.ternary_layers().values():
            before = layer.ternary_weight()
            with torch.no_grad():
                layer.weight[0] *= -1  # magnitudes and thresholds stay
            changed += int((before != layer.ternary_weight()).sum())
            total += before.numel()
        assert training.ternary_statistics(model, codes)["flip_share"] == pytest.approx(changed / total)
        assert changed > 0

    def test_the_full_precision_twin_has_no_ternary_statistics(self):
        assert training.ternary_statistics(fresh_model(ternary=False)) == {}

    def test_gates_start_at_the_gain_of_the_adaln_norm(self):
        gates = training.gate_sizes(fresh_model(num_layers=3))
        assert [len(values) for values in gates.values()] == [3, 3]
        assert all(0.03 < value < 0.3 for values in gates.values() for value in values)


class TestFolders:
    def test_only_whole_checkpoints_are_found_and_the_oldest_go(self, tmp_path):
        for step in (100, 20, 3):
            (tmp_path / f"checkpoint-{step}").mkdir()
            (tmp_path / f"checkpoint-{step}" / training.STATE_NAME).write_text("{}")
        (tmp_path / "checkpoint-200.partial").mkdir()
        (tmp_path / "checkpoint-300").mkdir()  # empty
        assert [path.name for path in training.checkpoints(tmp_path)] == [
            "checkpoint-3",
            "checkpoint-20",
            "checkpoint-100",
        ]
        training.rotate_checkpoints(tmp_path, None)
        assert len(training.checkpoints(tmp_path)) == 3
        training.rotate_checkpoints(tmp_path, 2)
        assert [path.name for path in training.checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-100"]


class TestLog:
    def test_lines_after_the_step_and_torn_lines_are_cut(self, tmp_path):
        path = tmp_path / "log.jsonl"
        path.write_text('{"step": 1}\n{"step": 2, "loss": 0.5}\n{"step": 3}\n{"step": 2, "lo')
        training.cut_log(path, 2)
        assert path.read_text() == '{"step": 1}\n{"step": 2, "loss": 0.5}\n'
        assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]
        training.cut_log(tmp_path / "missing.jsonl", 2)


class TestCheckpoints:
    def test_training_goes_on_in_the_same_bits(self, tmp_path):
        model, average = fresh_model(), fresh_model()
        optimizer = optimizer_of(model)
        take_steps(model, optimizer, 2)
        training.save_checkpoint(tmp_path / "checkpoint-2", model, average, optimizer, {"step": 2})
        take_steps(model, optimizer, 2, start=2)

        resumed, resumed_average = fresh_model(1), fresh_model(2)
        resumed_optimizer = optimizer_of(resumed)
        state = training.load_checkpoint(tmp_path / "checkpoint-2", resumed, resumed_average, resumed_optimizer)
        assert state == {"step": 2}
        take_steps(resumed, resumed_optimizer, 2, start=2)
        for name, value in model.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name
        for name, value in average.state_dict().items():
            assert torch.equal(value, resumed_average.state_dict()[name]), name

    def test_raw_weights_are_the_models_own_tensors_by_name(self, tmp_path):
        model = fresh_model(scale_granularity="row")
        training.save_checkpoint(tmp_path / "checkpoint-0", model, model, optimizer_of(model), {})
        tensors = load_file(tmp_path / "checkpoint-0" / "model.safetensors")
        loaded = training.load_transformer(tmp_path / "checkpoint-0")
        assert tensors.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(value, tensors[name])
            assert torch.equal(value, loaded.state_dict()[name])

    def test_a_folder_that_is_no_checkpoint_is_refused(self, tmp_path):
        model = fresh_model()
        with pytest.raises(OSError, match="no checkpoint"):
            training.load_checkpoint(tmp_path, model, model, optimizer_of(model))

    def test_another_models_checkpoint_is_refused(self, tmp_path):
        model, deeper, wider = fresh_model(), fresh_model(num_layers=3), fresh_model(ffn_dim=64)
        training.save_checkpoint(tmp_path / "checkpoint-0", model, model, optimizer_of(model), {})
        with pytest.raises(ValueError, match=r"transformer_blocks\.2"):
            training.load_checkpoint(tmp_path / "checkpoint-0", deeper, deeper, optimizer_of(deeper))
        with pytest.raises(ValueError, match=r"\[32, 16\], the model's is \[64, 16\]"):
            training.load_checkpoint(tmp_path / "checkpoint-0", wider, wider, optimizer_of(wider))


class TestExport:
    def test_float_model_packed_export_and_loaded_pipeline_give_the_same_samples(self, tmp_path):
        model = fresh_model().eval()
        take_steps(model, optimizer_of(model), 3)
        before = copy.deepcopy(model.state_dict())
        exported = training.export_pipeline(model, tmp_path, id2label={i: str(i) for i in range(10)})
        loaded = TerDiTPipeline.from_pretrained(tmp_path)
        trained = TerDiTPipeline(model, training.training_scheduler())
        images = [
            pipe(
                [3, 7], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="latent"
            ).images
            for pipe in (trained, exported, loaded)
        ]
        assert torch.equal(images[0], images[1])
        assert torch.equal(images[0], images[2])
        assert loaded.transformer.config.weight_format == "packed"
        assert loaded.labels["7"] == 7
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_exporting_again_replaces_the_pipeline_and_keeps_other_files(self, tmp_path):
        (tmp_path / "checkpoint-1").mkdir()
        training.export_pipeline(fresh_model(0), tmp_path)
        training.export_pipeline(fresh_model(1), tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "checkpoint-1",
            "model_index.json",
            "scheduler",
            "transformer",
        ]
        codes = training.packed_codes(fresh_model(1))
        loaded = TerDiTPipeline.from_pretrained(tmp_path).transformer
        for name, layer in loaded.ternary_layers().items():
            assert torch.equal(layer.weight_packed, codes[name])

    def test_scales_stay_float32_in_a_half_precision_export(self, tmp_path):
        model = fresh_model()
        training.export_pipeline(model, tmp_path, dtype=torch.float16)
        dtypes = {
            n: t.dtype for n, t in load_file(tmp_path / "transformer/diffusion_pytorch_model.safetensors").items()
        }
        assert {d for n, d in dtypes.items() if n.endswith("weight_scale")} == {torch.float32}
        assert {d for n, d in dtypes.items() if n.endswith("weight_packed")} == {torch.uint8}
        assert dtypes["proj_in.weight"] == torch.float16

    def test_the_full_precision_twin_is_exported_as_it_is(self, tmp_path):
        model = fresh_model(ternary=False)
        training.export_pipeline(model, tmp_path)
        loaded = TerDiTPipeline.from_pretrained(tmp_path).transformer
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())

    def test_a_model_without_learned_variance_samples_with_the_schedulers_own(self, tmp_path):
        training.export_pipeline(fresh_model(learn_sigma=False), tmp_path)
        pipe = TerDiTPipeline.from_pretrained(tmp_path)
        assert pipe.scheduler.config.variance_type == "fixed_small"
        assert pipe([0], num_inference_steps=2, output_type="latent").images.isfinite().all()
        assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"][1] == "DDPMScheduler"


class TestImages:
    def test_the_middle_of_the_image_is_kept_at_the_asked_size(self):
        pixels = np.zeros((40, 80, 3), dtype=np.uint8)
        pixels[:, 20:60] = 255  # the middle square
        image = training.prepare_image(Image.fromarray(pixels), 16)
        assert image.shape == (3, 16, 16)
        assert image.dtype == torch.float32
        torch.testing.assert_close(image[:, :, 2:-2], torch.ones(3, 16, 12))
        assert training.prepare_image(Image.fromarray(pixels), 8, channels=1).shape == (1, 8, 8)

    @pytest.mark.parametrize("size", [(5, 9), (16, 16), (17, 16), (100, 33), (16, 31)])
    def test_any_size_of_image_fits(self, size):
        image = training.prepare_image(Image.new("RGB", size, (255, 0, 0)), 16)
        torch.testing.assert_close(image, torch.tensor([1.0, -1, -1]).view(3, 1, 1).expand(3, 16, 16))

    def test_labels_come_from_folder_names_in_order(self, image_folder):
        samples = training.ImageSamples.from_folder(image_folder, resolution=8)
        assert samples.id2label == {0: "ant", 1: "bee"}
        assert samples.labels == [0, 0, 0, 1, 1, 1]
        shade, label = samples[4]
        assert label == 1
        torch.testing.assert_close(shade, torch.full((3, 8, 8), 110 / 127.5 - 1))

    def test_a_corrupt_image_is_logged_and_the_next_one_taken(self, image_folder, caplog):
        (image_folder / "ant" / "1.png").write_bytes(b"not an image")
        samples = training.ImageSamples.from_folder(image_folder, resolution=8)
        with pytest.raises(OSError, match=r"image 1 .*1\.png.* cannot be read"):
            samples.read(1)
        diffusers_logger = logging.getLogger("diffusers")
        diffusers_logger.addHandler(caplog.handler)
        try:
            assert torch.equal(samples[1][0], samples[2][0])
        finally:
            diffusers_logger.removeHandler(caplog.handler)
        assert "1.png" in caplog.text

    def test_data_without_a_single_readable_image_is_an_error(self, tmp_path):
        (tmp_path / "ant").mkdir()
        (tmp_path / "ant" / "1.png").write_bytes(b"")
        samples = training.ImageSamples.from_folder(tmp_path, resolution=8)
        with pytest.raises(OSError, match="cannot be read"):
            samples[0]

    def test_a_folder_without_class_folders_is_refused(self, tmp_path):
        Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
        with pytest.raises(ValueError, match="folders named after their labels"):
            training.ImageSamples.from_folder(tmp_path, resolution=8)


class TestDatasets:
    def test_a_parquet_file_gives_the_images_of_its_folder(self, image_folder, parquet):
        dataset = training.open_dataset(str(parquet))
        samples = training.ImageSamples.from_dataset(dataset, resolution=8)
        expected = training.ImageSamples.from_folder(image_folder, resolution=8)
        assert samples.id2label == expected.id2label
        assert all(
            torch.equal(a[0], b[0]) and a[1] == b[1]
            for a, b in zip((samples[i] for i in range(6)), (expected[i] for i in range(6)), strict=True)
        )

    def test_labels_without_names_are_numbered(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        dataset = datasets.Dataset.from_dict({"image": [{"path": None, "bytes": b""}] * 3, "kind": [30, 10, 30]})
        samples = training.ImageSamples.from_dataset(dataset, label_column="kind", resolution=8)
        assert samples.labels == [1, 0, 1]
        assert samples.id2label == {0: "10", 1: "30"}

    def test_a_column_that_is_not_there_is_named_with_those_that_are(self, parquet):
        dataset = training.open_dataset(str(parquet))
        with pytest.raises(ValueError, match="no column 'class'; its columns are image, label"):
            training.ImageSamples.from_dataset(dataset, label_column="class", resolution=8)
        stream = training.open_dataset(str(parquet), streaming=True)
        with pytest.raises(ValueError, match="no column 'picture'"):
            training.ShardedStream(stream, "picture", "label", 0, resolution=8, flip=False)

    def test_a_data_set_that_does_not_load_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match="cannot be loaded"):
            training.open_dataset(str(tmp_path / "missing.parquet"))


class TestStream:
    rows = ((0, 1, 2), (10, 11), (), (20, 21, 22, 23))

    def take(self, positions, sizes=None, reads=None):
        def read(shard):
            if reads is not None:
                reads.append(shard)
            return self.rows[shard]

        sizes = {} if sizes is None else sizes
        return list(training.stream_samples(4, read, positions, seed=5, shard_sizes=sizes))

    def test_every_row_comes_once_per_epoch_in_a_new_order(self):
        rows = self.take(range(27))
        every = sorted(sum(self.rows, ()))
        assert [sorted(rows[i : i + 9]) for i in (0, 9, 18)] == [every] * 3
        assert rows[:9] != rows[9:18]

    @pytest.mark.parametrize("start", [0, 4, 8, 9, 14])
    def test_a_process_that_starts_anywhere_and_skips_sees_the_same_rows(self, start):
        everything = self.take(range(40))
        assert self.take(range(start, 40, 3)) == everything[start::3]

    def test_a_resumed_run_reads_only_the_shards_it_needs(self):
        sizes, reads = {}, []
        everything = self.take(range(9), sizes)
        assert sizes == {i: len(rows) for i, rows in enumerate(self.rows)}
        assert self.take([8], sizes, reads) == [everything[8]]
        assert len(reads) == 1

    def test_a_stream_without_samples_is_refused(self):
        with pytest.raises(ValueError, match="no samples"):
            next(training.stream_samples(2, lambda shard: [], [0], 0, {}))

    def test_a_streamed_data_set_holds_every_image_once_per_epoch(self, parquet):
        stream = training.ShardedStream(
            training.open_dataset(str(parquet), streaming=True), "image", "label", 0, resolution=8, flip=False
        )
        shades = [round(image.mean().item() * 127.5 + 127.5) for image, _ in stream.samples(range(12))]
        assert sorted(shades[:6]) == sorted(shades[6:]) == [0, 10, 20, 100, 110, 120]
        assert stream.id2label == {0: "ant", 1: "bee"}
        assert stream.shard_sizes == {0: 6}


class TestLatents:
    def test_latents_are_drawn_from_what_the_vae_says(self, tiny_vae):
        codec = training.LatentCodec(tiny_vae)
        assert codec.latent_shape(16, 3) == (4, 8, 8)
        images = training.normal(0, "images", range(2), (3, 16, 16)).clamp(-1, 1)
        noise = training.normal(0, "posterior", range(2), (4, 8, 8))
        with torch.no_grad():
            distribution = tiny_vae.encode(images).latent_dist
        expected = (distribution.mean + distribution.std * noise) * tiny_vae.config.scaling_factor
        batch = codec.encode({"samples": images, "posterior_noise": noise, "class_labels": torch.zeros(2)})
        torch.testing.assert_close(batch["samples"], expected)
        assert set(batch) == {"samples", "class_labels"}

    def test_decoding_undoes_the_scale_as_the_pipeline_does(self, tiny_vae, tiny_pipeline):
        pipe = tiny_pipeline(vae=True)
        call = {"num_inference_steps": 2, "class_labels": [1]}
        latents = pipe(generator=torch.Generator().manual_seed(0), output_type="latent", **call).images
        images = pipe(generator=torch.Generator().manual_seed(0), output_type="pt", **call).images
        torch.testing.assert_close(training.LatentCodec(pipe.vae).decode(latents), images)

    def test_pixels_stay_as_they_are(self):
        codec = training.LatentCodec()
        batch = {"samples": torch.ones(1, 1, 8, 8)}
        assert codec.encode(batch)["samples"] is batch["samples"]
        assert codec.latent_shape(8, 1) == (1, 8, 8)

    def test_a_folder_without_a_finished_cache_is_refused(self, tmp_path):
        with pytest.raises(OSError, match=r"cache_latents\.py"):
            training.LatentSamples(tmp_path)


class TestExamples:
    def examples(self, **kwargs):
        return training.Examples(training.Digits(train=True), 3, (1, 8, 8), 10, **kwargs)

    def test_an_example_is_a_function_of_its_position(self):
        first, again = self.examples(), self.examples()
        later = [again[position] for position in (4000, 10, 1497)]
        for example, position in zip(later, (4000, 10, 1497), strict=True):
            assert all(np.array_equal(example[key], value) for key, value in first[position].items())

    def test_an_epoch_holds_every_digit_once(self):
        examples = self.examples(class_dropout_prob=0.0)
        labels = [examples[position]["class_labels"] for position in range(1497)]
        assert sorted(labels) == sorted(examples.samples.labels)

    def test_labels_are_dropped_as_often_as_asked(self):
        examples = self.examples(class_dropout_prob=0.25)
        dropped = np.mean([examples[position]["class_labels"] == 10 for position in range(1497)])
        assert abs(dropped - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 1497)

    def test_timesteps_cover_their_range(self):
        examples = self.examples()
        times = [examples[position]["time"] for position in range(300)]
        assert all(isinstance(time, int) and 0 <= time < 1000 for time in times)
        assert min(times) < 30
        assert max(times) > 970
        examples = self.examples(continuous_time=True)
        times = [examples[position]["time"] for position in range(300)]
        assert all(time.dtype == np.float32 and 0 <= time <= 1 for time in times)

    def test_half_of_the_images_are_mirrored_where_that_is_allowed(self, image_folder):
        samples = training.ImageSamples.from_folder(image_folder, resolution=8, flip=True)
        samples.read = lambda index: torch.arange(8.0).expand(3, 8, 8)
        examples = training.Examples(samples, 0, (3, 8, 8), 2)
        mirrored = np.mean([examples[position]["samples"][0, 0, 0].item() == 7 for position in range(400)])
        assert abs(mirrored - 0.5) < 5 * math.sqrt(0.25 / 400)
        samples.flip = False
        assert not any(examples[position]["samples"][0, 0, 0] == 7 for position in range(50))

    def test_a_stream_gives_batches_of_the_same_kind(self, parquet):
        stream = training.ShardedStream(
            training.open_dataset(str(parquet), streaming=True), "image", "label", 0, resolution=8, flip=True
        )
        examples = training.Examples(stream, 0, (3, 8, 8), 2)
        batches = list(examples.stream(iter([range(0, 3), range(6, 9)])))
        assert batches[1]["samples"].shape == (3, 3, 8, 8)
        assert torch.equal(batches[1]["noise"], training.normal(0, "noise", range(6, 9), (3, 8, 8)))

    def test_the_last_digits_are_held_out(self):
        train, held_out = training.Digits(train=True), training.Digits(train=False)
        assert (len(train), len(held_out)) == (1497, 300)
        assert not (train.images[:, None] == held_out.images).flatten(2).all(2).any()
        assert train.images.min() == -1
        assert train.images.max() == 1


class TestStartingWeights:
    @pytest.mark.parametrize("granularity", ["tensor", "row", 8])
    def test_the_scale_is_the_least_squares_one(self, granularity):
        weight = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
        scale = training.least_squares_scale(weight, granularity)
        ternary = ternarize(weight, granularity)

        def error(candidate):
            return (dequantize(ternary, candidate) - weight).square().sum()

        assert all(error(scale) < error(scale * factor) for factor in (0.99, 1.01))

    def test_a_ternary_model_starts_from_full_precision(self):
        source, target = fresh_model(0, ternary=False), fresh_model(1)
        assert training.transfer_weights(source, target) == []
        for name, layer in target.ternary_layers().items():
            assert torch.equal(layer.weight, source.state_dict()[f"{name}.weight"])
            assert torch.equal(layer.weight_scale, training.least_squares_scale(layer.weight))
        assert torch.equal(target.proj_in.weight, source.proj_in.weight)

    def test_fine_tuning_starts_from_the_packed_codes(self):
        source, target = fresh_model(0).pack(), fresh_model(1)
        before = {name: layer.weight_packed.clone() for name, layer in source.ternary_layers().items()}
        training.transfer_weights(source, target)
        assert all(torch.equal(codes, before[name]) for name, codes in training.packed_codes(target).items())

    def test_a_full_precision_model_starts_from_ternary(self):
        source, target = randomize(fresh_model(0)), fresh_model(1, ternary=False)
        training.transfer_weights(source, target)
        inputs = (torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 10]))
        torch.testing.assert_close(target(*inputs).sample, source(*inputs).sample)

    def test_other_classes_get_a_fresh_label_table(self):
        source, target = fresh_model(0), fresh_model(1, num_classes=3)
        assert training.transfer_weights(source, target) == ["class_embed.weight"]

    def test_another_shape_is_refused(self):
        with pytest.raises(ValueError, match=r"\[32, 16\]"):
            training.transfer_weights(fresh_model(), fresh_model(ffn_dim=64))

    def test_gradual_ternarization_goes_from_full_precision_to_ternary(self):
        source, model = randomize(fresh_model(ternary=False)), fresh_model()
        training.transfer_weights(source, model)
        inputs = (torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 10]))
        ternary, names = model(*inputs).sample, set(model.state_dict())
        set_strength = training.gradual_ternarization(model)
        torch.testing.assert_close(model(*inputs).sample, source(*inputs).sample)
        set_strength(0.5)
        half = model(*inputs).sample
        assert not torch.allclose(half, ternary)
        assert not torch.allclose(half, source(*inputs).sample)
        half.sum().backward()
        assert all(layer.weight.grad.abs().sum() > 0 for layer in model.ternary_layers().values())
        assert all(layer.weight_scale.grad is not None for layer in model.ternary_layers().values())
        assert set(model.state_dict()) == names
        set_strength(1.0)
        assert torch.equal(model(*inputs).sample, ternary)
        assert not any("forward" in vars(layer) for layer in model.ternary_layers().values())


class TestCard:
    def test_the_card_says_how_to_load_and_how_it_was_trained(self):
        pipe = training.to_pipeline(fresh_model(), id2label={i: f"kind {i}" for i in range(10)})
        card = ModelCard(training.model_card(pipe, "me/tiny", {"steps": "12,000"}, ["samples/a.png"], license="mit"))
        assert card.data.license == "mit"
        assert card.data.library_name == "diffusers"
        assert {"terdit", "ternary", "1.58-bit", "class-conditional"} <= set(card.data.tags)
        assert 'from_pretrained("me/tiny")' in card.text
        assert "| steps | 12,000 |" in card.text
        assert "](samples/a.png)" in card.text
        assert "zero share" in card.text

    def test_the_full_precision_twin_is_not_called_ternary(self):
        card = training.model_card(training.to_pipeline(fresh_model(ternary=False)), "twin", {})
        assert "ternary" not in card.replace("terdit", "")
