"""Images of every kind that the binaries read: real ones, and small ones of all modes and sizes."""

from pathlib import Path

import numpy as np
from PIL import Image

MINI = Path(__file__).resolve().parents[4] / "shared" / "data" / "mini" / "images"


def real_images():
    """Those of the mini data set; none where it is not."""
    return sorted(path for path in MINI.rglob("*") if path.suffix in (".png", ".jpg"))


def smooth(height, width, channels, seed=0, most=255):
    """[H, W, C] waves with a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    waves = [np.sin(x / rng.uniform(3, 30) + rng.uniform(0, 6)) * np.cos(y / rng.uniform(3, 30)) for _ in range(channels)]
    return ((np.stack(waves, -1) + 1) / 2 * 0.9 * most + rng.uniform(0, 0.1 * most, (height, width, channels))).round()


def write_pictures(folder):
    """Name -> file."""
    rgb = Image.fromarray(smooth(90, 131, 3).astype(np.uint8))
    grey = rgb.convert("L")
    files = {}

    def save(name, image, **how):
        files[name] = folder / name
        image.save(folder / name, **how)

    save("rgb.png", rgb)
    save("grey.png", grey)
    save("bits.png", grey.point(lambda value: 255 * (value > 99)).convert("1"))
    save("palette.png", rgb.quantize(37))
    save("clear_palette.png", rgb.quantize(37), transparency=3)
    save("alpha.png", rgb.convert("RGBA"))
    save("grey_alpha.png", grey.convert("LA"))
    save("small.png", rgb.resize((1, 1)))
    save("thin.png", rgb.resize((300, 2)))
    save("deep.png", Image.fromarray(smooth(40, 50, 1, most=4000)[..., 0].astype(np.uint16)))
    save("deeper.png", Image.fromarray(smooth(40, 50, 1, most=65000)[..., 0].astype(np.uint16)))
    offset = 32768 + smooth(40, 50, 1, most=2000)[..., 0]
    offset[:3] = 0
    save("hounsfield.png", Image.fromarray(offset.astype(np.uint16)))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        save(f"turned{orientation}.jpg", rgb, exif=exif, quality=95, subsampling=0)
        save(f"turned{orientation}.png", rgb, exif=exif)
    save("subsampled.jpg", rgb, quality=80, subsampling=2)
    save("progressive.jpg", rgb, quality=80, progressive=True)
    save("grey.jpg", grey, quality=90)
    save("ink.jpg", rgb.convert("CMYK"), quality=90)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    save("xmp.jpg", rgb, quality=90, xmp=xmp)
    return files
