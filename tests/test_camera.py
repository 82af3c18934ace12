"""A deployment's pixels: resize against OpenCV, NV12 against CANN's formula, OpenCV and Pillow, and the bins of rehearse.py input."""
import numpy as np
import pytest
from PIL import Image

from lib.aipp import aipp_cfg
from lib.camera import STANDARDS, resize_plain, to_nv12, to_rgb
from lib.images import normalise, preprocess
from lib.script import has_module
from helpers import check_error, script, write_images

import aipp  # the stand-ins'

SHAPES = [(448, 448), (400, 160), (126, 50), (1, 1), (3, 700), (224, 60)]
random = np.random.RandomState(0)


def pixels(height, width):
    return random.randint(0, 256, (height, width, 3)).astype(np.uint8)


def smooth(height, width):
    """Colours that change little from pixel to pixel, so that U and V at half the resolution lose little."""
    return np.asarray(Image.fromarray(pixels(3, 3) // 2 + 64).resize((width, height), Image.BILINEAR))


# --- resize ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES)
def test_resize_is_opencvs_to_the_bit(shape):
    cv2 = pytest.importorskip("cv2")
    for height, width in ((224, 224), (256, 128), (7, 11), shape):
        image = pixels(*shape)
        assert np.array_equal(resize_plain(image, height, width), cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR))


@pytest.mark.parametrize("shape", SHAPES)
def test_resize_takes_the_four_nearest_pixels(shape):
    """In float, by numpy's own interpolation, which OpenCV's weights in 1/2048 approach."""
    image, (height, width) = pixels(*shape), (30, 50)
    y, x = ((np.arange(new) + 0.5) * old / new - 0.5 for new, old in zip((height, width), shape))
    rows = np.stack([[np.interp(x, np.arange(shape[1]), row[:, i]) for i in range(3)] for row in image.astype(float)])
    expected = np.apply_along_axis(lambda column: np.interp(y, np.arange(shape[0]), column), 0, rows).transpose(0, 2, 1)
    assert np.abs(resize_plain(image, height, width) - expected).max() < 1


# --- NV12 ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("standard", sorted(STANDARDS))
def test_nv12_to_rgb_is_aipps_formula(standard):
    picture = random.randint(0, 256, (3 * 16, 64)).astype(np.uint8)
    picture[:2] = [[0], [255]]  # with any colour
    lines = (line.strip().split(": ") for line in aipp_cfg(32, 64, standard).splitlines() if ": " in line)
    assert np.array_equal(to_rgb(picture, standard), aipp.from_nv12(picture.tobytes(), dict(lines), [1, 3, 32, 64])[0])


@pytest.mark.parametrize("standard", sorted(STANDARDS))
def test_rgb_to_nv12_is_the_matrix_rounded(standard):
    image = pixels(8, 12)
    picture, (_, matrix, bias) = to_nv12(image, standard), STANDARDS[standard]
    for y in range(8):
        for x in range(12):
            block = image[y // 2 * 2:y // 2 * 2 + 2, x // 2 * 2:x // 2 * 2 + 2].mean(axis=(0, 1))
            for place, row, colour in ((picture[y, x], 0, image[y, x]), (picture[8 + y // 2, x // 2 * 2], 1, block),
                                       (picture[8 + y // 2, x // 2 * 2 + 1], 2, block)):
                level = np.dot(matrix[row], colour) / 256 + bias[row]
                assert place == int(np.floor(level + 0.5).clip(0, 255))
    image = smooth(64, 48)
    assert np.abs(to_rgb(to_nv12(image, standard), standard).astype(int) - image).mean() < 2.5


def test_nv12_is_that_of_opencv_and_pillow():
    """The first knows BT.601 narrow alone, the second JPEG's; both have other integers."""
    image = smooth(64, 48)
    picture = to_nv12(image, "jpeg")
    assert np.abs(picture[:64].astype(int) - np.asarray(Image.fromarray(image).convert("YCbCr"))[..., 0]).max() <= 1
    halves = np.asarray(Image.fromarray(image).convert("YCbCr"), int)[..., 1:].reshape(32, 2, 24, 2, 2).mean(axis=(1, 3))
    assert np.abs(picture[64:].reshape(32, 24, 2) - halves).max() < 2
    cv2 = pytest.importorskip("cv2")
    picture = to_nv12(image, "601")
    difference = to_rgb(picture, "601").astype(int) - cv2.cvtColor(picture, cv2.COLOR_YUV2RGB_NV12)
    assert np.abs(difference).max() <= 1 and abs(difference.mean()) < 0.1  # it would be -0.5 if AIPP's cut off


# --- bins ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("camera")
    for i, name in enumerate(write_images(folder / "images", 3)):
        Image.fromarray(smooth(60 + i, 30)).save(str(folder / "images" / name))
    (folder / "image.txt").write_text("im0.png\nim1.png\nim2.png\n")
    return folder


def jpeg(image, folder):
    Image.fromarray(image).save(str(folder / "q.jpg"), quality=90)  # Pillow's default is 4:2:0, too
    return np.asarray(Image.open(str(folder / "q.jpg")))


@pytest.mark.parametrize("options, expected", [
    ([], lambda image, _: np.asarray(Image.fromarray(image).resize((16, 24), Image.BILINEAR))),
    (["--resize", "plain"], lambda image, _: resize_plain(image, 24, 16)),
    (["--nv12", "709", "--resize", "plain"], lambda image, _: to_rgb(to_nv12(resize_plain(image, 24, 16), "709"), "709")),
    (["--jpeg", 90, "--resize", "plain"], lambda image, folder: resize_plain(jpeg(image, folder), 24, 16))])
def test_input_of_a_deployment(folder, tmp_path, options, expected):
    for kind in ("uint8", "float32"):
        done = script("tools/rehearse.py", "input", "images", tmp_path / kind, "image.txt", "--size", 24, 16, "--kind", kind, *options,
                      cwd=folder)
        assert done.returncode == 0 and "3 images -> 3 bins of %s" % kind in done.stdout, done.stderr
    for name in ("im0", "im1", "im2"):
        with Image.open(str(folder / "images" / (name + ".png"))) as image:
            wanted = expected(np.asarray(image), tmp_path)
        assert np.array_equal(np.fromfile(str(tmp_path / "uint8" / (name + ".bin")), np.uint8).reshape(24, 16, 3), wanted)
        assert np.array_equal(np.fromfile(str(tmp_path / "float32" / (name + ".bin")), "<f4").reshape(3, 24, 16),
                              normalise(Image.fromarray(wanted), np.empty((3, 24, 16), "<f4")))


def test_stage_4_writes_nv12(folder, tmp_path):
    done = script("preprocess_deepmar_pytorch.py", "images", tmp_path / "bins", "image.txt", "--size", 24, 16, "--nv12", "jpeg", cwd=folder)
    assert done.returncode == 0 and "3 bins of NV12 uint8 [36,16]\n" in done.stdout, done.stderr
    script("tools/rehearse.py", "input", "images", tmp_path / "same", "image.txt", "--size", 24, 16, "--nv12", "jpeg", "--kind", "nv12",
           cwd=folder)
    rgb = preprocess(str(folder / "images" / "im1.png"), np.empty((24, 16, 3), np.uint8))
    for name in ("bins", "same"):
        assert (tmp_path / name / "im1.bin").read_bytes() == to_nv12(rgb, "jpeg").tobytes()
    done = script("get_info.py", tmp_path / "bins", tmp_path / "info", 16, 24)
    assert done.returncode == 0 and done.stdout.endswith(", 16 x 24, NV12\n"), done.stderr
    before = sorted((tmp_path / "bins").iterdir())
    for command in (["preprocess_deepmar_pytorch.py"], ["tools/rehearse.py", "input"]):
        check_error(script(*command, "images", tmp_path / "bins", "image.txt", "--size", 24, 15, "--nv12", "601", cwd=folder),
                    "NV12 needs an even height and width, not 24 x 15")
    assert sorted((tmp_path / "bins").iterdir()) == before


def test_input_with_opencv_and_usage_errors(folder, tmp_path):
    command = ["tools/rehearse.py", "input", "images", tmp_path / "bins", "image.txt", "--kind"]
    check_error(script(*command, "nv12", cwd=folder), "--kind nv12 needs --nv12", code=2)
    done = script(*command, "uint8", "--resize", "opencv", "--size", 24, 16, cwd=folder)
    if not has_module("cv2"):
        check_error(done, "--resize opencv needs OpenCV; run: pip install opencv-python-headless")
        return
    assert done.returncode == 0, done.stderr
    with Image.open(str(folder / "images" / "im2.png")) as image:
        assert (tmp_path / "bins" / "im2.bin").read_bytes() == resize_plain(np.asarray(image), 24, 16).tobytes()
