import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, PartialState
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, training
from diffusers_terdit.checkpoints import bundled


EXAMPLES = Path(__file__).parents[2] / "examples"
SIZE = ["--num_layers", "1", "--num_attention_heads", "2", "--attention_head_dim", "8", "--ffn_dim", "16"]
TINY = [*SIZE, "--train_batch_size", "8", "--lr_warmup_steps", "1", "--lr_decay_steps", "2", "--logging_steps", "1"]
TINY += ["--num_validation_images", "2", "--num_inference_steps", "2"]
PARTS = ("model", "ema", "optimizer")


@pytest.fixture(scope="session")
def examples():
    sys.path.insert(0, str(EXAMPLES))
    import cache_latents
    import train_terdit

    yield {"train": train_terdit, "cache": cache_latents}
    sys.path.remove(str(EXAMPLES))


@pytest.fixture
def run(examples, tmp_path):
    """`run("--demo", ..., output_dir="out")`: train in this process; the output folder."""
    handler = signal.getsignal(signal.SIGTERM)

    def train(*args, output_dir="out", steps=4, script="train"):
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        folder = tmp_path / output_dir
        tiny = [*TINY, "--max_train_steps", str(steps)] if script == "train" else []
        examples[script].main([*tiny, *map(str, args), "--output_dir", str(folder)])
        return folder

    yield train
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def refused(run, capsys):
    """The message with which a run ends that must not start."""

    def message(*args, **kwargs):
        with pytest.raises(SystemExit) as error:
            run(*args, **kwargs)
        return f"{error.value}{capsys.readouterr().err}"

    return message


def records(folder, key="loss"):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def assert_same_bits(folder, other, parts=PARTS):
    for part in parts:
        tensors, others = load_file(folder / f"{part}.safetensors"), load_file(other / f"{part}.safetensors")
        assert tensors.keys() == others.keys()
        different = [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])]
        assert not different, (part, different)


def samples_of(folder):
    pipe = TerDiTPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    return pipe([0, 1], num_inference_steps=3, generator=generator, output_type="latent").images


