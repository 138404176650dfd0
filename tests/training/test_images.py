import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_terdit.training.images import formats, prepare_image, read_image, suffixes


def tone(path, **options):
    return read_image(path, 4, **options).mean().item() / 2 + 0.5


class TestSquare:
    def test_the_middle_of_the_image_is_kept_at_the_asked_size(self):
        pixels = np.zeros((40, 80, 3), dtype=np.uint8)
        pixels[:, 20:60] = 255  # the middle square
        image = prepare_image(Image.fromarray(pixels), 16)
        assert torch.equal(image, torch.ones(3, 16, 16))
        assert prepare_image(Image.fromarray(pixels), 8, channels=1).shape == (1, 8, 8)

    @pytest.mark.parametrize("size", [(5, 9), (16, 16), (17, 16), (100, 33), (16, 31), (1, 40_000)])
    def test_any_size_of_image_fits(self, size):
        """The last one used to be scaled before it was cut, to 16 x 640,000."""
        image = prepare_image(Image.new("RGB", size, (255, 0, 0)), 16)
        torch.testing.assert_close(image, torch.tensor([1.0, -1, -1]).view(3, 1, 1).expand(3, 16, 16))

    def test_a_photo_is_turned_as_its_exif_data_say(self, tmp_path):
        pixels = np.zeros((8, 8, 3), dtype=np.uint8)
        pixels[:, 4:] = 255
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        Image.fromarray(pixels).save(tmp_path / "1.png", exif=exif)
        turned = Image.fromarray(pixels).rotate(-90)
        assert torch.equal(read_image(tmp_path / "1.png", 8), prepare_image(turned, 8))


class TestTones:
    @pytest.mark.parametrize(
        ("dtype", "value", "suffix"),
        [(np.uint16, 16448, "png"), (np.uint16, 16448, "tiff"), (np.float32, 64 / 255, "tiff")],
    )
    def test_sixteen_bits_and_floats_are_not_clipped(self, tmp_path, dtype, value, suffix):
        Image.fromarray(np.full((8, 8), value, dtype=dtype)).save(tmp_path / f"1.{suffix}")
        assert tone(tmp_path / f"1.{suffix}", channels=1) == pytest.approx(64 / 255, abs=1e-6)

    @pytest.mark.parametrize("name", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
    def test_usual_formats_are_read(self, tmp_path, name):
        Image.new("RGB", (8, 8), (51, 51, 51)).save(tmp_path / f"1.{name}")
        assert f".{name}" in suffixes()
        assert tone(tmp_path / f"1.{name}") == pytest.approx(0.2, abs=0.01)


class TestTransparency:
    """The colors under transparent pixels are anything; what a viewer shows is the background."""

    @staticmethod
    def saved(tmp_path, mode, suffix):
        image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))  # an invisible red
        image.paste((0, 0, 255, 255), (0, 0, 4, 8))
        if mode == "P":
            image = image.quantize(8)
        elif mode == "RGB":  # one color of an opaque image that counts as transparent
            image = Image.new("RGB", (8, 8), (255, 0, 0))
            image.paste((0, 0, 255), (0, 0, 4, 8))
        else:
            image = image.convert(mode)
        options = {"transparency": (255, 0, 0)} if mode == "RGB" else {"lossless": True} if suffix == "webp" else {}
        image.save(tmp_path / f"1.{suffix}", **options)
        return tmp_path / f"1.{suffix}"

    @pytest.mark.parametrize(
        ("mode", "suffix"),
        [
            ("RGBA", "png"),
            ("RGBA", "webp"),
            ("RGBA", "tiff"),
            ("LA", "png"),
            ("P", "png"),
            ("RGBA", "gif"),
            ("RGB", "png"),
        ],
    )
    @pytest.mark.parametrize(
        ("background", "color"), [("white", (1, 1, 1)), ("black", (-1, -1, -1)), ("#ff0", (1, 1, -1))]
    )
    def test_transparent_pixels_show_the_background(self, tmp_path, mode, suffix, background, color):
        image = read_image(self.saved(tmp_path, mode, suffix), 8, background=background)
        torch.testing.assert_close(image[:, :, 6], torch.tensor(color).float()[:, None].expand(3, 8))
        inside = read_image(self.saved(tmp_path, mode, suffix), 8, background="black")[:, :, 1]
        torch.testing.assert_close(image[:, :, 1], inside)
        assert inside.mean() > -0.99

    def test_half_transparent_pixels_are_mixed_before_scaling(self, tmp_path):
        Image.new("RGBA", (8, 8), (0, 0, 0, 128)).save(tmp_path / "1.png")
        assert tone(tmp_path / "1.png") == pytest.approx(127 / 255, abs=0.01)

    def test_cmyk_is_converted(self, tmp_path):
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "1.jpg")
        torch.testing.assert_close(
            read_image(tmp_path / "1.jpg", 8).mean((1, 2)), torch.tensor([1.0, -1, -1]), atol=0.03, rtol=0
        )

    @pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
    def test_an_animation_gives_its_first_frame(self, tmp_path, suffix):
        frames = [Image.new("RGB", (8, 8), color) for color in ("white", "black")]
        frames[0].save(tmp_path / f"1.{suffix}", save_all=True, append_images=frames[1:])
        with Image.open(tmp_path / f"1.{suffix}") as image:
            assert image.n_frames == 2
        assert tone(tmp_path / f"1.{suffix}") == 1


