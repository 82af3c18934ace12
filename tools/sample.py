"""Stage 0: makes sample data for a machine without PETA and a checkpoint: drawn pedestrians, and a DeepMAR for them.

    python3 tools/sample.py sample

The script writes sample/images/*.png, image.txt, label.json and attributes.txt (drawn test images with known PETA attributes),
checkpoint.pth.tar (a DeepMAR that recognises them), accuracy.txt (PyTorch's own instance_acc on them, with torchvision's
transforms), and calibration_images/*.png and calibration.txt (other drawings, to calibrate INT8). The same seed gives the same
data. The checkpoint is not trained: a random ResNet-50 gets its BatchNorm statistics from other drawings, and ridge regression
fits the classifier to the features of the test images and of other drawings. The sample shows that the pipeline computes the
right thing. It says nothing about photographs.
"""
import argparse
import collections
import io
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from lib.files import replaced_folder
from lib.images import MEAN, SIZE, STD
from lib.labels import PETA
from lib.machine import check_threads, cores
from lib.metrics import evaluate
from lib.script import command, importing, number, pixels, progress

with importing():
    import numpy as np

MIN_DRAWINGS = 120          # the classifier is fitted to at least this many drawings: the test images and others
CALIBRATION = 32     # drawings for INT8. AMCT's guides advise 16 or 32
STATISTICS = 32      # BatchNorm takes its statistics from this many of the others, the first ones
BATCH = 8            # it is small because PyTorch allocates the feature maps of large batches anew each time
BN3_WEIGHT = 0.2     # the weight of each residual block's last BatchNorm; it keeps a random network's features from growing
RIDGE = 1            # regularisation, relative to the mean squared norm of the features. With less, the classifier learns the
                     # drawings by heart. No logit is then near 0, and a small fault of the pipeline changes no attribute
OPTIONS_FILE = "made_with.txt"  # holds the options with which a sample was made
WIDTH, HEIGHT = 160, 400  # size of the canvas; drawings are scaled down from it

# Each thing has its own colour. A random network's features, averaged over the picture, distinguish colours and textures far
# better than places.
SKIN = [(236, 200, 170), (222, 182, 150)]
HAIR = {"personalLess30": (20, 15, 15), "personalLess45": (150, 60, 10), "personalLess60": (105, 115, 150),
        "personalLarger60": (250, 250, 250)}
SHIRT = {"upperBodyFormal": (25, 25, 40), "upperBodyTshirt": (215, 45, 45), "upperBodyJacket": (40, 110, 60),
         "upperBodyOther": (120, 60, 150)}


def choose(random):
    """Returns a set of PETA attributes that can be seen together in one drawing."""
    def chance(probability):
        return random.random_sample() < probability

    def one(*names):
        return names[random.randint(len(names))]

    has = {one(*HAIR)}
    male = chance(0.55)
    has |= {"personalMale"} if male else set()
    has |= {"hairLong"} if chance(0.1 if male else 0.75) else set()
    formal = chance(0.3)
    if formal:
        has |= {"upperBodyFormal", "upperBodyJacket", "lowerBodyFormal", "lowerBodyTrousers", "footwearLeatherShoes"}
    else:
        has |= {"upperBodyCasual", "lowerBodyCasual"}
        has |= {one("upperBodyTshirt", "upperBodyTshirt", "upperBodyJacket", "upperBodyOther")}
        if "upperBodyTshirt" in has:
            has |= {"upperBodyShortSleeve"}
        if "upperBodyJacket" not in has:
            has |= {one("upperBodyLogo", "upperBodyPlaid", "upperBodyThinStripes", "upperBodyVNeck", "upperBodyVNeck")}
        has |= {one("lowerBodyJeans", "lowerBodyTrousers", "lowerBodyShorts", "lowerBodyShorts" if male
                    else "lowerBodyShortSkirt")}
        has |= {one("footwearSandals", "footwearShoes", "footwearSneaker")}
    accessories = [name for name in ("accessoryHat", "accessoryMuffler", "accessorySunglasses") if chance(0.25)]
    has |= set(accessories or ["accessoryNothing"])
    has |= {one("carryingNothing", "carryingBackpack", "carryingMessengerBag", "carryingPlasticBags", "carryingOther")}
    return has


