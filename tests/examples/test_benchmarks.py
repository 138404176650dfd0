"""examples/benchmarks: every scenario at a toy size on the CPU, what it refuses, and the committed pages."""

import importlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import Flux2Transformer2DModel

from diffusers_terdit.ops import choose_kernel, has_integer_kernel, integer_linear, ternary_linear
from diffusers_terdit.ops.cpu import choose


ROOT = Path(__file__).parents[2]
STEPS = [f"step {i}" for i in range(1, 5)]  # of the pipeline
RESULTS = ROOT / "docs" / "results"
BENCHMARKS = ROOT / "examples" / "benchmarks"
needs_integers = pytest.mark.skipif(not has_integer_kernel("cpu"), reason="needs AVX2 and numba")
INTEGERS = ("int16", "int8") if has_integer_kernel("cpu") else ()
MODES = {(name, dtype) for name in ("dense", "best dense", "exact", *INTEGERS) for dtype in ("float32", "bfloat16")}
IN_GROUPS = {(f"{name}, groups of 128", "float32") for name in ("exact", *INTEGERS)}


@pytest.fixture(scope="module")
def scenarios():
    """The modules by name; `gpu_designs` needs Triton."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        names = {path.stem for path in BENCHMARKS.glob("*.py")} - {"gpu_designs"}
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture
def run(scenarios, monkeypatch, tmp_path):
    """`run("kernels", "--turns", 2)`: the JSON and the page that the command leaves in `tmp_path`."""
    monkeypatch.setattr(scenarios.cpu_speed, "has_fast_bfloat16", lambda: True)  # on every machine the same modes
    monkeypatch.setattr(scenarios.peers, "PEERS", [])
    monkeypatch.setattr(scenarios.cpu_speed, "BYTES", 2**17)  # of toy layers

    def command(name, *args):
        monkeypatch.setattr(sys, "argv", ["run.py", name, *map(str, args), "--output_dir", str(tmp_path)])
        scenarios.run.main()
        path = tmp_path / f"{name.replace('-', '_')}.json"
        return json.loads(path.read_text()), path.with_suffix(".md").read_text("utf-8")

    return command


@pytest.fixture
def in_this_process(scenarios, monkeypatch):
    """Measure here what belongs into a process of its own: starting one takes ten seconds. Returns who was asked."""
    asked = []

    def measure(script, **settings):
        asked.append(settings)
        return getattr(scenarios, Path(script).stem).measure(**json.loads(json.dumps(settings)))

    monkeypatch.setattr(scenarios.shared, "in_a_process", measure)
    return asked


def by_mode(records):
    return {(record["mode"], record["dtype"]): record for record in records}


# Pages and refusals


@pytest.mark.parametrize("name", ["deployment", "kernels", "step", "flux2", "numerics", "memory", "training"])
def test_the_committed_page_is_what_the_committed_json_renders_to(run, tmp_path, name):
    for file in (f"{name}.json", "measured.json"):
        shutil.copy(RESULTS / file, tmp_path)
    _, page = run(name, "--render")
    assert page == (RESULTS / f"{name}.md").read_text("utf-8")
    assert (tmp_path / f"{name}.png").exists() == (RESULTS / f"{name}.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernels", "--turns", "0"], "must be 1 or more, got 0"),
        (["kernels", "--kernel", "no_such_module:linear"], "is no module:function"),
        (["gpu-steps", "--render"], "gpu_steps.json does not exist; measure first"),
        *([] if torch.cuda.is_available() else [(["gpu-tests"], "This torch sees no GPU")]),
    ],
)
def test_refusals(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert message in f"{error.value}{capsys.readouterr().err}"


@pytest.mark.parametrize("command", [["kernels"], ["gpu-layers", "--device", "cpu"]], ids=lambda c: c[0])
def test_nothing_is_timed_when_the_tests_fail(scenarios, run, monkeypatch, tmp_path, command):
    (tmp_path / "test_it.py").write_text("def test_it(): assert 1 == 2\n")
    for scenario in (scenarios.cpu_speed, scenarios.gpu_layers):
        monkeypatch.setattr(scenario, "TESTS", [str(tmp_path / "test_it.py")])
    with pytest.raises(SystemExit, match="so no speed is measured"):
        run(*command, "--presets", "toy")
    assert not list(tmp_path.glob("*.json"))
    if command == ["kernels"]:
        (tmp_path / "test_it.py").write_text("def test_it(): pass\n")
        scenarios.shared.run_tests(False, *scenarios.cpu_speed.TESTS)


@pytest.mark.parametrize("scenario", ["memory", "deployment", "flux2"])
def test_numbers_that_are_not_finite_are_refused(scenarios, monkeypatch, tmp_path, scenario):
    is_flux, folder = scenario == "flux2", str(tmp_path)
    model = Flux2Transformer2DModel(**scenarios.flux2.TOY) if is_flux else scenarios.shared.random_model("toy")
    model.proj_out.weight.data.fill_(3e38)
    model.save_pretrained(tmp_path / "transformer" if scenario == "memory" else tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("step\n"))
    measure = {
        "memory": lambda: scenarios.memory.measure(folder, 8, "float32"),
        "deployment": lambda: scenarios.deployment.serve(folder, "float32", "cpu"),
        "flux2": lambda: scenarios.flux2.measure_forward(folder, "float32", "toy"),
    }[scenario]
    with pytest.raises(RuntimeError, match="in float32 gave numbers that are not finite"):
        measure()


# What the scenarios share


def test_results_of_another_machine_or_setting_are_not_continued(scenarios, tmp_path):
    args = SimpleNamespace(output_dir=tmp_path, render=False)

    def resumed(place, fresh=False):
        results = scenarios.shared.Results(args, "some", lambda data: "a page")
        results.resume(fresh, place=place)
        return results

    first = resumed("here")
    first.collect([{"mode": "exact", "values": [1.5, {"a": [{}]}]}, {"mode": "int8", "values": []}])
    assert resumed("here").data["records"] == first.data["records"]
    assert resumed("here").missing([{"mode": "exact"}, {"mode": "int16"}]) == [{"mode": "int16"}]
    assert resumed("there").missing([{"mode": "exact"}]) == [{"mode": "exact"}]
    assert resumed("here", fresh=True).missing([{"mode": "exact"}]) == [{"mode": "exact"}]
    assert {path.name for path in tmp_path.iterdir()} == {"some.json", "some.md", "measured.json"}


def test_a_process_of_its_own_answers_on_its_last_line(scenarios, tmp_path, monkeypatch, capsys):
    (tmp_path / "echo.py").write_text("import sys\nprint('noise')\nprint(sys.argv[1])\n")
    settings = {"limit": None, "names": ["a b"]}
    assert scenarios.shared.in_a_process(tmp_path / "echo.py", **settings) == settings
    monkeypatch.setattr(sys, "argv", ["memory.py", json.dumps(settings)])
    scenarios.shared.answer(lambda **settings: settings)
    assert json.loads(capsys.readouterr().out) == settings


def test_turns_go_there_and_back_after_one_that_warms_up(scenarios):
    called = []
    times = scenarios.shared.in_turns({name: name for name in "abc"}, 3, clock=called.append)
    assert "".join(called) == "cbaabccbaabc"
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert scenarios.shared.ratios([1.0, 4.0, 2.0], [1.0, 1.0, 4.0]) == [1.0, 0.5, 4.0]


# Kernels and steps on a CPU


def test_kernels(scenarios, run, monkeypatch, tmp_path):
    (tmp_path / "own_kernels.py").write_text("from diffusers_terdit.ops import ternary_linear as linear\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    args = ["--presets", "toy", "--skip_tests", "--turns", 2]
    data, page = run("kernels", *args, "--rows", 3, 70, "--kernel", "own_kernels:linear")
    (place,) = data["places"]
    bounds = {
        **{(mode, "float32"): (0, 1e-6) for mode in ("dense", "exact", "exact, groups of 128")},
        **{(mode, "float32"): (1e-6, 5e-4) for mode in ("int16", "int16, groups of 128")},
        **{(mode, "bfloat16"): (1e-3, 4e-3) for mode in ("dense", "exact", "int16")},
    }
    cases = {scenarios.cpu_speed.case_of(record) for record in place["records"]}
    assert len(cases) == 4 * 2
    for case in cases:
        found = by_mode(record for record in place["records"] if scenarios.cpu_speed.case_of(record) == case)
        others = {("unpack in every call", "float32"), ("own_kernels:linear", "float32"), ("best dense", "int8")}
        assert found.keys() == MODES | IN_GROUPS | others
        for mode, record in found.items():
            assert ("by" in record) == (mode[0] == "best dense")
            assert (not record["error"]) == (mode == ("best dense", "int8"))
            low, high = bounds.get(mode, (0, 5e-2))
            assert all(low <= error <= high for error in record["error"].values()), record
            assert record["turns"] == 2
            inputs, outputs = record["shape"]
            assert record["layers"] == (-(-(2**15) // (inputs * outputs)) if record["rows"] == 3 else 1)
            median, lowest, highest = record["cpu_over_float32"]
            assert 0 < lowest <= median <= highest
            assert mode != ("dense", "float32") or median == 1
    assert "OMP_NUM_THREADS=1 python examples/benchmarks/run.py kernels --presets toy --skip_tests" in page
    # another machine's records stay; of the same layer and rows, all modes are replaced
    place["machine"] = "an abacus"
    (tmp_path / "kernels.json").write_text(json.dumps(data))
    for _ in range(2):
        data, _ = run("kernels", *args, "--rows", 3)
    assert data["places"][0] == place
    assert len(data["places"][1]["records"]) == 4 * (len(MODES | IN_GROUPS) + 2)


@needs_integers
def test_isa_forces_the_kernels(run, monkeypatch):
    integer = importlib.import_module("diffusers_terdit.ops.cpu.integer")  # which needs numba
    sets, compiled, asked = tuple(choose.integer_kernels()), integer.compiled, set()
    monkeypatch.setattr(integer, "compiled", lambda kernel, *args: asked.add(kernel.name) or compiled(kernel, *args))
    args = ["--presets", "toy", "--rows", 3, "--turns", 1, "--skip_tests", "--isa"]
    assert run("kernels", *args, sets[-1])[0]["places"][0]["isa"] == sets[-1]
    assert asked == {sets[-1]}
    assert tuple(choose.integer_kernels()) == sets
    monkeypatch.setattr(choose, "integer_kernels", dict)
    with pytest.raises(SystemExit, match="can run here in no instruction set"):
        run("kernels", *args, sets[-1])


@pytest.mark.usefixtures("no_integer_kernels")
def test_what_cannot_or_need_not_run_is_left_out(scenarios, run, monkeypatch):
    monkeypatch.setattr(scenarios.cpu_speed, "has_fast_bfloat16", lambda: False)
    data, page = run("step", "--presets", "toy", "--turns", 1, "--skip_tests")
    found = by_mode(data["places"][0]["records"])
    assert not {("dense", "bfloat16"), ("best dense", "bfloat16")} & found.keys()
    assert {mode for mode, _ in found} == {"dense", "best dense", "exact"}
    assert "The integer kernels cannot run here" in page
    assert "A matmul in bfloat16 was tried and is slower" in page


def test_step(run):
    data, page = run("step", "--presets", "toy", "--turns", 1, "--skip_tests")
    found = by_mode(data["places"][0]["records"])
    assert found.keys() == MODES
    for record in found.values():
        assert (record["layers"], record["tokens"]) == (2, [2, 16])
        step = record["rest"]["seconds"] + 2 * record["block"]["seconds"]
        assert record["step"]["seconds"] == pytest.approx(step, rel=2e-2)
        base = found["dense", "float32"]["step"]["seconds"]
        assert record["step"]["over_float32"][0] == pytest.approx(base / record["step"]["seconds"], rel=2e-2)
    errors = {mode: record["error"] for mode, record in found.items()}
    assert max(errors["dense", "float32"], errors["exact", "float32"]) < 2e-6
    assert 1e-3 < errors["exact", "bfloat16"] < 3e-2
    if INTEGERS:
        rounds = choose_kernel(torch.device("cpu"), torch.float32, 128, 128, requested_bits=16).bits == 16
        assert (errors["int16", "float32"] > 2e-6) == rounds
        assert errors["int16", "float32"] < 1e-3 < errors["int8", "float32"] < 1e-1
    assert "| toy | exact bfloat16 |" in page


def test_an_installed_package_is_measured_next_to_ours(scenarios, run, monkeypatch):
    seen = []

    def build(weight):
        seen.append(len(weight.unique()))
        return lambda x: x @ weight.T

    others = [("theirs", ("torch",)), ("absent", ("no_such_module.part",)), ("missing", ("no_such_module",))]
    found = [scenarios.peers.Peer(name, "float32", needs, build) for name, needs in others]
    monkeypatch.setattr(scenarios.peers, "PEERS", found)
    for command in ("kernels", "step"):
        arguments = ["--rows", 3] if command == "kernels" else []
        data, page = run(command, "--presets", "toy", "--turns", 1, "--skip_tests", *arguments)
        names = {record["mode"] for record in data["places"][0]["records"]}
        assert "theirs" in names
        assert not {"absent", "missing"} & names
        assert "| theirs float32 |" in page
    assert set(seen) == {3}  # a scale times -1, 0, +1: the layers of the blocks alone


@torch.inference_mode()
def test_peers_multiply_right(scenarios):
    """Those that are installed, with the error that they are known for."""
    largest = {"SDNQ int8": 2e-2, "torchao int8": 2e-2, "ONNX Runtime 2 bits, int8": 2e-2}
    largest["GGUF Q4_0 in diffusers"] = 0.1  # one of the two ends is rounded to 7/8
    weight, x = torch.randint(-1, 2, (96, 256)) * 2.0**-4, torch.randn(33, 256)
    expected = x.double() @ weight.double().T
    for peer in scenarios.peers.installed():
        output = peer.build(weight)(x.to(getattr(torch, peer.dtype)))
        exact = 1e-6 if peer.dtype == "float32" else 1e-2
        assert scenarios.shared.relative_error(output, expected) < largest.get(peer.name, exact), peer.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_best_dense_product_is_one(scenarios, dtype):
    weight = torch.randint(-1, 2, (96, 256)).to(dtype)
    product = scenarios.peers.BestDense(weight)
    for rows in (2, 33):
        x = torch.randint(-5, 6, (rows, 256)).to(dtype)
        assert torch.equal(product(x).float(), (x.float() @ weight.float().T).to(product(x).dtype).float())
    assert product.names.keys() == {2, 33}
    assert set(product.names.values()) <= scenarios.peers.candidates(x, weight, True).keys()


def test_the_best_dense_layer_has_the_gradients_of_a_linear_one(scenarios):
    ours, torchs = scenarios.peers.BestDenseLinear(24, 40), torch.nn.Linear(24, 40)
    torchs.load_state_dict(ours.state_dict())
    found = []
    for layer in (ours, torchs):
        x = torch.arange(2 * 3 * 24.0).view(2, 3, 24).div(100).requires_grad_()
        layer(x).square().sum().backward()
        found.append([x.grad, layer.weight.grad, layer.bias.grad])
    torch.testing.assert_close(*found)
    with torch.autocast("cpu"):
        assert ours(x).dtype == torch.bfloat16


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


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (one_wrong_value, r"wrong at 512 rows, 768 x 1152, .*: relative error 0.00\d+ \(tolerance 0.01\), largest"),
        (unwritten_column, "wrong at 1 rows, 4 x 1, .*: relative error nan .*: does it write every output"),
        (forgets_the_last_odd_input, "wrong at 2 rows, 128 x 129, scale of a tensor, no bias"),
        (lambda x, packed, scale, bias: ternary_linear(x, packed, scale), "wrong at 1 rows, .*, a bias"),
        (lambda x, packed, scale, bias: ternary_linear(x, packed, scale[:1].reshape(1), bias), "wrong at .* of a row"),
        (changes_its_input, "changes what it is given, at 1 rows, 4 x 1"),
        (lambda *args: ternary_linear(*args).T, r"returns \(\(4, 1\).* It must return \(1, 4\)"),
        (lambda *args: ternary_linear(*args).double(), "returns .*float64"),
        (lambda *args: None, "returns NoneType"),
    ],
)
def test_a_kernel_that_is_wrong_is_told_where(scenarios, function, message):
    with pytest.raises(SystemExit, match=f"mine:linear (is )?{message}"):
        scenarios.cpu_speed.check_kernel("mine:linear", function, torch.float32, 1e-2)


def test_a_kernel_that_is_wrong_is_not_timed(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wrong_kernels.py").write_text("def half(input, *rest):\n    return input / 2\n")
    with pytest.raises(SystemExit, match="wrong_kernels:half returns"):
        run("kernels", "--presets", "toy", "--skip_tests", "--kernel", "wrong_kernels:half")
    assert not (tmp_path / "kernels.json").exists()


@pytest.mark.parametrize("bits", [None, pytest.param(16, marks=needs_integers)])
def test_a_kernel_that_is_right_passes(scenarios, bits):
    function = ternary_linear if bits is None else lambda *args: integer_linear(*args, bits=bits)
    for dtype in (torch.float32, torch.bfloat16):
        scenarios.cpu_speed.check_kernel("mine:linear", function, dtype, 1e-2)


# Models on a CPU


def test_memory(run, in_this_process):
    args = "--presets", "toy", "--sizes", 8, 16, "--dtypes", "bfloat16"
    data, page = run("memory", *args)
    assert [(asked["size"], asked["dtype"]) for asked in in_this_process] == [(8, "bfloat16"), (16, "bfloat16")]
    for record in data["records"]:
        peaks = [record[f"{name}_gib"] for name in ("imports", "loaded", "peak", "decoded")]
        assert peaks[0] > 0.1
        assert peaks == sorted(peaks)
    assert "| toy | 128 px | bfloat16 |" in page
    assert run("memory", *args)[0]["records"] == data["records"]
    assert len(in_this_process) == 2


def test_training(run, in_this_process):
    args = ["--preset", "toy", "--layers", 1, "--batch_size", 2, "--repeats", 1]
    data, page = run("training", *args)
    assert [record["model"] for record in data["records"]] == [asked["name"] for asked in in_this_process]
    assert data["records"][0]["over_full_precision"] == data["records"][1]["over_best_dense"] == [1, 1, 1]
    assert "| ternary, 8-bit activations |" in page
    for record in data["records"]:
        assert list(record["parts"]) == ["data", "forward", "backward", "clip", "optimize", "average"]
        for shares in record["shares"].values():
            assert sum(shares.values()) == pytest.approx(1)
            assert all(share > 0 for share in shares.values()), shares
    assert run("training", *args)[0] == data
    assert len(in_this_process) == 4  # the second time nothing was measured
    assert run("training", *args, "--dtype", "bfloat16")[0]["settings"]["dtype"] == "bfloat16"
    assert len(in_this_process) == 8  # a setting that is not there


def test_deployment(scenarios, run, monkeypatch):
    args = ["--models", "toy", "dense toy", "--dtypes", "bfloat16"]
    data, page = run("deployment", *args, "--turns", 2)  # the processes are real
    ((record, _), (timed, best)) = data["models"], data["turns"]
    counted = scenarios.deployment.counts(scenarios.deployment.on_meta("toy"))
    assert {key: record[key] for key in counted} == counted
    weights = 2 * (counted["parameters"] - counted["ternary_weights"]) + counted["ternary_weights"] / 4
    assert 0 < record["checkpoint_bytes"] - weights < 10_000  # headers, config, float32 scales
    assert record["checkpoint_bytes"] == sum(record["files"].values())
    assert 5e7 < record["imported_bytes"] <= record["peak_bytes"]
    assert all(len(timed[clock]["toy"]) == 2 and min(timed[clock]["toy"]) > 0 for clock in ("seconds", "cpu_seconds"))
    assert best["models"] == ["toy", "dense toy, best dense"]
    for row in ("toy | bfloat16", "dense toy, best dense | bfloat16 | -", "toy over dense toy, best dense | CPU"):
        assert f"| {row}" in page
    monkeypatch.setattr(scenarios.deployment, "measure_together", None)
    assert run("deployment", *args)[0] == data  # measures nothing


def test_models_of_two_machines_are_not_compared(scenarios):
    data = json.loads((RESULTS / "deployment.json").read_text())
    assert "TerDiT-4.2B over Large-DiT-4.2B | CPU, float32" in scenarios.deployment.page(data)
    data["models"][0]["machine"] = data["models"][2]["machine"] = "an abacus"
    assert "over Large-DiT-4.2B | CPU, float32" not in scenarios.deployment.page(data)


def test_the_committed_deployment_is_of_the_papers_models_as_they_are_now(scenarios):
    data = json.loads((RESULTS / "deployment.json").read_text())
    assert len(data["models"]) == 8
    for record in data["models"]:
        counted = scenarios.deployment.counts(scenarios.deployment.on_meta(record["model"]))
        assert {key: record[key] for key in counted} == counted
    block = scenarios.deployment.on_meta("DiT-XL/2").transformer_blocks[0]  # what the page says about it
    copies = 27 * sum(parameter.numel() for parameter in block.norm1.emb.parameters())
    (total,) = {record["parameters"] for record in data["models"] if record["model"] == "DiT-XL/2"}
    assert (round(copies / 1e6, 1), round((total - copies) / 1e6, 1)) == (75.0, 674.8)


def test_a_process_that_dies_is_named(scenarios):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(3)"], **pipes) as process:
        process.wait()
        with pytest.raises(RuntimeError, match="The process of odd ended with code 3"):
            scenarios.deployment.ask("odd", process, "step")


def test_flux2(scenarios, run, in_this_process):
    data, page = run("flux2", "--preset", "toy", "--turns", 1)
    sizes, errors = data["sizes"], data["blocks"]["relative_error"]
    assert sizes["ternary_layers"] == 12 + 2 * 2
    assert sizes["ternary_weights"] / 4 < sizes["packed_bytes"] < sizes["dense_bytes"]
    assert errors["dense, float32"] == 0
    assert errors["packed, float32"] < 1e-5 > errors["best dense, float32"]
    assert len(errors) == 2 * (4 if INTEGERS else 3)
    assert errors["packed, bfloat16"] < 2 * errors["dense, bfloat16"] < 0.1
    assert len(in_this_process) == 3
    assert run("flux2", "--preset", "toy") == (data, page)
    assert len(in_this_process) == 3  # the second time nothing was measured


def test_pipeline(run, in_this_process):
    """Every mode draws; the parts of the pipeline are written once."""
    data, page = run("pipeline", "--preset", "toy")
    found = {record["mode"]: record for record in data["records"]}
    assert len(found) == 6 + (importlib.util.find_spec("torchao") is not None)
    assert all(record["pixels"] == [64, 64] for record in found.values())
    assert data["bytes"]["packed"] < data["bytes"]["dense"]
    parts = found["packed, int8, encoder evicted"]["parts"]
    assert [*parts] == ["imports", "load the encoder", "encode", "load the rest", *STEPS, "decode"]
    assert all(part["peak_gib"] > 0.1 for part in parts.values())
    assert all(mode in page for mode in found)
    assert run("pipeline", "--preset", "toy") == (data, page)


def test_flux2_has_the_shape_of_the_published_model(scenarios):
    model = scenarios.flux2.meta_model(scenarios.flux2.KLEIN_4B)
    assert len(scenarios.flux2.ternary_names(model)) == 100
    assert 3.8e9 < sum(parameter.numel() for parameter in model.parameters()) < 4.0e9
    sizes = json.loads((RESULTS / "flux2.json").read_text())["sizes"]
    assert sizes["packed_bytes"] <= scenarios.flux2.bound(sizes)


@pytest.mark.slow
def test_the_folder_of_the_4b_model_is_within_the_bound_and_its_weights_are_never_dense(run, scenarios):
    """9 GB on disk and some ten minutes."""
    data, _ = run("flux2", "--turns", 1)
    sizes = data["sizes"]
    assert sizes["packed_bytes"] <= scenarios.flux2.bound(sizes)
    dense_gib = 2 * (sizes["ternary_weights"] + sizes["other_parameters"]) / 2**30
    assert data["import"]["peak_gib"] < 0.4 * dense_gib
    assert data["forward"]["packed, bfloat16"]["peak_gib"] < 0.4 * dense_gib


@pytest.mark.parametrize("granularity", ["tensor", 8])
@torch.no_grad()
def test_the_reference_of_numerics_computes_in_float64_throughout(scenarios, tiny_model, tiny_inputs, granularity):
    """The dense model of the same values, with other matmuls, agrees far below float32's rounding."""
    inputs = tiny_inputs(dtype=torch.float64)
    model = tiny_model("packed", scale_granularity=granularity, num_key_value_heads=2)
    found = scenarios.numerics.in_float64(model)(**inputs).sample
    dense = scenarios.numerics.in_float64(model.dequantize())(**inputs).sample
    torch.testing.assert_close(found, dense, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.float(), model(**tiny_inputs()).sample, rtol=1e-4, atol=1e-5)


