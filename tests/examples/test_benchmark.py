import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from PIL import Image

from diffusers_terdit import TerDiTTransformer2DModel


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
PAIR = ["ternary", "dit"]


@pytest.fixture(scope="session")
def scripts():
    sys.path.insert(0, str(ROOT / "examples"))
    import benchmark
    import deployment_page

    yield {"benchmark": benchmark, "page": deployment_page}
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folders of configs, and the same models to count and save by hand."""
    size = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8, "num_classes": 10}
    models = {
        "ternary": TerDiTTransformer2DModel(**size, ffn_dim=64, weight_format="packed"),
        "dense": TerDiTTransformer2DModel(**size, ffn_dim=64, ternary=False),
        "dit": DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, out_channels=8
        ),
    }
    folder = tmp_path_factory.mktemp("configs")
    for name, model in models.items():
        model.save_config(folder / name)
    return folder, models


@pytest.fixture
def run(scripts, monkeypatch):
    """`run("--turns", "2", ...)`: the subcommand in this process; its measuring processes are real."""

    def deployment(*args):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", "deployment", *map(str, args)])
        scripts["benchmark"].main()

    return deployment


@pytest.fixture(scope="session")
def measured(scripts, tiny, tmp_path_factory):
    """Folder with what a run on two tiny models wrote, and the arguments of that run."""
    out = tmp_path_factory.mktemp("out")
    args = ["--models", *(f"{name}={tiny[0] / name}" for name in PAIR), "--dtypes", "bfloat16", "--turns", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["benchmark.py", "deployment", *args, "--output_dir", str(out)])
        patch.setenv("OMP_NUM_THREADS", "1")
        scripts["benchmark"].main()
    return out, args


@pytest.fixture
def refused(run, capsys):
    """The message with which a command ends."""

    def message(*args):
        with pytest.raises(SystemExit) as error:
            run(*args)
        return f"{error.value}{capsys.readouterr().err}"

    return message


def read(folder):
    return json.loads((folder / "deployment.json").read_text())


class TestMeasuring:
    def test_there_is_a_record_for_every_model_with_everything_measured(self, measured):
        data = read(measured[0])
        assert [record["model"] for record in data["models"]] == PAIR
        for record in data["models"]:
            assert record["dtype"] == "bfloat16"
            assert record["device"] == "cpu"
            assert torch.__version__ in record["machine"]
            assert record["command"].startswith("OMP_NUM_THREADS=1 python examples/benchmark.py deployment --models")
            assert record["latents"] == [2, 4, 8, 8]
            assert 5e7 < record["imported_bytes"] <= record["peak_bytes"] < 3e9
        assert {record["class"] for record in data["models"]} == {"TerDiTTransformer2DModel", "DiTTransformer2DModel"}

    def test_the_bytes_are_those_of_the_files_that_save_pretrained_writes(self, measured, tiny, tmp_path):
        records = {record["model"]: record for record in read(measured[0])["models"]}
        for name in PAIR:
            model = tiny[1][name]
            model.to(torch.bfloat16).save_pretrained(tmp_path / name)
            files = {path.name: path.stat().st_size for path in (tmp_path / name).iterdir()}
            assert records[name]["files"] == files
            assert records[name]["checkpoint_bytes"] == sum(files.values())

    def test_every_model_of_a_run_has_a_time_for_every_turn(self, measured):
        (timed,) = read(measured[0])["turns"]
        assert timed["models"] == PAIR
        for key in ("seconds", "cpu_seconds"):
            assert all(len(timed[key][name]) == 3 and min(timed[key][name]) > 0 for name in timed["models"])

    def test_page_and_plot_are_written(self, measured, scripts):
        out, _ = measured
        assert (out / "deployment.md").read_text("utf-8") == scripts["page"].page(read(out))
        with Image.open(out / "deployment.png") as image:
            assert image.width == 900

    def test_a_second_run_measures_nothing(self, measured, run, scripts, monkeypatch):
        out, args = measured
        before = (out / "deployment.json").read_bytes()
        monkeypatch.setattr(scripts["benchmark"], "measure_together", None)
        run(*args, "--output_dir", out)
        assert (out / "deployment.json").read_bytes() == before

    @pytest.mark.parametrize(
        ("change", "replaced"),
        [("--fresh", PAIR), ("another machine", PAIR), ("another config", ["ternary"]), ("another pair", [])],
    )
    def test_what_is_not_there_is_measured(self, measured, run, scripts, monkeypatch, tmp_path, change, replaced):
        out, args = measured
        data = read(out)
        if change == "another machine":
            for item in [*data["models"], *data["turns"]]:
                item["machine"] = "an abacus"
        if change == "another config":
            data["models"][0]["config"]["num_layers"] = 7
        if change == "another pair":
            data["turns"][0]["models"] = ["ternary", "dense"]
        (tmp_path / "deployment.json").write_text(json.dumps(data))
        asked = []

        def measure(models, dtype, args, common):
            asked.append([name for name, _ in models])
            records = [{**record, **common, "command": "again"} for record in read(out)["models"]]
            seconds = {name: [1.0] for name in asked[-1]}
            run = {"models": asked[-1], "dtype": dtype, **common, "seconds": seconds, "cpu_seconds": seconds}
            return [record for record in records if record["model"] in asked[-1]], run

        monkeypatch.setattr(scripts["benchmark"], "measure_together", measure)
        run(*args, "--output_dir", tmp_path, *([change] if change == "--fresh" else []))
        assert asked == [PAIR]
        after = read(tmp_path)
        assert [record["model"] for record in after["models"]] == PAIR
        assert [record["model"] for record in after["models"] if record["command"] == "again"] == replaced
        assert after["turns"][-1]["models"] == PAIR
        assert len(after["turns"]) == {"--fresh": 1, "another config": 1}.get(change, 2)

    def test_models_that_do_not_fit_together_run_in_pairs(self, scripts, monkeypatch):
        benchmark = scripts["benchmark"]
        models = [benchmark.model_source(name) for name in benchmark.MODELS]

        def groups(free, dtype):
            monkeypatch.setattr(benchmark, "is_free", lambda needed, device: needed < free)
            return [[name for name, _ in group] for group in benchmark.groups_that_fit(models, dtype, "cpu")]

        assert groups(17e9, torch.bfloat16) == [list(benchmark.MODELS)]
        assert groups(22e9, torch.float32) == [["TerDiT-600M", "DiT-XL/2"], ["TerDiT-4.2B", "Large-DiT-4.2B"]]
        with pytest.raises(SystemExit, match=r"TerDiT-4.2B and Large-DiT-4.2B in float32 need about 20 GB"):
            groups(17e9, torch.float32)

    @pytest.mark.parametrize("command", [None, "step"])
    def test_a_process_that_dies_is_named(self, scripts, command):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], **pipes) as process:
            if command:
                process.wait()
            with pytest.raises(RuntimeError, match="The process of odd ended with code 3"):
                scripts["benchmark"].ask("odd", process, command)


class TestCounting:
    @pytest.mark.parametrize(
        ("name", "layers", "width", "condition", "share"),
        [
            ("TerDiT-600M", 16, 1536, 1024, 24.8),
            ("DiT-XL/2", 28, 1152, 1152, 29.7),
            ("TerDiT-4.2B", 32, 3072, 1024, 14.3),
            ("Large-DiT-4.2B", 32, 3072, 1024, 14.3),
        ],
    )
    def test_adaln_of_the_papers_models(self, scripts, name, layers, width, condition, share):
        benchmark = scripts["benchmark"]
        counted = benchmark.counts(benchmark.on_meta(benchmark.MODELS[name]))
        assert counted["adaln_weights"] == layers * 6 * width * condition
        assert round(100 * counted["adaln_weights"] / counted["parameters"], 1) == share

    @pytest.mark.parametrize(("name", "width"), [("TerDiT-600M", 1536), ("TerDiT-4.2B", 3072)])
    def test_ternary_weights_are_those_of_the_blocks_matrices(self, scripts, name, width):
        benchmark = scripts["benchmark"]
        ffn, layers = 8 * width // 3, {1536: 16, 3072: 32}[width]
        counted = benchmark.counts(benchmark.on_meta(benchmark.MODELS[name]))
        assert counted["ternary_weights"] == layers * (4 * width**2 + 3 * width * ffn + 6 * width * 1024)

    def test_parameters_are_counted_as_weights_not_bytes(self, scripts, tiny):
        count = scripts["benchmark"].counts
        scales = len(tiny[1]["ternary"].ternary_layers())
        assert count(tiny[1]["ternary"])["parameters"] == count(tiny[1]["dense"])["parameters"] + scales
        assert count(tiny[1]["dense"])["ternary_weights"] == 0

    def test_the_page_is_right_about_diffusers_copies_of_the_embedders(self, scripts):
        model = scripts["benchmark"].on_meta(scripts["benchmark"].MODELS["DiT-XL/2"])
        total = sum(parameter.numel() for parameter in model.parameters())
        copies = 27 * sum(parameter.numel() for parameter in model.transformer_blocks[0].norm1.emb.parameters())
        assert (round(copies / 1e6, 1), round((total - copies) / 1e6, 1)) == (75.0, 674.8)
        adaln = scripts["benchmark"].counts(model)["adaln_weights"]
        assert round(100 * adaln / (total - copies), 1) == 33.0
        assert "75.0 M" in scripts["page"].ADALN_NOTE
        assert "674.8 M" in scripts["page"].ADALN_NOTE
        assert "33.0 %" in scripts["page"].ADALN_NOTE


def record(model, size, peak, **more):
    return {
        "model": model,
        "dtype": "float32",
        "device": "cpu",
        "machine": "an abacus",
        "command": "python x",
        "parameters": 2_000_000,
        "ternary_weights": 1_000_000,
        "adaln_weights": 500_000,
        "checkpoint_bytes": size,
        "imported_bytes": 50_000_000,
        "peak_bytes": peak,
        **more,
    }


def turns(seconds, **more):
    place = {"dtype": "float32", "device": "cpu", "machine": "an abacus", "command": "python x"}
    busy = {name: [time / (2 if name.startswith("Ter") else 4) for time in times] for name, times in seconds.items()}
    return {"models": list(seconds), **place, "seconds": seconds, "cpu_seconds": busy, **more}


class TestPage:
    @pytest.fixture
    def data(self):
        seconds = {"TerDiT-4.2B": [1.0, 3.0, 4.0], "Large-DiT-4.2B": [2.0, 2.0, 2.0]}
        models = [record("TerDiT-4.2B", 100_000_000, 200_000_000), record("Large-DiT-4.2B", 1_600_000_000, 10**9)]
        return {"models": models, "turns": [turns(seconds)]}

    def test_its_figures_follow_from_the_json(self, scripts, data):
        page = scripts["page"].page(data)
        # the median of the turns; 250 times the smaller one
        assert "| TerDiT-4.2B | float32 | 100 | 200 | 50 | 3.00 | 1.50 | 375 |" in page
        times = "1.50 (0.50 to 2.00) | 3.00 (1.00 to 4.00) | 3"
        assert f"| TerDiT-4.2B over Large-DiT-4.2B | float32 | 1/16.0 | 1/5.0 | {times} |" in page
        assert "1/16.0 of the disk, 1/5.0 of the memory and 3.00 times the processor time of Large-DiT-4.2B" in page
        assert "| ours: processor time of a step, float32, CPU | 0.50 s | 1.50 s | 3.00 |" in page
        assert "| TerDiT-4.2B | 2.0 | 1.0 | 0.5 | 25.0 % |" in page
        assert "| ours: checkpoint, float32, CPU | 1,600 MB | 100 MB | 1/16.0 |" in page
        assert "| **paper: checkpoint** | 16 GB | 1.1 GB | 1/14.5 |" in page
        assert "| **paper: peak memory, GPU** | 17,027 MB | 1,919 MB | 1/8.9 |" in page
        assert "| **paper: 250 steps, A100** | 83 s | 97 s | 1.17 |" in page

    def test_times_of_different_runs_are_not_compared(self, scripts, data):
        both = data["turns"].pop()["seconds"]
        data["turns"] = [turns({name: seconds}) for name, seconds in both.items()]
        page = scripts["page"].page(data)
        assert "| TerDiT-4.2B | float32 | 100 | 200 | 50 | 3.00 | 1.50 | 375 |" in page
        assert "| TerDiT-4.2B over" not in page
        assert "ours: " not in page

    def test_a_model_without_times_says_so(self, scripts, data):
        data["turns"] = []
        assert "| TerDiT-4.2B | float32 | 100 | 200 | 50 | not timed | not timed | not timed |" in scripts[
            "page"
        ].page(data)

    def test_a_gpu_has_its_own_section_and_its_own_memory(self, scripts, data, tmp_path):
        gpu = {"device": "cuda", "machine": "a card"}
        data["models"] += [{**item, **gpu, "device_peak_bytes": 30_000_000} for item in data["models"]]
        assert "No GPU was at hand" in scripts["page"].page({**data, "models": data["models"][:2]})
        data["turns"] += [{**data["turns"][0], **gpu}]
        page = scripts["page"].page(data)
        assert page.index("## On a CPU") < page.index("an abacus") < page.index("## On a GPU") < page.index("a card")
        assert "| TerDiT-4.2B | float32 | 100 | 30 | 50 | 3.00 | - | 750 |" in page
        assert "| ours: time of a step, float32, GPU | 2.00 s | 3.00 s | 1.50 |" in page
        assert "No GPU was at hand" not in page
        scripts["page"].plot(data, tmp_path / "plot.png")

    def test_a_pair_of_which_one_was_measured_elsewhere_is_left_out(self, scripts, data):
        data["models"][1]["machine"] = "another abacus"
        assert "| TerDiT-4.2B over" not in scripts["page"].page(data)

    def test_the_committed_page_is_what_the_committed_json_renders_to(self, scripts):
        assert (RESULTS / "deployment.md").read_text("utf-8") == scripts["page"].page(read(RESULTS))

    def test_the_committed_records_are_of_the_papers_models_as_they_are_now(self, scripts):
        benchmark, data = scripts["benchmark"], read(RESULTS)
        cpu = [item for item in data["models"] if item["device"] == "cpu"]
        assert {(item["model"], item["dtype"]) for item in cpu} == {
            (name, dtype) for name in benchmark.MODELS for dtype in ("float32", "bfloat16")
        }
        for item in data["models"]:
            model = benchmark.on_meta(benchmark.MODELS[item["model"]])
            counted = benchmark.counts(model)
            assert {key: item[key] for key in counted} == counted
            dense = counted["parameters"] - counted["ternary_weights"]
            weights = dense * getattr(torch, item["dtype"]).itemsize + counted["ternary_weights"] / 4
            assert item["checkpoint_bytes"] == sum(item["files"].values())
            assert 0 < item["checkpoint_bytes"] - weights < 300_000  # headers, index, config, float32 scales
            assert item["peak_bytes"] > item["checkpoint_bytes"]


class TestRefusals:
    def test_unknown_model(self, refused):
        assert "no model 'terdit'; there are TerDiT-600M, DiT-XL/2" in refused("--models", "terdit")

    def test_folder_without_a_config(self, refused, tmp_path):
        assert "no config.json in the folder of" in refused("--models", f"a={tmp_path}")

    def test_config_of_another_class(self, refused, tmp_path):
        (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
        assert "is the config of a UNet2DModel" in refused("--models", f"a={tmp_path}")

    def test_a_name_twice(self, refused):
        assert "has a name twice" in refused("--models", "TerDiT-600M", "TerDiT-600M")

    def test_no_turns(self, refused):
        assert "--turns must be 1 or more, got 0" in refused("--turns", "0")

    def test_nothing_to_render(self, refused, tmp_path):
        assert "does not exist; measure first" in refused("--render", "--output_dir", tmp_path)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_no_gpu(self, refused):
        assert "sees no GPU" in refused("--device", "cuda")
