"""A deployment's pixels: OpenCV's resize, and NV12, the format of video decoders, which AIPP converts to RGB.

An NV12 picture is uint8 [1.5 x height,width]: the luma Y, then U and V alternating, one pair for each 2 x 2 pixels. Height and width
are even. The matrices are those of "CSC Configuration" in CANN's guide to atc, for BT-601NARROW, BT-709NARROW and JPEG (which is also
BT-601WIDE).

AIPP's formula there ends in ">> 8". CANN's own source of AIPP (github.com/hicann/ops-cv, image/aipp/op_kernel/arch35/aipp_base.h, for
the Ascend950) rounds to the nearest instead: (matrix * (YUV - bias) + 128) >> 8. It gives U and V to all four pixels without
interpolation. Both are done so here. If a chip cut off instead, its pixels would be darker by 0.5 levels on average, by 1 at most.
"""
import io

from lib.script import importing

with importing():
    import numpy as np

NARROW, WIDE = (16, 128, 128), (0, 128, 128)  # the biases of Y, U and V
STANDARDS = {  # YUV to RGB, RGB to YUV, in 1 / 256
    "601": (((298, 0, 409), (298, -100, -208), (298, 516, 0)), ((66, 129, 25), (-38, -74, 112), (112, -94, -18)), NARROW),
    "709": (((298, 0, 459), (298, -55, -136), (298, 541, 0)), ((47, 157, 16), (-26, -87, 112), (112, -102, -10)), NARROW),
    "jpeg": (((256, 0, 359), (256, -88, -183), (256, 454, 0)), ((77, 150, 29), (-43, -85, 128), (128, -107, -21)), WIDE)}
COEFFICIENTS = 2048    # OpenCV's weights of a pixel are multiples of 1 / 2048


def check_even(height, width):
    """Raises ValueError for a size that NV12 cannot have."""
    if height % 2 or width % 2:
        raise ValueError("NV12 needs an even height and width, not %d x %d" % (height, width))


def converted(levels, matrix, scale):
    """Returns the product of a matrix and levels [...,3], divided by scale and rounded. It is exact: float32 holds all the sums."""
    return np.floor(levels.astype(np.float32).dot(np.float32(matrix).T) / scale + 0.5)


def to_nv12(pixels, standard):
    """Returns RGB pixels, uint8 [height,width,3], as NV12. standard: a key of STANDARDS. U and V are the mean of four pixels."""
    height, width = pixels.shape[:2]
    check_even(height, width)
    _, matrix, bias = STANDARDS[standard]
    four = pixels.reshape(height // 2, 2, width // 2, 2, 3).sum(axis=(1, 3))
    luma, chroma = converted(pixels, matrix[0], 256) + bias[0], converted(four, matrix[1:], 1024) + bias[1]
    return np.concatenate([luma, chroma.reshape(-1, width)]).clip(0, 255).astype(np.uint8)


def to_rgb(picture, standard):
    """Returns an NV12 picture as AIPP converts it, uint8 [height,width,3]. standard: a key of STANDARDS."""
    matrix, _, bias = STANDARDS[standard]
    height, width = len(picture) * 2 // 3, picture.shape[1]
    chroma = picture[height:].reshape(height // 2, width // 2, 2).repeat(2, axis=0).repeat(2, axis=1)
    yuv = np.concatenate([picture[:height, :, None], chroma], axis=2).astype(np.int16) - np.int16(bias)
    return converted(yuv, matrix, 256).clip(0, 255).astype(np.uint8)


def neighbours(source, target):
    """Returns (the place left of each new pixel, float32 how far right of it the new pixel is, from 0 to 1), as OpenCV computes them.

    A place may be -1, or the last one.
    """
    places = ((np.arange(target) + 0.5) * (1 / (target / source)) - 0.5).astype(np.float32)
    left = np.floor(places)
    return left.astype(int), places - left


def weights(fraction):
    """Returns the weights of the left and the right neighbour, of COEFFICIENTS."""
    return (np.rint(part * COEFFICIENTS).astype(np.int32) for part in (1 - fraction, fraction))


def resize_plain(pixels, height, width):
    """Returns pixels, uint8 [h,w,3], resized to the bit as OpenCV's INTER_LINEAR, which does not average while it shrinks."""
    if pixels.shape[:2] == (height, width):
        return pixels
    left, fraction = neighbours(pixels.shape[1], width)
    fraction[(left < 0) | (left >= pixels.shape[1] - 1)] = 0
    columns = [np.clip(left + i, 0, pixels.shape[1] - 1) for i in (0, 1)]
    across = [weight[:, None] for weight in weights(fraction)]
    top, fraction = neighbours(len(pixels), height)
    total = 2
    for i, weight in enumerate(weights(fraction)):
        rows = pixels[np.clip(top + i, 0, len(pixels) - 1)]
        line = rows[:, columns[0]] * across[0] + rows[:, columns[1]] * across[1]
        total = total + (weight[:, None, None] * (line >> 4) >> 16)
    return (total >> 2).clip(0, 255).astype(np.uint8)


def resize_opencv(pixels, height, width):
    """The same with OpenCV itself, in the version that is installed. Raises ImportError if none is."""
    import cv2
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)


def resized(function):
    """Returns one of the two functions above for PIL images of mode RGB: (image, (height, width)) -> image."""
    def on_image(image, size):
        from PIL import Image
        return Image.fromarray(function(np.asarray(image), *size))
    return on_image


def through_jpeg(image, quality):
    """Returns a PIL image of mode RGB as it is after saving it as JPEG. U and V get half the resolution, as in NV12."""
    from PIL import Image
    with io.BytesIO() as f:
        image.save(f, "JPEG", quality=quality, subsampling="4:2:0")
        return Image.open(f).convert("RGB")