class TestRefusals:
    def test_postscript_starts_no_program(self, tmp_path):
        """Whatever its name; a program called gs, first in PATH, would leave a trace."""
        (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        (tmp_path / "gs").chmod(0o755)
        photo = tmp_path / "photo.jpg"
        photo.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n")
        code = "import sys\nfrom PIL import Image\nfrom diffusers_terdit.training.images import read_image\n"
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        opened = [sys.executable, "-c", f"{code}Image.open(sys.argv[1]).load()", photo]
        subprocess.run(opened, env=environment, capture_output=True)
        assert (tmp_path / "started").exists()  # what Pillow itself does
        (tmp_path / "started").unlink()
        done = subprocess.run([sys.executable, "-c", f"{code}read_image(sys.argv[1], 8)", photo], env=environment,
                              capture_output=True, text=True)  # fmt: skip
        assert "OSError: UnidentifiedImageError" in done.stderr
        assert not (tmp_path / "started").exists()

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
    def test_a_named_pipe_does_not_hang(self, tmp_path):
        os.mkfifo(tmp_path / "1.png")
        with pytest.raises(OSError, match="no regular file"):
            read_image(tmp_path / "1.png", 8)

    @pytest.mark.filterwarnings("ignore")  # of Pillow
    @pytest.mark.parametrize("name", [name for name in formats() if name in Image.SAVE])
    def test_damage_of_every_kind_is_one_error(self, tmp_path, name):
        random = np.random.default_rng(0)
        Image.fromarray(random.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(tmp_path / "whole", format=name)
        data = np.frombuffer((tmp_path / "whole").read_bytes(), dtype=np.uint8)
        for _ in range(100):
            damaged = data.copy()[: random.integers(1, len(data) + 1)]
            places = random.integers(0, min(len(damaged), 200), random.integers(1, 4))
            damaged[places] = random.integers(0, 255, len(places))
            try:
                image = read_image({"bytes": damaged.tobytes()}, 8)
            except OSError:
                continue
            assert image.shape == (3, 8, 8)
            assert image.isfinite().all()

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    def test_a_small_file_of_a_very_large_image(self, tmp_path):
        Image.new("1", (10_000, 10_000)).save(tmp_path / "1.png")
        assert (tmp_path / "1.png").stat().st_size < 20_000
        with pytest.raises(OSError, match="it has 10000 x 10000 pixels, more than 89478485"):
            read_image(tmp_path / "1.png", 8)

    @pytest.mark.parametrize("source", [None, {"bytes": b"", "path": None}, {"bytes": None}, 3])
    def test_a_row_without_an_image(self, source):
        with pytest.raises(OSError, match="Error: "):
            read_image(source, 8)
