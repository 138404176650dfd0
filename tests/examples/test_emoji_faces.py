import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_terdit import TerDiTPipeline
from diffusers_terdit.checkpoints import bundled
from diffusers_terdit.training.data import ImageSamples


SCRIPT = Path(__file__).parents[2] / "examples" / "emoji_faces.py"
CLEAR_BLUE = (0, 0, 255, 0)


@pytest.fixture(scope="module")
def emoji_faces():
    spec = importlib.util.spec_from_file_location("emoji_faces", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entry(name, short_name, image, order, category="Smileys & Emotion", subcategory="face-smiling", has_image=True):
    return {
        "name": name,
        "short_name": short_name,
        "image": image,
        "sort_order": order,
        "category": category,
        "subcategory": subcategory,
        "has_img_google": has_image,
    }


FACES = [
    entry("FACE WITH TEARS OF JOY", "joy", "1f602.png", 3),
    entry("CLOWN FACE", "clown_face", "1f921.png", 2, subcategory="face-costume"),
    entry("POUTING CAT FACE", "pouting_cat", "1f63e.png", 5, subcategory="cat-face"),
    entry("SEE/HEAR, NO EVIL", "see_no_evil", "1f648.png", 4, subcategory="monkey-face"),
]
OTHERS = [
    entry("KISS MARK", "kiss", "1f48b.png", 1, subcategory="emotion"),
    entry("RED HEART", "heart", "2764.png", 6, subcategory="heart"),
    entry("DOG FACE", "dog", "1f436.png", 7, category="Animals & Nature", subcategory="animal-mammal"),
    entry("FACE OF ANOTHER VENDOR", "vendor", "1faff.png", 8, has_image=False),
]


@pytest.fixture
def package(tmp_path):
    """A package with red discs: opaque in the middle 32 x 32 pixels, elsewhere blue that is wholly transparent."""
    folder = tmp_path / "package"
    pictures = folder / "img" / "google" / "64"
    pictures.mkdir(parents=True)
    image = Image.new("RGBA", (64, 64), CLEAR_BLUE)
    image.paste((255, 0, 0, 255), (16, 16, 48, 48))
    for emoji in FACES + OTHERS[:3]:
        image.save(pictures / emoji["image"])
    (folder / "emoji.json").write_text(json.dumps(OTHERS + FACES))
    return folder


def test_writes_one_folder_per_face_in_the_order_of_the_standard(emoji_faces, package, tmp_path):
    labels = emoji_faces.write_faces(package, tmp_path / "faces")
    assert labels == [
        "clown face",  # "clown_face" adds nothing
        "face with tears of joy, joy",
        "see hear no evil, see no evil",
        "pouting cat face, pouting cat",
    ]
    files = sorted(path.relative_to(tmp_path / "faces").as_posix() for path in (tmp_path / "faces").glob("*/*"))
    assert files == [
        "clown face/1f921.png",
        "face with tears of joy, joy/1f602.png",
        "pouting cat face, pouting cat/1f63e.png",
        "see hear no evil, see no evil/1f648.png",
    ]
    note = (tmp_path / "faces" / "LICENCE.txt").read_text()
    assert "Apache License 2.0" in note
    assert "MIT" in note


def test_the_trainer_reads_the_folders(emoji_faces, package, tmp_path):
    emoji_faces.write_faces(package, tmp_path / "faces")
    samples = ImageSamples.from_folder(tmp_path / "faces", resolution=32)
    assert len(samples) == 4
    assert samples.id2label[1] == "face with tears of joy, joy"
    image, label = samples[2]
    assert tuple(image.shape) == (3, 32, 32)
    assert label == 2
    assert image[:, 0, 0].tolist() == [1, 1, 1]  # white
    assert image[:, 16, 16].tolist() == [1, -1, -1]  # red


@pytest.mark.parametrize("resolution", [64, 32, 16])
def test_transparent_is_white_and_its_colour_is_not_seen(emoji_faces, package, tmp_path, resolution):
    emoji_faces.write_faces(package, tmp_path / "faces", resolution)
    with Image.open(tmp_path / "faces" / "clown face" / "1f921.png") as image:
        assert image.mode == "RGB"
        assert image.size == (resolution, resolution)
        pixels = np.asarray(image).astype(int)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[resolution // 2, resolution // 2].tolist() == [255, 0, 0]
    # Red on white: green equals blue and red is full, but for rounding. Blue from under the transparency would show.
    assert pixels[..., 0].min() >= 253
    assert np.abs(pixels[..., 1] - pixels[..., 2]).max() <= 2


def test_half_transparent_red_is_pink(emoji_faces):
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 128))
    assert emoji_faces.on_white(image, 32).getpixel((9, 9)) == (255, 127, 127)


