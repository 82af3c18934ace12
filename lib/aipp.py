"""AIPP, the card's own preprocessing: its settings for atc, its arithmetic in numpy, and a model that begins with it."""
from lib import camera
from lib.images import LAYOUTS, MEAN, STD
from lib.models import PREFIX, image_input
from lib.script import importing

with importing():
    import numpy as np

MIN = [255 * mean for mean in MEAN]          # AIPP's min_chn and var_reci_chn. AIPP computes (pixel - min) * var_reci
VAR_RECI = [1 / (255 * std) for std in STD]
BEYOND = 512  # AIPP's matrices give levels from -290 to 545, which are then limited to 0 to 255


def aipp_cfg(height, width, nv12=None):
    """Returns AIPP's settings for atc, in protobuf's text format. nv12: for an input of NV12, its key in camera.STANDARDS."""
    fields = ["aipp_mode: static", "related_input_rank: 0", "input_format: %s" % ("YUV420SP_U8" if nv12 else "RGB888_U8"),
              "src_image_size_w: %d" % width, "src_image_size_h: %d" % height, "csc_switch: %s" % ("true" if nv12 else "false"),
              "rbuv_swap_switch: false"]
    if nv12:
        camera.check_even(height, width)
        matrix, _, bias = camera.STANDARDS[nv12]
        fields += ["matrix_r%dc%d: %d" % (i, j, value) for i, row in enumerate(matrix) for j, value in enumerate(row)]
        fields += ["input_bias_%d: %d" % pair for pair in enumerate(bias)]
    for name, values in (("min", MIN), ("var_reci", VAR_RECI)):
        fields += ["%s_chn_%d: %.15g" % (name, i, value) for i, value in enumerate(values)]
    return "aipp_op {\n    %s\n}\n" % "\n    ".join(fields)


def aipp_table():
    """Returns AIPP's result for each pixel value, float32 [3 channels,256]. Its settings and both operations are float16."""
    pixel = np.arange(256).astype(np.float16)
    return np.stack([(pixel - np.float16(low)) * np.float16(factor) for low, factor in zip(MIN, VAR_RECI)]).astype(np.float32)


def aipp_differences():
    """Returns the largest difference between AIPP's and stage 4's values over all pixel values, for each channel."""
    pixel = np.arange(256, dtype=np.float32) / np.float32(255)
    exact = [(pixel - np.float32(mean)) / np.float32(std) for mean, std in zip(MEAN, STD)]
    return np.abs(aipp_table() - exact).max(axis=1)


