import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from PIL import Image

from diffusers_terdit import TerDiTTransformer2DModel
from diffusers_terdit.models.transformer_terdit import SIZES
from diffusers_terdit.ops import has_integer_kernel, integer_linear, ternary_linear, unpack_ternary
from diffusers_terdit.ops.cpu import choose


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
PAIR = ["ternary", "dit"]


@pytest.fixture(scope="session")
def scripts():
    sys.path.insert(0, str(ROOT / "examples"))
    import benchmark
    import deployment_page
    import kernel_benchmark
    import kernel_page

    yield {
        "benchmark": benchmark,
        "page": deployment_page,
        "kernel_benchmark": kernel_benchmark,
        "kernel_page": kernel_page,
    }
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


needs_integers = pytest.mark.skipif(not has_integer_kernel("cpu"), reason="needs AVX2 and numba")
INPUTS = ("gaussian", "gated", "outliers")
INTEGERS = [(name, dtype) for name in ("int16", "int8") for dtype in ("float32", "bfloat16")]
MODES = [
    *[("dense", "float32"), ("dense", "bfloat16"), ("exact", "float32"), ("exact", "bfloat16")],
    *(INTEGERS if has_integer_kernel("cpu") else []),
]
TOY = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 8, "num_classes": 10}


@pytest.fixture
def measure(scripts, monkeypatch, tmp_path):
    """`measure("kernels", "--turns", "1", ...)`: the command into `tmp_path`, or another `--output_dir`; its JSON."""

    def command(name, *args):
        args = ["--output_dir", tmp_path, *args]
        monkeypatch.setattr(sys, "argv", ["benchmark.py", name, *map(str, args)])
        scripts["benchmark"].main()
        folder = Path(args[len(args) - 1 - args[::-1].index("--output_dir") + 1])
        return json.loads((folder / f"{name}.json").read_text())

    return command


@pytest.fixture
def fast_bfloat16(scripts, monkeypatch):
    """Sets whether bfloat16 is fast here, so that a test does not depend on the machine."""

    def fast(value):
        monkeypatch.setattr(scripts["kernel_benchmark"], "has_fast_bfloat16", lambda: value)

    fast(True)
    return fast


@pytest.fixture(scope="session")
def layers(scripts, tmp_path_factory):
    """Folder with what `kernels` wrote about two small layers and a kernel of somebody's."""
    out = tmp_path_factory.mktemp("kernels")
    (out / "own_kernels.py").write_text("from diffusers_terdit.ops import ternary_linear as linear\n")
    args = ["--shapes", "64x48", "24x20", "--rows", "3", "70", "--turns", "2", "--kernel", "own_kernels:linear"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts["kernel_benchmark"], "has_fast_bfloat16", lambda: True)
        patch.setattr(sys, "argv", ["benchmark.py", "kernels", *args, "--output_dir", str(out)])
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.syspath_prepend(out)
        scripts["benchmark"].main()
    return out


def modes_of(records):
    return [(record["mode"], record["dtype"]) for record in records]


