"""The scripts in examples/: their options, folders in use, data and models that do not fit."""

import io
import json
import subprocess
import sys
import warnings
from argparse import Namespace
from contextlib import redirect_stderr

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from message_table import REASON, Fixed, Row, edit_json
from PIL import Image
from torch import nn

from diffusers_terdit import training
from diffusers_terdit.checkpoints import bundled
from diffusers_terdit.ops import ternary_linear


DATA = "pass one of --demo, --train_data_dir"
SIZE = ["--num_layers", 1, "--num_attention_heads", 2, "--attention_head_dim", 8, "--ffn_dim", 16]
TINY = [*SIZE, "--train_batch_size", 8, "--lr_warmup_steps", 0, "--num_validation_images", 2, "--logging_steps", 1]
TINY += ["--num_inference_steps", 2]
TEXT = ["--train_batch_size", 8, "--lr_warmup_steps", 0, "--num_validation_images", 2, "--num_inference_steps", 2]


def run(script, *arguments):
    """A script; `TMP` in its arguments is the row's folder."""
    return lambda w: w.run(script, *(str(argument).replace("TMP", str(w.tmp)) for argument in arguments))


def bench(*arguments):
    return lambda w: w.benchmark(*(str(argument).replace("TMP", str(w.tmp)) for argument in arguments))


def without_gpu(*arguments):
    def provoke(w):
        w.monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        bench(*arguments)(w)

    return provoke


def in_use(script, *arguments):
    def provoke(w):
        (w.tmp / "checkpoint-3").mkdir()
        (w.tmp / "checkpoint-3" / training.checkpointing.STATE_NAME).write_text("{}")
        run(script, *arguments, "--output_dir", "TMP")(w)

    return provoke


def huge(w):
    """A folder of a model whose numbers are finite and whose output is not."""
    model = w.model("packed")
    model.proj_out.weight.data.fill_(3e38)
    model.save_pretrained(w.tmp / "huge")
    return w.tmp / "huge"


def memory(w):
    with torch.no_grad():
        w.script("benchmark").measure_memory(huge(w), 8, torch.float32, None)


def step(w):
    w.monkeypatch.setattr(sys, "stdin", io.StringIO("step\n"))
    w.script("benchmark").serve_steps(str(huge(w)), torch.float32, "cpu")


def dead_process(w):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(3)"], **pipes) as process:
        w.script("benchmark").ask("odd", process)


def no_memory(w):
    benchmark = w.script("benchmark")
    w.monkeypatch.setattr(benchmark, "is_free", lambda needed, device: False)
    benchmark.groups_that_fit([benchmark.model_source("TerDiT-600M")], torch.float32, "cpu")


def other_class(w):
    bench("deployment", "--models", f"mine={w.saved('layer')}")(w)


def unreadable_images(w):
    (w.tmp / "data" / "cat").mkdir(parents=True)
    (w.tmp / "data" / "cat" / "1.png").write_bytes(b"no picture")
    w.vae.save_pretrained(w.tmp / "vae")
    data = ["--train_data_dir", "TMP/data", "--pretrained_vae_model_name_or_path", "TMP/vae"]
    run("cache_latents", *data, "--resolution", 16, "--output_dir", "TMP/out")(w)


def other_latents(w):
    from safetensors.torch import save_file

    (w.tmp / "out").mkdir()
    save_file({"a": torch.zeros(1)}, w.tmp / "out" / "latents-00000.safetensors", {"resolution": "8"})
    unreadable_images(w)


def faces(*entries, pictures=(), **changes):
    """Write faces from a package of these entries and pictures."""

    def provoke(w):
        (w.tmp / "img" / "google" / "64").mkdir(parents=True)
        for name in pictures:
            Image.new("RGB", (64, 64)).save(w.tmp / "img" / "google" / "64" / name)
        if entries:
            plain = {"category": "Smileys & Emotion", "subcategory": "face-smiling", "has_img_google": True}
            (w.tmp / "emoji.json").write_text(json.dumps([{**plain, **entry} for entry in entries]))
        arguments = {"package": w.tmp, "output_dir": w.tmp / "faces", **changes}
        w.script("emoji_faces").write_faces(**arguments)

    return provoke


