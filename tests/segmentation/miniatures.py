"""Miniature data sets in the layouts of CamVid and Cityscapes."""

from pathlib import Path

import numpy as np
from PIL import Image

CAMVID_NAMES = {
    "train": ("0001TP_006690", "0006R0_f00930", "0006R0_f00960", "0016E5_00390", "0016E5_00420"),
    "val": ("0016E5_07959", "0016E5_07961"),
    "test": ("0001TP_008550", "Seq05VD_f00000", "Seq05VD_f00030"),
}


def pair(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) of blocks whose grey level tells their class, and its labels 0..11."""
    random = np.random.RandomState(seed)
    blocks = random.randint(0, 12, (height // 8 + 1, width // 8 + 1))
    labels = np.kron(blocks, np.ones((8, 8), int))[:height, :width].astype(np.uint8)
    image = np.repeat(20 * labels[:, :, None], 3, axis=2).astype(np.uint8)
    return image, labels


def camvid(root: Path, height: int = 45, width: int = 60, flat: bool = False) -> Path:
    """`root`/camvid with ten images; `flat`: in SPLIT and SPLITannot, as in SegNet's tutorial."""
    seed = 0
    for split, names in CAMVID_NAMES.items():
        folders = (split, f"{split}annot") if flat else (f"{split}/images", f"{split}/labels")
        images, labels = (root / "camvid" / folder for folder in folders)
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for name in names:
            pixels, classes = pair(seed, height, width)
            Image.fromarray(pixels).save(images / f"{name}.png")
            Image.fromarray(classes).save(labels / f"{name}.png")
            seed += 1
    return root


def cityscapes(root: Path, height: int = 16, width: int = 32) -> Path:
    """`root`/cityscapes with label ids 0..33 in rising order, repeated, in two cities a split."""
    home = root / "cityscapes"
    for split, cities in {"train": ("zurich", "aachen"), "val": ("munster", "lindau")}.items():
        for city in cities:
            for frame in ("000001", "000000"):
                stem = f"{city}_{frame}_000019"
                image = home / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png"
                labels = home / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png"
                for path in (image, labels):
                    path.parent.mkdir(parents=True, exist_ok=True)
                ids = np.arange(height * width).reshape(height, width) % 34
                Image.fromarray(np.full((height, width, 3), len(city), np.uint8)).save(image)
                Image.fromarray(ids.astype(np.uint8)).save(labels)
    return root