class TestKernels:
    def test_there_is_a_record_for_every_layer_and_mode(self, layers):
        (place,) = json.loads((layers / "kernels.json").read_text())["places"]
        wanted = {*MODES, ("unpack in every call", "float32"), ("own_kernels:linear", "float32")}
        for shape in ([64, 48], [24, 20]):
            for rows, turns in ((3, 10), (70, 2)):
                found = [r for r in place["records"] if (r["shape"], r["rows"]) == (shape, rows)]
                assert len(found) == len(wanted)
                assert set(modes_of(found)) == wanted
                assert {record["turns"] for record in found} == {turns}
        assert place["threads"] == torch.get_num_threads()
        assert place["commands"][0].startswith("OMP_NUM_THREADS=1 python examples/benchmark.py kernels --shapes 64x48")
        assert torch.__version__ in place["machine"]

    def test_speeds_are_those_of_pairs(self, layers):
        for record in json.loads((layers / "kernels.json").read_text())["places"][0]["records"]:
            assert record["seconds"] > 0
            for key in ("over_float32", "over_bfloat16", "cpu_over_float32", "cpu_over_bfloat16"):
                median, low, high = record[key]
                assert 0 < low <= median <= high
                if (record["mode"], f"over_{record['dtype']}") == ("dense", key.removeprefix("cpu_")):
                    assert record[key] == [1, 1, 1]

    def test_errors_are_those_of_the_arithmetic(self, layers):
        bounds = {
            ("exact", "float32"): (0, 1e-6),
            ("unpack in every call", "float32"): (0, 1e-6),
            ("dense", "bfloat16"): (1e-3, 4e-3),
            ("exact", "bfloat16"): (1e-3, 4e-3),
            ("int16", "float32"): (1e-6, 5e-4),
            ("int16", "bfloat16"): (1e-3, 4e-3),
            ("int8", "float32"): (3e-3, 5e-2),
        }
        for record in json.loads((layers / "kernels.json").read_text())["places"][0]["records"]:
            low, high = bounds.get((record["mode"], record["dtype"]), (0, 5e-2))
            assert record["error"].keys() == {"gaussian", "gated", "outliers"}
            assert all(low <= error <= high for error in record["error"].values()), record

    def test_page_and_plot_are_rendered_from_the_json_alone(self, layers, scripts, measure, monkeypatch):
        data = json.loads((layers / "kernels.json").read_text())
        page = (layers / "kernels.md").read_text("utf-8")
        assert page == scripts["kernel_page"].layers_page(data)
        with Image.open(layers / "kernels.png") as image:
            assert image.width == 900
        (layers / "kernels.md").unlink()
        monkeypatch.setattr(scripts["kernel_benchmark"], "measure_layers", None)
        assert measure("kernels", "--render", "--output_dir", layers) == data
        assert (layers / "kernels.md").read_text("utf-8") == page

    def test_a_rerun_replaces_what_it_measures_and_keeps_the_rest(self, layers, measure, tmp_path, fast_bfloat16):
        data = json.loads((layers / "kernels.json").read_text())
        elsewhere = {**data["places"][0], "machine": "an abacus"}
        (tmp_path / "kernels.json").write_text(json.dumps({"places": [elsewhere, *data["places"]]}))
        after = measure("kernels", "--shapes", "24x20", "--rows", "3", "--turns", "1")
        assert after["places"][0] == elsewhere
        old, new = data["places"][0], after["places"][1]
        stay = [record for record in old["records"] if (record["shape"], record["rows"]) != ([24, 20], 3)]
        assert new["records"][: len(stay)] == stay
        again = new["records"][len(stay) :]
        assert set(modes_of(again)) == {*MODES, ("unpack in every call", "float32")}  # not of two runs
        assert all((r["shape"], r["rows"], r["turns"]) == ([24, 20], 3, 5) for r in again)
        assert new["commands"] == [old["commands"][0], again[0]["command"]]
        assert "## " + "an abacus" not in (tmp_path / "kernels.md").read_text("utf-8")
        assert (tmp_path / "kernels.md").read_text("utf-8").count("### 70 rows") == 2

    def test_limits_of_the_libraries_are_another_place_and_named(self, layers, measure, monkeypatch, fast_bfloat16):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        (place,) = measure("kernels", "--shapes", "24x20", "--rows", "3", "--turns", "1")["places"]
        assert place["limits"] == {"ONEDNN_MAX_CPU_ISA": "AVX2"}
        assert "ONEDNN_MAX_CPU_ISA=AVX2 python examples/benchmark.py kernels" in place["commands"][0]

    @needs_integers
    def test_isa_forces_the_kernels(self, scripts, measure, monkeypatch, tmp_path):
        integer = importlib.import_module("diffusers_terdit.ops.cpu.integer")  # which needs numba
        sets, compiled, asked = tuple(choose.integer_kernels()), integer.compiled, set()

        def spy(kernel, *args):
            asked.add(kernel.name)
            return compiled(kernel, *args)

        monkeypatch.setattr(integer, "compiled", spy)
        (place,) = measure("kernels", "--shapes", "24x20", "--rows", "3", "--turns", "1", "--isa", sets[-1])["places"]
        assert asked == {sets[-1]}
        assert tuple(choose.integer_kernels()) == sets
        assert (place["isa"], place["forced"]) == (sets[-1], len(sets) > 1)
        page = (tmp_path / "kernels.md").read_text("utf-8")
        assert f"## {scripts['kernel_page'].ISA_NAMES[sets[-1]]}, {torch.get_num_threads()} thread" in page
        assert ("held to" in page) == (len(sets) > 1)

    @pytest.mark.parametrize("command", ["kernels", "step"])
    @pytest.mark.usefixtures("no_integer_kernels", "fast_bfloat16")
    def test_without_integer_kernels_the_page_says_so(self, measure, monkeypatch, tmp_path, command):
        monkeypatch.setitem(SIZES, "toy", TOY)
        args = ["--shapes", "24x20", "--rows", "3"] if command == "kernels" else ["--presets", "toy"]
        (place,) = measure(command, *args, "--turns", "1")["places"]
        assert (place["isa"], place["numba"]) == (None, None)
        assert not any(record["mode"].startswith("int") for record in place["records"])
        page = (tmp_path / f"{command}.md").read_text("utf-8")
        assert "the integer kernels cannot run (no numba, or no AVX2)" in page
        assert "Left out: int16 float32, int16 bfloat16, int8 float32, int8 bfloat16" in page
        with pytest.raises(SystemExit, match="--isa avx2: the integer kernels cannot run here"):
            measure(command, *args, "--isa", "avx2")

    @pytest.mark.parametrize("has_instructions", [True, False])
    @pytest.mark.parametrize("command", ["kernels", "step"])
    def test_slow_bfloat16_is_left_out(self, measure, monkeypatch, tmp_path, fast_bfloat16, command, has_instructions):
        fast_bfloat16(False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_instructions)
        monkeypatch.setitem(SIZES, "toy", TOY)
        args = ["--shapes", "24x20", "--rows", "3"] if command == "kernels" else ["--presets", "toy"]
        (place,) = measure(command, *args, "--turns", "1")["places"]
        found = modes_of(place["records"])
        assert ("dense", "bfloat16") not in found
        # without the instructions ours multiplies in float32; libraries may leave them unused that are there
        assert (("exact", "bfloat16") in found) != has_instructions
        page = (tmp_path / f"{command}.md").read_text("utf-8")
        assert "A matmul in bfloat16 was tried and is slower than float32 here" in page

    def test_bfloat16_is_tried_out(self, scripts, monkeypatch):
        times = {"torch.float32": [1.0] * 5, "torch.bfloat16": [0.5] * 5}
        monkeypatch.setattr(scripts["kernel_benchmark"], "in_turns", lambda *args: {"cpu_seconds": times})
        assert scripts["kernel_benchmark"].has_fast_bfloat16()
        times["torch.bfloat16"] = [6.0] * 5
        assert not scripts["kernel_benchmark"].has_fast_bfloat16()

    def test_turns_go_there_and_back_after_one_that_warms_up(self, scripts):
        called, bar = [], []
        functions = {name: lambda name=name: called.append(name) for name in "abc"}
        times = scripts["kernel_benchmark"].in_turns(functions, 3, lambda: bar.append(1))
        assert "".join(called) == "cbaabccbaabc"
        assert len(bar) == 4
        for clock in ("seconds", "cpu_seconds"):
            assert {name: len(values) for name, values in times[clock].items()} == {"a": 3, "b": 3, "c": 3}

    def test_a_speed_is_the_median_of_paired_ratios(self, scripts):
        assert scripts["kernel_benchmark"].speed([1.0, 4.0, 2.0], [1.0, 1.0, 4.0]) == [1.0, 0.5, 4.0]

    def test_inputs_are_what_they_are_called(self, scripts):
        def new(kind):
            return scripts["kernel_benchmark"].new_input(kind, 100, 1000, torch.Generator().manual_seed(0))

        assert abs(new("gaussian").std() - 1) < 0.02
        assert new("gaussian").abs().max() < 6
        changed = new("outliers") / new("gaussian")
        assert set(changed.round(decimals=3).unique().tolist()) == {1, 20}
        assert 50 < (changed > 10).sum() < 150
        gated = new("gated")
        assert (gated**4).mean() / (gated**2).mean() ** 2 > 9  # heavy tails; 3 for normal numbers

    def test_refusals(self, scripts, measure, capsys):
        for args, message in (
            (["--turns", "0"], "--turns must be 1 or more, got 0"),
            (["--rows", "0"], "--rows must be 1 or more, got 0"),
            (["--render"], "kernels.json does not exist; measure first"),
            (["--shapes", "6x4"], "'6x4' is no OUTPUTSxINPUTS with outputs a multiple of 4"),
            (["--isa", "sse2"], "invalid choice: 'sse2'"),
        ):
            with pytest.raises(SystemExit) as error:
                measure("kernels", *args)
            assert message in f"{error.value}{capsys.readouterr().err}"

    @needs_integers
    def test_an_instruction_set_that_is_not_there(self, measure, monkeypatch):
        monkeypatch.setattr(choose, "integer_kernels", lambda: {"avx2": None})
        with pytest.raises(SystemExit, match="--isa avx512_vnni: the integer kernels can run here in avx2"):
            measure("kernels", "--isa", "avx512_vnni")