class TestDemo:
    def test_a_run_leaves_a_packed_pipeline_checkpoints_a_log_samples_and_a_card(self, run):
        folder = run("--demo", "--checkpointing_steps", 1, "--validation_steps", 2, "--checkpoints_total_limit", 2)
        pipe = TerDiTPipeline.from_pretrained(folder)
        assert pipe.transformer.config.weight_format == "packed"
        assert pipe.labels["seven"] == 7
        assert [path.name for path in training.checkpointing.find(folder)] == ["checkpoint-3", "checkpoint-4"]
        assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step-2.png", "step-4.png"]
        assert "32 images seen" in (folder / "README.md").read_text()
        assert not list(folder.rglob("*.partial"))
        record = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
        assert record.keys() >= {
            "step", "images_seen", "loss", "lr", "grad_norm", "grad_norm_max", "images_per_second", "zero_share",
            "flip_share", "near_threshold_share", "scale_min", "scale_median", "scale_max", "scale_negative_share",
            "dead_layers", "gate_msa", "gate_mlp",
        }  # fmt: skip
        assert records(folder, "images_seen") == [8, 16, 24, 32]
        assert len(records(folder, "noise_error_held_out")) == 2

    def test_the_average_is_what_is_exported(self, run):
        folder = run("--demo", "--ema_decay", 0.5)
        average = TerDiTTransformer2DModel.from_config(
            TerDiTPipeline.from_pretrained(folder).transformer.config, weight_format="float"
        )
        average.load_state_dict(load_file(folder / "checkpoint-4" / "ema.safetensors"))
        exported = TerDiTPipeline.from_pretrained(folder).transformer.state_dict()
        for name, codes in training.statistics.packed_codes(average).items():
            assert torch.equal(exported[f"{name}.weight_packed"], codes)
        assert torch.equal(exported["proj_in.weight"], average.proj_in.weight)

    def test_a_resumed_run_ends_in_the_bits_of_an_unbroken_one(self, run, tmp_path):
        whole = run("--demo", "--checkpointing_steps", 2, output_dir="whole", steps=6)
        run("--demo", "--checkpointing_steps", 2, output_dir="parts", steps=6)
        for step in (4, 6):
            folder = tmp_path / "parts" / f"checkpoint-{step}"
            (folder / training.checkpointing.STATE_NAME).unlink()  # as if killed in step 4
        with pytest.raises(AssertionError):
            assert_same_bits(whole / "checkpoint-6", whole / "checkpoint-4")
        parts = run("--demo", "--resume_from_checkpoint", "latest", output_dir="parts", steps=6)
        assert_same_bits(whole / "checkpoint-6", parts / "checkpoint-6")
        assert torch.equal(samples_of(whole), samples_of(parts))
        assert records(parts, "step") == records(whole, "step")
        assert records(parts) == records(whole)

    def test_accumulated_batches_give_the_gradient_of_the_whole(self, run):
        whole = run("--demo", output_dir="whole")
        parts = run("--demo", "--train_batch_size", 2, "--total_batch_size", 8, output_dir="parts")
        for key in ("loss", "grad_norm"):
            assert records(parts, key) == pytest.approx(records(whole, key), rel=1e-5)

    def test_gradient_checkpointing_changes_no_bit(self, run):
        plain = run("--demo", output_dir="plain")
        saving = run("--demo", "--gradient_checkpointing", output_dir="saving")
        assert_same_bits(plain / "checkpoint-4", saving / "checkpoint-4")

    @pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a single core
    def test_loader_workers_change_no_bit(self, run):
        plain = run("--demo", output_dir="plain")
        workers = run("--demo", "--dataloader_num_workers", 2, output_dir="workers")
        assert_same_bits(plain / "checkpoint-4", workers / "checkpoint-4")

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("c++") is None, reason="Inductor needs a C++ compiler")
    @pytest.mark.filterwarnings("ignore")  # Inductor's own
    def test_compiled_blocks_train_alike(self, run):
        plain, compiled = run("--demo", output_dir="plain"), run("--demo", "--torch_compile", output_dir="compiled")
        assert records(compiled) == pytest.approx(records(plain), rel=1e-4)
        assert records(compiled, "grad_norm") == pytest.approx(records(plain, "grad_norm"), rel=1e-3)

    def test_weights_and_average_stay_float32_under_bfloat16(self, run):
        folder = run("--demo", "--mixed_precision", "bf16")
        for part in PARTS:
            tensors = load_file(folder / "checkpoint-4" / f"{part}.safetensors")
            assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        exact = run("--demo", output_dir="exact")
        assert records(folder) == pytest.approx(records(exact), rel=0.02)
        assert records(folder) != records(exact)

    def test_the_full_precision_twin_sees_the_same_data_and_noise(self, run):
        ternary, twin = run("--demo", output_dir="ternary"), run("--demo", "--ternary", "false", output_dir="twin")
        # A fresh model predicts zero, whatever its weights: the first loss is that of the noise alone.
        assert records(ternary)[0] == records(twin)[0]
        assert not TerDiTPipeline.from_pretrained(twin).transformer.config.ternary

    def test_a_stop_signal_saves_and_the_run_goes_on(self, run, examples, monkeypatch):
        whole = run("--demo", output_dir="whole")
        update, calls = training.ema.update, []

        def stop_in_second_step(*args):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(*args)

        monkeypatch.setattr(training.ema, "update", stop_in_second_step)
        folder = run("--demo", output_dir="stopped")
        assert [path.name for path in training.checkpointing.find(folder)] == ["checkpoint-2"]
        assert not (folder / "model_index.json").exists()
        monkeypatch.undo()
        run("--demo", "--resume_from_checkpoint", "latest", output_dir="stopped")
        assert_same_bits(whole / "checkpoint-4", folder / "checkpoint-4")

    def test_a_loss_that_is_no_number_ends_the_run_and_writes_nothing(self, run, tmp_path):
        with pytest.raises(FloatingPointError, match=r"last checkpoint is of step \d"):
            run("--demo", "--learning_rate", 1e30, "--checkpointing_steps", 1, steps=20)
        for path in training.checkpointing.find(tmp_path / "out"):
            assert all(t.isfinite().all() for t in load_file(path / "model.safetensors").values()), path
        assert not (tmp_path / "out" / "model_index.json").exists()

    def test_a_full_disk_is_an_error_and_the_last_checkpoint_stays(self, run, tmp_path, monkeypatch):
        save_file, calls = training.checkpointing.save_file, []

        def full_after_two_files(*args, **kwargs):
            calls.append(1)
            if len(calls) > 4:
                raise OSError(28, "No space left on device")
            return save_file(*args, **kwargs)

        monkeypatch.setattr(training.checkpointing, "save_file", full_after_two_files)
        folder = tmp_path / "out"
        flags = ["--checkpointing_steps", "1", "--max_train_steps", "4", "--output_dir", str(folder)]
        monkeypatch.setattr(sys, "argv", ["train_terdit.py", "--demo", *TINY, *flags])
        message = rf"^train_terdit.py: {folder / 'checkpoint-2'} cannot be written: No space left on device. Make room"
        with pytest.raises(SystemExit, match=message):  # one line of the command
            runpy.run_path(str(EXAMPLES / "train_terdit.py"), run_name="__main__")
        assert [path.name for path in sorted((tmp_path / "out").glob("checkpoint*"))] == ["checkpoint-1"]

    def test_a_run_that_ends_between_saving_and_validating_validates_when_it_goes_on(self, run, tmp_path, monkeypatch):
        class Killed(BaseException): ...

        def kill(*args):
            raise Killed

        whole = run("--demo", output_dir="whole")
        with monkeypatch.context() as patch:
            patch.setattr(training.export, "image_grid", kill)
            with pytest.raises(Killed):
                run("--demo", "--checkpointing_steps", 2)
        assert not (tmp_path / "out" / "samples" / "step-4.png").exists()
        folder = run("--demo", "--resume_from_checkpoint", "latest", "--checkpoints_total_limit", 1)
        assert [path.name for path in training.checkpointing.find(folder)] == ["checkpoint-4"]
        assert records(folder, "noise_error") == records(whole, "noise_error")
        assert len(records(whole, "noise_error")) == 1
        picture = Path("samples", "step-4.png")
        assert (folder / picture).read_bytes() == (whole / picture).read_bytes()
        run("--demo", "--resume_from_checkpoint", "latest")
        assert len(records(folder, "noise_error")) == 1

    @pytest.mark.slow
    def test_a_folder_that_takes_no_file_ends_the_command_with_one_line(self, tmp_path):
        """The real thing: the system refuses to write more than 1,000 bytes into a file."""
        limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        program = f"{limit} sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
        command = [sys.executable, "-c", program, EXAMPLES / "train_terdit.py", "--demo", *TINY]
        command += ["--max_train_steps", 1, "--output_dir", tmp_path]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        message = f"train_terdit.py: {tmp_path / 'checkpoint-1'} cannot be written: File too large. Make room there"
        assert [line for line in done.stderr.splitlines() if line.startswith(message)]

    def test_a_feature_network_gives_a_frechet_distance(self, run, tmp_path, monkeypatch):
        (tmp_path / "my_features.py").write_text("import torch\n\n\ndef flat():\n    return torch.nn.Flatten()\n")
        monkeypatch.syspath_prepend(tmp_path)
        flags = ("--feature_network", "my_features:flat", "--frechet_steps", 2, "--num_frechet_images", 20)
        distances = records(run("--demo", *flags), "frechet_distance")
        assert len(distances) == 2
        assert all(0 < distance < 100 for distance in distances)

    def test_push_sends_the_pipeline_and_the_card_but_no_checkpoints(self, run, fake_hub, caplog, capfd, tmp_path):
        caplog.set_level("DEBUG")
        folder = run("--demo", "--push_to_hub", "--hub_model_id", "someone/digits", "--hub_token", fake_hub.token)
        files = fake_hub.repos["someone/digits"].files()
        assert {"README.md", "model_index.json", "transformer/config.json"} <= set(files)
        assert not [name for name in files if "checkpoint" in name]
        assert b'from_pretrained("someone/digits")' in files["README.md"]
        printed = caplog.text + "".join(capfd.readouterr())
        assert "pushed to someone/digits" in printed
        assert fake_hub.token not in printed
        kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert len(kept) > len(files)
        for name, data in (files | kept).items():
            assert fake_hub.token.encode() not in data, name
            assert str(tmp_path).encode() not in data, name

    def test_trackers_get_no_token_and_no_path(self, examples, tmp_path):
        flags = ["--train_data_dir", str(tmp_path), "--hub_token", "hf_secret", "--init_from", "someone/model"]
        args = examples["train"].parse_args([*flags, "--output_dir", str(tmp_path / "later")])
        settings = examples["train"].tracked(args)
        assert (settings["train_data_dir"], settings["output_dir"]) == (tmp_path.name, "later")
        assert (settings["init_from"], settings["learning_rate"]) == ("someone/model", "0.0005")
        assert not [value for value in settings.values() if "hf_secret" in value or str(tmp_path) in value]


