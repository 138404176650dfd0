"""Make class folders of emoji faces for train_terdit.py, one class per emoji, with an image in each style.

    npm pack emoji-datasource-google@16.0.0
    tar -xzf emoji-datasource-google-16.0.0.tgz package/emoji.json package/img/google/64
    python examples/emoji_faces.py package --output_dir faces
    python examples/train_terdit.py --train_data_dir faces --resolution 32 --output_dir outputs/emoji

The pictures are Google's Noto Emoji (https://github.com/googlefonts/noto-emoji), Apache-2.0; the npm package and its
`emoji.json` are MIT (https://github.com/iamcal/emoji-data). A class is called by the emoji's Unicode name and its
short one, such as "face with tears of joy, joy": the pipeline knows it by either.

`--fluent` adds a second style, Microsoft's Fluent Emoji in 3D (https://github.com/microsoft/fluentui-emoji), MIT. It
lacks three of the 130 faces:

    npm pack @lobehub/fluent-emoji-3d@1.1.0
    tar -xzf lobehub-fluent-emoji-3d-1.1.0.tgz package/assets
    python examples/emoji_faces.py package --fluent package --resolution 64 --output_dir faces
"""

import json
from pathlib import Path

from PIL import Image

from diffusers_terdit.arguments import Parser


LICENSE = """\
The pictures in these folders are made from Noto Emoji, https://github.com/googlefonts/noto-emoji, Copyright Google
LLC, Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0. They were scaled and set on white.
Their names are from emoji-data, https://github.com/iamcal/emoji-data, Copyright Cal Henderson, MIT.
"""
FLUENT_LICENSE = """\
Pictures whose names end in -fluent are made from Fluent Emoji instead, Copyright Microsoft Corporation, MIT,
https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE, as packaged by LobeHub,
https://github.com/lobehub/fluent-emoji, MIT.
"""


def is_face(emoji: dict) -> bool:
    """Whether an entry of `emoji.json` is a face that has a picture in this package."""
    group = emoji["subcategory"]
    smiley = emoji["category"] == "Smileys & Emotion"
    return smiley and (group.startswith("face-") or group in ("cat-face", "monkey-face")) and emoji["has_img_google"]


def label(emoji: dict) -> str:
    """Names of an entry in lower case, separated by commas, the Unicode name first.

    `/` would end the folder's name and `,` the label's, so both become spaces.
    """
    names = [emoji["name"].lower(), emoji["short_name"].replace("_", " ")]
    return ", ".join(dict.fromkeys(" ".join(name.replace("/", " ").replace(",", " ").split()) for name in names))


def on_white(path: Path, resolution: int) -> Image.Image:
    """Read a picture and set it on white, in RGB; Pillow weights colors by their opacity when it scales."""
    try:
        with Image.open(path, formats=["PNG", "WEBP"]) as stored:
            image = stored.convert("RGBA")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is damaged ({error}). Unpack it again.") from error
    if image.size != (resolution, resolution):
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def fluent_picture(fluent: Path, emoji: dict) -> Path | None:
    """The picture of an entry of `emoji.json` in Fluent's package, which spells some code points otherwise."""
    points = [(emoji[key] or "").lower() for key in ("unified", "non_qualified")]
    paths = [fluent / "assets" / f"{spelled}.webp" for spelled in (*points, points[0].replace("-fe0f", ""))]
    return next((path for path in paths if path.is_file()), None)


def write_faces(package: Path, output_dir: Path, resolution: int = 32, fluent: Path | None = None) -> list[str]:
    """Write `output_dir/<label>/<code points>.png` for every face, and a license note.

    Args:
        package (`Path`): The unpacked npm package: `emoji.json` and `img/google/64`.
        output_dir (`Path`): Must not exist, or be empty: a picture that was left there would be trained on.
        resolution (`int`): Side of the square pictures in pixels, at most the 64 of the package's.
        fluent (`Path`, *optional*): The unpacked npm package of Fluent Emoji; a face that it has becomes a second
            picture, `<code points>-fluent.png`.

    Returns:
        `list[str]`: The labels in the order of `emoji.json`'s `sort_order`.

    Raises:
        ValueError: No such package, no faces, a missing or damaged picture, two faces of one name, or a bad resolution
            or folder. Nothing is written then.
    """
    if not 1 <= resolution <= 64:
        raise ValueError(f"`resolution` must be 1 to 64, the package's pictures have 64 pixels; got {resolution}.")
    index, pictures = package / "emoji.json", package / "img" / "google" / "64"
    if not index.is_file():
        raise ValueError(f"{package} holds no emoji.json. Pass the folder `package` that tar made, see --help.")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(f"{output_dir} is not empty. Remove it or pass another --output_dir.")
    if fluent is not None and not any((fluent / "assets").glob("*.webp")):
        raise ValueError(f"{fluent} holds no assets/*.webp. Pass the folder into which tar unpacked it, see --help.")
    faces = sorted(filter(is_face, json.loads(index.read_text("utf-8"))), key=lambda emoji: emoji["sort_order"])
    if not faces:
        raise ValueError(
            f'{index} lists no faces (subcategories face-*, cat-face, monkey-face of "Smileys & Emotion"). Unpack it'
            " again."
        )
    missing = [emoji["image"] for emoji in faces if not (pictures / emoji["image"]).is_file()]
    if missing:
        raise ValueError(
            f"{pictures} lacks {len(missing)} of {len(faces)} faces, such as {missing[0]}. Unpack it, too."
        )
    labels = [label(emoji) for emoji in faces]
    names = [name for text in labels for name in text.split(", ")]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{index} gives two faces the name {twice[0]!r}; a label must mean one picture. Rename one.")

    images = {}
    for emoji, name in zip(faces, labels, strict=True):
        target = output_dir / name / emoji["image"]
        images[target] = on_white(pictures / emoji["image"], resolution)
        second = fluent_picture(fluent, emoji) if fluent else None
        if second is not None:
            images[target.with_stem(f"{target.stem}-fluent")] = on_white(second, resolution)
    for target, image in images.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target)
    (output_dir / "LICENSE.txt").write_text(LICENSE + (FLUENT_LICENSE if fluent else ""), encoding="utf-8")
    return labels


def main(argv=None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("package", type=Path, help="The unpacked npm package emoji-datasource-google.")
    parser.add_argument("--output_dir", type=Path, default=Path("faces"), help="Write a folder of each face here.")
    parser.add_argument("--resolution", type=int, default=32, help="Scale the faces to this many pixels, at most 64.")
    parser.add_argument(
        "--fluent", type=Path, help="Add the faces of this folder, the unpacked npm package fluent-emoji-3d."
    )
    args = parser.parse_args(argv)
    labels = write_faces(args.package, args.output_dir, args.resolution, args.fluent)
    pictures = len(list(args.output_dir.glob("*/*.png")))
    print(f"{args.output_dir}: {pictures} pictures of {len(labels)} faces, {args.resolution}x{args.resolution} pixels")


if __name__ == "__main__":
    main()