def draw(has, random):
    """Returns a drawing of a pedestrian with these attributes: an RGB image, 40 to 110 pixels wide as in PETA."""
    from PIL import Image, ImageDraw

    def colour(base, spread=12):
        return tuple(int(value) for value in np.clip(np.array(base) + random.randint(-spread, spread + 1, 3), 0, 255))

    ground = random.randint(125, 146) + random.randint(-6, 7, 3)
    background = np.clip(np.linspace(ground, ground + random.randint(-20, 21), HEIGHT)[:, None, :]
                         + random.normal(0, 4, (HEIGHT, WIDTH, 3)), 0, 255)
    image = Image.fromarray(background.astype(np.uint8))
    pen = ImageDraw.Draw(image)
    dx, dy = random.randint(-4, 5), random.randint(-4, 5)

    def at(*points):
        return [(x + dx, y + dy) for x, y in points]

    def of(colours):  # returns the colour of the first of these attributes that the pedestrian has
        return colour([colours[name] for name in colours if name in has][0])

    skin, shirt, hair = colour(SKIN[random.randint(len(SKIN))], 6), of(SHIRT), of(HAIR)
    dark, light = colour((30, 30, 40)), colour((245, 245, 240), 6)
    half = 46 if "personalMale" in has else 30  # half the width of the shoulders

    # behind the body
    if "carryingBackpack" in has:
        pen.rectangle(at((80 - half - 24, 92), (80 + half + 24, 190)), fill=colour((110, 120, 20)))
    if "hairLong" in has:
        pen.rectangle(at((46, 40), (114, 125)), fill=hair)

    # legs
    legs = of({"lowerBodyFormal": (25, 25, 40), "lowerBodyJeans": (40, 80, 190), "lowerBodyTrousers": (95, 80, 60),
               "lowerBodyShorts": skin, "lowerBodyShortSkirt": skin})
    for x in (56, 84):
        pen.rectangle(at((x, 200), (x + 20, 362)), fill=legs)
    if "lowerBodyShorts" in has:
        for x in (54, 82):
            pen.rectangle(at((x, 198), (x + 24, 275)), fill=colour((0, 150, 160)))
    if "lowerBodyShortSkirt" in has:
        pen.polygon(at((50, 195), (110, 195), (135, 280), (25, 280)), fill=colour((230, 80, 200)))

    # feet
    shoe = of({"footwearLeatherShoes": (10, 10, 10), "footwearShoes": (150, 75, 20), "footwearSneaker": (250, 250, 250),
               "footwearSandals": skin})
    for x, toe in ((48, 34), (84, 126)):
        left, right = min(x, toe), max(x + 28, toe)
        pen.rectangle(at((left, 354), (right, 386)), fill=shoe)
        if "footwearSandals" in has:
            for x in range(left, right, 9):
                pen.line(at((x, 354), (x, 386)), fill=(200, 0, 0), width=4)

    # arms and trunk
    for side in (-1, 1):
        x = 80 + side * (half + 7)
        pen.rectangle(at((x - 9, 100), (x + 9, 205)), fill=skin if "upperBodyShortSleeve" in has else shirt)
        if "upperBodyShortSleeve" in has:
            pen.rectangle(at((x - 10, 98), (x + 10, 135)), fill=shirt)
        pen.ellipse(at((x - 9, 198), (x + 9, 220)), fill=skin)
    pen.rectangle(at((80 - half, 95), (80 + half, 205)), fill=shirt)
    if "upperBodyOther" in has:  # a long coat
        pen.rectangle(at((80 - half, 160), (80 + half, 240)), fill=shirt)
    if "upperBodyPlaid" in has:
        for offset in range(0, 2 * half, 14):
            pen.line(at((80 - half + offset, 95), (80 - half + offset, 205)), fill=dark, width=4)
        for y in range(98, 205, 14):
            pen.line(at((80 - half, y), (80 + half, y)), fill=light, width=4)
    if "upperBodyThinStripes" in has:
        for y in range(98, 205, 9):
            pen.line(at((80 - half, y), (80 + half, y)), fill=light, width=4)
    if "upperBodyLogo" in has:
        pen.ellipse(at((54, 112), (106, 164)), fill=(255, 230, 0))
    if "upperBodyVNeck" in has:
        pen.polygon(at((50, 95), (110, 95), (80, 165)), fill=skin)
    if "upperBodyJacket" in has:
        pen.polygon(at((64, 95), (96, 95), (90, 205), (70, 205)), fill=light)
        if "upperBodyFormal" in has:
            pen.polygon(at((77, 98), (83, 98), (86, 165), (74, 165)), fill=(150, 20, 30))

    # things carried in front of the body
    if "carryingBackpack" in has:
        for x in (80 - half + 4, 80 + half - 16):
            pen.rectangle(at((x, 95), (x + 12, 180)), fill=(150, 160, 30))
    if "carryingMessengerBag" in has:
        pen.line(at((80 - half, 97), (80 + half, 195)), fill=(20, 60, 40), width=8)
        pen.rectangle(at((80 + half - 14, 185), (80 + half + 26, 235)), fill=(20, 60, 40))
    if "carryingPlasticBags" in has:
        for side in (-1, 1):
            x = 80 + side * (half + 10)
            pen.polygon(at((x - 6, 212), (x + 6, 212), (x + 18, 275), (x - 18, 275)), fill=(250, 250, 255))
    if "carryingOther" in has:
        pen.rectangle(at((38, 165), (122, 215)), fill=(190, 150, 90))

    # head
    pen.rectangle(at((72, 78), (88, 98)), fill=skin)
    pen.ellipse(at((58, 30), (102, 88)), fill=skin)
    pen.pieslice(at((50, 18), (110, 86)), 180, 360, fill=hair)
    if "accessorySunglasses" in has:
        pen.rectangle(at((58, 54), (102, 66)), fill=(0, 0, 0))
    if "accessoryHat" in has:
        hat = colour((250, 140, 0))
        pen.rectangle(at((54, 4), (106, 38)), fill=hat)
        pen.rectangle(at((36, 36), (124, 47)), fill=hat)
    if "accessoryMuffler" in has:
        pen.rectangle(at((56, 84), (104, 104)), fill=(220, 30, 120))
        pen.rectangle(at((86, 100), (102, 150)), fill=(220, 30, 120))

    width = random.randint(40, 111)
    return image.resize((width, int(width * 2.5)), Image.BICUBIC)