class TestActivations:
    def test_a_model_trained_with_8_bit_activations_says_so_and_samples_with_them(self, run):
        folder = run("--demo", "--activation_bits", 8)
        pipe = TerDiTPipeline.from_pretrained(folder)
        assert pipe.transformer.config.activation_bits == 8
        trained = training.initialize.load_transformer(folder / "checkpoint-4")
        assert trained.config.activation_bits == 8
        assert records(folder) != records(run("--demo", output_dir="float"))
        average = TerDiTTransformer2DModel.from_config(trained.config)
        average.load_state_dict(load_file(folder / "checkpoint-4" / "ema.safetensors"))
        inputs = (torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 10]))
        assert torch.equal(average.eval()(*inputs).sample, pipe.transformer(*inputs).sample)


class TestLosses:
    @pytest.mark.parametrize(
        "flags",
        [("--learn_sigma", "false"), ("--snr_gamma", 5), ("--adaln_norm", "false")],
        ids=lambda flags: flags[0],
    )
    def test_options_train_and_sample(self, run, flags):
        folder = run("--demo", *flags)
        assert samples_of(folder).isfinite().all()

    def test_a_flow_model_is_saved_with_its_scheduler(self, run):
        folder = run("--demo", "--flow_matching")
        assert isinstance(TerDiTPipeline.from_pretrained(folder).scheduler, FlowMatchEulerDiscreteScheduler)
        assert not TerDiTPipeline.from_pretrained(folder).transformer.config.learn_sigma
        assert samples_of(folder).isfinite().all()


