"""examples/app.py: the sampler behind the page, and the page itself in a real browser."""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusers_terdit import TerDiTPipeline
from diffusers_terdit.checkpoints import bundled
from diffusers_terdit.cli import load_pipeline, report_errors


APP = Path(__file__).parents[2] / "examples" / "app.py"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# To run as the administrator in a container, and to leave the network alone.
CHROMIUM_FLAGS = [
    "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync",
]  # fmt: skip


def test_without_gradio_it_says_what_to_install(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError('not here')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, APP], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("The app needs Gradio: pip install gradio")


@pytest.fixture
def app():
    pytest.importorskip("gradio", reason="gradio is not installed")
    import app

    return app


def settings(app, **changes):
    values = {"label": 3, "seed": 5, "num_images": 2, "num_inference_steps": 4, "guidance_scale": 2.0}
    return app.Settings(**{**values, "scheduler": "DDPMScheduler", **changes})


def pipeline_images(pipe, settings):
    """The images that the pipeline draws by itself, as bytes."""
    images = pipe(
        [settings.label],
        num_images_per_prompt=settings.num_images,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        generator=[torch.Generator().manual_seed(settings.seed + i) for i in range(settings.num_images)],
        # With a callback adaLN is computed step by step, as in the app; see docs/limits.md, "Numbers".
        callback_on_step_end=lambda pipe, step, timestep, tensors: tensors,
    ).images
    return [image.tobytes() for image in images]


def test_bad_arguments_are_one_line(app, capsys):
    for flags, message in (
        (["--model", "nothing"], "app: 'nothing' is no folder here, no Hub id"),
        (["--model", ""], "app: '' is no folder here, no Hub id"),
        (["--device", "toaster"], "app: Device 'toaster' cannot be used here"),
    ):
        assert report_errors("app", lambda flags=flags: app.main(flags)) == 1
        assert capsys.readouterr().err.startswith(message)


def test_a_page_for_others_draws_so_many_images_x_steps_at_a_time(app):
    sampler, names = app.Sampler(load_pipeline("digits")), {3: "three"}
    asked = (3, 0, 16, 250, 2.0, "DDPMScheduler")
    with pytest.raises(app.gr.Error, match="images x steps may be 1000, got 16 x 250"):
        next(app.pictures(sampler, names, *asked, most=app.MAX_SHARED))
    few = app.pictures(sampler, names, 3, 0, 2, 2, 2.0, "DDPMScheduler", most=app.MAX_SHARED)
    assert "2 steps" in [*few][-1]
    own = app.pictures(sampler, names, *asked)
    assert "step " in next(own)
    own.close()


@pytest.mark.parametrize("model", ["digits", "emoji"])
def test_every_scheduler_on_the_page_samples_the_pipelines_own_images(app, model):
    pipe = load_pipeline(model)
    before = type(pipe.scheduler)
    sampler = app.Sampler(pipe)
    assert sampler.schedulers[0] == before.__name__
    own = TerDiTPipeline.from_pretrained(bundled(model))
    own.set_progress_bar_config(disable=True)
    for name in sampler.schedulers:
        asked = settings(app, scheduler=name)
        *previews, last = sampler.sample(asked)
        assert type(pipe.scheduler) is before  # visitors do not change each other's
        assert last.final
        assert last.step == last.steps
        assert all(0 < update.step <= update.steps and not update.final for update in previews)
        own.scheduler = app.scheduler_by_name(name, pipe.scheduler, pipe.prediction_type)
        assert [image.tobytes() for image in last.images] == pipeline_images(own, asked)


def test_previews_of_latents_go_through_the_vae(app, tiny_pipeline):
    pipe = tiny_pipeline(vae=True, weight_format="packed")
    *previews, last = app.Sampler(pipe).sample(settings(app, num_inference_steps=40))
    assert previews
    assert {image.size for update in [*previews, last] for image in update.images} == {(16, 16)}


def test_a_stop_ends_one_visitor_and_not_the_other(app):
    sampler = app.Sampler(load_pipeline("digits"))
    finals = {}

    def visit(name, steps):
        for update in sampler.sample(settings(app, num_inference_steps=steps), name):
            if name == "a":
                sampler.stop("a")
            finals[name] = update

    visitors = [threading.Thread(target=visit, args=arguments) for arguments in (("a", 250), ("b", 5))]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(60)
    assert finals["a"].step < 250
    assert finals["b"].step == 5
    assert all(update.final for update in finals.values())


def test_a_listener_that_goes_away_ends_the_sampling(app):
    listening = app.Sampler(load_pipeline("digits")).sample(settings(app, num_inference_steps=250))
    next(listening)
    threads = threading.active_count()
    listening.close()
    assert threading.active_count() == threads - 1


def test_names_cannot_become_markup(app):
    shown = app.show(app.Update([Image.new("L", (8, 8))], 1, 2, 0.5), settings(app), "<b>'")
    assert "<b>" not in shown
    assert "seed 5" in shown


def test_the_page_starts_as_the_model_recommends(app):
    """In a process of its own, because Gradio leaves an event loop open."""
    assert app.parse_args([]).model == "emoji"
    program = (
        "import json, app; page = app.build(app.load_pipeline('emoji'), 'emoji');"
        "print(json.dumps({b.label: b.value for b in page.blocks.values() if hasattr(b, 'label')}, default=str))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=APP.parent, stdout=subprocess.PIPE, check=True, text=True
    )
    fields, pipe = json.loads(run.stdout), load_pipeline("emoji")
    assert fields["Steps"] == pipe.sampling_defaults["num_inference_steps"] != 50
    assert fields["Guidance"] == pipe.sampling_defaults["guidance_scale"]
    assert fields["Class"] == pipe.labels["joy"]


