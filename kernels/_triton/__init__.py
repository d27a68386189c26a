"""The Triton kernels, each file one kernel: its maths, its launcher, its tile.

Launchers take and return NHWC-contiguous tensors: an NCHW tensor in channels_last memory, permuted by (0, 2, 3, 1), is
one without a copy. They are plain functions: no autograd, no dispatch, no tuning. `prepare_…` checks the arguments and
allocates the outputs, and returns a `Job`, which can be run, run again, or compiled for a GPU that is not there.

    conv                  k4 s2 convolution: a discriminator's forward pass, a generator's data gradient
    conv_transpose        k4 s2 transposed, in four phases: a generator's forward pass, a discriminator's data gradient
    conv_transpose_image  the same onto 1 to 4 channels, the phases side by side; `conv_transpose` picks it
    wgrad                 the weight gradient of both, split over pixels
    epilogue              what the first two do with their accumulators: statistics, activations, derivatives
    batch_norm            merging those statistics and applying them; batch_norm_grad: the same backward
    head                  a discriminator's last layer with loss and both gradients; the loss alone
    adam                  every parameter in one launch, and its 16-bit copy
    gather                a step's images from a dataset on the device
    ticket                which program of a grid is the last to finish, and may read what the others wrote
    config, launch        tiles, without Triton; argument checks, TMA views and jobs
"""