JOY = {"name": "FACE WITH TEARS OF JOY", "short_name": "joy", "image": "1.png", "sort_order": 1}


def faces_again(w):
    (w.tmp / "faces").mkdir()
    (w.tmp / "faces" / "old.png").touch()
    faces(JOY)(w)


def other_images(w):
    (w.tmp / "settings.json").write_text('{"model": "emoji"}')
    run("evaluate", "--output_dir", "TMP")(w)


def images_of_another_program(w):
    (w.tmp / "samples.npz").touch()
    run("evaluate", "--output_dir", "TMP")(w)


def other_parts(w):
    np.save(w.tmp / "00000000-00000000.npy", np.zeros((1, 8, 8, 1), np.uint8))
    w.script("evaluate").merge(w.tmp, 5, w.tmp / "samples.npz")


def broken_pixels(w):
    w.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    args = Namespace(seed=0, label_policy="balanced", num_inference_steps=1, guidance_scale=1.0, dtype="float32")
    w.script("evaluate").sample(w.pipe(vae=w.vae, in_channels=4), args, range(2))


def reference(name, shape=(9, 8, 8, 1)):
    def provoke(w):
        np.save(w.tmp / "x.npy", np.zeros((2, 4, 4, 3), np.uint8))
        args = Namespace(reference=name.replace("TMP", str(w.tmp)))
        w.script("evaluate").reference_statistics(args, nn.Flatten(), shape, "cpu")

    return provoke


def nothing_to_render(w):
    with redirect_stderr(w.errors):
        w.script("common").main("", "adaln_norm", {}, None, ["--render", str(w.tmp)])


def torn_records(w):
    (w.tmp / "a.jsonl").write_text('{\n{"run": 1}\n')
    w.script("common").Records(w.tmp / "a.jsonl")


def silent_calibration(w):
    pipe = w.pipe()
    call = {"class_labels": 0, "num_inference_steps": 1, "guidance_scale": 1.0}
    w.script("few_steps").mag_ratios(pipe, 7, call)


def other_classes(w):
    (w.tmp / "horse").mkdir()
    Image.new("RGB", (8, 8)).save(w.tmp / "horse" / "1.png")
    w.script("few_steps").real_images(w.tmp, w.pipe())


def missing_box(w):
    figure = w.script("figure2")
    drawing = figure.Drawing(w.model())
    drawing.drawn = set(figure.modules_to_draw(drawing.model)) - {"proj_in"}
    drawing.svg()


def other_block(w):
    model = w.model(num_layers=2)
    model.transformer_blocks[1].ff.up_proj = nn.Linear(4, 4)
    w.script("figure2").modules_to_draw(model)


def huge_flux(w):
    from diffusers import Flux2Transformer2DModel

    page = w.script("flux2_page")
    model = Flux2Transformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
        joint_attention_dim=8, axes_dims_rope=(2, 2, 2, 2), timestep_guidance_channels=8, guidance_embeds=False,
    )  # fmt: skip
    model.proj_out.weight.data.fill_(3e38)
    model.save_pretrained(w.tmp / "flux")
    w.monkeypatch.setattr(page, "SIDE", 2)
    w.monkeypatch.setattr(page, "TEXT_TOKENS", 2)
    page.measure_forward(w.tmp / "flux", "float32", lambda: 0.0)


def kernel_module(w):
    w.monkeypatch.chdir(w.tmp)
    w.monkeypatch.setattr(sys, "path", [*sys.path, str(w.tmp)])
    bench("kernels", "--kernel", "json:linear")(w)


def kernel(function):
    return lambda w: w.script("kernel_benchmark").check_kernel("mine:linear", function, torch.float32, 1e-2)


