import contextlib
import json
import logging
import os
import re
import runpy
import shutil
import signal
import sqlite3
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

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, cli, training
from diffusers_terdit.checkpoints import bundled
from diffusers_terdit.ops import torch_ops
from idx_files import write_idx


EXAMPLES = Path(__file__).parents[2] / "examples"
SIZE = ["--num_layers", "1", "--num_attention_heads", "2", "--attention_head_dim", "8", "--ffn_dim", "16"]
TINY = [*SIZE, "--train_batch_size", "8", "--lr_warmup_steps", "1", "--lr_decay_steps", "2", "--logging_steps", "1"]
TINY += ["--num_validation_images", "2", "--num_inference_steps", "2"]
PARTS = ("model", "ema", "optimizer")
COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "lime": (0, 255, 0)}


@pytest.fixture(scope="module")
def programs():
    sys.path.insert(0, str(EXAMPLES))
    import cache_latents
    import train_terdit

    yield {"train": train_terdit, "cache": cache_latents}
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def run_in(programs):
    """`run_in(folder, "--demo", ...)`: run a program in this process; the folder."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(folder, *args, steps=4, program="train"):
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        tiny = [*TINY, "--max_train_steps", str(steps)] if program == "train" else []
        programs[program].main([*tiny, *map(str, args), "--output_dir", str(folder)])
        return folder

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run(run_in, tmp_path):
    """`run("--demo", ..., output_dir="out")`: the same in a folder of the test."""
    return lambda *args, output_dir="out", **kwargs: run_in(tmp_path / output_dir, *args, **kwargs)


@pytest.fixture(scope="module")
def plain(run_in, tmp_path_factory):
    """Folder of a run of four steps that nothing interrupts, to compare others with."""
    flags = ("--checkpointing_steps", 1, "--validation_steps", 2, "--checkpoints_total_limit", 9, "--ema_decay", 0.5)
    return run_in(tmp_path_factory.mktemp("plain") / "out", "--demo", *flags)


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
    is_checkpoint = training.checkpointing.is_checkpoint(folder)
    pipe = (training.export.checkpoint_pipeline if is_checkpoint else TerDiTPipeline.from_pretrained)(folder)
    generator = torch.Generator().manual_seed(0)
    return pipe([0, 1], num_inference_steps=3, generator=generator, output_type="latent").images


class TestRun:
    def test_a_run_leaves_a_packed_pipeline_checkpoints_a_log_samples_and_a_card(self, plain):
        pipe = TerDiTPipeline.from_pretrained(plain)
        assert pipe.transformer.config.weight_format == "packed"
        assert pipe.labels["seven"] == 7
        assert [path.name for path in training.checkpointing.find(plain)] == [f"checkpoint-{i}" for i in (1, 2, 3, 4)]
        assert sorted(path.name for path in (plain / "samples").iterdir()) == ["step-2.png", "step-4.png"]
        assert "32 images seen" in (plain / "README.md").read_text()
        assert not list(plain.rglob("*.partial"))
        assert json.loads((plain / "log.jsonl").read_text().splitlines()[0]).keys() >= {
            "step", "images_seen", "loss", "lr", "grad_norm", "grad_norm_max", "images_per_second", "zero_share",
            "flip_share", "near_threshold_share", "scale_min", "scale_median", "scale_max", "scale_negative_share",
            "dead_layers", "gate_msa", "gate_mlp",
        }  # fmt: skip
        assert records(plain, "images_seen") == [8, 16, 24, 32]
        assert len(records(plain, "noise_error_held_out")) == 2

    def test_the_average_is_what_is_exported(self, plain):
        exported = TerDiTPipeline.from_pretrained(plain).transformer
        average = TerDiTTransformer2DModel.from_config(exported.config, weight_format="float")
        average.load_state_dict(load_file(plain / "checkpoint-4" / "ema.safetensors"))
        for name, codes in training.statistics.packed_codes(average).items():
            assert torch.equal(exported.state_dict()[f"{name}.weight_packed"], codes)
        assert torch.equal(exported.proj_in.weight, average.proj_in.weight)

    def test_a_checkpoint_samples_as_the_pipeline_that_a_run_ends_in(self, plain):
        exported = TerDiTPipeline.from_pretrained(plain)
        pipe = training.export.checkpoint_pipeline(plain / "checkpoint-4")
        assert torch.equal(samples_of(plain / "checkpoint-4"), samples_of(plain))
        assert not torch.equal(samples_of(plain / "checkpoint-2"), samples_of(plain))
        assert pipe.transformer.config.weight_format == "packed"
        assert pipe.transformer.config.prediction_type == "epsilon"
        assert pipe.labels == exported.labels
        assert pipe.sampling_defaults == exported.sampling_defaults
        assert pipe.sampling_defaults == {"num_inference_steps": 2, "guidance_scale": 1.5}

    @pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a single core
    def test_what_saves_time_or_memory_changes_no_bit(self, run, plain):
        flags = ("--gradient_checkpointing", "--dataloader_num_workers", 2, "--ema_decay", 0.5)
        assert_same_bits(run("--demo", *flags) / "checkpoint-4", plain / "checkpoint-4")

    def test_accumulated_batches_give_the_gradient_of_the_whole(self, run, plain):
        parts = run("--demo", "--train_batch_size", 2, "--total_batch_size", 8)
        for key in ("loss", "grad_norm"):
            assert records(parts, key) == pytest.approx(records(plain, key), rel=1e-5)

    def test_weights_are_packed_once_a_step(self, run, monkeypatch):
        pytest.importorskip("numba")
        packed, pack, counts = [], torch_ops._pack, []
        monkeypatch.setattr(torch_ops, "_pack", lambda *given: packed.append(given) or pack(*given))
        for number, flags in enumerate(
            (["8"], ["2", "--gradient_accumulation_steps", "4"], ["8", "--gradient_checkpointing"])
        ):
            packed.clear()
            run("--demo", "--train_batch_size", *flags, output_dir=str(number), steps=2)
            counts.append(len(packed))
        assert counts[0] > 0
        assert len(set(counts)) == 1

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")  # Inductor's own
    @pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
    def test_compiled_blocks_train_alike_and_go_on_in_the_same_bits(self, run, plain, tmp_path):
        flags = ("--demo", "--torch_compile", "--checkpointing_steps", 2)
        compiled = run(*flags)
        assert records(compiled) == pytest.approx(records(plain), rel=1e-4)
        assert records(compiled, "grad_norm") == pytest.approx(records(plain, "grad_norm"), rel=1e-3)
        shutil.copytree(compiled / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
        torch._dynamo.reset()  # as a new process
        resumed = run(*flags, "--resume_from_checkpoint", "latest", output_dir="resumed")
        assert_same_bits(compiled / "checkpoint-4", resumed / "checkpoint-4")

    def test_weights_and_average_stay_float32_under_bfloat16(self, run, plain):
        folder = run("--demo", "--mixed_precision", "bf16")
        for part in PARTS:
            tensors = load_file(folder / "checkpoint-4" / f"{part}.safetensors")
            assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        assert records(folder) == pytest.approx(records(plain), rel=0.02)
        assert records(folder) != records(plain)

    def test_an_optimizer_of_8_bits_trains_nearly_alike_and_goes_on_in_the_same_bits(self, run, tmp_path):
        pytest.importorskip("bitsandbytes")
        flags = ("--demo", "--use_8bit_adam", "--attention_head_dim", 32, "--ffn_dim", 128)
        folder = run(*flags, "--checkpointing_steps", 2)
        found = load_file(folder / "checkpoint-4" / "optimizer.safetensors")
        assert {tensor.dtype for tensor in found.values()} == {torch.uint8, torch.float32, torch.int64}
        assert "AdamW of 8 bits" in (folder / "README.md").read_text()
        assert records(folder) == pytest.approx(records(run(*flags[:1], *flags[2:], output_dir="plain")), rel=0.02)
        shutil.copytree(folder / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
        resumed = run(*flags, "--resume_from_checkpoint", "latest", output_dir="resumed")
        assert_same_bits(folder / "checkpoint-4", resumed / "checkpoint-4")
        with pytest.raises(ValueError, match="Resume with the options it was trained with"):
            run(*flags[:1], *flags[2:], "--resume_from_checkpoint", "latest", output_dir="resumed", steps=6)

    def test_an_optimizer_of_8_bits_names_the_library_that_it_needs(self, run, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
        with pytest.raises(SystemExit, match="--use_8bit_adam needs bitsandbytes: pip install bitsandbytes"):
            run("--demo", "--use_8bit_adam")
        assert not (tmp_path / "out").exists()

    def test_the_full_precision_baseline_sees_the_same_data_and_noise(self, run, plain):
        baseline = run("--demo", "--ternary", "false")
        # A fresh model predicts zero, whatever its weights: the first loss is that of the noise alone.
        assert records(plain)[0] == records(baseline)[0]
        assert not TerDiTPipeline.from_pretrained(baseline).transformer.config.ternary

    def test_a_model_trained_with_8_bit_activations_says_so_and_samples_with_them(self, run, plain):
        folder = run("--demo", "--activation_bits", 8)
        exported = TerDiTPipeline.from_pretrained(folder).transformer
        trained = training.initialize.load_transformer(folder / "checkpoint-4")
        assert exported.config.activation_bits == trained.config.activation_bits == 8
        assert records(folder) != records(plain)
        trained.load_state_dict(load_file(folder / "checkpoint-4" / "ema.safetensors"))
        inputs = (torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 10]))
        assert torch.equal(trained.eval()(*inputs).sample, exported(*inputs).sample)

    def test_options_of_the_loss_train_and_sample(self, run):
        flags = ("--learn_sigma", "false", "--snr_gamma", 5, "--adaln_norm", "false")
        assert samples_of(run("--demo", *flags)).isfinite().all()

    def test_a_flow_model_is_saved_with_its_scheduler(self, run):
        folder = run("--demo", "--flow_matching")
        assert isinstance(TerDiTPipeline.from_pretrained(folder).scheduler, FlowMatchEulerDiscreteScheduler)
        assert TerDiTPipeline.from_pretrained(folder).transformer.config.prediction_type == "flow_prediction"
        assert samples_of(folder).isfinite().all()
        assert torch.equal(samples_of(folder / "checkpoint-4"), samples_of(folder))
        flags = ("--init_from", folder, "--learn_sigma", "false")  # the run decides, not what it starts from
        again = run("--demo", *flags, output_dir="noise")
        assert TerDiTPipeline.from_pretrained(again).prediction_type == "epsilon"

    def test_a_feature_network_gives_a_frechet_distance(self, run, tmp_path, monkeypatch):
        (tmp_path / "my_features.py").write_text("import torch\n\n\ndef flat():\n    return torch.nn.Flatten()\n")
        monkeypatch.syspath_prepend(tmp_path)
        flags = ("--feature_network", "my_features:flat", "--frechet_steps", 2, "--num_frechet_images", 20)
        distances = records(run("--demo", *flags), "frechet_distance")
        assert len(distances) == 2
        assert all(0 < distance < 100 for distance in distances)


class TestSeen:
    """What is to be seen of a run while it goes on."""

    def test_the_log_is_drawn_at_each_validation_and_after_a_resume(self, run, monkeypatch, caplog):
        caplog.set_level("INFO")
        drawn, draw = [], training.log.draw

        def count(path, picture):
            draw(path, picture)
            drawn.append([record["step"] for record in training.log.read(path) if "noise_error" in record])
            Image.open(picture).verify()

        monkeypatch.setattr(training.log, "draw", count)
        flags = ("--checkpointing_steps", 2, "--validation_steps", 2)
        folder = run("--demo", *flags)
        assert drawn == [[2], [2, 4]]
        shutil.rmtree(folder / "checkpoint-4")
        (folder / "log.png").unlink()
        text = (folder / "log.jsonl").read_text()
        (folder / "log.jsonl").write_text(text + '{"step": 5, "loss"')  # cut by a kill
        run("--demo", *flags, "--resume_from_checkpoint", "latest")
        assert drawn == [[2], [2, 4], [2, 4]]
        assert (folder / "log.png").stat().st_size > 10_000
        assert not list(folder.rglob("*.partial"))

    def test_without_matplotlib_a_line_says_what_is_missing_and_the_run_goes_on(self, run, monkeypatch, caplog):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        caplog.set_level("INFO")
        folder = run("--demo", "--validation_steps", 2)
        assert [r.message for r in caplog.records if "log.png" in r.message] == [
            "no log.png: A picture of the log needs matplotlib: pip install matplotlib"
        ]
        assert not (folder / "log.png").exists()
        assert (folder / "model_index.json").exists()

    def test_what_a_run_saves_and_measures_draws_nothing_from_the_global_generator(
        self, run, programs, monkeypatch, tmp_path
    ):
        (tmp_path / "my_features.py").write_text("import torch\n\n\ndef flat():\n    return torch.nn.Flatten()\n")
        monkeypatch.syspath_prepend(tmp_path)
        same, methods = [], dict(vars(programs["train"].Trainer))
        for name in ("validate", "save", "export"):

            def watched(self, method=methods[name]):
                before = torch.get_rng_state()
                method(self)
                same.append(torch.equal(torch.get_rng_state(), before))

            monkeypatch.setattr(programs["train"].Trainer, name, watched)
        flags = ("--feature_network", "my_features:flat", "--frechet_steps", 2, "--num_frechet_images", 20)
        run("--demo", "--validation_steps", 2, *flags)
        assert same == [True] * 4

    def test_each_validation_says_how_much_is_left_and_no_bar_fills_a_file(self, run, caplog, capfd):
        caplog.set_level("INFO")
        run("--demo", "--validation_steps", 2, steps=6)
        lines = [r.message for r in caplog.records if " left" in r.message]
        assert [bool(re.fullmatch(rf"step {step} of 6, about \d+ seconds left", line)) for step, line in
                zip((2, 4), lines, strict=True)] == [True, True]  # fmt: skip
        assert "\r" not in capfd.readouterr().err

    @pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
    def test_trackers_get_the_numbers_and_ask_no_network(self, tmp_path, tracker):
        pytest.importorskip(tracker)
        program = """
