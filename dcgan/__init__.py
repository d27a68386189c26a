"""Train and sample a DCGAN, as fast as the hardware allows."""


def load(source, *, ema=True, device="cpu"):
    """The generator of a run, ready to sample: `dcgan.load("runs/digits")(torch.randn(16, 64))`.

    See `dcgan.loading.load`, which this calls; torch is not imported before it is needed.
    """
    from dcgan.loading import load

    return load(source, ema=ema, device=device)