def changes_input(x, *others):
    output = ternary_linear(x, *others)
    x.zero_()
    return output


def not_here(w):
    benchmark = w.script("kernel_benchmark")
    w.monkeypatch.setattr(benchmark, "instruction_sets", lambda: [])
    bench("kernels", "--isa", "avx2", "--output_dir", "TMP")(w)


def other_engine(w):
    w.monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    run("train_terdit", "--demo", "--output_dir", "TMP/out")(w)


def no_tracker(w):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # accelerate's own word on it
        run("train_terdit", "--demo", "--report_to", "wandb", "--output_dir", "TMP")(w)


def latents_to_show(w):
    info = {
        "id2label": {"0": "cat"},
        "flip": False,
        "shards": [{"name": "x", "num_samples": 1}],
        "scaling_factor": 1.0,
    }
    (w.tmp / "latents.json").write_text(json.dumps({**info, "latent_shape": [4, 8, 8]}))
    network = ["--frechet_steps", 1, "--feature_network", "torch.nn:Flatten"]
    run("train_terdit", "--train_latents_dir", "TMP", *network, "--output_dir", "TMP/out")(w)


def other_teacher(w):
    run("train_terdit", "--demo", *TINY, "--teacher", bundled("emoji"), "--output_dir", "TMP/out")(w)


def other_batch_size(w):
    start = [*TINY, "--max_train_steps", 1, "--output_dir", "TMP/out", "--demo"]
    run("train_terdit", *start)(w)
    run("train_terdit", *start, "--resume_from_checkpoint", "latest", "--seed", 7)(w)


def no_captions(w):
    w.script("train_text_to_image").open_images(w.tmp, 8, 1)


def half_a_caption(w):
    (w.tmp / "metadata.jsonl").write_text('{"file_name": "1.png"}\n')
    w.script("train_text_to_image").open_images(w.tmp, 8, 1)


def text_to_image(w, *arguments):
    """The script with a model of 16 thousand weights, and a VAE that has hardly been trained."""
    script = w.script("train_text_to_image")
    size = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}
    train_vae = script.train_vae
    with w.monkeypatch.context() as patch:
        patch.setattr(script, "MODEL", size)
        patch.setattr(script, "train_vae", lambda images: train_vae(images, steps=1))
        run("train_text_to_image", "--demo", *TEXT, *arguments)(w)


def from_pixart(change):
    """Train on from a pipeline that was changed."""

    def provoke(w):
        folder = w.trained(text_to_image, "--max_train_steps", 1)
        change(w, folder)
        text_to_image(w, "--pretrained_model_name_or_path", folder, "--output_dir", "TMP/out")

    return provoke


def large_picture(w, folder):
    edit_json(folder / "transformer" / "config.json", use_additional_conditions=True)


def velocity(w, folder):
    DPMSolverMultistepScheduler(prediction_type="v_prediction").save_pretrained(folder / "scheduler")


def colours(w, folder):
    w.vae.save_pretrained(folder / "vae")


def other_text_seed(w):
    folder = w.trained(text_to_image, "--max_train_steps", 1)
    text_to_image(w, "--resume_from_checkpoint", "latest", "--seed", 7, "--output_dir", folder)


def diverging_text(w):
    folder = w.trained(text_to_image, "--max_train_steps", 1)
    options = ["--pretrained_model_name_or_path", folder, "--learning_rate", 1e30, "--max_train_steps", 9]
    text_to_image(w, *options, "--output_dir", "TMP/out")


def app_call(label=0, seed=0, steps=1):
    """What the button does."""

    def provoke(w):
        app, pipe = w.script("app"), w.pipe()
        list(app.pictures(app.Sampler(pipe), app.names_of(pipe), label, seed, 1, steps, 1.0, "DDPMScheduler"))

    return provoke