class TestStart:
    def test_from_full_precision_by_degrees_and_with_a_teacher(self, run):
        dense = run("--demo", "--ternary", "false", "--learning_rate", 0.02, output_dir="dense", steps=12)
        start = ("--demo", "--init_from", dense)
        folder = run(*start, "--ternary_warmup_steps", 3, "--teacher", dense, output_dir="by_degrees")
        pipe = TerDiTPipeline.from_pretrained(folder)
        assert pipe.transformer.config.weight_format == "packed"
        # At strength 0 the student is its teacher, so the first loss is the teacher's own.
        assert records(folder)[0] < 1.1 * records(run(*start, "--ternary", "false", output_dir="again"))[0]
        names = load_file(folder / "checkpoint-4" / "model.safetensors").keys()
        assert (
            names
            == TerDiTTransformer2DModel.from_config(pipe.transformer.config, weight_format="float").state_dict().keys()
        )

    def test_a_teacher_of_other_classes_is_refused(self, refused, tmp_path, tiny_pipeline):
        tiny_pipeline(num_classes=3).save_pretrained(tmp_path / "three")
        assert "knows 3 classes, the data has 10" in refused("--demo", "--teacher", tmp_path / "three")

    def test_a_packed_model_is_fine_tuned_from_its_codes(self, run):
        first = run("--demo", output_dir="first")
        second = run("--demo", "--init_from", first, "--learning_rate", 0, output_dir="second")
        assert torch.equal(samples_of(first), samples_of(second))