@pytest.fixture
def served(tmp_path):
    """`python examples/app.py --model digits` as a user starts it; yields its address, then checks who it called."""
    calls = tmp_path / "calls.txt"
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "def hook(event, args):\n"
        "    if event == 'socket.getaddrinfo': host = args[0]\n"
        "    elif event in ('socket.connect', 'socket.sendto') and isinstance(args[1], tuple): host = args[1][0]\n"
        "    else: return\n"
        "    if str(host) not in ('127.0.0.1', 'localhost', '::1', 'None'):\n"
        f"        print(event, args, file=open({str(calls)!r}, 'a'))\n"
        "sys.addaudithook(hook)\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, APP, "--model", "digits", "--server_port", str(port)]
    with (
        open(tmp_path / "stderr.txt", "w") as stderr,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            line = process.stdout.readline()
            assert f"digits is at http://127.0.0.1:{port}" in line, (tmp_path / "stderr.txt").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
    assert "Traceback" not in (tmp_path / "stderr.txt").read_text()
    assert not calls.exists(), calls.read_text()


def post(url, body, kind="application/json"):
    """Status and text of the answer to a request."""
    request = urllib.request.Request(url, body.encode(), {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_nobody_stores_files_there_or_fills_the_queue(app, served):
    body = '--x\r\nContent-Disposition: form-data; name="files"; filename="a.bin"\r\n\r\nsome bytes\r\n--x--\r\n'
    status, text = post(f"{served}/gradio_api/upload", body, "multipart/form-data; boundary=x")
    assert status == 413, text
    answers = []
    for i in range(app.MAX_WAITING + 5):
        job = {"data": [3, 1, 16, 250, 2.0, "DDPMScheduler"], "session_hash": f"visitor{i}", "fn_index": 2}
        answers.append(post(f"{served}/gradio_api/queue/join", json.dumps(job)))
    assert answers[0][0] == 200
    assert answers[-1][0] == 503
    assert "Queue is full" in answers[-1][1]


@pytest.fixture
def browser(tmp_path):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=CHROMIUM,
            headless=True,
            args=[f"--{name}" for name in CHROMIUM_FLAGS],
            viewport={"width": 1100, "height": 820},
        )
        context.set_default_timeout(30_000)
        yield context
        context.close()


def set_number(page, label, value):
    box = page.get_by_role("spinbutton", name=label)
    box.fill(str(value))
    box.press("Tab")


@pytest.mark.skipif(
    CHROMIUM is None or find_spec("playwright") is None,
    reason="no Chromium (Debian: apt-get install chromium) or no playwright (pip install playwright)",
)
def test_a_visitor_types_a_class_and_sees_the_pipelines_picture_appear(app, served, browser):
    requests, errors = [], []
    browser.on("request", lambda request: requests.append(request.url))
    page = browser.new_page()
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(served)

    # Search: what does not fit disappears; a click takes the rest. (Enter may come before Gradio has moved its mark.)
    box = page.locator("#class input")
    # What is there is selected by a click, as soon as Gradio listens, so that typing replaces it.
    for _ in range(20):
        box.click()
        page.wait_for_timeout(300)
        if page.evaluate("getSelection().toString()") == "eight":
            break
        page.locator("h1").click()
    box.press_sequentially("sev")
    page.locator("#class [role=option]", has_text="eight").wait_for(state="detached")
    page.locator("#class [role=option]", has_text="seven").click()
    page.wait_for_function("document.querySelector('#class input').value === 'seven'")
    page.locator("#seed input").fill("42")
    set_number(page, "number input for Images", 2)
    set_number(page, "number input for Steps", 100)

    # The page keeps every picture that it shows.
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
            const image = document.querySelector('.terdit-images img');
            if (image && image.src !== window.seen.at(-1)) window.seen.push(image.src);
        }).observe(document.querySelector('#picture'), {childList: true, subtree: true, attributes: true}); }"""
    )
    page.locator("#generate").click()
    page.locator(".terdit-status[data-state=done]").wait_for()
    assert len(set(page.evaluate("window.seen"))) >= 2
    assert "seven: 100 steps" in page.locator(".terdit-status").inner_text()
    facts = page.locator("#facts").inner_text()
    assert "233,472 ternary weights in 58.4 kB, 40% of them zero" in facts
    urls = [image.get_attribute("src") for image in page.locator(".terdit-images img").all()]
    shown = [Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))) for url in urls]
    asked = settings(app, label=7, seed=42, num_inference_steps=100, guidance_scale=1.5)
    assert [image.tobytes() for image in shown] == pipeline_images(load_pipeline("digits"), asked)

    # A stop, and a wrong seed.
    set_number(page, "number input for Images", 16)
    set_number(page, "number input for Steps", 250)
    page.locator("#generate").click()
    page.locator(".terdit-status[data-state=running]").wait_for()
    page.locator("#stop").click()
    page.locator(".terdit-status[data-state=stopped]").wait_for()
    page.locator("#seed input").fill("")
    page.locator("#generate").click()
    page.get_by_text("The seed must be a whole number").wait_for()

    assert errors == []
    assert [url for url in requests if not url.startswith((served, "data:", "blob:"))] == []