# fmt: off
ROWS = [
    # benchmark.py
    Row("bench-memory", memory, RuntimeError, "torch.float32", "numbers that are not finite", "Try --dtype float32."),
    Row("bench-step", step, RuntimeError, "torch.float32", "numbers that are not finite", "Try --dtypes float32."),
    Row("bench-model", bench("deployment", "--models", "huge"), SystemExit,
        "no model 'huge'", "there are TerDiT-600M", "or name=folder"),
    Row("bench-folder", bench("deployment", "--models", "mine=TMP"), SystemExit,
        "'mine=TMP'", "no config.json in the folder", "pass name=folder"),
    Row("bench-class", other_class, SystemExit,
        "the config of a TernaryLinear", "TMP/layer", "it must be one of TerDiTTransformer2DModel"),
    Row("bench-process", dead_process, RuntimeError,
        "The process of odd", "ended with code 3", "its error stands above"),
    Row("bench-groups", no_memory, SystemExit,
        "TerDiT-600M in float32", "which is not free", "Leave some out with --models"),
    Row("bench-render", bench("deployment", "--render", "--output_dir", "TMP"), SystemExit,
        "TMP/deployment.json", "does not exist", "measure first, without --render"),
    Row("bench-numerics", bench("numerics", "--output_dir", "TMP", "--steps", 0), SystemExit,
        "got 0", "--steps must be 1 or more", REASON),
    Row("bench-numerics-render", bench("numerics", "--output_dir", "TMP", "--render"), SystemExit,
        "TMP/numerics.json", "does not exist", "measure first, without --render"),
    Row("bench-turns", bench("deployment", "--turns", 0), SystemExit, "got 0", "--turns must be 1 or more", REASON),
    Row("bench-gpu", without_gpu("deployment", "--device", "cuda"), SystemExit,
        "--device cuda", "This torch sees no GPU", "leave out"),
    Row("bench-twice", bench("deployment", "--models", "DiT-XL/2", "DiT-XL/2"), SystemExit,
        "DiT-XL/2, DiT-XL/2", "--models has a name twice", "Leave one out"),
    Row("bench-flux-render", bench("flux2", "--render", "--output_dir", "TMP"), SystemExit,
        "TMP/flux2.json", "does not exist", "measure first, without --render"),
    Row("bench-flux-step", huge_flux, RuntimeError, "in float32", "numbers that are not finite", "Try float32."),
    Row("bench-gpu-render", bench("gpu", "--render", "--output_dir", "TMP"), SystemExit,
        "TMP/gpu.json", "does not exist", "measure first, without --render"),
    Row("bench-gpu-none", without_gpu("gpu", "--output_dir", "TMP"), SystemExit,
        Fixed("no GPU"), "This torch sees no GPU", "--device cpu tries the code"),
    Row("bench-gpu-turns", bench("gpu", "--device", "cpu", "--rows", 0, "--output_dir", "TMP"), SystemExit,
        "got 0", "--turns, --rows and --batch_sizes must be 1 or more", REASON),

    # kernel_benchmark.py
    Row("kernel-shape", bench("kernels", "--shapes", "7x8"), SystemExit,
        "'7x8'", "is no OUTPUTSxINPUTS with outputs a multiple of 4", "as 1536x1024"),
    Row("kernel-name", bench("kernels", "--kernel", "linear"), SystemExit,
        "'linear'", "is no module:function", "as my_kernels:linear"),
    Row("kernel-import", bench("kernels", "--kernel", "no_such_module:linear"), SystemExit,
        "'no_such_module'", "cannot be imported", "Put it here, or install it."),
    Row("kernel-function", kernel_module, SystemExit, "'json'", "has no function 'linear'", "define it there"),
    Row("kernel-render", bench("step", "--render", "--output_dir", "TMP"), SystemExit,
        "TMP/step.json", "does not exist", "measure first, without --render"),
    Row("kernel-turns", bench("step", "--turns", 0), SystemExit, "got 0", "--turns must be 1 or more", REASON),
    Row("kernel-isa", not_here, SystemExit, "--isa avx2", "cannot run here", "they need numba and AVX2"),
    Row("kernel-rows", bench("kernels", "--rows", 0, "--output_dir", "TMP"), SystemExit,
        "got 0", "--rows must be 1 or more", REASON),
    Row("kernel-fails", kernel(lambda: None), SystemExit,
        "mine:linear", "TypeError", "It must take (input, weight_packed, weight_scale, bias)."),
    Row("kernel-returns", kernel(lambda *tensors: None), SystemExit,
        "mine:linear", "must return", "it returned NoneType"),
    Row("kernel-changes", kernel(changes_input), SystemExit,
        "mine:linear", "changes what it is given", "Write to a new tensor."),
    Row("kernel-nan", kernel(lambda *tensors: ternary_linear(*tensors) * float("nan")), SystemExit,
        "mine:linear", "gives NaN or infinity", "does it write every output?"),
    Row("kernel-wrong", kernel(lambda *tensors: ternary_linear(*tensors) * 2), SystemExit,
        "mine:linear", "is wrong at", "--tolerance allows more"),

    # pages and experiments
    Row("records-render", nothing_to_render, SystemExit,
        "TMP has no adaln_norm.jsonl", "run the parts first", "with --records TMP"),
    Row("records-torn", torn_records, ValueError, "TMP/a.jsonl, line 1", "is not JSON", "Remove it"),
    Row("records-none", lambda w: w.script("text_to_image").render(w.tmp), SystemExit,
        "TMP/text_to_image.jsonl", "has no results of these models", "run the parts first"),
    Row("steps-rounds", run("few_steps", "--rounds", 0), SystemExit, "got 0", "--rounds must be at least 1", REASON),
    Row("steps-render", run("few_steps", "--render", "TMP"), SystemExit,
        "TMP has no few_steps.jsonl", "sample first", "with --output_dir TMP"),
    Row("steps-calibration", silent_calibration, RuntimeError,
        "of 7 steps", "printed no list of ratios", "Update diffusers."),
    Row("steps-images", other_classes, ValueError,
        "TMP", "must hold one picture of each of the model's 4 classes", "and no others"),
    Row("figure-words", lambda w: w.script("figure2").describe(nn.Conv2d(1, 1, 1)), ValueError,
        "Conv2d", "No words for a", "Add it to `describe`."),
    Row("figure-lacks", missing_box, ValueError, "['proj_in']", "The picture lacks", "draw them"),
    Row("figure-blocks", other_block, ValueError, "all 2", "The blocks differ", "Draw another model."),

    # data
    Row("cache-data", run("cache_latents", "--pretrained_vae_model_name_or_path", "x", "--output_dir", "x"),
        SystemExit,
        Fixed("--train_data_dir, --dataset_name"), "pass one of", REASON),
    Row("cache-unreadable", unreadable_images, SystemExit,
        "images 0 to 0", "None of the", "The log above names them."),
    Row("cache-settings", other_latents, SystemExit,
        "TMP/out/latents-00000.safetensors", "was made with {'resolution': '8'}", "Take another --output_dir."),
    Row("faces-resolution", faces(JOY, resolution=65), ValueError, "got 65", "must lie in 1 to 64", REASON),
    Row("faces-package", faces(), ValueError, "TMP", "holds no emoji.json", "Pass the folder `package`"),
    Row("faces-again", faces_again, ValueError,
        "TMP/faces", "is not empty", "Remove it or pass another --output_dir."),
    Row("faces-none", faces({**JOY, "subcategory": "heart"}), ValueError,
        "TMP/emoji.json", "lists no faces", "Unpack it again."),
    Row("faces-missing", faces(JOY), ValueError, "such as 1.png", "lacks 1 of 1 faces", "Unpack it, too."),
    Row("faces-twice", faces(JOY, {**JOY, "sort_order": 2}, pictures=["1.png"]), ValueError,
        "'face with tears of joy'", "a label must mean one picture", "Rename one."),

    # evaluate.py
    Row("evaluate-counts", run("evaluate", "--num_images", 0), SystemExit,
        "got 0, 32, 50, 64", "--feature_batch_size must be at least 1", REASON),
    Row("evaluate-networks", run("evaluate", "--inception_weights", "x", "--feature_network", "y"), SystemExit,
        Fixed("--inception_weights, --feature_network"), "pass one of", REASON),
    Row("evaluate-scheduler", run("evaluate", "--scheduler", "DDIM", "--output_dir", "TMP"), SystemExit,
        "'DDIM'", "diffusers has no scheduler", "try DPMSolverMultistepScheduler"),
    Row("evaluate-pixels", broken_pixels, FloatingPointError,
        "Images [0, 1]", "hold NaN or infinite pixels", "Try --dtype float32"),
    Row("evaluate-parts", other_parts, SystemExit, "TMP", "holds 1 of 5 images", "Delete it."),
    Row("evaluate-settings", other_images, SystemExit,
        "TMP", "holds images of model emoji (now digits)", "Pass another --output_dir."),
    Row("evaluate-samples", images_of_another_program, SystemExit,
        "TMP/samples.npz", "is not of this script", "Pass another --output_dir."),
    Row("evaluate-squares", reference("TMP", (9, 8, 16, 1)), SystemExit,
        "8 x 16", "is read as squares", "Pass an .npz."),
    Row("evaluate-reference", reference("TMP/nothing"), SystemExit,
        "--reference TMP/nothing", "no such file or folder", 'Pass one, or "digits".'),
    Row("evaluate-shapes", reference("TMP/x.npy"), SystemExit,
        "TMP/x.npy are (4, 4, 3)", "the samples (8, 8, 1)", "Pass others as --reference."),
    Row("evaluate-network", run("evaluate", "--model", "emoji", "--reference", "x.npz", "--output_dir", "TMP"),
        SystemExit,
        "--reference x.npz", "needs a network", "pass --inception_weights or --feature_network"),

    # train_lora.py
    Row("lora-data", run("train_lora"), SystemExit, Fixed("--memory"), DATA, REASON),
    Row("lora-memory", run("train_lora", "--memory", "int4"), SystemExit, "['int4']", "--memory knows", REASON),
    Row("lora-diverges", run("train_lora", "--demo", "--rank", 1, "--learning_rate", 1e30, "--train_batch_size", 8,
        "--rehearsal", 1, "--max_train_steps", 9, "--num_inference_steps", 1, "--output_dir", "TMP"),
        FloatingPointError, "at step 1", "The loss is nan",
        "Lower --learning_rate."),

    # train_terdit.py
    Row("train-boolean", run("train_terdit", "--demo", "--ternary", "no"), SystemExit,
        "'no'", "expected true or false", REASON),
    Row("train-data", run("train_terdit"), SystemExit, Fixed("--train_latents_dir"), DATA, REASON),
    Row("train-preset", run("train_terdit", "--demo", "--preset", "ablation"), SystemExit,
        Fixed("--preset"), "--demo brings its own model", "leave out --preset"),
    Row("train-streaming", run("train_terdit", "--demo", "--streaming"), SystemExit,
        Fixed("--streaming"), "goes with --dataset_name and --dataloader_num_workers 0", REASON),
    Row("train-frechet", run("train_terdit", "--demo", "--frechet_steps", 5), SystemExit,
        Fixed("--frechet_steps"), "needs --feature_network", "0 switches it off"),
    Row("train-activations", run("train_terdit", "--demo", "--ternary", "false", "--activation_bits", 8), SystemExit,
        Fixed("--activation_bits"), "is for ternary models", "not --ternary false"),
    Row("train-snr", run("train_terdit", "--demo", "--flow_matching", "--snr_gamma", 5), SystemExit,
        Fixed("--snr_gamma"), "is for DDPM", "not --flow_matching"),
    Row("train-warmup", run("train_terdit", "--demo", "--ternary_warmup_steps", 5), SystemExit,
        Fixed("--ternary_warmup_steps"), "goes with --init_from a full-precision model", REASON),
    Row("train-engine", other_engine, SystemExit,
        "in fp16", "Ternary weights need float32 masters", "use MULTI_GPU, with --fsdp to shard, and bf16 or no"),
    Row("train-tracker", no_tracker, SystemExit,
        "--report_to wandb", "this tracker is not installed", "log.jsonl needs none"),
    Row("train-total", run("train_terdit", "--demo", "--total_batch_size", 65, "--output_dir", "TMP"), SystemExit,
        "--total_batch_size 65", "is no multiple of 1 process(es)", "Change one of the two."),
    Row("train-in-use", in_use("train_terdit", "--demo"), SystemExit,
        "TMP holds checkpoint-3", "Pass --resume_from_checkpoint latest to go on", "or another --output_dir"),
    Row("train-show", latents_to_show, SystemExit,
        Fixed("--frechet_steps"), "shows images to a network", "pass --pretrained_vae_model_name_or_path, too"),
    Row("train-teacher", other_teacher, SystemExit,
        "the data has 10", "--teacher knows ", "Pass a teacher of these."),
    Row("train-resume", other_batch_size, SystemExit,
        "TMP/out/checkpoint-1", "this run has 8 and 7", "Pass --total_batch_size 8 --seed 0."),
    Row("train-diverges", run("train_terdit", "--demo", *TINY, "--learning_rate", 1e30, "--max_train_steps", 9,
        "--output_dir", "TMP/out"), FloatingPointError, "at step 1", "The last checkpoint is of step 0",
        "Lower --learning_rate"),

    # train_text_to_image.py
    Row("text-data", run("train_text_to_image"), SystemExit, Fixed("--train_data_dir"), DATA, REASON),
    Row("text-model", run("train_text_to_image", "--train_data_dir", "x"), SystemExit,
        Fixed("--train_data_dir"), "text encoder and VAE are not trained",
        "goes with --pretrained_model_name_or_path"),
    Row("text-captions", no_captions, SystemExit, "TMP", "has no metadata.jsonl", "each of its lines is"),
    Row("text-caption", half_a_caption, SystemExit,
        "TMP/metadata.jsonl, line 1", "has no file_name or no text", "Add or remove it."),
    Row("text-in-use", in_use("train_text_to_image", "--demo"), SystemExit,
        "TMP holds checkpoint-3", "Pass --resume_from_checkpoint latest to go on", "or another --output_dir"),
    Row("text-large", from_pixart(large_picture), SystemExit,
        "TMP/text", "is told size and aspect ratio", "take one of 512 px"),
    Row("text-velocity", from_pixart(velocity), SystemExit,
        "'v_prediction'", "trains the prediction of noise", "Pass another --pretrained_model_name_or_path."),
    Row("text-colours", from_pixart(colours), SystemExit,
        "this VAE takes 3", "--demo has pictures of 1 channel", "pass --train_data_dir"),
    Row("text-resume", other_text_seed, SystemExit,
        "TMP/text/checkpoint-1", "this run has 8 and 7", "Pass the same, or another --output_dir."),
    Row("text-diverges", diverging_text, FloatingPointError,
        "at step 1", "The gradient is nan", "Lower --learning_rate or raise --lr_warmup_steps."),
]

try:
    import gradio as gr
except ImportError:
    pass
else:
    ROWS += [
        Row("app-class", app_call(label=None), gr.Error, Fixed("none is chosen"), "Choose a class", REASON),
        Row("app-seed", app_call(seed=0.5), gr.Error, "got 0.5", "must be a whole number from 0 to", REASON),
        Row("app-steps", app_call(steps=0), gr.Error, "got 0", "`num_inference_steps` must be a positive int", REASON),
        Row("app-model", run("app", "--model", "cifar"), SystemExit,
            "'cifar'", "app.py: No bundled checkpoint", "there are 'digits', 'emoji'"),
    ]
