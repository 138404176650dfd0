"""examples/emoji_faces.py on a package of eight entries, and what the bundled model has learned from the real one."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import emoji_faces
from diffusers_terdit import TerDiTPipeline
from diffusers_terdit.checkpoints import bundled
from diffusers_terdit.training.data import ImageSamples


def entry(name, short_name, image, order, category="Smileys & Emotion", subcategory="face-smiling", has_image=True):
    values = {"name": name, "short_name": short_name, "image": image, "sort_order": order}
    points = {"unified": image.removesuffix(".png").upper(), "non_qualified": None}
    return {**values, **points, "category": category, "subcategory": subcategory, "has_img_google": has_image}


FACES = [
    entry("FACE WITH TEARS OF JOY", "joy", "1f602.png", 3),
    entry("CLOWN FACE", "clown_face", "1f921.png", 2, subcategory="face-costume"),
    entry("POUTING CAT FACE", "pouting_cat", "1f63e.png", 5, subcategory="cat-face"),
    entry("SEE/HEAR, NO EVIL", "see_no_evil", "1f648.png", 4, subcategory="monkey-face"),
]
OTHERS = [
    entry("KISS MARK", "kiss", "1f48b.png", 1, subcategory="emotion"),
    entry("DOG FACE", "dog", "1f436.png", 7, category="Animals & Nature", subcategory="animal-mammal"),
    entry("FACE OF ANOTHER VENDOR", "vendor", "1faff.png", 8, has_image=False),
]


@pytest.fixture
def package(tmp_path):
    """A package with red discs: opaque in the middle 32 x 32 pixels, elsewhere blue that is wholly transparent."""
    pictures = tmp_path / "package" / "img" / "google" / "64"
    pictures.mkdir(parents=True)
    image = Image.new("RGBA", (64, 64), (0, 0, 255, 0))
    image.paste((255, 0, 0, 255), (16, 16, 48, 48))
    for emoji in FACES + OTHERS[:2]:
        image.save(pictures / emoji["image"])
    (tmp_path / "package" / "emoji.json").write_text(json.dumps(OTHERS + FACES))
    return tmp_path / "package"


@pytest.fixture
def fluent(tmp_path):
    """Green pictures of two faces, one of which spells its code points without the variation selector."""
    assets = tmp_path / "fluent" / "assets"
    assets.mkdir(parents=True)
    for name in ("1f602", "1f921", "1f48b"):
        Image.new("RGBA", (256, 256), (0, 255, 0, 255)).save(assets / f"{name}.webp", lossless=True)
    return tmp_path / "fluent"


def test_a_second_style_is_a_second_picture_of_the_class(package, fluent, tmp_path, capsys):
    index = package / "emoji.json"
    entries = json.loads(index.read_text())
    next(entry for entry in entries if entry["short_name"] == "clown_face")["unified"] = "1F921-FE0F"
    index.write_text(json.dumps(entries))
    emoji_faces.main(
        [str(package), "--fluent", str(fluent), "--output_dir", str(tmp_path / "faces"), "--resolution", "64"]
    )
    assert "6 pictures of 4 faces, 64x64 pixels" in capsys.readouterr().out
    samples = ImageSamples.from_folder(tmp_path / "faces", resolution=64)
    assert [len(list((tmp_path / "faces" / name).glob("*.png"))) for name in samples.id2label.values()] == [2, 2, 1, 1]
    middles = [samples[i][0][:, 32, 32].tolist() for i in range(2)]
    assert sorted(middles) == [[-1, 1, -1], [1, -1, -1]]  # green and red
    assert "Fluent" in (tmp_path / "faces" / "LICENSE.txt").read_text()


def test_a_folder_without_fluent_pictures_is_refused(package, tmp_path):
    with pytest.raises(ValueError, match=r"holds no assets/\*\.webp"):
        emoji_faces.write_faces(package, tmp_path / "faces", fluent=package)
    assert not (tmp_path / "faces").exists()


@pytest.mark.parametrize("name", ["package/img/google/64/1f921.png", "fluent/assets/1f602.webp"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_truncated_picture_is_named_and_nothing_is_written(package, fluent, tmp_path, name, share):
    path = tmp_path / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
        emoji_faces.write_faces(package, tmp_path / "faces", fluent=fluent)
    assert not (tmp_path / "faces").exists()


def test_one_folder_per_face_that_the_trainer_reads(package, tmp_path, capsys):
    emoji_faces.main([str(package), "--output_dir", str(tmp_path / "faces"), "--resolution", "16"])
    assert "4 pictures of 4 faces, 16x16 pixels" in capsys.readouterr().out
    assert "Fluent" not in (tmp_path / "faces" / "LICENSE.txt").read_text()
    samples = ImageSamples.from_folder(tmp_path / "faces", resolution=16)
    assert list(samples.id2label.values()) == [
        "clown face",  # "clown_face" adds nothing
        "face with tears of joy, joy",
        "pouting cat face, pouting cat",
        "see hear no evil, see no evil",
    ]
    pixels = samples[0][0].numpy()
    assert pixels[:, 0, 0].tolist() == [1, 1, 1]  # white
    assert pixels[:, 8, 8].tolist() == [1, -1, -1]  # red
    # Red on white: green equals blue and red is full, but for rounding. Blue from under the transparency would show.
    assert pixels[0].min() > 0.98
    assert np.abs(pixels[1] - pixels[2]).max() < 0.02


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda package: (package / "emoji.json").unlink(), "holds no emoji.json"),
        (lambda package: (package / "emoji.json").write_text(json.dumps(OTHERS)), "lists no faces"),
        (lambda package: (package / "img/google/64/1f602.png").unlink(), r"lacks 1 of 4 faces, such as 1f602\.png"),
        (
            lambda package: (package / "emoji.json").write_text(
                json.dumps([*FACES, entry("JOY", "happiness", "1f602.png", 9)])
            ),
            "two faces the name 'joy'",
        ),
    ],
)
def test_a_damaged_package_is_refused_before_anything_is_written(package, tmp_path, damage, message):
    damage(package)
    with pytest.raises(ValueError, match=message):
        emoji_faces.write_faces(package, tmp_path / "faces")
    assert not (tmp_path / "faces").exists()


@pytest.fixture(scope="module")
def pipe():
    pipe = TerDiTPipeline.from_pretrained(bundled("emoji"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, labels, steps):
    """(B, 3, 32, 32), 0 to 255."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(labels))]
    options = {"num_inference_steps": steps, "guidance_scale": 1.5, "output_type": "pt"}
    return pipe(labels, generator=generators, **options).images * 255


def test_the_bundled_model_draws_what_it_is_called(pipe):
    images = sample(pipe, ["neutral face", "pouting face", "smiling imp", "pile of poo"], 10)
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
    distances = (
        torch.cdist(sample(pipe, faces.labels, 25).round().flatten(1), real.flatten(1)) / real[0].numel() ** 0.5
    )
    own = (distances.argmin(1) == torch.arange(len(faces))).float().mean()
    error = distances.diagonal().median()
    print(f"nearest to its own picture: {own:.1%}; distance, 0 to 255: median {error:.1f}")
    assert own > 0.97
    assert error < 9