def pedestrians(count, seed):
    """Returns (images, labels uint8 [count,35]) of drawn pedestrians."""
    random = np.random.RandomState(seed)
    images, labels = [], np.zeros((count, len(PETA)), np.uint8)
    for row in labels:
        has = choose(random)
        row[:] = [name in has for name in PETA]
        images.append(draw(has, random))
    return images, labels


def forward(function, images, size, advance, calls):
    """Yields a function's results for batches of the images, in order. The images go through torchvision's transforms.

    function: takes a tensor [up to BATCH,3,height,width]. calls: how many run at the same time. Calls advance(images) after every
    batch.
    """
    import torch
    from torchvision import transforms
    transform = transforms.Compose([transforms.Resize(size), transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def work(batch):
        with torch.no_grad():
            tensor = torch.stack([transform(image) for image in batch])
            return function(tensor.contiguous(memory_format=torch.channels_last)), len(batch)

    parts = [images[start:start + BATCH] for start in range(0, len(images), BATCH)]
    running = collections.deque()
    with ThreadPoolExecutor(calls) as runner:
        for part in parts + [None] * calls:
            if len(running) == calls or part is None and running:
                result, count = running.popleft().result()
                advance(count)
                yield result
            if part is not None:
                running.append(runner.submit(work, part))


def make_model(images, labels, size=(SIZE, SIZE), last_conv_stride=2, seed=0, calls=1):
    """Returns (a DeepMAR_ResNet50 in eval mode that recognises the attributes of these drawings, its logits for them)."""
    import torch
    import torch.nn.functional as F
    from DeepMAR import DeepMAR_ResNet50
    random = np.random.RandomState(seed)
    model = DeepMAR_ResNet50(num_att=labels.shape[1], last_conv_stride=last_conv_stride)
    for name, module in model.base.named_modules():
        if isinstance(module, torch.nn.Conv2d):  # He et al.'s initialisation as in torchvision, but with numpy's random
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]  # numbers, which never change
            weight = random.standard_normal(tuple(module.weight.shape)) * np.sqrt(2.0 / fan_out)
            module.weight.data = torch.from_numpy(weight.astype(np.float32))
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the statistics are a plain mean over the batches
            if name.endswith("bn3"):
                module.weight.data.fill_(BN3_WEIGHT)

    model = model.to(memory_format=torch.channels_last)  # PyTorch is a fifth faster in this format
    with progress(STATISTICS + len(images), "image") as steps:
        model.train()
        for _ in forward(model.base, images[:STATISTICS], size, steps.update, 1):
            pass
        model.eval()
        if calls > 1:  # each batch gets one thread, because threads that share a batch wait for each other at each layer
            torch.set_num_threads(1)
        pooled = torch.cat(list(forward(
            lambda batch: F.adaptive_avg_pool2d(model.base(batch), 1).flatten(1), images, size, steps.update, calls)))

    # Ridge regression to +1 and -1, in its dual form, which has one unknown per drawing and not per feature.
    features = pooled.double().numpy()
    mean = features.mean(axis=0)
    centred = features - mean
    targets = 2.0 * labels - 1
    kernel = centred.dot(centred.T)
    ridge = RIDGE * np.trace(kernel) / len(kernel)
    weight = centred.T.dot(np.linalg.solve(kernel + ridge * np.eye(len(kernel)), targets - targets.mean(axis=0))).T
    model.classifier.weight.data = torch.from_numpy(weight.astype(np.float32))
    model.classifier.bias.data = torch.from_numpy((targets.mean(axis=0) - weight.dot(mean)).astype(np.float32))
    with torch.no_grad():
        return model, model.classifier(pooled).numpy()


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("folder", help="the folder to write; an earlier sample there is replaced")
    parser.add_argument("--images", type=number(int, 1), default=200, help="test images to draw (default: 200)")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="the seed of all random numbers (default: 0)")
    parser.add_argument("--size", nargs=2, type=pixels, default=(SIZE, SIZE), metavar=("H", "W"),
                        help="height and width of the network's input (default: 224 224)")
    parser.add_argument("--last-conv-stride", type=int, choices=(1, 2), default=2, help="the network's stride in layer4 (default: 2)")
    parser.add_argument("--keep", action="store_true", help="do nothing if the folder already has such a sample")
    return parser.parse_args(argv)