def test_the_loop_of_numerics_is_the_pipelines(scenarios, tiny_pipeline):
    pipe = tiny_pipeline(weight_format="packed")
    exact = scenarios.numerics.in_float64(pipe.transformer)
    settings = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent"}
    labels, generators = scenarios.numerics.labels_of(exact), scenarios.numerics.generators()
    expected = pipe(labels, generator=generators, **settings).images
    with torch.no_grad():
        found = scenarios.numerics.float64_pictures(pipe, exact, 4, 2.0)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-4)


def test_numerics(scenarios, run):
    data, _ = run("numerics", "--models", "digits", "--steps", 1)
    layer = {mode: record["error"] for mode, record in by_mode(data["layer"]).items()}
    model = by_mode(data["models"]["digits"])
    assert layer.keys() == model.keys() == set(scenarios.numerics.modes())
    for mode in ("dense", "exact"):
        assert 0 < max(layer[mode, "float32"]["gaussian"], model[mode, "float32"]["forward"]) < 2e-6
        assert 1e-4 < layer[mode, "float16"]["gaussian"] < 1e-3 < layer[mode, "bfloat16"]["gaussian"] < 1e-2
    if INTEGERS:
        assert 1e-5 < layer["int16", "float32"]["gaussian"] < layer["int16", "float32"]["outliers"] < 1e-3
        assert 5e-3 < layer["int8", "float32"]["gaussian"] < layer["int8", "float32"]["outliers"] < 0.1