def test_a_palette_image_with_transparency_is_read(emoji_faces, package, tmp_path):
    path = package / "img" / "google" / "64" / "1f921.png"
    image = Image.new("P", (64, 64), 0)
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.paste(1, (16, 16, 48, 48))
    image.save(path, transparency=0)
    emoji_faces.write_faces(package, tmp_path / "faces")
    with Image.open(tmp_path / "faces" / "clown face" / "1f921.png") as image:
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert image.getpixel((16, 16)) == (255, 0, 0)


def test_command_line(emoji_faces, package, tmp_path, capsys):
    emoji_faces.main([str(package), "--output_dir", str(tmp_path / "faces"), "--resolution", "16"])
    assert "4 faces of 16x16 pixels" in capsys.readouterr().out
    with Image.open(tmp_path / "faces" / "clown face" / "1f921.png") as image:
        assert image.size == (16, 16)


def no_index(package):
    (package / "emoji.json").unlink()


def no_faces(package):
    (package / "emoji.json").write_text(json.dumps(OTHERS))


def no_picture(package):
    (package / "img" / "google" / "64" / "1f602.png").unlink()


def one_name_twice(package):
    again = entry("JOY", "happiness", "1f602.png", 9)
    (package / "emoji.json").write_text(json.dumps([*FACES, again]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_index, "holds no emoji.json"),
        (no_faces, "lists no faces"),
        (no_picture, r"lacks 1 of 4 faces, such as 1f602\.png"),
        (one_name_twice, "two faces the name 'joy'"),
    ],
)
def test_a_damaged_package_is_refused_before_anything_is_written(emoji_faces, package, tmp_path, damage, message):
    damage(package)
    with pytest.raises(ValueError, match=message):
        emoji_faces.write_faces(package, tmp_path / "faces")
    assert not (tmp_path / "faces").exists()


@pytest.mark.parametrize("resolution", [0, 65])
def test_a_resolution_without_pixels_is_refused(emoji_faces, package, tmp_path, resolution):
    with pytest.raises(ValueError, match=f"got {resolution}"):
        emoji_faces.write_faces(package, tmp_path / "faces", resolution)


def test_a_folder_that_holds_something_is_refused(emoji_faces, package, tmp_path):
    (tmp_path / "faces" / "old").mkdir(parents=True)
    with pytest.raises(ValueError, match="not empty"):
        emoji_faces.write_faces(package, tmp_path / "faces")


@pytest.fixture(scope="module")
def pipe():
    pipe = TerDiTPipeline.from_pretrained(bundled("emoji"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, labels, seeds, **kwargs):
    """(B, 3, 32, 32) in shades 0 to 255."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(labels, generator=generators, output_type="pt", guidance_scale=1.5, **kwargs).images * 255


def test_the_bundled_model_draws_what_it_is_called(pipe):
    labels = ["neutral face", "pouting face", "smiling imp", "pile of poo"]
    images = sample(pipe, labels, range(4), num_inference_steps=10)
    assert images[:, :, :2, :2].mean(dim=(1, 2, 3)).min() > 230  # the corners are white
    red, green, blue = images[:, :, 8:24, 8:24].mean(dim=(2, 3)).T  # the middle
    assert ((red > 200) & (green > 165) & (blue < 70)).tolist() == [True, False, False, False]  # yellow
    assert ((green < 40) & (blue > 150)).tolist() == [False, False, True, False]  # purple
    assert ((red < 180) & (green < 150)).tolist() == [False, False, False, True]  # brown


@pytest.mark.slow
@pytest.mark.skipif("EMOJI_FACES" not in os.environ, reason="EMOJI_FACES names no folder made by emoji_faces.py")
def test_samples_are_nearest_to_the_picture_of_their_label(pipe):
    """The figures of the card: `EMOJI_FACES=faces pytest -s -m slow tests/examples/test_emoji_faces.py`."""
    faces = ImageSamples.from_folder(os.environ["EMOJI_FACES"], resolution=32)
    assert faces.id2label == {int(key): name for key, name in pipe.config.id2label.items()}
    real = torch.stack([faces[i][0] for i in range(len(faces))]) * 127.5 + 127.5
    images = sample(pipe, faces.labels, range(len(faces)), num_inference_steps=25).round()
    distances = torch.cdist(images.flatten(1), real.flatten(1)) / real[0].numel() ** 0.5  # shades, root mean square
    own = (distances.argmin(1) == torch.arange(len(faces))).float().mean()
    error = distances.diagonal()
    print(f"nearest to its own picture: {own:.1%}; distance in shades: median {error.median():.1f}")
    assert own > 0.97
    assert error.median() < 9