def add_aipp(model, path, nv12=None):
    """Puts AIPP's arithmetic at the beginning of an onnx.ModelProto, in place. The new nodes' names begin with aipp_."""
    from onnx import TensorProto, helper, numpy_helper
    graph, image = model.graph, image_input(model)
    if image.type.tensor_type.elem_type != TensorProto.FLOAT:
        raise ValueError("%s: does not take float32; it may already have AIPP" % path)
    batch, _, height, width = image.type.tensor_type.shape.dim
    if nv12:
        rows, columns = height.dim_value, width.dim_value
        if not rows or not columns:
            raise ValueError("%s: does not fix the height and width, which NV12 needs; export it with --size" % path)
        camera.check_even(rows, columns)
        uint8 = helper.make_tensor_value_info("aipp_pixels", TensorProto.UINT8, [1, rows * 3 // 2, columns])
        nodes, constants = nv12_nodes(rows, columns, nv12)
    else:
        uint8 = helper.make_tensor_value_info("aipp_pixels", TensorProto.UINT8, [1, 1, 1, 3])
        for dim, source in zip(uint8.type.tensor_type.shape.dim[1:], (height, width)):
            dim.CopyFrom(source)
        nodes, constants = [helper.make_node("Cast", ["aipp_pixels"], ["aipp_levels"], "aipp_cast", to=TensorProto.INT32)], {}
    uint8.type.tensor_type.shape.dim[0].CopyFrom(batch)
    graph.value_info.add().CopyFrom(image)
    graph.input.remove(image)
    graph.input.insert(0, uint8)
    layouts = [entry for entry in model.metadata_props if entry.key == PREFIX + "layout"]
    if nv12 and not layouts:  # only the layout tells the standard
        layouts = [model.metadata_props.add(key=PREFIX + "layout")]
    for entry in layouts:
        entry.value = LAYOUTS["nv12-" + nv12 if nv12 else "uint8"]
    # A table is enough, because a channel has only 256 levels. That for NV12 begins at -BEYOND and also limits the levels to these.
    table = np.pad(aipp_table(), ((0, 0), (BEYOND, BEYOND)), "edge") if nv12 else aipp_table()
    constants.update(aipp_table=table.ravel(), aipp_rows=np.arange(3, dtype=np.int32) * table.shape[1])
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    nodes += [helper.make_node("Add", ["aipp_levels", "aipp_rows"], ["aipp_places"], "aipp_add"),
              helper.make_node("Gather", ["aipp_table", "aipp_places"], ["aipp_nhwc"], "aipp_gather", axis=0),
              helper.make_node("Transpose", ["aipp_nhwc"], [image.name], "aipp_transpose", perm=[0, 3, 1, 2])]
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)


def nv12_nodes(height, width, standard):
    """Returns (nodes that convert NV12 as camera.to_rgb() does, but without its limits; their constants, {name: array}).

    aipp_pixels: uint8 [N,1.5 x height,width]. aipp_levels: int32 [N,height,width,3], the levels of RGB + BEYOND.
    """
    from onnx import TensorProto, helper
    matrix, _, bias = camera.STANDARDS[standard]
    of_y, of_u, of_v = np.array(matrix, np.int32).T
    # Half of 256 makes the division round. ONNX's division truncates, so the sum is made positive.
    rest = 128 + 256 * BEYOND - np.array(matrix).dot(bias)
    constants = {"aipp_y": of_y, "aipp_u": of_u, "aipp_v": of_v, "aipp_rest": rest.astype(np.int32), "aipp_256": np.int32([256])}
    # A pixel's Y and its block's U and V meet as [N,height / 2,2,width / 2,2,3].
    shapes = {"aipp_pairs": [0, height // 2, 1, width // 2, 1, 2], "aipp_blocks": [0, height // 2, 2, width // 2, 2, 1],
              "aipp_image": [0, height, width, 3], "aipp_0": [0], "aipp_1": [1], "aipp_2": [2], "aipp_height": [height],
              "aipp_end": [height * 3 // 2], "aipp_axis_1": [1], "aipp_axis_5": [5]}
    constants.update((name, np.array(values, np.int64)) for name, values in shapes.items())
    nodes = [helper.make_node("Cast", ["aipp_pixels"], ["aipp_values"], "aipp_cast", to=TensorProto.INT32)]
    nodes += [helper.make_node(op, ["aipp_" + name for name in inputs.split()], ["aipp_" + output], "aipp_to_" + output)
              for op, inputs, output in (
                  ("Slice", "values 0 height axis_1", "luma"), ("Slice", "values height end axis_1", "chroma"),
                  ("Reshape", "luma blocks", "luma_blocks"), ("Reshape", "chroma pairs", "chroma_pairs"),
                  ("Slice", "chroma_pairs 0 1 axis_5", "u_level"), ("Slice", "chroma_pairs 1 2 axis_5", "v_level"),
                  ("Mul", "luma_blocks y", "from_y"), ("Mul", "u_level u", "from_u"), ("Mul", "v_level v", "from_v"),
                  ("Add", "from_u from_v", "from_uv"), ("Add", "from_uv rest", "colour"), ("Add", "from_y colour", "sum"),
                  ("Div", "sum 256", "blocks_of_levels"), ("Reshape", "blocks_of_levels image", "levels"))]
    return nodes, constants