def one_wrong_value(input, packed, scale, bias):
    output = ternary_linear(input, packed, scale, bias)
    if output.numel() > 300_000:
        output[-1, -1] += 2 * output.std()
    return output


def unwritten_column(input, packed, scale, bias):
    result, output = ternary_linear(input, packed, scale, bias), torch.empty(len(input), 4 * len(packed))
    output[:, 1:] = result[:, 1:]
    return output


def forgets_the_last_odd_input(input, packed, scale, bias):
    even = max(1, input.shape[1] // 2 * 2)
    return ternary_linear(input[:, :even].contiguous(), packed[:, :even].contiguous(), scale, bias)


def changes_its_input(input, packed, scale, bias):
    output = ternary_linear(input, packed, scale, bias)
    input.zero_()
    return output


def refuses_odd_inputs(input, packed, scale, bias):
    if input.shape[1] % 4:
        raise ValueError("I want fours")
    return ternary_linear(input, packed, scale, bias)


def rounds_to_3_percent(input, packed, scale, bias):
    output = ternary_linear(input, packed, scale, bias)
    return output * (1.03 if output.numel() % 8 else 0.97)


class TestKernelCheck:
    @pytest.fixture
    def check(self, scripts):
        def run(function, dtype=torch.float32, tolerance=1e-2):
            scripts["kernel_benchmark"].check_kernel("mine:linear", function, dtype, tolerance)

        return run

    def test_right_ones_pass(self, check):
        check(ternary_linear)
        check(ternary_linear, torch.bfloat16)
        check(lambda x, packed, scale, bias: torch.nn.functional.linear(x, scale * unpack_ternary(packed), bias))

    @needs_integers
    @pytest.mark.parametrize("bits", [8, 16])
    def test_ours_pass(self, check, bits):
        check(lambda *args: integer_linear(*args, bits=bits), tolerance=1e-2 if bits == 8 else 5e-4)

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (
                one_wrong_value,
                r"is wrong at 512 rows, 768 x 1152, .*: relative error 0.00\d+ \(tolerance 0.01\), largest",
            ),
            (unwritten_column, "gives NaN or infinity at 1 rows, 4 x 1, .*; does it write every output"),
            (forgets_the_last_odd_input, "is wrong at 2 rows, 128 x 129, scale of a tensor, no bias: relative"),
            (
                lambda x, packed, scale, bias: ternary_linear(x, packed, scale),
                "is wrong at 1 rows, .*, a bias: relative",
            ),
            (lambda x, p, scale, bias: ternary_linear(x, p, scale[:1].reshape(1), bias), "wrong at .*scale of a row"),
            (changes_its_input, "changes what it is given, at 1 rows, 4 x 1"),
            (refuses_odd_inputs, "fails at 1 rows, 4 x 1, scale of a tensor, no bias: ValueError: I want fours"),
            (lambda *args: ternary_linear(*args).T, r"must return \(1, 4\), torch.float32 .* it returned \(\(4, 1\)"),
            (lambda *args: ternary_linear(*args).double(), "it returned .*float64"),
            (lambda *args: None, "it returned NoneType"),
            (rounds_to_3_percent, r"relative error 0.03 \(tolerance 0.01\), .* --tolerance allows more"),
        ],
    )
    def test_wrong_ones_are_told_where(self, check, function, message):
        with pytest.raises(SystemExit, match=f"mine:linear .*{message}"):
            check(function)

    def test_tolerance_is_the_callers(self, check):
        check(rounds_to_3_percent, tolerance=0.04)

    def test_a_wrong_one_is_not_timed(self, measure, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "wrong_kernels.py").write_text("def half(input, *rest):\n    return input / 2\n")
        with pytest.raises(SystemExit, match="wrong_kernels:half must return"):
            measure("kernels", "--shapes", "24x20", "--rows", "3", "--kernel", "wrong_kernels:half")
        assert not (tmp_path / "kernels.json").exists()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("torch", "'torch' is no module:function, as my_kernels:linear"),
            ("a b:c", "'a b:c' is no module:function"),
            ("no_such_module:f", "cannot be imported: ModuleNotFoundError"),
            ("math:linear", "module 'math' has no function 'linear'"),
            ("math:pi", "module 'math' has no function 'pi'"),
        ],
    )
    def test_no_such_function(self, measure, capsys, text, message):
        with pytest.raises(SystemExit):
            measure("kernels", "--kernel", text)
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in last

    def test_the_present_folder_is_searched(self, scripts, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        (tmp_path / "nearby_kernels.py").write_text("class Kernels:\n    linear = print\n")
        text = "nearby_kernels:Kernels.linear"
        assert scripts["kernel_benchmark"].kernel_source(text) == (text, print)


class TestStep:
    @pytest.fixture
    def measured_step(self, measure, monkeypatch, fast_bfloat16):
        monkeypatch.setitem(SIZES, "toy", TOY)
        return measure("step", "--presets", "toy", "--turns", "1")

    def test_a_step_is_computed_from_block_and_rest(self, measured_step):
        (place,) = measured_step["places"]
        assert modes_of(place["records"]) == MODES
        for record in place["records"]:
            assert (record["preset"], record["layers"], record["tokens"]) == ("toy", 3, [2, 16])
            for clock in ("seconds", "cpu_seconds"):
                step = record["rest"][clock] + 3 * record["block"][clock]
                assert record["step"][clock] == pytest.approx(step, rel=2e-2)
            base = place["records"][0]["step"]["seconds"]
            assert record["step"]["over_float32"][0] == pytest.approx(base / record["step"]["seconds"], rel=2e-2)

    def test_errors_are_those_of_the_arithmetic(self, measured_step):
        errors = {(r["mode"], r["dtype"]): r["error"] for r in measured_step["places"][0]["records"]}
        assert errors["dense", "float32"] < 2e-6
        assert errors["exact", "float32"] < 2e-6
        assert 1e-3 < errors["exact", "bfloat16"] < 3e-2
        if has_integer_kernel("cpu"):
            assert 2e-6 < errors["int16", "float32"] < 1e-3
            assert 3e-3 < errors["int8", "float32"] < 1e-1

    def test_all_modes_hold_the_same_values(self, scripts, monkeypatch):
        monkeypatch.setitem(SIZES, "toy", TOY)
        with torch.inference_mode():
            model = scripts["kernel_benchmark"].random_model("toy")
            modes = scripts["kernel_benchmark"].model_modes(model, [])
        weights = {mode: m.transformer_blocks[0].ff.up_proj for mode, m in modes.items()}
        expected = model.transformer_blocks[0].ff.up_proj.dequantize()
        assert 0.5 < (expected != 0).float().mean() < 0.8
        for mode, layer in weights.items():
            found = layer.weight.float() if mode.name == "dense" else layer.dequantize()
            assert torch.equal(found, expected), mode

    def test_page_and_plot_are_rendered_from_the_json_alone(self, measured_step, scripts, tmp_path):
        assert (tmp_path / "step.md").read_text("utf-8") == scripts["kernel_page"].step_page(measured_step)
        with Image.open(tmp_path / "step.png") as image:
            assert image.width == 900

    def test_unknown_preset(self, measure, capsys):
        with pytest.raises(SystemExit):
            measure("step", "--presets", "terdit-9b")
        assert "invalid choice: 'terdit-9b'" in capsys.readouterr().err


def place(records, threads=1, **more):
    return {
        "machine": "an abacus",
        "threads": threads,
        "isa": "avx2",
        "forced": False,
        "numba": "1.0",
        "limits": {},
        "left_out": [],
        "commands": ["python x"],
        "records": records,
        **more,
    }


def layer_record(mode, dtype, speed, shape=(3072, 3072), **more):
    speeds = {"over_float32": [speed, speed / 2, 2 * speed], "cpu_over_float32": [10 * speed, speed, 20 * speed]}
    return {
        **{"shape": list(shape), "rows": 512, "mode": mode, "dtype": dtype, "turns": 7, "seconds": 1.0},
        **{"cpu_seconds": 1.0, **speeds, "error": {"gaussian": 0.001, "gated": 0.02, "outliers": 0.3}, **more},
    }


def step_record(mode, dtype, step, speed):
    times = {"seconds": 2 * step, "cpu_seconds": step, "over_float32": [speed, 1, 9], "cpu_over_float32": [3.0, 2, 4]}
    rest = {"seconds": 0.25, "cpu_seconds": 0.125}
    return {
        **{"preset": "toy", "layers": 3, "tokens": [2, 16], "turns": 7, "mode": mode, "dtype": dtype},
        **{"block": times, "rest": rest, "step": times, "error": 0.001},
    }


class TestSpeedPages:
    def test_the_layers_figures_follow_from_the_json(self, scripts):
        records = [
            layer_record("mine:linear", "float32", 1.5, cpu_over_bfloat16=[0.5, 0.25, 0.75]),
            layer_record("int16", "float32", 2.0),
            layer_record("int16", "float32", 12.0, shape=(8192, 3072), error=dict.fromkeys(INPUTS, 0.5)),
            layer_record("dense", "float32", 1.0),
        ]
        page = scripts["kernel_page"].layers_page({"places": [place(records)]})
        assert "| outputs x inputs | speed over | int16 float32 | mine:linear float32 |" in page
        assert "| 3072 x 3072 | dense float32, wall | 2.00 (1.00 to 4.00) | 1.50 (0.75 to 3.00) |" in page
        assert "| 3072 x 3072 | dense float32, processor | 20.0 (2.00 to 40.0) | 15.0 (1.50 to 30.0) |" in page
        assert "| 3072 x 3072 | dense bfloat16, processor | - | 0.50 (0.25 to 0.75) |" in page
        assert "| 8192 x 3072 | dense float32, wall | 12.0 (6.00 to 24.0) | - |" in page
        assert "| int16 float32 | 5.0e-01 | 5.0e-01 | 5.0e-01 |" in page
        assert "| mine:linear float32 | 1.0e-03 | 2.0e-02 | 3.0e-01 |" in page
        assert "| int16 float32 | dense float32 | 20.0 to 120.0 |" in page
        assert "AVX2, 1 thread: speed by processor time, least to most of the layers" in page

    def test_several_threads_are_judged_by_wall_time(self, scripts):
        records = [layer_record("int16", "float32", 2.0)]
        page = scripts["kernel_page"].layers_page({"places": [place(records, threads=2)]})
        assert "## AVX2, 2 threads" in page
        assert "| int16 float32 | dense float32 | 2.00 to 2.00 |" in page
        assert "dense float32, processor" not in page
        page = scripts["kernel_page"].step_page({"places": [place([step_record("int16", "float32", 4, 2.5)], 2)]})
        assert "| int16 float32 | 8.000 | 0.250 | 8.000 | 2,000 | 160 |" in page
        assert "speed of a step over dense float32 by wall time: int16 float32 2.50.\n" in page

    def test_the_steps_figures_follow_from_the_json(self, scripts):
        records = [step_record("int16", "bfloat16", 4, 2.5), step_record("dense", "float32", 12, 1.0)]
        data = {"places": [place(records, forced=True, limits={"A": "b"}, note="Older kernels.")]}
        page = scripts["kernel_page"].step_page(data)
        speeds = ["2.50 (1.00 to 9.00)"] * 2 + ["3.00 (2.00 to 4.00)"] * 2
        assert f"| int16 bfloat16 | {' | '.join(speeds)} | 1.0e-03 |" in page
        assert "| int16 bfloat16 | 4.000 | 0.125 | 4.000 | 1,000 | 80 |" in page
        assert "computed to take 1,000 s at 250 steps and 80 s at 20 steps" in page
        assert "by processor time: int16 bfloat16 3.00.\n" in page
        assert "held to AVX2" in page
        assert "The libraries were limited by `A=b`" in page
        assert "\nOlder kernels.\n" in page

    def test_several_places_and_unknown_kernels_are_drawn(self, scripts, tmp_path):
        records = [layer_record("int16", "bfloat16", 2.0), layer_record("mine:linear", "float32", 1.0)]
        data = {"places": [place(records), place(records, 2), place([layer_record("exact", "float32", 1.0)], 4)]}
        scripts["kernel_page"].layers_plot(data, tmp_path / "plot.png")
        with Image.open(tmp_path / "plot.png") as image:
            assert image.width == 900

    @pytest.mark.parametrize("command", ["kernels", "step"])
    def test_the_committed_page_is_what_the_committed_json_renders_to(self, scripts, command):
        data = json.loads((RESULTS / f"{command}.json").read_text())
        page = {"kernels": scripts["kernel_page"].layers_page, "step": scripts["kernel_page"].step_page}[command]
        assert (RESULTS / f"{command}.md").read_text("utf-8") == page(data)

    def test_the_committed_records_are_of_all_layers_and_both_models(self, scripts):
        for found in json.loads((RESULTS / "kernels.json").read_text())["places"]:
            shapes = {tuple(record["shape"]) for record in found["records"]}
            assert shapes == set(scripts["kernel_benchmark"].SHAPES)
        for found in json.loads((RESULTS / "step.json").read_text())["places"]:
            assert {record["preset"] for record in found["records"]} == {"terdit-600m-256", "terdit-4.2b-256"}

    def test_the_layers_are_those_of_the_presets(self, scripts):
        shapes = set()
        for preset in ("terdit-600m-256", "terdit-4.2b-256"):
            with torch.device("meta"):
                model = TerDiTTransformer2DModel.from_preset(preset, num_layers=1)
            shapes |= {(layer.out_features, layer.in_features) for layer in model.ternary_layers().values()}
        assert shapes == set(scripts["kernel_benchmark"].SHAPES)


class TestMemory:
    @pytest.mark.parametrize(
        ("args", "dtype", "bits"),
        [
            ([], torch.float32, "auto"),
            (["--dtype", "bfloat16"], torch.bfloat16, "auto"),
            (["--activation_bits", "none"], torch.float32, None),
            pytest.param(["--activation_bits", "16"], torch.float32, 16, marks=needs_integers),
            pytest.param(["--dtype", "bfloat16", "--activation_bits", "8"], torch.bfloat16, 8, marks=needs_integers),
        ],
    )
    def test_dtype_and_bits_reach_the_model(self, scripts, monkeypatch, capsys, tmp_path, args, dtype, bits):
        TerDiTTransformer2DModel(**TOY, weight_format="packed").save_pretrained(tmp_path)
        seen = []
        forward, set_bits = TerDiTTransformer2DModel.forward, TerDiTTransformer2DModel.set_activation_bits

        def spied_forward(model, hidden_states, *rest):
            seen.append((hidden_states.dtype, model.dtype))
            return forward(model, hidden_states, *rest)

        def spied_bits(model, value):
            seen.append(value)
            set_bits(model, value)

        monkeypatch.setattr(TerDiTTransformer2DModel, "forward", spied_forward)
        monkeypatch.setattr(TerDiTTransformer2DModel, "set_activation_bits", spied_bits)
        argv = ["benchmark.py", "memory", "--measure", str(tmp_path), "--sizes", "8", *args]
        monkeypatch.setattr(sys, "argv", argv)
        scripts["benchmark"].main()
        assert seen == [bits, (dtype, dtype)]
        imported, loaded, peak, seconds = map(float, capsys.readouterr().out.split())
        assert 0 < imported <= loaded <= peak
        assert seconds >= 0

    def test_the_table_says_which_mode(self, scripts, monkeypatch, capsys, tmp_path):
        monkeypatch.setitem(SIZES, "toy", TOY)
        argv = ["benchmark.py", "memory", "--preset", "toy", "--sizes", "8", "--folder", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [*argv, "--dtype", "bfloat16", "--activation_bits", "none"])
        scripts["benchmark"].main()
        out = capsys.readouterr().out
        assert "toy, packed, random codes, bfloat16, activation bits: none:" in out
        assert "| 8 x 8 | " in out