def write_images(folder, images, form):
    """Writes images into a new folder. form: that of their names, such as %05d.png. Returns the names."""
    os.makedirs(folder)
    names = [form % (i + 1) for i in range(len(images))]
    for name, image in zip(names, images):
        image.save(os.path.join(folder, name))
    return names


def write(folder, model, images, labels, accuracy, calibration, made_with):
    """Writes the sample's files into a folder."""
    import torch
    names = write_images(os.path.join(folder, "images"), images, "%05d.png")
    calibration = write_images(os.path.join(folder, "calibration_images"), calibration, "calibration_%05d.png")
    # Ascend's training script writes the keys in this form
    state = {"module." + key: value.contiguous() for key, value in model.state_dict().items()}
    checkpoint = io.BytesIO()  # torch.save to a file crashes if the disk is full
    torch.save({"state_dict": state}, checkpoint)
    with open(os.path.join(folder, "checkpoint.pth.tar"), "wb") as f:
        f.write(checkpoint.getbuffer())
    for name, text in (("label.json", json.dumps(dict(zip(names, labels.tolist())))),
                       ("image.txt", "".join(name + "\n" for name in names)),
                       ("calibration.txt", "".join(name + "\n" for name in calibration)),
                       ("attributes.txt", "".join(name + "\n" for name in PETA)),
                       ("accuracy.txt", "%r\n" % accuracy), (OPTIONS_FILE, made_with)):
        with open(os.path.join(folder, name), "w") as f:
            f.write(text)


def main(argv=None):
    args = parse(argv)
    size, stride = tuple(args.size), args.last_conv_stride
    made_with = "images %d, calibration %d, size %d %d, last_conv_stride %d, seed %d\n" % (
        (args.images, CALIBRATION) + size + (stride, args.seed))
    folder = os.path.realpath(args.folder)
    if os.path.exists(folder):
        try:
            with open(os.path.join(folder, OPTIONS_FILE)) as f:
                same = f.read() == made_with
        except OSError:
            raise ValueError("%s: exists and is not an earlier sample; give another folder" % args.folder)
        if args.keep and same:
            print("%s: kept, because it already has %d images" % (args.folder, args.images))
            return
    with importing():
        import torch  # noqa: F401
        import torchvision  # noqa: F401
    calls = cores()
    check_threads(calls)
    torch.set_num_threads(calls)
    with replaced_folder(folder, ending="") as partial:
        others, other_labels = pedestrians(max(MIN_DRAWINGS - args.images, STATISTICS), args.seed + 1)
        images, labels = pedestrians(args.images, args.seed + 2)
        model, logits = make_model(others + images, np.concatenate([other_labels, labels]), size=size,
                                   last_conv_stride=stride, seed=args.seed, calls=calls)
        reached = evaluate(logits[len(others):], labels)[0]["instance_acc"]
        calibration, _ = pedestrians(CALIBRATION, args.seed + 3)
        write(partial, model, images, labels, reached, calibration, made_with)
    print("%s: %d drawn pedestrians with labels, and a checkpoint that reaches instance_acc %.4f on them in PyTorch"
          % (args.folder, len(images), reached))


if __name__ == "__main__":
    command(main)