import runpy, sys

def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request"):
        raise RuntimeError(f"asked a network: {event} {arguments}")

sys.addaudithook(hook)
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
        out, store = tmp_path / "out", tmp_path / "store"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("TRACKIO_")}
        flags = ["--demo", *TINY, "--max_train_steps", "3", "--report_to", tracker, "--output_dir", str(out)]
        done = subprocess.run(
            [sys.executable, "-W", "error::UserWarning", "-c", program, str(EXAMPLES / "train_terdit.py"), *flags],
            env={**environment, "TRACKIO_DIR": str(store), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        if tracker == "tensorboard":
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

            events = EventAccumulator(str(out / "train_terdit"))
            events.Reload()
            seen = {key: [(e.step, e.value) for e in events.Scalars(key)] for key in ("loss", "noise_error_held_out")}
        else:
            with contextlib.closing(sqlite3.connect(next(store.glob("*.db")))) as database:
                rows = database.execute("SELECT step, metrics FROM metrics ORDER BY step, id").fetchall()
            rows = [(step, json.loads(metrics)) for step, metrics in rows]
            seen = {
                key: [(step, metrics[key]) for step, metrics in rows if key in metrics]
                for key in ("loss", "noise_error_held_out")
            }
        assert [step for step, _ in seen["loss"]] == [1, 2, 3]
        assert [step for step, _ in seen["noise_error_held_out"]] == [3]
        for key, values in seen.items():
            assert [value for _, value in values] == pytest.approx(records(out, key), rel=1e-6)


class TestInterrupted:
    @pytest.fixture(autouse=True)
    def _interrupts_are_not_ignored(self):
        """As they are in what a shell starts in the background."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    def test_a_resumed_run_ends_in_the_bits_of_an_unbroken_one(self, run, plain, tmp_path):
        """It was killed between saving step 2 and validating it: that is made up, and nothing is written twice."""
        flags = ("--validation_steps", 2, "--ema_decay", 0.5, "--checkpointing_steps", 2)
        folder = run("--demo", *flags)
        lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
        (folder / "log.jsonl").write_text("".join(lines[:2]))  # losses of steps 1 and 2
        (folder / "checkpoint-4" / training.checkpointing.STATE_NAME).unlink()
        (folder / "samples" / "step-2.png").unlink()
        with pytest.raises(AssertionError):
            assert_same_bits(plain / "checkpoint-4", plain / "checkpoint-2")
        for _ in range(2):
            run("--demo", *flags, "--resume_from_checkpoint", "latest", "--checkpoints_total_limit", 1)
            assert_same_bits(plain / "checkpoint-4", folder / "checkpoint-4")
            assert torch.equal(samples_of(plain), samples_of(folder))
            assert records(folder, "noise_error") == records(plain, "noise_error")
            for step in (2, 4):
                picture = Path("samples", f"step-{step}.png")
                assert (folder / picture).read_bytes() == (plain / picture).read_bytes()
        assert [path.name for path in training.checkpointing.find(folder)] == ["checkpoint-4"]

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_stop_signal_saves_and_the_run_goes_on(self, run, plain, tmp_path, monkeypatch, number):
        update, calls = training.recipes.update_average, []

        def stop_in_second_step(*args):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # a launcher passes on what all processes have got
            return update(*args)

        monkeypatch.setattr(training.recipes, "update_average", stop_in_second_step)
        folder = tmp_path / "out"
        with pytest.raises(KeyboardInterrupt) if number == signal.SIGINT else contextlib.nullcontext():
            run("--demo", "--ema_decay", 0.5)
        assert [path.name for path in training.checkpointing.find(folder)] == ["checkpoint-2"]
        assert not (folder / "model_index.json").exists()
        monkeypatch.undo()
        run("--demo", "--ema_decay", 0.5, "--resume_from_checkpoint", "latest")
        assert_same_bits(plain / "checkpoint-4", folder / "checkpoint-4")

    def test_a_second_interrupt_ends_the_run_at_once(self, run, tmp_path, monkeypatch):
        update = training.recipes.update_average

        def interrupt_twice(*args):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.1)
            os.kill(os.getpid(), signal.SIGINT)
            return update(*args)

        monkeypatch.setattr(training.recipes, "update_average", interrupt_twice)
        with pytest.raises(KeyboardInterrupt):
            run("--demo")
        assert not training.checkpointing.find(tmp_path / "out")

    @pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_an_interrupted_run_saves_says_so_and_exits_with_130(self, tmp_path, processes):
        process = start(tmp_path, processes=processes, steps=10**6)
        deadline = time.monotonic() + 120
        while not (tmp_path / "log.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output = process.communicate(timeout=120)[0]
        assert len(training.checkpointing.find(tmp_path)) == 1
        assert "stopped by a signal; go on with --resume_from_checkpoint latest" in output
        assert "train_terdit: interrupted" in output
        if processes == 1:
            assert process.returncode == 130
            assert "Traceback" not in output

    def test_a_loss_that_is_no_number_ends_the_run_and_writes_nothing(self, run, tmp_path):
        with pytest.raises(FloatingPointError, match=r"last checkpoint is of step 1\. Lower"):
            run("--demo", "--learning_rate", 1e30, "--checkpointing_steps", 1, steps=20)
        for path in training.checkpointing.find(tmp_path / "out"):
            assert all(t.isfinite().all() for t in load_file(path / "model.safetensors").values()), path
        assert not (tmp_path / "out" / "model_index.json").exists()

    def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(self, tmp_path, monkeypatch, capsys):
        save_file, calls = training.checkpointing.save_file, []

        def full_after_two_files(*args, **kwargs):
            calls.append(1)
            if len(calls) > 4:
                raise OSError(28, "No space left on device")
            return save_file(*args, **kwargs)

        monkeypatch.setattr(training.checkpointing, "save_file", full_after_two_files)
        flags = ["--checkpointing_steps", "1", "--max_train_steps", "4", "--output_dir", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["train_terdit.py", "--demo", *TINY, *flags])
        with pytest.raises(SystemExit, match=r"^1$"):
            runpy.run_path(str(EXAMPLES / "train_terdit.py"), run_name="__main__")
        message = f"train_terdit: {tmp_path / 'checkpoint-2'} cannot be written: No space left on device. Make"
        assert message in capsys.readouterr().err
        assert [path.name for path in sorted(tmp_path.glob("checkpoint*"))] == ["checkpoint-1"]

    @pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_a_run_killed_at_random_ends_in_the_bits_of_an_unbroken_one(self, tmp_path, processes):
        flags = ("--checkpointing_steps", 1, "--checkpoints_total_limit", 2)
        resume, steps = (*flags, "--resume_from_checkpoint", "latest"), 30
        whole, folder = launch(tmp_path / "whole", *flags, processes=processes, steps=steps), tmp_path / "killed"
        random, kills = np.random.default_rng(0), 0
        for _ in range(2 if processes == 1 else 5):
            first = training.checkpointing.find(folder)
            process = start(folder, *resume, processes=processes, steps=steps)
            # Wait until it has gone on from where it was, then a random moment longer: saving takes most of the time.
            deadline = time.monotonic() + 120
            while training.checkpointing.find(folder) == first and time.monotonic() < deadline:
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.2))
            if process.poll() is None:
                kills += 1
                command = ["pgrep", "-P", str(process.pid)]
                children = subprocess.run(command, capture_output=True, text=True).stdout.split()
                for pid in [process.pid, *map(int, children)]:
                    os.kill(pid, signal.SIGKILL)
            process.communicate()
        assert kills >= 2
        launch(folder, *resume, processes=processes, steps=steps)
        assert_same_bits(whole / f"checkpoint-{steps}", folder / f"checkpoint-{steps}")
        assert records(folder, "step") == records(whole, "step")

    def test_a_run_killed_while_its_thread_writes_ends_in_the_bits_of_an_unbroken_one(self, run, plain, tmp_path):
        """The second checkpoint stays at half of its average, as on a disk that hangs; training goes on meanwhile."""
        launcher = """
import os, runpy, sys, time
from diffusers_terdit.training import checkpointing

def half(tensors, path, metadata, save_file=checkpointing.save_file):
    save_file(tensors, path, metadata)
    if (path.parent.name, path.name) == ("checkpoint-2", "ema.safetensors"):
        os.truncate(path, path.stat().st_size // 2)
        time.sleep(600)

checkpointing.save_file = half
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
        flags, folder = ("--checkpointing_steps", 1, "--ema_decay", 0.5), tmp_path / "killed"
        process, deadline = start(folder, *flags, steps=4, launcher=launcher), time.monotonic() + 120
        while not (folder / "log.jsonl").exists() or records(folder, "step") != [1, 2, 3]:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        (written,) = folder.glob("checkpoint-2.*.partial/checkpoint-2")
        assert sorted(path.name for path in written.iterdir()) == ["ema.safetensors", "model.safetensors"]
        assert [path.name for path in training.checkpointing.find(folder)] == ["checkpoint-1"]
        run("--demo", *flags, "--resume_from_checkpoint", "latest", output_dir="killed")
        assert_same_bits(plain / "checkpoint-4", folder / "checkpoint-4")
        assert records(folder) == records(plain)
        assert not list(folder.glob("*.partial"))


class TestHub:
    def test_push_sends_the_pipeline_and_the_card_but_no_checkpoints(self, run, fake_hub, caplog, capfd, tmp_path):
        caplog.set_level("DEBUG")
        folder = run("--demo", "--push_to_hub", "--hub_model_id", "someone/digits", "--hub_token", fake_hub.token)
        files = fake_hub.repos["someone/digits"].files()
        assert {"README.md", "model_index.json", "transformer/config.json"} <= set(files)
        assert not [name for name in files if "checkpoint" in name]
        assert b'from_pretrained("someone/digits")' in files["README.md"]
        printed = caplog.text + "".join(capfd.readouterr())
        assert "pushed step 4 to someone/digits" in printed
        assert fake_hub.token not in printed
        kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for name, data in (files | kept).items():
            assert fake_hub.token.encode() not in data, name
            assert str(tmp_path).encode() not in data, name

    def test_the_pipeline_is_uploaded_while_training_goes_on(self, run, fake_hub, caplog):
        caplog.set_level("INFO")
        flags = ("--push_to_hub", "--hub_model_id", "someone/digits", "--hub_token", fake_hub.token)
        run("--demo", *flags, "--hub_push_steps", 3, "--validation_steps", 2)
        repo = fake_hub.repos["someone/digits"]
        titles = [title for title, _ in repo.commits.values()]
        assert titles[-2:] == ["Step 3 of 4", "Step 4 of 4"]
        early = next(files for title, files in repo.commits.values() if title == "Step 3 of 4")
        assert {"README.md", "model_index.json", "samples/step-2.png"} <= set(early)
        assert b"24 images seen" in early["README.md"]
        assert not [r for r in caplog.records if r.name == "train_terdit" and r.levelname == "WARNING"]

    def test_a_hub_that_is_away_does_not_end_the_run_but_the_last_upload_says_so(self, run, fake_hub, caplog):
        fake_hub.refuse_uploads(500)
        flags = ("--push_to_hub", "--hub_model_id", "someone/digits", "--hub_token", fake_hub.token)
        with pytest.raises(OSError, match="Try again later"):
            run("--demo", *flags, "--hub_push_steps", 2)
        assert "not pushed, training goes on: The Hub answered 500" in caplog.text

    def test_the_clients_of_the_hub_do_not_log_their_requests(self, run, monkeypatch):
        monkeypatch.setattr(logging.root, "handlers", [])  # pytest's, with which `basicConfig` does nothing
        level = logging.root.level
        logging.root.setLevel(logging.WARNING)
        try:
            run("--demo", steps=1)
            assert not logging.getLogger("httpx").isEnabledFor(logging.INFO)
            assert logging.getLogger("train_terdit").isEnabledFor(logging.INFO)
        finally:
            logging.root.setLevel(level)

    def test_trackers_get_no_token_and_no_path(self, programs, tmp_path):
        flags = ["--train_data_dir", str(tmp_path), "--hub_token", "hf_secret", "--init_from", "someone/model"]
        args = programs["train"].parse_args([*flags, "--output_dir", str(tmp_path / "later")])
        settings = programs["train"].tracked(args)
        assert (settings["train_data_dir"], settings["output_dir"]) == (tmp_path.name, "later")
        assert (settings["init_from"], settings["learning_rate"]) == ("someone/model", "0.003")
        assert not [value for value in settings.values() if "hf_secret" in value or str(tmp_path) in value]

    @pytest.mark.parametrize(
        ("given", "seen"),
        [
            ("https://user:password@example.org/a/faces.parquet?token=1", "faces.parquet"),
            ("https://user:password@example.org", ""),
            ("~/private/faces", "faces"),
            ("../private/faces", "faces"),
            ("./faces", "faces"),
            ("private/no/such/faces", "faces"),
            ("someone/faces.v2", "someone/faces.v2"),
            ("1:1550000,0.2", "1:1550000,0.2"),
        ],
    )
    def test_no_password_and_no_place_is_told(self, programs, given, seen):
        assert programs["train"].without_place(given) == seen


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
        fresh = TerDiTTransformer2DModel.from_config(pipe.transformer.config, weight_format="float")
        assert names == fresh.state_dict().keys()

    def test_a_bundled_model_is_known_by_its_name(self, run, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        flags = ("--init_from", "digits", "--teacher", "digits", "--learning_rate", 0, "--report_to", "none")
        folder = run("--demo", *flags)
        source = TerDiTPipeline.from_pretrained(bundled("digits")).transformer
        for name, layer in TerDiTPipeline.from_pretrained(folder).transformer.ternary_layers().items():
            assert torch.equal(layer.weight_packed, source.state_dict()[f"{name}.weight_packed"])

    def test_a_teacher_of_another_prediction_is_refused(self, run, plain):
        with pytest.raises(SystemExit, match="predicts epsilon, this run flow_prediction"):
            run("--demo", "--flow_matching", "--teacher", plain)

    def test_a_packed_model_is_fine_tuned_from_its_codes(self, run, plain):
        folder = run("--demo", "--init_from", plain, "--learning_rate", 0)
        assert torch.equal(samples_of(plain), samples_of(folder))


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

    def test_the_first_batch_is_shown_as_it_is_trained_with_its_labels(self, run, tmp_path, vae, caplog):
        caplog.set_level("INFO")
        for name, color in (("ant", (255, 0, 0)), ("bee", (0, 0, 255))):
            (tmp_path / "pictures" / name).mkdir(parents=True)
            for i in range(4):
                image = Image.new("RGBA", (16, 16))
                image.paste((*color, 255), (0, 0, 8, 16))  # on the left; the rest is transparent
                image.save(tmp_path / "pictures" / name / f"{i}.png")
        flags = ("--train_data_dir", tmp_path / "pictures", "--resolution", 16, "--random_flip")
        flags += ("--class_dropout_prob", 0, "--background", "lime")
        folder = run(*flags)
        assert f"{folder / 'first-batch.png'} shows what the model sees" in caplog.text
        with Image.open(folder / "first-batch.png") as picture:
            grid = np.asarray(picture.convert("RGB")).astype(int)
        counts = {name: (grid == color).all(2).sum() for name, color in COLORS.items()}
        area = 8 * 128 * 64  # eight pictures, half of each
        assert (counts["red"] + counts["blue"], counts["lime"]) == (area, area)
        edges = (grid[:, 1:] == COLORS["lime"]).all(2) & (grid[:, :-1] == (255, 255, 255)).all(2)
        assert 0 < edges.sum() < 8 * 128  # some are mirrored: these begin with the background
        assert (grid.sum(2) < 100).any()  # the text of a label
        (folder / "first-batch.png").unlink()
        run(*flags, "--resume_from_checkpoint", "latest", steps=6)
        assert not (folder / "first-batch.png").exists()
        decoded = run(*flags, "--pretrained_vae_model_name_or_path", vae, output_dir="decoded")
        with Image.open(decoded / "first-batch.png") as picture:
            assert picture.size == (3 * 136 + 8, 3 * 150 + 8)

    def test_what_is_new_since_a_checkpoint_is_told_and_is_on_the_card(self, run, caplog):
        flags = ("--lr_scheduler", "constant", "--learning_rate", 0.001)
        folder = run("--demo", *flags, steps=2)
        assert "has changed since" not in caplog.text
        run(
            "--demo", *flags[:3], 0.002, "--resume_from_checkpoint", "checkpoint-2/", steps=4
        )  # a name in --output_dir
        change = "--learning_rate 0.001, from step 2 on 0.002"
        assert f"The recipe has changed since {folder / 'checkpoint-2'}" in caplog.text
        assert change in caplog.text
        run("--demo", *flags[:3], 0.002, "--resume_from_checkpoint", "latest", steps=6)
        card = (folder / "README.md").read_text("utf-8")
        assert change in card
        assert "--max_train_steps 4, from step 4 on 6" in card

    def test_a_run_that_is_complete_trains_nothing(self, run, caplog):
        caplog.set_level("INFO")
        folder = run("--demo", steps=2)
        caplog.clear()
        run("--demo", "--resume_from_checkpoint", "latest", steps=2)
        assert f"{folder / 'checkpoint-2'} has reached --max_train_steps 2: nothing to train" in caplog.text
        assert "Running training" not in caplog.text
        with pytest.raises(
            SystemExit, match=r"nothing is left to train with another recipe .--learning_rate 0.004, from"
        ):
            run("--demo", "--resume_from_checkpoint", "latest", "--learning_rate", 0.005, steps=2)

    def test_a_checkpoint_that_is_not_there_and_another_optimizer_are_refused(self, run):
        folder = run("--demo", steps=2)
        with pytest.raises(SystemExit, match=f"that is no checkpoint. {folder} holds checkpoint-2."):
            run("--demo", "--resume_from_checkpoint", "checkpoint-9", steps=4)
        with pytest.raises(SystemExit, match="was trained with --optimizer adamw, this run has muon"):
            run("--demo", "--resume_from_checkpoint", "latest", "--optimizer", "muon", steps=4)

    def test_metadata_that_is_not_read_is_told(self, run, image_folder, caplog):
        (image_folder / "metadata.jsonl").write_text('{"file_name": "ant/0.png", "text": "an ant"}')
        run("--train_data_dir", image_folder, "--resolution", 16, steps=1)
        assert (
            f"metadata.jsonl is not read. To train on a column of it, pass --dataset_name {image_folder}"
            in caplog.text
        )

    def test_a_run_is_resumed_with_the_classes_it_was_trained_with(self, run, image_folder):
        flags = ("--train_data_dir", image_folder, "--resolution", 16)
        folder = run(*flags)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        shutil.copytree(image_folder / "ant", image_folder / "ape")
        for message in ("1 was 'bee', is 'ape'; 2 was None, is 'bee'", "0 was 'ant', is 'ape'"):
            with pytest.raises(SystemExit, match=f"checkpoint-4 was trained with other classes: {message}."):
                run(*flags, "--resume_from_checkpoint", "latest", steps=6)
            shutil.rmtree(image_folder / "ant", ignore_errors=True)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    def test_numbered_classes_are_told_and_an_order_that_changed_is_refused(self, run, image_folder, tmp_path, caplog):
        (image_folder / "ant").rename(image_folder / "9")
        (image_folder / "bee").rename(image_folder / "10")
        flags = ("--train_data_dir", image_folder, "--resolution", 16, "--resume_from_checkpoint", "latest")
        caplog.set_level("INFO")
        for order, other, labels in (("value", "text", ["9", "10"]), ("text", "value", ["10", "9"])):
            folder = run(*flags, "--label_order", order, output_dir=order)
            assert TerDiTPipeline.from_pretrained(folder).labels == {name: i for i, name in enumerate(labels)}
            assert f"id 0 is '{labels[0]}', id 1 is '{labels[1]}'." in caplog.text
            with pytest.raises(SystemExit, match=f"0 was '{labels[0]}', .*Pass --label_order {order}, with which"):
                run(*flags, "--label_order", other, output_dir=order, steps=6)
        shutil.rmtree(image_folder / "9")
        with pytest.raises(SystemExit, match=r"1 was '9', is None\. Pass that data"):
            run(*flags, output_dir="text", steps=6)

    def test_images_without_classes_train_a_model_that_needs_no_label(self, run, image_folder, vae, parquet, capsys):
        flags = ("--train_data_dir", image_folder / "ant", "--resolution", 16)
        folder = run(*flags, "--random_flip")
        pipe = TerDiTPipeline.from_pretrained(folder)
        config = pipe.transformer.config
        assert (config.num_classes, config.class_dropout_prob, pipe.config.id2label) == (1, 0, None)
        assert pipe.sampling_defaults["guidance_scale"] == 1
        assert pipe(num_inference_steps=2, num_images_per_prompt=3, output_type="pt").images.shape == (3, 3, 16, 16)
        drawn = ["generate", str(folder), "--num_inference_steps", "2", "--output", str(folder / "drawn.png")]
        assert cli.main(drawn) == 0
        card = (folder / "README.md").read_text("utf-8")
        assert "unconditional" in card
        assert "pipe().images[0]" in card
        assert "class" not in card.split("## Size")[0]
        run(*flags, "--random_flip", "--resume_from_checkpoint", "latest", steps=6)

        cached = ("--pretrained_vae_model_name_or_path", vae)
        latents = run(*flags, *cached, output_dir="latents", program="cache")
        assert training.data.LatentSamples(latents).id2label == {}
        run("--train_latents_dir", latents, *cached, output_dir="from_latents")
        from_rows = run("--dataset_name", parquet, "--label_column", "none", "--resolution", 16, output_dir="rows")
        assert TerDiTPipeline.from_pretrained(from_rows).transformer.config.num_classes == 1

    def test_the_start_says_what_will_be_trained(self, run, image_folder, caplog):
        caplog.set_level("INFO")
        folder = run("--train_data_dir", image_folder, "--resolution", 16, steps=12)
        model = training.initialize.load_transformer(folder / "checkpoint-12")
        ternary = sum(layer.weight.numel() for layer in model.ternary_layers().values())
        lines = [record.message for record in caplog.records if record.name == "train_terdit"]
        assert "***** Running training *****" in lines
        for line in (
            "  Num examples = 20", "  Num classes = 2", "  Num epochs = 4.8", "  Num processes = 1, on cpu",
            "  Total optimization steps = 12", "  Tokens per picture = 16",
            f"  Weights = {model.num_parameters():,}, of them {ternary:,} ternary",
        ):  # fmt: skip
            assert line in lines
        assert re.search(r"Expected memory = 0\.\d GB, [\d.]+ GB are free", caplog.text)
        assert re.search(r"Expected time = \d+ seconds more, at [\d.e-]+ s a step", caplog.text)

    @pytest.mark.parametrize("packed", [False, True])
    def test_idx_files_train_in_gray_in_their_own_size_and_measure_on_the_test_images(self, run, tmp_path, packed):
        for part in ("train", "t10k"):
            write_idx(tmp_path / "idx", part, count=12, side=12, packed=packed)
        folder = run("--train_data_dir", tmp_path / "idx")
        config = TerDiTPipeline.from_pretrained(folder).transformer.config
        assert (config.sample_size, config.in_channels, config.patch_size, config.num_classes) == (12, 1, 4, 3)
        assert len(records(folder, "noise_error_held_out")) == 1
        assert records(folder, "noise_error_held_out") != records(folder, "noise_error")
        flags = ("--preset", "small", "--ffn_dim", 16, "--patch_size", 8, "--in_channels", 3)
        folder = run("--train_data_dir", tmp_path / "idx", *flags, output_dir="small")
        assert TerDiTPipeline.from_pretrained(folder).transformer.config.sample_size == 64

    def test_a_run_that_does_not_fit_the_memory_is_refused_before_it_starts(self, run, image_folder, tmp_path):
        with pytest.raises(SystemExit, match=r"would take about [\d.]+ GB .*--train_batch_size .*--preset tiny"):
            run("--train_data_dir", image_folder, "--resolution", 1024, "--patch_size", 1, "--train_batch_size", 999)
        assert not (tmp_path / "out").exists()

    def test_a_folder_that_is_not_there_leaves_no_empty_output_folder(self, run, tmp_path):
        with pytest.raises(OSError, match="is no folder"):
            run("--train_data_dir", tmp_path / "nothing")
        assert not (tmp_path / "out").exists()

    def test_each_grid_shows_the_next_ten_classes_by_name(self, run, tmp_path, monkeypatch):
        for i in range(13):
            (tmp_path / "many" / f"kind {i:02}").mkdir(parents=True)
            Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / "many" / f"kind {i:02}" / "1.png")
        image_grid, shown = training.export.image_grid, []

        def watched(images, columns=None, labels=None, **options):
            shown.append(labels)
            return image_grid(images, columns, labels, **options)

        monkeypatch.setattr(training.export, "image_grid", watched)
        flags = ("--resolution", 8, "--validation_steps", 2, "--num_validation_images", 10)
        run("--train_data_dir", tmp_path / "many", *flags, steps=3)
        assert shown[-2] == [f"kind {i:02}" for i in range(10)]
        assert shown[-1] == [f"kind {i:02}" for i in (10, 11, 12, 0, 1, 2, 3, 4, 5, 6)]

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

    def test_cached_latents_train_as_the_images_do(self, run, image_folder, vae):
        common = ("--pretrained_vae_model_name_or_path", vae, "--resolution", 16)
        cache = ("--train_data_dir", image_folder, *common, "--shard_size", 6, "--batch_size", 4)
        latents = run(*cache, "--dtype", "float32", output_dir="latents", program="cache")
        assert len(list(latents.glob("*.safetensors"))) == 4
        online = run("--train_data_dir", image_folder, "--random_flip", *common, output_dir="online")
        cached = run("--train_latents_dir", latents, output_dir="cached")
        assert records(cached) == pytest.approx(records(online), rel=1e-4)
        assert TerDiTPipeline.from_pretrained(online).vae is not None
        assert training.export.checkpoint_pipeline(online / "checkpoint-4")("ant").images[0].size == (16, 16)
        assert TerDiTPipeline.from_pretrained(cached).vae is None
        assert not (cached / "samples").exists()
        with pytest.raises(SystemExit, match="--pretrained_vae"):
            run("--train_latents_dir", latents, "--feature_network", "a:b", "--frechet_steps", 2, output_dir="no_vae")
        half = run(*cache, output_dir="half", program="cache")
        assert records(run("--train_latents_dir", half, output_dir="c2")) == pytest.approx(records(online), rel=1e-2)

    def test_a_killed_cache_goes_on_and_leaves_out_what_cannot_be_read(self, run, image_folder, vae):
        (image_folder / "ant" / "3.png").write_bytes(b"no image")
        flags = ("--train_data_dir", image_folder, "--pretrained_vae_model_name_or_path", vae, "--resolution", 16)
        flags += ("--shard_size", 6)
        latents = run(*flags, output_dir="latents", program="cache")
        before = (latents / "latents-00001.safetensors").read_bytes()
        (latents / "latents-00002.safetensors").unlink()
        (latents / training.data.LATENTS_NAME).unlink()
        run(*flags, output_dir="latents", program="cache")
        samples = training.data.LatentSamples(latents)
        assert [samples[i][1] for i in range(len(samples))] == [0] * 9 + [1] * 10
        assert (latents / "latents-00001.safetensors").read_bytes() == before
        for changed in (["--no_flip"], ["--background", "black"]):
            with pytest.raises(SystemExit, match=f"{changed[0][-4:]}.*Take another"):
                run(*flags, *changed, output_dir="latents", program="cache")


class TestRefusals:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ((), "--demo, --train_data_dir, --dataset_name, --train_latents_dir"),
            (("--demo", "--train_data_dir", "x"), "pass one of"),
            (("--demo", "--ternary", "yes"), "expected true or false"),
            (("--demo", "--preset", "terdit-600m"), "brings its own model"),
            (("--demo", "--streaming"), "--dataset_name"),
            (("--demo", "--frechet_steps", 5), "--feature_network"),
            (("--demo", "--flow_matching", "--snr_gamma", 5), "--snr_gamma"),
            (("--demo", "--weighting_scheme", "logit_normal"), "pass --flow_matching, too"),
            (("--demo", "--ternary_warmup_steps", 5), "--init_from"),
            (("--demo", "--activation_bits", 8, "--ternary", "false"), "--activation_bits"),
            (("--demo", "--use_8bit_adam", "--fsdp"), "leave out --fsdp"),
            (("--demo", "--use_8bit_adam", "--optimizer", "muon"), "--use_8bit_adam is for AdamW alone"),
            (("--train_data_dir", "x", "--resolution", 31), "--resolution 31 must be a multiple of --patch_size"),
            (("--demo", "--total_batch_size", 12), "no multiple of 1 process"),
            (("--demo", "--lr_scheduler", "linear"), "invalid choice"),
            (("--demo", "--checkpoints_total_limit", "0"), "expected an integer, 1 or more, got '0'"),
            (("--demo", "--max_grad_norm", "0"), "expected a number, above 0, got '0'"),
            (("--demo", "--report_to", "wandb"), "not installed"),
            (("--demo", "--teacher", "TEACHER"), "knows 3 classes, the data has 10"),
        ],
        ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
    )
    @pytest.mark.filterwarnings("ignore:.*no supported trackers")
    def test_flags_that_do_not_go_together(self, run, capsys, tmp_path, tiny_pipeline, flags, message):
        if "TEACHER" in flags:
            tiny_pipeline(num_classes=3).save_pretrained(tmp_path / "three")
            flags = (*flags[:-1], tmp_path / "three")
        with pytest.raises(SystemExit) as error:
            run(*flags)
        assert message in f"{error.value}{capsys.readouterr().err}"

    def test_a_folder_with_a_run_of_other_settings(self, run_in, plain):
        before = {path: path.read_bytes() for path in plain.rglob("*") if path.is_file()}
        resume = ("--resume_from_checkpoint", "latest")
        for flags, message in [
            ((), "--resume_from_checkpoint latest"),
            ((*resume, "--train_batch_size", 4), "--total_batch_size 8 --seed 0"),
            ((*resume, "--seed", 1), "--total_batch_size 8 --seed 0"),
        ]:
            with pytest.raises(SystemExit, match=message):
                run_in(plain, "--demo", *flags, steps=8)
        assert {path: path.read_bytes() for path in plain.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("flags", "ffn_dim"),
    [
        ((), 384),
        (("--num_layers", "9"), 384),
        (("--num_attention_heads", "8", "--attention_head_dim", "16"), 384),
        (("--num_attention_heads", "6"), None),
        (("--attention_head_dim", "64", "--ffn_dim", "100"), 100),
    ],
)
def test_another_width_does_not_keep_the_presets_feed_forward_layers(programs, flags, ffn_dim):
    assert programs["train"].parse_args(["--train_data_dir", "x", *flags]).ffn_dim == ffn_dim


@pytest.mark.parametrize(
    ("name", "batch", "steps", "drop", "size"),
    [("terdit-600m", 256, 1_750_000, 1_550_000, (16, 1536)), ("terdit-4.2b", 512, 1_180_000, 550_000, (32, 3072))],
)
def test_the_papers_numbers(programs, name, batch, steps, drop, size):
    args = programs["train"].parse_args(["--preset", name, "--train_latents_dir", "x"])
    assert (args.total_batch_size, args.max_train_steps, args.ema_decay) == (batch, steps, 0.9999)
    rates = [
        args.learning_rate
        * training.recipes.learning_rate_factor(step, args.lr_scheduler, steps, step_rules=args.lr_step_rules)
        for step in (0, drop - 1, drop, steps - 1)
    ]
    assert rates == pytest.approx([5e-4, 5e-4, 1e-4, 1e-4])
    assert (args.num_layers, args.num_attention_heads * args.attention_head_dim) == size
    assert (args.initialization, args.flow_matching, args.adam_beta2) == ("reference", False, 0.999)


@pytest.mark.parametrize(
    ("flags", "decay", "warmup"),
    [
        (["--train_data_dir", "x"], 0.99, 75),
        (["--train_data_dir", "x", "--preset", "small", "--max_train_steps", "300"], 0.95, 15),
        (["--train_data_dir", "x", "--ema_decay", "0.9", "--lr_warmup_steps", "0"], 0.9, 0),
        (["--train_data_dir", "x", "--max_train_steps", "9"], 0.0, 0),
        (["--train_data_dir", "x", "--max_train_steps", "1000000"], 0.9999, 50_000),
        (["--demo", "--max_train_steps", "300"], 0.995, 100),
        (["--train_data_dir", "x", "--preset", "terdit-600m", "--max_train_steps", "300"], 0.9999, 0),
    ],
)
def test_average_and_warmup_fit_the_run_where_no_preset_says_otherwise(programs, flags, decay, warmup):
    args = programs["train"].parse_args(flags)
    assert (args.ema_decay, args.lr_warmup_steps) == (pytest.approx(decay), warmup)


def test_without_a_preset_a_laptop_trains_pixels_or_latents(programs):
    parse = programs["train"].parse_args
    pixels, latents = ["--train_data_dir", "x"], ["--train_latents_dir", "x"]
    assert vars(parse(pixels)) == {**vars(parse([*pixels, "--preset", "tiny"])), "preset": None}
    assert vars(parse(latents)) == {**vars(parse([*latents, "--preset", "medium"])), "preset": None}
    assert parse([*pixels, "--resolution", "64"]).max_train_steps == parse(pixels).max_train_steps <= 2000
    paper = parse([*latents, "--preset", "terdit-600m"])
    assert (paper.flow_matching, paper.adam_beta2, paper.scale_lr_factor) == (False, 0.999, 1)
    assert (parse(pixels).optimizer, paper.optimizer) == ("muon", "adamw")
    assert (
        parse([*pixels, "--use_8bit_adam"]).optimizer == parse([*pixels, "--optimizer", "adamw"]).optimizer == "adamw"
    )


@pytest.mark.parametrize("path", sorted((EXAMPLES / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    config = load_config_from_file(str(path))
    assert config.distributed_type in ("NO", "MULTI_GPU")
    assert config.mixed_precision in ("no", "bf16")


def start(folder, *args, processes=1, steps=6, launcher=None):
    """Start training in new processes, one thread each; `launcher` is the source of a program that runs it."""
    command = [sys.executable, EXAMPLES / "train_terdit.py", "--demo", *TINY, "--max_train_steps", steps]
    command[1:1] = ["-c", launcher] if launcher else []
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes]
        command[:1] = [*torchrun, "--rdzv_endpoint", "localhost:0", "--rdzv_backend", "c10d"]
    command = [str(part) for part in [*command, *args, "--output_dir", folder]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen(command, env=environment, **options)


def launch(folder, *args, processes=1, steps=6):
    """Train to the end in new processes; the folder."""
    process = start(folder, *args, processes=processes, steps=steps)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert f"Num processes = {processes}, on cpu" in output
    assert "find_unused_parameters" not in output
    return folder


class TestProcesses:
    @pytest.mark.parametrize(
        ("sharding", "optimizer"),
        [((), ()), (("--fsdp",), ()), (("--fsdp",), ("--optimizer", "muon"))],
        ids=["DDP", "FSDP2", "FSDP2-muon"],
    )
    def test_two_processes_train_as_one_and_resume_in_the_same_bits(self, run, tmp_path, sharding, optimizer):
        """As float32 sums allow: two processes add gradients in another order."""
        flags, steps = ("--checkpointing_steps", 3, "--checkpoints_total_limit", 9, *optimizer), 9
        one = run("--demo", "--train_batch_size", 16, *flags, output_dir="one", steps=steps)
        two = launch(tmp_path / "two", *flags, *sharding, processes=2, steps=steps)
        assert records(two, "grad_norm")[0] == pytest.approx(records(one, "grad_norm")[0], rel=1e-6)
        assert records(two) == pytest.approx(records(one), rel=1e-4)
        assert records(two, "images_seen") == records(one, "images_seen")
        assert records(two, "zero_share") == pytest.approx(records(one, "zero_share"), abs=2e-3)
        assert samples_of(two).isfinite().all()

        resume = (*flags, "--resume_from_checkpoint", "latest")
        for name, step in (("resumed", 6), ("one_again", 3)):
            (tmp_path / name).mkdir()
            (two / f"checkpoint-{step}").rename(tmp_path / name / f"checkpoint-{step}")
        launch(tmp_path / "resumed", *resume, *sharding, processes=2, steps=steps)
        assert_same_bits(two / "checkpoint-9", tmp_path / "resumed" / "checkpoint-9")
        # On one process: a checkpoint like any other.
        run("--demo", "--train_batch_size", 16, *resume, output_dir="one_again", steps=steps)
        assert records(tmp_path / "one_again") == pytest.approx(records(two)[3:], rel=1e-4)