# The GPU's scenarios, tried on the CPU: what they write has the right shape; the figures mean nothing


def test_gpu_steps_of_two_presets_keep_every_mode(scenarios, run, monkeypatch):
    # Dynamo keeps eight graphs of a block for all models together: sixteen are compiled here.
    monkeypatch.setitem(
        scenarios.shared.PRESETS, "other toy", scenarios.shared.PRESETS["toy"] | {"attention_head_dim": 32}
    )
    args = ["--device", "cpu", "--presets", "toy", "other toy", "--dtypes", "bfloat16", "--turns", 1]
    data, page = run("gpu-steps", *args, "--batch_sizes", 1, 2)
    assert data["left_out"] == []
    modes = ["unpack in every call", "dense, eager", "exact, eager", "dense", "exact", "int16", "int8"]
    assert [record["mode"] for record in data["records"]] == modes * 4
    for record in data["records"]:
        assert record["error"] < 0.1
        assert (record["error"] == 0) == (record["mode"] == "unpack in every call")
        assert record["over_dense"] == [1, 1, 1] or record["mode"] != "dense"
    assert "## other toy, bfloat16" in page
    assert "No GPU: a trial of the code" in page


def test_gpu_pictures_go_on_where_they_stopped(run, capsys, tmp_path):
    args = ["--device", "cpu", "--presets", "toy", "--dtype", "float32", "--steps", 2, "--batch_sizes", 2]
    data, page = run("gpu-pictures", *args)
    assert [record["compiled"] for record in data["records"]] == [False, False, True, True]
    assert all(record["milliseconds_per_step"] > 0 and record["picture_seconds"] > 0 for record in data["records"])
    assert "| 2 | DPM-Solver++ | compiled |" in page
    capsys.readouterr()
    (tmp_path / "gpu_pictures.json").write_text(json.dumps(data | {"records": data["records"][1:]}))
    again, _ = run("gpu-pictures", *args)
    assert again["records"][:3] == data["records"][1:]
    assert capsys.readouterr().err.count('"compiled"') == 1  # the first eager one alone was measured again


