"""Train and sample a DCGAN, as fast as the hardware allows."""
