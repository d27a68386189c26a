"""Train and sample a DCGAN, as fast as the hardware allows."""


def load(source, *, ema=True, device="cpu"):
    """The generator of a run, ready to sample: `dcgan.load("runs/digits")(torch.randn(16, 64))`.

    See `dcgan.loading.load`, which this calls; torch is not imported before it is needed.
    """
    from dcgan.loading import load

    return load(source, ema=ema, device=device)


def sampler(source, *, precision="auto", ema=True, device="cpu"):
    """The same generator for many images: `dcgan.sampler("runs/digits")(torch.randn(10000, 64))`.

    See `dcgan.sampling.Sampler`, which this makes: it has no gradients, and its weights are those of now.
    """
    from dcgan.loading import load
    from dcgan.sampling import Sampler

    return Sampler(load(source, ema=ema, device=device), precision)
