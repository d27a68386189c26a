"""The Triton kernels, one family per file: their maths, launchers and tiles.

Launchers take and return NHWC-contiguous tensors: an NCHW tensor in channels_last memory, permuted by (0, 2, 3, 1), is
one without a copy. They are plain functions: no autograd, no dispatch, no tuning. `prepare_…` checks the arguments and
allocates the outputs, and returns a `Job`, which can be run, run again, or compiled for a GPU that is not there.

    conv                  k4 s2 convolution: a discriminator's forward pass, a generator's data gradient
    conv_transpose        k4 s2 transposed, in four phases: a generator's forward pass, a discriminator's data gradient
    conv_transpose_image  the same onto 1 to 4 channels, the phases side by side; `conv_transpose` picks it
    wgrad                 the weight gradient of both, split over pixels, and the sum of the shares that leaves
    prologue              what these do with an input as they load it: the batch norm and activation before it
    epilogue              what the first two do with their accumulators: statistics, activations, derivatives
    merge                 merging what tiles leave of a batch norm, in a launch of its own or at the end of a GEMM's
    batch_norm            statistics in a pass of their own, merging them, applying them; batch_norm_grad: backward
    head                  a discriminator's last layer with loss, its backward pass; the loss by itself
    adam                  every parameter in one launch, and its 16-bit copy; float16's check for overflow
    gather                a step's images from a dataset on the device
    ticket                which program of a grid is the last to finish, and may read what the others wrote
    dependent             the wait for the previous launch, with which every kernel begins
    config, launch        tiles, without Triton; argument checks, TMA views and jobs
"""