class TestData:
    @pytest.fixture
    def image_folder(self, tmp_path):
        generator = np.random.default_rng(0)
        for label in ("ant", "bee"):
            (tmp_path / "images" / label).mkdir(parents=True)
            for i in range(10):
                pixels = generator.integers(0, 255, (20, 18, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.png")
        return tmp_path / "images"

    @pytest.fixture
    def vae(self, tiny_vae, tmp_path):
        tiny_vae.save_pretrained(tmp_path / "vae")
        return tmp_path / "vae"

    @pytest.fixture
    def parquet(self, image_folder, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
        rows = [
            {"image": {"bytes": file.read_bytes(), "path": None}, "label": file.parent.name}
            for file in sorted(image_folder.rglob("*.png"))
        ]
        dataset = datasets.Dataset.from_list(rows, features=features)
        (tmp_path / "parquet").mkdir()
        for i in range(4):
            dataset.shard(4, i).to_parquet(tmp_path / "parquet" / f"train-{i}.parquet")
        return tmp_path / "parquet"

    def test_class_folders_with_a_corrupt_image_train_to_the_end(self, run, image_folder):
        (image_folder / "ant" / "3.png").write_bytes(b"no image")
        folder = run("--train_data_dir", image_folder, "--resolution", 16, "--random_flip")
        assert TerDiTPipeline.from_pretrained(folder).labels == {"ant": 0, "bee": 1}

    def test_a_data_set_gives_the_run_of_its_folder(self, run, image_folder, parquet):
        flags = ("--resolution", 16, "--random_flip")
        from_folder = run("--train_data_dir", image_folder, *flags, output_dir="folder")
        from_dataset = run("--dataset_name", parquet, *flags, output_dir="dataset")
        assert records(from_dataset) == records(from_folder)

    def test_a_resumed_stream_loses_and_repeats_no_sample(self, run, parquet, tmp_path):
        flags = ("--dataset_name", parquet, "--streaming", "--resolution", 16, "--checkpointing_steps", 3)
        whole = run(*flags, output_dir="whole", steps=6)
        run(*flags, output_dir="parts", steps=6)
        (tmp_path / "parts" / "checkpoint-6" / training.checkpointing.STATE_NAME).unlink()
        parts = run(*flags, "--resume_from_checkpoint", "latest", output_dir="parts", steps=6)
        assert_same_bits(whole / "checkpoint-6", parts / "checkpoint-6")

    def test_cached_latents_train_as_the_images_do(self, run, image_folder, vae, refused):
        common = ("--pretrained_vae_model_name_or_path", vae, "--resolution", 16)
        cache = ("--train_data_dir", image_folder, *common, "--shard_size", 6, "--batch_size", 4)
        latents = run(*cache, "--dtype", "float32", output_dir="latents", script="cache")
        assert len(list(latents.glob("*.safetensors"))) == 4
        online = run("--train_data_dir", image_folder, "--random_flip", *common, output_dir="online")
        cached = run("--train_latents_dir", latents, output_dir="cached")
        assert records(cached) == pytest.approx(records(online), rel=1e-4)
        assert TerDiTPipeline.from_pretrained(online).vae is not None
        assert TerDiTPipeline.from_pretrained(cached).vae is None
        assert not (cached / "samples").exists()
        network = ("--feature_network", "torch.nn:Flatten", "--frechet_steps", 2)
        assert "--pretrained_vae" in refused("--train_latents_dir", latents, *network, output_dir="no_vae")

        half = run(*cache, output_dir="half", script="cache")
        assert records(run("--train_latents_dir", half, output_dir="c2")) == pytest.approx(records(online), rel=1e-2)

    def test_a_killed_cache_goes_on_and_leaves_out_what_cannot_be_read(self, run, image_folder, vae, refused):
        (image_folder / "ant" / "3.png").write_bytes(b"no image")
        flags = ("--train_data_dir", image_folder, "--pretrained_vae_model_name_or_path", vae, "--resolution", 16)
        flags += ("--shard_size", 6)
        latents = run(*flags, output_dir="latents", script="cache")
        before = (latents / "latents-00001.safetensors").read_bytes()
        (latents / "latents-00002.safetensors").unlink()
        (latents / training.data.LATENTS_NAME).unlink()
        run(*flags, output_dir="latents", script="cache")
        samples = training.data.LatentSamples(latents)
        assert len(samples) == 19
        assert [samples[i][1] for i in range(19)] == [0] * 9 + [1] * 10
        assert (latents / "latents-00001.safetensors").read_bytes() == before
        assert "Take another" in refused(*flags, "--no_flip", output_dir="latents", script="cache")


class TestRefusals:
    def test_no_data(self, refused):
        assert "--demo, --train_data_dir, --dataset_name, --train_latents_dir" in refused()
        assert "pass one of" in refused("--demo", "--train_data_dir", "x")

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--demo", "--ternary", "yes"), "expected true or false"),
            (("--demo", "--preset", "terdit-600m"), "brings its own model"),
            (("--demo", "--streaming"), "--dataset_name"),
            (("--demo", "--frechet_steps", 5), "--feature_network"),
            (("--demo", "--flow_matching", "--snr_gamma", 5), "--snr_gamma"),
            (("--demo", "--ternary_warmup_steps", 5), "--init_from"),
            (("--demo", "--activation_bits", 8, "--ternary", "false"), "--activation_bits"),
            (("--demo", "--total_batch_size", 12), "no multiple of 1 process"),
            (("--demo", "--lr_scheduler", "linear"), "invalid choice"),
            (("--demo", "--report_to", "wandb"), "not installed"),
        ],
        ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
    )
    @pytest.mark.filterwarnings("ignore:.*no supported trackers")
    def test_flags_that_do_not_go_together(self, refused, flags, message):
        assert message in refused(*flags)

    def test_an_output_folder_with_a_run_in_it(self, run, refused):
        run("--demo")
        assert "--resume_from_checkpoint latest" in refused("--demo")

    def test_a_resumed_run_of_another_batch_size_or_seed(self, run, refused):
        run("--demo")
        flags = ("--demo", "--resume_from_checkpoint", "latest")
        assert "--total_batch_size 8 --seed 0" in refused(*flags, "--train_batch_size", 4, steps=8)
        assert "--total_batch_size 8 --seed 0" in refused(*flags, "--seed", 1, steps=8)

    def test_an_empty_folder(self, run, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="holds no images"):
            run("--train_data_dir", tmp_path / "empty")


class TestPresets:
    @pytest.mark.parametrize(
        ("name", "batch", "steps", "drop"),
        [("terdit-600m", 256, 1_750_000, 1_550_000), ("terdit-4.2b", 512, 1_180_000, 550_000)],
    )
    def test_the_papers_numbers(self, examples, name, batch, steps, drop):
        args = examples["train"].parse_args(["--preset", name, "--train_latents_dir", "x"])
        assert (args.total_batch_size, args.max_train_steps, args.ema_decay) == (batch, steps, 0.9999)
        rate = [
            args.learning_rate
            * training.recipes.learning_rate_factor(step, args.lr_scheduler, steps, step_rules=args.lr_step_rules)
            for step in (0, drop - 1, drop, steps - 1)
        ]
        assert rate == pytest.approx([5e-4, 5e-4, 1e-4, 1e-4])
        width = args.num_attention_heads * args.attention_head_dim
        assert (args.num_layers, width) == {"terdit-600m": (16, 1536), "terdit-4.2b": (32, 3072)}[name]

    def test_the_ablation_keeps_one_learning_rate(self, examples):
        flags = [
            "--preset",
            "ablation",
            "--train_latents_dir",
            "x",
            "--feature_network",
            "a:b",
            "--learning_rate",
            "1e-3",
        ]
        args = examples["train"].parse_args(flags)
        assert (args.total_batch_size, args.lr_scheduler, args.learning_rate) == (256, "constant", 1e-3)
        assert args.frechet_steps == 100_000


def launch(folder, *args, processes=1, steps=6, wait=True):
    """Train in new processes, one thread each; the finished process, with stdout and stderr together."""
    command = [sys.executable, EXAMPLES / "train_terdit.py", "--demo", *TINY, "--max_train_steps", steps]
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes]
        command[:1] = [*torchrun, "--rdzv_endpoint", "localhost:0", "--rdzv_backend", "c10d"]
    command = [str(part) for part in [*command, *args, "--output_dir", folder]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    if not wait:
        return process
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize("path", sorted((EXAMPLES / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    config = load_config_from_file(str(path))
    assert config.distributed_type in ("NO", "MULTI_GPU")
    assert config.mixed_precision in ("no", "bf16")


class TestProcesses:
    def test_two_processes_are_two_and_train_as_one(self, run, tmp_path):
        one = run("--demo", "--train_batch_size", 16, "--checkpointing_steps", 3, output_dir="one", steps=20)
        flags = ("--checkpointing_steps", 3, "--checkpoints_total_limit", 9)
        output = launch(tmp_path / "two", *flags, processes=2, steps=20)
        assert "2 process(es)" in output
        two = tmp_path / "two"
        assert records(two, "grad_norm")[0] == pytest.approx(records(one, "grad_norm")[0], rel=1e-6)
        assert records(two) == pytest.approx(records(one), rel=1e-4)
        assert records(two, "images_seen") == records(one, "images_seen")

        # Resumed on two processes: the same bits. On one: a checkpoint like any other.
        (tmp_path / "resumed").mkdir()
        (two / "checkpoint-15").rename(tmp_path / "resumed" / "checkpoint-15")
        launch(tmp_path / "resumed", *flags, "--resume_from_checkpoint", "latest", processes=2, steps=20)
        assert_same_bits(two / "checkpoint-20", tmp_path / "resumed" / "checkpoint-20")
        (tmp_path / "one_again").mkdir()
        (two / "checkpoint-12").rename(tmp_path / "one_again" / "checkpoint-12")
        run("--demo", "--train_batch_size", 16, "--resume_from_checkpoint", "latest", output_dir="one_again", steps=20)
        assert records(tmp_path / "one_again") == pytest.approx(records(two)[12:], rel=1e-4)

    def test_sharded_processes_train_as_one_and_export_the_same(self, run, tmp_path):
        one = run("--demo", "--train_batch_size", 16, "--checkpointing_steps", 3, output_dir="one", steps=6)
        output = launch(tmp_path / "sharded", "--fsdp", "--checkpointing_steps", 3, processes=2, steps=6)
        assert "2 process(es)" in output
        sharded = tmp_path / "sharded"
        assert records(sharded) == pytest.approx(records(one), rel=1e-4)
        assert records(sharded, "zero_share") == pytest.approx(records(one, "zero_share"), abs=2e-3)
        assert samples_of(sharded).isfinite().all()

        (tmp_path / "resumed").mkdir()
        (sharded / "checkpoint-3").rename(tmp_path / "resumed" / "checkpoint-3")
        launch(tmp_path / "resumed", "--fsdp", "--resume_from_checkpoint", "latest", processes=2, steps=6)
        assert_same_bits(sharded / "checkpoint-6", tmp_path / "resumed" / "checkpoint-6")
        (one / "checkpoint-6" / training.checkpointing.STATE_NAME).unlink()
        run("--demo", "--train_batch_size", 16, "--resume_from_checkpoint", tmp_path / "resumed" / "checkpoint-6",
            output_dir="alone", steps=8)  # fmt: skip

    @pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_a_run_killed_at_random_ends_in_the_bits_of_an_unbroken_one(self, tmp_path, processes):
        flags = ("--checkpointing_steps", 1, "--logging_steps", 1, "--checkpoints_total_limit", 2)
        resume, steps = (*flags, "--resume_from_checkpoint", "latest"), 40
        launch(tmp_path / "whole", *flags, processes=processes, steps=steps)
        random = np.random.default_rng(0)
        folder, kills = tmp_path / "killed", 0
        for _ in range(3 if processes == 1 else 5):
            first = training.checkpointing.find(folder)
            process = launch(
                folder, *flags, "--resume_from_checkpoint", "latest", processes=processes, steps=steps, wait=False
            )
            # Wait until it has gone on from where it was, then a random moment longer: saving takes most of the time.
            deadline = time.monotonic() + 120
            while (
                training.checkpointing.find(folder) == first and process.poll() is None and time.monotonic() < deadline
            ):
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.3))
            if process.poll() is None:
                kills += 1
                children = subprocess.run(
                    ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
                ).stdout.split()
                for pid in [process.pid, *map(int, children)]:
                    os.kill(pid, signal.SIGKILL)
            process.communicate()
        assert kills >= 2
        launch(folder, *resume, processes=processes, steps=steps)
        assert_same_bits(tmp_path / "whole" / f"checkpoint-{steps}", folder / f"checkpoint-{steps}")
        assert records(folder, "step") == records(tmp_path / "whole", "step")


def recognised(judge, images, labels):
    return float((judge(images).argmax(1) == torch.tensor(labels)).float().mean())


def bundled_samples(count, guidance_scale):
    pipe = TerDiTPipeline.from_pretrained(bundled("digits"))
    labels = [i % 10 for i in range(count)]
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 50, "guidance_scale": guidance_scale, "output_type": "latent"}
    return pipe(labels, generator=generator, **call).images.clamp(-1, 1), labels


def shifted(images, down, right):
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=-1)
    return padded[:, :, 1 + down : 9 + down, 1 + right : 9 + right]


