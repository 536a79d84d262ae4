"""Writing the IDX files that the library only reads."""

import gzip

import numpy as np


def write_idx(path, array):
    """Writes uint8 images or labels as a gzipped IDX file."""
    header = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))