def test_gpu_cards(scenarios, run, in_this_process, monkeypatch):
    args = ["--device", "cpu", "--preset", "toy", "--dtype", "float32", "--steps", 1, "--limits", 2]
    data, page = run("gpu-cards", *args)
    assert len(data["records"]) == len(in_this_process) == 2 * 2 * 3
    assert all(record["fits"] and record["milliseconds_per_step"] > 0 for record in data["records"])
    assert "| 2 GB | packed | group offload |" in page
    asked = []

    def fails(script, **settings):
        asked.append(settings)
        raise subprocess.CalledProcessError(1, script)

    monkeypatch.setattr(scenarios.shared, "in_a_process", fails)
    assert run("gpu-cards", *args, 4)[0]["records"] == data["records"]
    assert {settings["limit"] for settings in asked} == {4}  # what failed is tried again the next time


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
def test_gpu_layers_multiply_right_in_every_design(tmp_path):
    pytest.importorskip("triton")
    command = [sys.executable, BENCHMARKS / "run.py", "gpu-layers", "--output_dir", tmp_path, "--skip_tests"]
    command += ["--device", "cpu", "--presets", "toy", "--rows", "64", "--dtype", "float16", "--blocks", "1"]
    # in a process of its own: Triton reads the setting when it is imported, which torch does as well
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, check=True, env=env)
    records = json.loads((tmp_path / "gpu_layers.json").read_text())["records"]
    assert len(records) == 14
    largest = {"dense": 1e-3, "exact": 1e-3, "int8": 1e-2, "fp8": 4e-2}
    for record in records:
        kind = record["design"].split(",")[0]
        assert kind == "decode alone" or 0 < record["error"] < largest[kind]
    assert "## toy, 64 rows, float16" in (tmp_path / "gpu_layers.md").read_text("utf-8")


def test_gpu_tests_count_what_pytest_ran(scenarios, tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import time, pytest\n"
        "def test_right(): pass\n"
        "@pytest.mark.skip\n"
        "def test_left_out(): pass\n"
        "def test_wrong(): assert 1 == 2, 'no'\n"
        "def test_slow(): time.sleep(60)\n"
    )
    counted = scenarios.gpu_tests.run_part(["-k", "not slow", str(tmp_path)], seconds=60)
    assert {key: counted[key] for key in ("passed", "failed", "skipped")} == {"passed": 1, "failed": 1, "skipped": 1}
    ((name, line),) = counted["failures"].items()
    assert (counted["complete"], name.rpartition(".")[2], line) == (
        True,
        "test_some::test_wrong",
        "AssertionError: no",
    )
    cut_short = scenarios.gpu_tests.run_part([str(tmp_path)], seconds=12)
    assert not cut_short["complete"]
    assert cut_short["passed"] >= 1
    data = {"place": "here", "command": "this", "records": [{"part": "some", **counted}]}
    assert "| some | 1 | 1 | 1 | yes |" in scenarios.gpu_tests.page(data)
    assert "test_some::test_wrong`: AssertionError: no" in scenarios.gpu_tests.page(data)