def turned(images):
    """Each image turned, scaled, sheared and moved a little."""
    count = len(images)
    angle, scale = 0.5 * (torch.rand(count) - 0.5), 1 + 0.3 * (torch.rand(count) - 0.5)
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = angle.cos() * scale
    matrix[:, 0, 1] = 0.6 * (torch.rand(count) - 0.5) - angle.sin() * scale
    matrix[:, 1, 0] = angle.sin() * scale
    matrix[:, :, 2] = 0.5 * (torch.rand(count, 2) - 0.5)
    grid = torch.nn.functional.affine_grid(matrix, images.shape, align_corners=False)
    return torch.nn.functional.grid_sample(images + 1, grid, align_corners=False) - 1


def train_judge(seed, epochs=40):
    torch.manual_seed(seed)
    train, (one, two, three) = training.data.Digits(train=True), ((1, 32), (32, 64), (64, 64))
    labels = torch.tensor(train.labels)

    def block(inputs, outputs):
        return (torch.nn.Conv2d(inputs, outputs, 3, padding=1), torch.nn.BatchNorm2d(outputs), torch.nn.ReLU())

    pool, last = torch.nn.MaxPool2d(2), (torch.nn.Flatten(), torch.nn.Dropout(0.3), torch.nn.Linear(256, 10))
    network = torch.nn.Sequential(*block(*one), *block(*two), pool, *block(*three), pool, *last)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, epochs * 23)
    for _ in range(epochs):
        for rows in torch.randperm(len(train))[: 23 * 64].chunk(23):
            scores = network(turned(train.images[rows]))
            torch.nn.functional.cross_entropy(scores, labels[rows], label_smoothing=0.05).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return network.eval()


class TestBundledCheckpoint:
    def test_a_judge_recognises_its_samples(self):
        svm = pytest.importorskip("sklearn.svm")
        train, held_out = training.data.Digits(train=True), training.data.Digits(train=False)
        moves = ((0, 0), (0, 1), (0, -1))
        images = torch.cat([shifted(train.images, *move) for move in moves]).flatten(1).numpy()
        machine = svm.SVC(gamma=0.05, C=10).fit(images, train.labels * len(moves))

        def judge(images):
            return torch.nn.functional.one_hot(torch.from_numpy(machine.predict(images.flatten(1).numpy())), 10)

        assert recognised(judge, held_out.images, held_out.labels) > 0.95
        assert recognised(judge, *bundled_samples(100, guidance_scale=1.5)) >= 0.95

    @pytest.mark.slow
    def test_a_better_judge_gives_the_numbers_of_the_card(self):
        held_out = training.data.Digits(train=False)
        networks = [train_judge(seed) for seed in range(3)]

        @torch.no_grad()
        def judge(images):
            return sum(network(images).softmax(1) for network in networks)

        print("held-out digits recognised", recognised(judge, held_out.images, held_out.labels))
        assert recognised(judge, held_out.images, held_out.labels) >= 0.98
        for scale, least in ((1.0, 0.95), (1.5, 0.99), (2.0, 0.99)):
            share = recognised(judge, *bundled_samples(1000, scale))
            print("guidance", scale, "recognised", share)
            assert share >= least

    def test_it_is_small_and_holds_no_float_masters(self):
        files = [path for path in Path(bundled("digits")).rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < 200_000
        assert not [path for path in files if "checkpoint-" in str(path.relative_to(bundled("digits")))]
        assert (
            TerDiTTransformer2DModel.load_config(Path(bundled("digits")) / "transformer")["weight_format"] == "packed"
        )
